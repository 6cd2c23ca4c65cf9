"""The invariants of the design, held against two real brokers and real stores over HTTP. Each test names its own.

Others are held elsewhere: 1 in test_bytes.py, 3 in tests/storms, 4 in test_commits_at_bad_stores.py, 11 in test_kill.py, 13 in
test_secrets.py, 12 in tests/catalog/test_migrations.py, 14 in test_uploads.py.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import asyncpg
import jwt
import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.catalog import connect
from tests.parts.broker import Api, BrokerProcess, serve
from tests.parts.cluster import (
    Cluster,
    fetch,
    new_upload,
    ok,
    opened,
    put,
    reasons,
    register,
    s3_client,
    s3_store,
    said,
    send,
    settle,
    sources,
)  # fmt: skip
from tests.parts.condition import until

KINDS = ("weed", "disk", "swift")
_numbers = itertools.count(1)


def content(size: int = 50_000) -> bytes:
    """Bytes that no other test has."""
    return random.Random(f"invariants {next(_numbers)} {time.time_ns()}").randbytes(size)


@pytest.fixture
async def db(cluster: Cluster) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await connect.connect_one(cluster.database)
    yield connection
    await connection.close()


@pytest.fixture
def member(cluster: Cluster, session: aiohttp.ClientSession) -> Api:
    return cluster.api(session)


@pytest.fixture
def admin(cluster: Cluster, session: aiohttp.ClientSession) -> Api:
    return cluster.api(session, "admin")


async def change(admin: Api, path: str, body: dict[str, Any]) -> Any:
    """PATCH at the version that is there."""
    return ok(await admin.patch(path, body, (await admin.get(path)).etag))


# -- 2: only active replicas, on enabled stores, that the principal may see


@dataclass(frozen=True)
class Shelves:
    """Two stores in one bucket, and a community image with a replica on each."""

    image: str
    blob: str
    content: bytes


@pytest.fixture(scope="module")
def shelves(cluster: Cluster) -> Shelves:
    """The stores ``shelf``, which tests put into every state, and ``steady``."""

    async def prepare() -> Shelves:
        settings = {"bucket": cluster.weed.bucket, "region": cluster.weed.region}
        await register(
            cluster, *(s3_store(cluster, cluster.weed, name, settings={**settings, "prefix": f"{name}/"}) for name in ("shelf", "steady"))
        )
        async with aiohttp.ClientSession() as session:
            data = content()
            made = await put(cluster.api(session), session, data, "steady", "shelf")
            await change(cluster.api(session, "admin"), f"/v1/images/{made['image']}", {"visibility": "community"})
        return Shelves(made["image"], made["blob"]["id"], data)

    return asyncio.run(prepare())


PRINCIPALS = {
    "owner": {"role": "member"},
    "own reader": {"role": "reader", "subject": "rita"},
    "stranger": {"role": "member", "project": "elsewhere", "subject": "stan"},
    "service": {"role": "service", "project": "nova", "subject": "nova"},
    "admin": {"role": "admin", "project": "ops", "subject": "root"},
}
SITUATIONS: dict[str, tuple[str, set[str], str]] = {
    # What is done to the store or the replica, who is still offered it, and the reason that others are told.
    "active": ("", set(PRINCIPALS), ""),
    "pending": ("UPDATE replicas SET state = 'pending'", set(), "pending"),
    "unsealed": ("UPDATE replicas SET state = 'unsealed'", {"owner", "own reader"}, "unsealed"),
    "corrupt": ("UPDATE replicas SET state = 'corrupt'", set(), "corrupt"),
    "missing": ("UPDATE replicas SET state = 'missing'", set(), "missing"),
    "deleting": ("UPDATE replicas SET state = 'deleting'", set(), "deleting"),
    "disabled": ("UPDATE stores SET enabled = false", set(), "disabled"),
    "private": ("UPDATE stores SET exposure = 'service'", {"service", "admin"}, ""),
    "private and corrupt": ("UPDATE stores SET exposure = 'service'; UPDATE replicas SET state = 'corrupt'", set(), "corrupt"),
}  # fmt: skip
WHERE = {"replicas": "store_id = (SELECT id FROM stores WHERE name = 'shelf')", "stores": "name = 'shelf'"}


async def put_into(db: Any, sql: str) -> None:
    """Do `sql` to the store ``shelf`` or what lies on it, as other brokers and operators would."""
    for statement in filter(None, sql.split("; ")):
        await db.execute(f"{statement} WHERE {WHERE[statement.split()[1]]}")


@pytest.mark.parametrize("situation", SITUATIONS)
async def test_only_what_is_active_enabled_and_visible_is_offered(
    situation: str, cluster: Cluster, shelves: Shelves, session: aiohttp.ClientSession, db: Any
) -> None:
    """Invariant 2: in every state and exposure, for every role, by every way to a URL, at both brokers."""
    sql, may, reason = SITUATIONS[situation]
    asked = {"operation": "download", "image": shelves.image}
    apis = {who: [cluster.api(session, at=at, **how) for at in (0, 1)] for who, how in PRINCIPALS.items()}
    before = {who: ok(await mine[0].post("/v1/tickets", asked), 201) for who, mine in apis.items()}
    assert all(set(sources(ticket)) == {"shelf", "steady"} for ticket in before.values())

    async def owner_sees(stores: set[str]) -> bool:
        return all([set(sources(ok(await api.post("/v1/tickets", asked), 201))) == stores for api in apis["owner"]])

    await put_into(db, sql)
    try:
        await until(lambda: owner_sees({"shelf", "steady"} if "owner" in may else {"steady"}), seconds=2)
        if "owner" in may:
            await settle(cluster)  # nothing to see for the owner
        for who, mine in apis.items():
            expected = {"shelf", "steady"} if who in may else {"steady"}
            hidden = "private" in situation and who not in ("service", "admin")
            told = {} if who in may or hidden else {"shelf": reason}
            for api in mine:
                fresh = ok(await api.post("/v1/tickets", asked), 201)
                (many,) = ok(await api.post("/v1/tickets:batch", {"tickets": [asked]}))["tickets"]
                by_blob = ok(await api.post("/v1/tickets", {"operation": "download", "blob": shelves.blob}), 201)
                again = ok(await api.post(f"/v1/tickets/{before[who]['id']}/refresh"))
                for ticket in (fresh, many, by_blob, again):
                    assert set(sources(ticket)) == expected, who
                    assert reasons(ticket["excluded"]) == told, who
                    assert not hidden or "shelf" not in str(ticket)
                activated = await api.post(f"/v1/tickets/{before[who]['id']}/activate", {"store": "shelf"})
                if who in may:
                    assert "shelf" in sources(ok(activated))
                else:
                    # Not even the URL of another place: what was asked for cannot be had.
                    assert activated.status in (400, 409), (who, activated.body)
                known = {entry["store"] for entry in ok(await api.get(f"/v1/blobs/{shelves.blob}/replicas"))["replicas"]}
                assert not (hidden and "shelf" in known)
    finally:
        await db.execute(f"UPDATE replicas SET state = 'active' WHERE {WHERE['replicas']}")
        await db.execute(f"UPDATE stores SET enabled = true, exposure = 'public' WHERE {WHERE['stores']}")
        await until(lambda: owner_sees({"shelf", "steady"}))


async def test_an_image_that_may_not_be_read_gives_no_ticket(cluster: Cluster, session: aiohttp.ClientSession) -> None:
    """Invariant 2: private images answer strangers as if there were none; deactivated ones give URLs to administrators alone."""
    member, admin = cluster.api(session), cluster.api(session, "admin")
    stranger = cluster.api(session, project="elsewhere", at=1)
    made = await put(member, session, content(), "weed")
    asked = {"operation": "download", "image": made["image"]}
    ticket = ok(await member.post("/v1/tickets", asked), 201)
    nowhere = await stranger.post("/v1/tickets", {**asked, "image": "0" * 8 + made["image"][8:]})
    refused = await stranger.post("/v1/tickets", asked)
    assert (refused.status, refused.body) == (404, nowhere.body)
    (many,) = ok(await stranger.post("/v1/tickets:batch", {"tickets": [asked]}))["tickets"]
    assert many == nowhere.body
    for way in ("/refresh", "/activate", "/report", "/commit", "/parts", ""):
        body = {"": None, "/refresh": None, "/activate": {"store": "weed"}, "/commit": said(b"x"), "/parts": {"numbers": [1]}}.get(
            way, {"store": "weed", "outcome": "ok"}
        )
        path = f"/v1/tickets/{ticket['id']}{way}"
        assert (await (stranger.post(path, body) if way else stranger.get(path))).status == 404, way
    await change(admin, f"/v1/images/{made['image']}", {"status": "deactivated"})
    await settle(cluster)
    for at in (0, 1):
        mine = cluster.api(session, at=at)
        assert (await mine.post("/v1/tickets", asked)).status == 403
        assert (await mine.post("/v1/tickets", {"operation": "download", "blob": made["blob"]["id"]})).status == 404
        assert (await mine.post(f"/v1/tickets/{ticket['id']}/refresh")).status in (403, 404, 409, 410)
        assert (await mine.post(f"/v1/tickets/{ticket['id']}/activate", {"store": "weed"})).status in (403, 404, 409, 410)
        assert (await cluster.api(session, "admin", at=at).post("/v1/tickets", asked)).status == 201


# -- 5: bytes are immutable; what differs is corrupt, and soon nowhere offered


def spoil(cluster: Cluster, store: str, key: str, instead: bytes) -> None:
    """Change an object behind the broker's back."""
    if store == "weed":
        s3_client(cluster.weed).put_object(Bucket=cluster.weed.bucket, Key=key, Body=instead)
    else:
        (cluster.disk.root / key).write_bytes(instead)


