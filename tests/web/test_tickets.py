"""Download tickets over HTTP, on stores that nobody talks to: who is offered what, what is leased, what a retry gets.

Stores and blobs are rows in the catalogue; their credentials are made up, since signing needs no network.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from uuid import UUID

import aiohttp
import orjson
import pytest

from broker.model import new_id
from tests.parts.broker import Api, Reply, RunningBroker, broker_on

SITES = ("eu/az1", "eu/az2", "us")
ABILITIES = {"reads": True, "ranges": True, "writes": True, "observes": ["sha256"]}
S3 = {"access_key": "AKIDTEST", "secret_key": "not-very-secret"}
SWIFT = {"temp_url_key": "not-secret", "auth_url": "http://swift.example/auth/v1.0", "user": "a:b", "key": "c"}


@dataclass
class Desk:
    """A broker, its catalogue, and a member who asks."""

    broker: RunningBroker
    api: Api

    @property
    def db(self) -> Any:
        return self.broker.context.db

    async def store(self, name: str, *, kind: str = "s3", site: str = "eu/az1", slots: int | None = None, exposure: str = "public") -> int:
        """A store that may be read, with so many slots."""
        settings = {"s3": {"bucket": "images"}, "swift": {"account": "AUTH_a", "container": "images"}, "http": {}}[kind]
        id = await self.db.fetchval(
            """INSERT INTO stores (name, kind, site, endpoint, settings, credential, abilities, exposure)
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING id""",
            name, kind, site, f"https://{name}.example", settings, None if kind == "http" else kind, ABILITIES, exposure,
        )  # fmt: skip
        await self.db.execute("INSERT INTO slots (store_id, direction, slots) VALUES ($1, 'read', $2), ($1, 'write', NULL)", id, slots)
        await self.db.execute("INSERT INTO spaces (store_id) VALUES ($1)", id)
        await self.broker.context.memory.reload_stores()
        return int(id)

    async def blob(self, *stores: int, size: int = 1000, visibility: str = "public", status: str = "active") -> str:
        """A blob with a replica on each store, and an image ``raw`` of the project ``owner`` with it."""
        blob, image = new_id(), new_id()
        await self.db.execute("INSERT INTO blobs (id, size, digests, state) VALUES ($1, $2, $3, 'active')", blob, size, {"md5": "a" * 32})
        for store in stores:
            await self.db.execute(
                """INSERT INTO replicas (id, blob_id, store_id, key, state, project, subject, observed_by, observed_strength, observed_at)
                   VALUES ($1, $2, $3, $4, 'active', 'owner', 'u', 'broker', 'md5', now())""",
                new_id(), blob, store, f"{blob}/{store}",
            )  # fmt: skip
        await self.db.execute(
            "INSERT INTO images (id, name, project, subject, visibility, status) VALUES ($1, 'i', 'owner', 'u', $2, $3)",
            image, visibility, status,
        )  # fmt: skip
        await self.db.execute("INSERT INTO image_blobs VALUES ($1, 'raw', $2)", image, blob)
        return str(blob)

    async def image_of(self, blob: str) -> str:
        return str(await self.db.fetchval("SELECT image_id FROM image_blobs WHERE blob_id = $1", UUID(blob)))

    async def ask(self, blob: str, api: Api | None = None, **wishes: Any) -> Reply:
        headers = {"Idempotency_Key": wishes.pop("key")} if "key" in wishes else {}
        return await (api or self.api).post("/v1/tickets", {"operation": "download", "blob": blob, **wishes}, **headers)

    async def leases(self) -> list[tuple[str, str]]:
        """(ticket, store) of every lease there is."""
        rows = await self.db.fetch("SELECT l.ticket_id, s.name FROM leases l JOIN stores s ON s.id = l.store_id ORDER BY 2, 1")
        return [(str(ticket), store) for ticket, store in rows]


@pytest.fixture
async def desk(database: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with broker_on(database, tmp_path) as broker, aiohttp.ClientSession() as session:
        broker.credential("s3", S3)
        broker.credential("swift", SWIFT)
        desk = Desk(broker, Api(broker.url, session, broker.token(site="eu/az1")))
        for site in SITES:
            await desk.db.execute("INSERT INTO sites (path) VALUES ($1)", site)
        yield desk


def states(ticket: Any) -> dict[str, str]:
    assert "sources" in ticket, ticket
    return {source["store"]: source["state"] for source in ticket["sources"]}


async def test_a_ticket_names_signed_ranked_places_with_their_numbers(desk: Desk) -> None:
    ids = [await desk.store("near"), await desk.store("far", kind="swift", site="us"), await desk.store("disk", kind="http", site="eu/az2")]
    reply = await desk.ask(await desk.blob(*ids, size=10**9))
    ticket = reply.body
    assert (reply.status, reply.headers["Location"]) == (201, f"/v1/tickets/{ticket['id']}")
    sources = ticket["sources"]
    assert [source["rank"] for source in sources] == [1, 2, 3]
    assert [source["state"] for source in sources] == ["active", "standby", "standby"]
    assert sum(source["weight"] for source in sources) == pytest.approx(1)
    by_store = {source["store"]: source for source in sources}
    seconds = {name: source["estimate"]["seconds"] for name, source in by_store.items()}
    assert seconds["near"] < seconds["disk"] < seconds["far"]
    signed = {name: parse_qs(urlsplit(source["url"]).query) for name, source in by_store.items()}
    assert {"X-Amz-Signature", "response-content-type"} <= signed["near"].keys()
    assert {"temp_url_sig", "temp_url_expires"} <= signed["far"].keys()
    assert "token" in signed["disk"]
    assert ticket["blob"] == {"id": ticket["blob"]["id"], "size": 10**9, "digests": {"md5": "a" * 32}, "state": "active"}


async def test_stores_are_told_the_file_name(desk: Desk) -> None:
    """Signed for S3, in the URL for Swift; a token holds none. It is the ticket's: others for the same bytes have no name, or another."""
    blob = await desk.blob(await desk.store("s3"), await desk.store("swift", kind="swift"), await desk.store("disk", kind="http"))

    def named(ticket: Any) -> dict[str, Any]:
        found = {}
        for source in ticket["sources"]:
            query = parse_qs(urlsplit(source["url"]).query)
            found[source["store"]] = (query.get("response-content-disposition") or query.get("filename") or [None])[0]
        return found

    name = 'a"é.img'
    told = {"s3": "attachment; filename=\"a__.img\"; filename*=UTF-8''a%22%C3%A9.img", "swift": name, "disk": None}
    nothing = dict.fromkeys(told)
    first = await desk.ask(blob, filename=name, key="same")
    assert named(first.body) == told and named((await desk.ask(blob)).body) == nothing
    for again in (await desk.ask(blob, filename=name, key="same"), await desk.api.post(f"/v1/tickets/{first.body['id']}/refresh")):
        assert (again.body["id"], named(again.body)) == (first.body["id"], told)
    for wrong in ("", "a/b", "a\\b", "a\r\nSet-Cookie: a=b", "a" * 256, 5):
        refused = await desk.ask(blob, filename=wrong)
        assert (refused.status, refused.body["field"]) == (400, "filename"), wrong
    assert (await desk.ask(blob, filename="a" * 255)).status == 201
    path = f"/v1/images/{await desk.image_of(blob)}/content"
    for query, wanted in (("", "i.raw"), ("?filename=b%20c.img", "b c.img")):
        links = str((await desk.api.get(f"{path}{query}")).headers.getall("Link"))  # type: ignore[attr-defined]
        assert quote(f'attachment; filename="{wanted}"', safe="") in links and f"&filename={quote(wanted)}" in links