@pytest.mark.parametrize("store", ["weed", "disk"])
async def test_what_differs_leaves_every_brokers_tickets(store: str, cluster: Cluster, session: aiohttp.ClientSession) -> None:
    """Invariant 5: after a report, one look by one broker; within 2 s the other one offers it no more, nor can it be refreshed."""
    # A store that failed a client is kept from it for a while, so these are clients of their own.
    here, there = (cluster.api(session, subject=f"reporter-{store}-{at}", at=at) for at in (0, 1))
    data = content()
    other = "disk" if store == "weed" else "weed"
    made = await put(here, session, data, store, other)
    asked = {"operation": "download", "blob": made["blob"]["id"]}
    ticket = ok(await here.post("/v1/tickets", asked), 201)
    old = ok(await there.post("/v1/tickets", asked), 201)
    assert set(sources(old)) == {store, other}
    spoil(cluster, store, made["replica"]["key"], data[::-1])
    assert await fetch(session, sources(ticket)[store]) == data[::-1]
    # Many clients find it at once; each report is taken.
    crowd = [ok(await here.post("/v1/tickets", asked), 201) for _ in range(6)]
    report = {"store": store, "outcome": "corrupt"}
    replies = await asyncio.gather(*(here.post(f"/v1/tickets/{each['id']}/report", report) for each in (ticket, *crowd)))
    assert {reply.status for reply in replies} == {204}

    async def gone() -> bool:
        return set(sources(ok(await there.post("/v1/tickets", asked), 201))) == {other}

    await until(gone, seconds=2)
    assert set(sources(ok(await there.post(f"/v1/tickets/{old['id']}/refresh")))) == {other}
    assert ok(await there.get(f"/v1/replicas/{made['replica']['id']}"))["state"] == "corrupt"