async def test_many_tickets_put_the_near_one_first(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("near"), await desk.store("far", site="us"), size=10**9)
    replies = await asyncio.gather(*(desk.ask(blob) for _ in range(100)))
    assert sum(reply.body["sources"][0]["store"] == "near" for reply in replies) > 80


async def test_count_parallel_and_wishes(desk: Desk) -> None:
    blob = await desk.blob(*[await desk.store(name, slots=5) for name in "abcd"])
    assert len((await desk.ask(blob, count=2)).body["sources"]) == 2
    wide = (await desk.ask(blob, count=4, parallel=2)).body
    assert sorted(states(wide).values()) == ["active", "active", "standby", "standby"]
    leased = {store for ticket, store in await desk.leases() if ticket == wide["id"]}
    assert leased == {store for store, state in states(wide).items() if state == "active"}
    picky = (await desk.ask(blob, avoid=["a"], prefer=["b"], schemes=["https"])).body
    assert picky["excluded"] == [{"store": "a", "reason": "avoided"}]
    assert list(states((await desk.ask(blob, only=["c"])).body)) == ["c"]
    refused = await desk.ask(blob, schemes=["ftp"])
    assert (refused.status, refused.body["type"]) == (409, "/problems/no-source")
    assert {entry["reason"] for entry in refused.body["excluded"]} == {"scheme"}
    assert (await desk.ask(blob, prefer=["nowhere"])).body["field"] == "prefer.0"
    assert (await desk.ask(blob, site="mars")).body["field"] == "site"