async def test_a_lie_of_a_client_costs_nothing(cluster: Cluster, session: aiohttp.ClientSession) -> None:
    """Invariant 5: the broker looks for itself; bytes that are right stay on offer to everyone else."""
    here, there = cluster.api(session, subject="liar"), cluster.api(session, subject="bob", at=1)
    made = await put(here, session, content(), "weed")
    asked = {"operation": "download", "blob": made["blob"]["id"]}
    ticket = ok(await here.post("/v1/tickets", asked), 201)
    assert (await here.post(f"/v1/tickets/{ticket['id']}/report", {"store": "weed", "outcome": "corrupt"})).status == 204
    assert ok(await there.get(f"/v1/replicas/{made['replica']['id']}"))["state"] == "active"
    assert set(sources(ok(await there.post("/v1/tickets", asked), 201))) == {"weed"}


# -- 6 and 7: the last replica stays, and only delegated bytes are deleted


def lies_at(cluster: Cluster, store: str, key: str) -> bool:
    """Whether the object is there, by looking at the store itself."""
    if store == "disk":
        return (cluster.disk.root / key).exists()
    listed = s3_client(cluster.weed).list_objects_v2(Bucket=cluster.weed.bucket, Prefix=key)
    return any(entry["Key"] == key for entry in listed.get("Contents", ()))