async def test_what_may_not_be_read_does_not_exist(desk: Desk) -> None:
    store = await desk.store("a")
    private, off = await desk.blob(store, visibility="private"), await desk.blob(store, status="deactivated")
    owner, admin = desk.api.as_(desk.broker.token(project="owner")), desk.api.as_(desk.broker.token("admin"))
    for blob in (private, off, str(new_id())):
        assert (await desk.ask(blob)).status == 404
    assert (await desk.ask(private, owner)).status == 201
    assert (await desk.ask(off, owner)).status == 404
    assert (await desk.ask(off, admin)).status == 201


async def test_by_image_and_format(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("a"))
    image = await desk.image_of(blob)
    found = (await desk.api.post("/v1/tickets", {"operation": "download", "image": image, "formats": ["qcow2", "raw"]})).body
    assert (found["blob"]["id"], found["image"], found["format"]) == (blob, image, "raw")
    other = await desk.api.post("/v1/tickets", {"operation": "download", "image": image, "formats": ["qcow2"]})
    assert (other.status, other.body["expected"]) == (409, "raw")


async def test_a_full_store_is_passed_over_then_everyone_is_busy_until_a_release(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("a", slots=1), await desk.store("b", slots=1))
    first, second = (await desk.ask(blob)).body, (await desk.ask(blob)).body
    assert {store for _, store in await desk.leases()} == {"a", "b"}
    busy = await desk.ask(blob)
    assert (busy.status, busy.body["type"]) == (429, "/problems/busy")
    assert 1 <= int(busy.headers["Retry-After"]) <= 120
    other = desk.api.as_(desk.broker.token(subject="mallory"))
    assert (await other.delete(f"/v1/tickets/{first['id']}")).status == 404
    for _ in range(2):
        assert (await desk.api.delete(f"/v1/tickets/{first['id']}")).status == 204
    assert [ticket for ticket, _ in await desk.leases()] == [second["id"]]
    assert (await desk.ask(blob)).status == 201
    assert (await desk.api.post(f"/v1/tickets/{first['id']}/refresh")).status == 410


async def test_a_hundred_at_once_get_no_more_than_the_slots(desk: Desk) -> None:
    """Invariant 3, through the whole broker."""
    blob = await desk.blob(await desk.store("a", slots=7), await desk.store("b", slots=5))
    replies = await asyncio.gather(*(desk.ask(blob) for _ in range(100)))
    assert sorted(reply.status for reply in replies) == [201] * 12 + [429] * 88
    assert sorted(store for _, store in await desk.leases()) == ["a"] * 7 + ["b"] * 5
    assert await desk.db.fetchval("SELECT count(*) FROM tickets") == 12, "who got no lease got no ticket"


async def test_standby_is_activated_and_refresh_keeps_what_is_held(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("a", slots=1), await desk.store("b", slots=1), await desk.store("c"))
    ticket = (await desk.ask(blob, only=["a", "b"])).body
    standby = next(store for store, state in states(ticket).items() if state == "standby")
    path = f"/v1/tickets/{ticket['id']}"
    activated = await desk.api.post(f"{path}/activate", {"store": standby})
    assert (activated.status, set(states(activated.body).values())) == (200, {"active"})
    assert (await desk.api.post(f"{path}/activate", {"store": "c"})).body["field"] == "store"
    refreshed = await desk.api.post(f"{path}/refresh")
    assert (refreshed.status, states(refreshed.body)) == (200, {"a": "active", "b": "active"})
    state = (await desk.api.get(path)).body
    assert (state["state"], {place["store"] for place in state["places"] if "lease_expires_at" in place}) == ("open", {"a", "b"})
    assert sorted(store for _, store in await desk.leases()) == ["a", "b"]
    crowded = (await desk.ask(blob, only=["a", "b", "c"])).body
    taken = next((store for store, state in states(crowded).items() if state == "standby" and store != "c"), "")
    refused = await desk.api.post(f"/v1/tickets/{crowded['id']}/activate", {"store": taken})
    assert (refused.status, "Retry-After" in refused.headers) == (429, True)


async def test_a_retry_gets_the_same_ticket_and_no_second_lease(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("a", slots=5))
    first, again = await desk.ask(blob, key="k1"), await desk.ask(blob, key="k1")
    assert (first.status, again.status, first.body["id"]) == (201, 201, again.body["id"])
    assert len(await desk.leases()) == 1
    assert (await desk.ask(blob, key="k1", count=2)).status == 422
    stranger = desk.api.as_(desk.broker.token(subject="bob"))
    assert (await desk.ask(blob, stranger, key="k1")).body["id"] != first.body["id"]
    assert len(await desk.leases()) == 2


async def test_reports_end_leases_move_averages_and_keep_failures_away(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("a", slots=5), await desk.store("b", slots=5), size=10**9)
    ticket = (await desk.ask(blob, only=["a"])).body
    told = {"store": "a", "outcome": "ok", "bytes": 10**9, "seconds": 20.0, "setup_seconds": 0.5}
    for _ in range(2):
        assert (await desk.api.post(f"/v1/tickets/{ticket['id']}/report", told)).status == 204
    assert await desk.leases() == []
    (path,) = [path for path in (await desk.api.get("/v1/paths?store=a")).body["paths"] if path["site"] == "eu/az1"]
    assert path["rate"] == pytest.approx(10**9 / 19.5)
    await desk.broker.context.memory.catch_up()
    estimate = (await desk.ask(blob, only=["a"])).body["sources"][0]["estimate"]
    assert (estimate["basis"], estimate["rate"]) == ("measured", pytest.approx(10**9 / 19.5))

    failed = (await desk.ask(blob, only=["b"])).body
    assert (await desk.api.post(f"/v1/tickets/{failed['id']}/report", {"store": "b", "outcome": "failed"})).status == 204
    after = (await desk.ask(blob)).body
    assert (list(states(after)), after["excluded"]) == (["a"], [{"store": "b", "reason": "recently-failed"}])
    assert len((await desk.ask(blob, desk.api.as_(desk.broker.token(subject="bob")))).body["sources"]) == 2, "only for that client"