async def test_the_last_replica_stays(cluster: Cluster, session: aiohttp.ClientSession) -> None:
    """Invariant 6: of two replicas that both brokers are told to delete at the same instant, one stays, with its bytes."""
    apis = [cluster.api(session, at=at) for at in (0, 1)]
    for _ in range(5):
        data = content(1000)
        made = await put(apis[0], session, data, "weed", "disk")
        found = ok(await apis[0].get(f"/v1/blobs/{made['blob']['id']}/replicas"))["replicas"]
        assert len(found) == 2
        deleted = await asyncio.gather(
            *(api.delete(f"/v1/replicas/{replica['id']}", "*") for api, replica in zip(apis, found, strict=True))
        )
        assert sorted(reply.status for reply in deleted) == [204, 409]
        kept = found[[reply.status for reply in deleted].index(409)]
        assert (await apis[1].delete(f"/v1/replicas/{kept['id']}", "*")).body["type"] == "/problems/last-replica"
        assert lies_at(cluster, kept["store"], kept["key"])
        await until(lambda api=apis[1], blob=made["blob"]["id"], store=kept["store"]: offers(api, blob, {store}), seconds=2)  # type: ignore[misc]
        ticket = ok(await apis[1].post("/v1/tickets", {"operation": "download", "blob": made["blob"]["id"]}), 201)
        assert await fetch(session, ticket["sources"][0]) == data


async def offers(api: Api, blob: str, stores: set[str]) -> bool:
    """Whether a ticket for the blob names just these stores."""
    return set(sources(ok(await api.post("/v1/tickets", {"operation": "download", "blob": blob}), 201))) == stores


async def test_only_delegated_bytes_that_no_image_needs_are_deleted(cluster: Cluster, session: aiohttp.ClientSession) -> None:
    """Invariant 7: what was uploaded goes with the last image that has it; what was only registered stays where it lies."""
    member = cluster.api(session)
    data = content()
    made = await put(member, session, data, "weed")
    own = f"demo/mine-{next(_numbers)}"
    (cluster.disk.root / "demo").mkdir(exist_ok=True)
    (cluster.disk.root / own).write_bytes(data)
    registered = await member.post(f"/v1/blobs/{made['blob']['id']}/replicas", {"store": "disk", "key": own})
    if registered.status == 409:
        # The file server tells no digest of what it did not receive itself; the same bytes at the other store are proof enough.
        assert registered.body["type"] == "/problems/unverifiable"
        s3_client(cluster.weed).put_object(Bucket=cluster.weed.bucket, Key=own, Body=data)
        registered = await member.post(f"/v1/blobs/{made['blob']['id']}/replicas", {"store": "weed", "key": own})
    foreign = ok(registered, 201)
    second = ok(await member.post("/v1/images", {"name": "same", "blobs": {"raw": made["blob"]["id"]}}), 201)
    first = await member.get(f"/v1/images/{made['image']}")
    said_first = ok(await member.delete(f"/v1/images/{made['image']}", first.etag))
    assert (said_first["deleting"], said_first["kept"]) == ([], [])
    await asyncio.sleep(0.3)
    assert lies_at(cluster, "weed", made["replica"]["key"])
    said_second = ok(await member.delete(f"/v1/images/{second['id']}", "*"))
    assert [entry["key"] for entry in said_second["deleting"]] == [made["replica"]["key"]]
    assert [(entry["key"], bool(entry["reason"])) for entry in said_second["kept"]] == [(own, True)]

    async def gone() -> bool:
        return not lies_at(cluster, "weed", made["replica"]["key"])

    await until(gone)
    assert lies_at(cluster, foreign["store"], own)
    assert (await member.post("/v1/tickets", {"operation": "download", "blob": made["blob"]["id"]})).status == 404