async def test_a_batch_answers_each_in_order(desk: Desk) -> None:
    store = await desk.store("a", slots=2)
    good, private = await desk.blob(store), await desk.blob(store, visibility="private")
    image = await desk.image_of(good)
    unknown = str(new_id())
    named: list[dict[str, Any]] = [
        {"blob": good}, {"blob": private}, {"image": image}, {"blob": good, "only": ["nowhere"]}, {"blob": good}, {"blob": unknown},
    ]  # fmt: skip
    reply = await desk.api.post("/v1/tickets:batch", {"tickets": [{"operation": "download", **entry} for entry in named]})
    assert reply.status == 200
    found = [entry.get("status", "ticket") for entry in reply.body["tickets"]]
    assert found == ["ticket", 404, "ticket", 400, 429, 404]
    assert reply.body["tickets"][2]["image"] == image
    assert len(await desk.leases()) == 2


async def test_private_stores_are_for_services_alone(desk: Desk) -> None:
    """M13: a member learns nothing of it, neither as a source nor as an exclusion nor by name."""
    blob = await desk.blob(await desk.store("open"), await desk.store("node-7", exposure="service"))
    only_private = await desk.blob(await desk.store("node-8", exposure="service"))
    member, service = (await desk.ask(blob)).body, (await desk.ask(blob, desk.api.as_(desk.broker.token("service")))).body
    assert (list(states(member)), member["excluded"]) == (["open"], [])
    assert set(states(service)) == {"open", "node-7"}
    hidden, unknown = await desk.ask(blob, prefer=["node-7"]), await desk.ask(blob, prefer=["node-9"])
    assert (hidden.status, hidden.body) == (400, unknown.body)
    nothing = await desk.ask(only_private)
    assert (nothing.status, nothing.body["excluded"]) == (409, [])
    assert b"node-" not in orjson.dumps([member, nothing.body, (await desk.api.get("/v1/stores")).body])


async def test_a_corrupt_replica_leaves_every_broker_within_two_seconds(desk: Desk, database: str, tmp_path: Path) -> None:
    """Invariant 5, on a second broker that has the blob in memory."""
    blob = await desk.blob(await desk.store("a"), await desk.store("b"))
    async with broker_on(database, tmp_path) as second, aiohttp.ClientSession() as session:  # the same passphrase and credentials
        api = Api(second.url, session, second.token(site="eu/az1"))
        assert len(states((await desk.ask(blob, api)).body)) == 2
        await desk.db.execute(
            "UPDATE replicas SET state = 'corrupt' WHERE blob_id = $1 AND store_id = (SELECT id FROM stores WHERE name = 'a')", UUID(blob)
        )
        loop = asyncio.get_running_loop()
        ends = loop.time() + 2
        while states(ticket := (await desk.ask(blob, api)).body) != {"b": "active"}:
            assert loop.time() < ends, "still offered after 2 s"
            await asyncio.sleep(0.02)
        assert ticket["excluded"] == [{"store": "a", "reason": "corrupt"}]


async def test_a_store_without_credential_is_excluded_and_says_so(desk: Desk) -> None:
    good, bad = await desk.store("good"), await desk.store("bad")
    await desk.db.execute("UPDATE stores SET credential = 'gone' WHERE id = $1", bad)
    await desk.broker.context.memory.reload_stores()
    ticket = (await desk.ask(await desk.blob(good, bad), count=3, parallel=2)).body
    assert (list(states(ticket)), ticket["excluded"]) == (["good"], [{"store": "bad", "reason": "unsignable"}])


async def test_tickets_are_counted(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("a", slots=1))
    assert [(await desk.ask(blob)).status for _ in range(2)] == [201, 429]
    text = desk.broker.context.metrics.render().decode()
    for line in (
        'broker_tickets_total{operation="download",outcome="granted",store="a"} 1.0',
        'broker_tickets_total{operation="download",outcome="busy",store=""} 1.0',
        'broker_signing_seconds_count{kind="s3"} 1.0',
        'broker_leases_refused_total{direction="read",store="a"} 1.0',
        "broker_hot_misses_total ",
        "broker_hot_hits_total ",
    ):
        assert line in text
    assert 'broker_database_seconds_count{statement="grant"}' in text
    assert 'broker_coalesced_requests_count{statement="grant"}' in text