# -- 8: one method on one key of one store, until a stated instant


@pytest.fixture(scope="module")
def brief(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A third broker, whose URLs live for 2 s only."""
    settings = "[policy.uploads]\nurl_ttl_seconds = 2\npart_url_ttl_seconds = 2\nsingle_put_limit = 1048576\nmin_part_size = 5242880\n"
    place = cluster.running[0].config.parent
    with serve(cluster.database, place, settings=settings, only="api", public_url=cluster.issuer) as process:
        yield process


def ends_at(url: str) -> float:
    """When a signed URL ends, as the URL itself says."""
    query = parse_qs(urlsplit(url).query)
    if "X-Amz-Date" in query:
        began = datetime.strptime(query["X-Amz-Date"][0] + "+0000", "%Y%m%dT%H%M%SZ%z").timestamp()
        return began + int(query["X-Amz-Expires"][0])
    if "temp_url_expires" in query:
        return float(query["temp_url_expires"][0])
    claims = jwt.decode(query["token"][0], options={"verify_signature": False})
    return float(claims["exp"])


def stated(place: dict[str, Any]) -> float:
    """When it ends, as the ticket says."""
    return datetime.fromisoformat(place["expires_at"]).timestamp()


REFUSED = (401, 403)


async def test_a_url_opens_one_thing_for_a_stated_time(cluster: Cluster, brief: BrokerProcess, session: aiohttp.ClientSession) -> None:
    """Invariant 8: no other method, no other key, nothing after the end that the ticket states; for reading, writing, and parts."""
    api = Api(brief.url, session, cluster.token())
    await asyncio.gather(*(_one_thing(cluster, api, session, store) for store in KINDS))


async def _one_thing(cluster: Cluster, api: Api, session: aiohttp.ClientSession, store: str) -> None:
    data, other, third, member = content(), content(), content(), cluster.api(session)
    made, elsewhere = await put(member, session, data, store), await put(member, session, other, store)
    writing = ok(await api.post("/v1/tickets", new_upload(third, only=[store])), 201)["destinations"][0]
    large = {"operation": "upload", "image": {"name": "large"}, "size": 11 << 20, "only": [store]}
    part = {"method": "PUT", **ok(await api.post("/v1/tickets", large), 201)["destinations"][0]["parts"][0]}
    reading = await _read_in_time(api, session, made["image"], data)
    for place in (reading, writing, part):
        assert ends_at(place["url"]) == stated(place) <= time.time() + 2
        for method in {"GET", "PUT", "DELETE", "POST"} - {place["method"]}:
            async with opened(session, place, method=method, data=b"x" if method in ("PUT", "POST") else None) as response:
                assert response.status in (*REFUSED, 405), (store, place["method"], method, response.status)
    moved = reading["url"].replace(made["replica"]["key"], elsewhere["replica"]["key"])
    async with opened(session, reading, url=moved) as response:
        assert response.status in REFUSED
    moved = writing["url"].replace(urlsplit(writing["url"]).path.rsplit("/", 1)[-1], "stolen")
    assert await send(session, {**writing, "url": moved}, third) in REFUSED
    for one, two in (("partNumber=1", "partNumber=2"), ("00000001", "00000002")):
        if one in part["url"]:
            assert await send(session, {**part, "url": part["url"].replace(one, two)}, bytes(part["length"])) in REFUSED
    await asyncio.sleep(max(0.0, max(map(stated, (reading, writing, part))) - time.time()) + 1.1)
    async with opened(session, reading) as response:
        assert response.status in REFUSED
    assert await send(session, writing, third) in REFUSED
    assert await send(session, part, bytes(part["length"])) in REFUSED
    await _read_in_time(api, session, made["image"], data)


async def _read_in_time(api: Api, session: aiohttp.ClientSession, image: str, data: bytes) -> dict[str, Any]:
    """A source that these bytes came from. It is asked for again when its URL ended before it was opened."""
    while True:
        source: dict[str, Any] = ok(await api.post("/v1/tickets", {"operation": "download", "image": image}), 201)["sources"][0]
        async with opened(session, source) as response:
            if response.status == 200:
                assert await response.read() == data
                return source
        assert time.time() >= stated(source), response.status


async def test_no_url_outlives_the_credential(cluster: Cluster, session: aiohttp.ClientSession) -> None:
    """Invariant 8: the ticket states the credential's end where that comes first; after it, the store is excluded, with a reason."""
    end = int(time.time()) + 100
    settings = {"bucket": cluster.weed.bucket, "region": cluster.weed.region, "prefix": "lent/"}
    store = s3_store(cluster, cluster.weed, "lent", settings=settings)
    entries = {**cluster.weed.credential, "expires_at": str(end)}
    cluster.credential("lent", entries)
    await register(cluster, store)
    member = cluster.api(session)
    data = content()
    ticket = ok(await member.post("/v1/tickets", new_upload(data, only=["lent"])), 201)
    place = ticket["destinations"][0]
    assert ends_at(place["url"]) == stated(place) == end
    made = await put(member, session, data, "lent")
    asked = {"operation": "download", "image": made["image"]}
    for at in (0, 1):
        source = ok(await cluster.api(session, at=at).post("/v1/tickets", asked), 201)["sources"][0]
        assert ends_at(source["url"]) == stated(source) == end
    cluster.credential("lent", {**entries, "expires_at": str(int(time.time()) - 1)})

    async def refused() -> bool:
        return {(await cluster.api(session, at=at).post("/v1/tickets", asked)).status for at in (0, 1)} == {409}

    await until(refused)
    assert reasons((await member.post("/v1/tickets", asked)).body["excluded"]) == {"lent": "unsignable"}
    assert (await member.post("/v1/tickets", new_upload(content(), only=["lent"]))).status in (409, 503)


# -- 10: every decision explains itself, and is counted


async def counted(broker: BrokerProcess, session: aiohttp.ClientSession, name: str, label: str) -> dict[str, float]:
    """A counter of ``/metrics``, by one of its labels."""
    found: dict[str, float] = {}
    async with session.get(f"{broker.metrics_url}/metrics") as response:
        for family in text_string_to_metric_families(await response.text()):
            for sample in family.samples:
                if sample.name == name:
                    found[sample.labels[label]] = found.get(sample.labels[label], 0) + sample.value
    return found


async def test_every_exclusion_has_a_reason_and_is_counted(
    cluster: Cluster, shelves: Shelves, session: aiohttp.ClientSession, db: Any
) -> None:
    """Invariant 10: the reason is told to whoever may know the store, and counted in any case; so is every ticket's outcome."""
    here = cluster.running[0]
    member, admin = cluster.api(session, subject="curious"), cluster.api(session, "admin", subject="root-10")
    asked = {"operation": "download", "image": shelves.image}

    async def excluded(api: Api, request: dict[str, Any]) -> dict[str, str]:
        reply = await api.post("/v1/tickets", request)
        assert reply.status in (201, 409), reply.body
        return reasons(reply.body["excluded"])

    async def left_out_in_silence() -> bool:
        # A member sees nothing of a private store, so only the counter shows that the broker has learnt of it.
        known = (await counted(here, session, "broker_exclusions_total", "reason")).get("private", 0)
        await excluded(cluster.api(session, subject=f"probe-{next(_numbers)}"), asked)
        return (await counted(here, session, "broker_exclusions_total", "reason")).get("private", 0) > known

    async def knows(expected: str | None) -> None:
        async def seen() -> bool:
            return (await excluded(cluster.api(session, subject=f"probe-{next(_numbers)}"), asked)).get("shelf") == expected

        await until(seen)

    before = await counted(here, session, "broker_exclusions_total", "reason")
    outcomes = await counted(here, session, "broker_tickets_total", "outcome")
    assert await excluded(member, {**asked, "avoid": ["shelf"]}) == {"shelf": "avoided"}
    assert await excluded(member, {**asked, "schemes": ["https"]}) == {"shelf": "scheme", "steady": "scheme"}
    ticket = ok(await member.post("/v1/tickets", asked), 201)
    assert (await member.post(f"/v1/tickets/{ticket['id']}/report", {"store": "shelf", "outcome": "failed"})).status == 204
    assert await excluded(member, asked) == {"shelf": "recently-failed"}
    assert await excluded(admin, asked) == {}
    told = {"avoided": 1.0, "scheme": 2.0, "recently-failed": 1.0}
    for sql, reason in (
        ("UPDATE slots SET slots = 0", "full"),
        ("UPDATE stores SET abilities = jsonb_set(abilities, '{reads}', 'false')", "not-readable"),
        ("UPDATE stores SET credential = 'nobody'", "unsignable"),
        ("UPDATE stores SET exposure = 'service'", None),
    ):
        table = sql.split()[1]
        rows = "store_id = (SELECT id FROM stores WHERE name = 'shelf')" if table == "slots" else "name = 'shelf'"
        kept = await db.fetch(f"SELECT * FROM {table} WHERE {rows}")
        await db.execute(f"{sql} WHERE {rows}")
        try:
            if reason is None:
                await until(left_out_in_silence)
                assert await excluded(admin, {**asked, "avoid": ["shelf"]}) == {"shelf": "avoided"}
                told["avoided"] += 1
            else:
                await knows(reason)
            told[reason or "private"] = 1.0  # at least
        finally:
            for row in kept:
                if table == "slots":
                    where = row["store_id"], row["direction"]
                    await db.execute("UPDATE slots SET slots = $1 WHERE store_id = $2 AND direction = $3", row["slots"], *where)
                else:
                    await db.execute(
                        "UPDATE stores SET abilities = $1, credential = $2, exposure = $3 WHERE id = $4",
                        row["abilities"], row["credential"], row["exposure"], row["id"],
                    )  # fmt: skip
            await knows(None)
    after = await counted(here, session, "broker_exclusions_total", "reason")
    risen = {reason: after[reason] - before.get(reason, 0) for reason in told}
    assert all(risen[reason] >= number for reason, number in told.items()), (risen, told)
    assert (risen["avoided"], risen["scheme"], risen["recently-failed"]) == (2, 2, 1)
    upload = await member.post("/v1/tickets", {"operation": "upload", "image": {"name": "x"}, "size": 1 << 52, "only": ["weed"]})
    assert upload.status in (409, 413)
    assert reasons(upload.body["excluded"])["weed"] == "too-large"
    later = await counted(here, session, "broker_tickets_total", "outcome")
    assert later["granted"] > outcomes["granted"]
    assert later["no-source"] == outcomes.get("no-source", 0) + 1
    assert later["no-destination"] == outcomes.get("no-destination", 0) + 1
