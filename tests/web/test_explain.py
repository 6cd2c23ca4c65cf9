"""Everything can be looked at: why a ticket would be what it is, and why it was; by whom it concerns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import orjson
import pytest

from broker import errors
from broker.catalog import tickets
from broker.model import new_id
from broker.service import promises
from tests.parts.broker import Api, Reply, broker_on
from tests.parts.process import find_program
from tests.web.test_tickets import S3, SITES, Desk, states


@pytest.fixture
async def desk(database: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with broker_on(database, tmp_path) as broker, aiohttp.ClientSession() as session:
        broker.credential("s3", S3)
        desk = Desk(broker, Api(broker.url, session, broker.token(site="eu/az1")))
        for site in SITES:
            await desk.db.execute("INSERT INTO sites (path) VALUES ($1)", site)
        yield desk


async def explain(desk: Desk, blob: str, api: Api | None = None, **wishes: Any) -> Reply:
    return await (api or desk.api).post("/v1/tickets:explain", {"operation": "download", "blob": blob, **wishes})


def stores(reply: Reply) -> list[str]:
    assert reply.status == 200, reply.body
    return [candidate["store"] for candidate in reply.body["candidates"]]


async def test_an_explanation_has_the_numbers_and_leaves_nothing_behind(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("near", slots=3), await desk.store("far", site="us"), size=10**9)
    await desk.ask(blob, only=["near"])
    await desk.broker.context.memory.catch_up()
    before = await desk.db.fetchval("SELECT count(*) FROM tickets"), await desk.leases()
    found = await explain(desk, blob)
    assert (stores(found), found.body["site"], found.body["excluded"]) == (["near", "far"], "eu/az1", [])
    near, far = found.body["candidates"]
    assert (near["active"], near["slots"], far["slots"], near["doubt"], near["evidence"]) == (1, 3, None, 0, 0)
    assert near["weight"] + far["weight"] == pytest.approx(1)
    assert near["score"] == pytest.approx(near["estimate"]["seconds"] / near["estimate"]["success"])
    assert b"url" not in orjson.dumps(found.body)
    assert (await desk.db.fetchval("SELECT count(*) FROM tickets"), await desk.leases()) == before
    by_image = await desk.api.post("/v1/tickets:explain", {"operation": "download", "image": await desk.image_of(blob)})
    assert (stores(by_image), by_image.body["format"]) == (["near", "far"], "raw")


async def test_an_administrator_names_any_site_others_only_where_nobody_knows_theirs(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("a"), await desk.store("b", site="us"), size=10**9)
    admin = desk.api.as_(desk.broker.token("admin", site="eu/az1"))
    assert stores(await explain(desk, blob, admin, site="us")) == ["b", "a"]
    mine = await explain(desk, blob, site="us")
    assert (stores(mine), mine.body["site"]) == (["a", "b"], "eu/az1")
    hinted = await explain(desk, blob, desk.api.as_(desk.broker.token(subject="bob")), site="us")
    assert (stores(hinted), hinted.body["site"]) == (["b", "a"], "us")
    assert (await explain(desk, blob, admin, site="mars")).body["field"] == "site"


async def test_what_may_not_be_known_is_not_explained(desk: Desk) -> None:
    """M13, and blobs of others."""
    blob = await desk.blob(await desk.store("open"), await desk.store("node-7", exposure="service"))
    member, service = await explain(desk, blob), await explain(desk, blob, desk.api.as_(desk.broker.token("service")))
    assert (stores(member), member.body["excluded"]) == (["open"], [])
    assert set(stores(service)) == {"open", "node-7"}
    hidden, unknown = await explain(desk, blob, avoid=["node-7"]), await explain(desk, blob, avoid=["node-9"])
    assert (hidden.status, hidden.body) == (400, unknown.body)
    others = await desk.blob(await desk.store("b"), visibility="private")
    assert (await explain(desk, others)).status == (await explain(desk, str(new_id()))).status == 404


async def test_what_was_granted_is_answered_though_the_catalogue_goes_away(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = await desk.blob(await desk.store("a", slots=2), await desk.store("b"))
    ticket = (await desk.ask(blob, only=["b"])).body
    assert (await desk.api.post(f"/v1/tickets/{ticket['id']}/report", {"store": "b", "outcome": "failed"})).status == 204

    async def away(*_: Any) -> None:
        raise errors.Unavailable("The catalogue cannot be reached.")

    monkeypatch.setattr(tickets, "tell_why", away)
    granted = await desk.ask(blob)
    assert (granted.status, granted.body["excluded"]) == (201, [{"store": "b", "reason": "recently-failed"}])
    assert (await desk.api.get(f"/v1/tickets/{granted.body['id']}")).status == 200
    # Nor does one request of a batch cost the others theirs: who is full hears that it cannot be told when to come again.
    full = await desk.blob(await desk.store("full", slots=1))
    assert (await desk.ask(full)).status == 201
    monkeypatch.setattr(promises, "until_turn", away)
    asked = [{"operation": "download", "blob": each} for each in (blob, full)]
    results = (await desk.api.post("/v1/tickets:batch", {"tickets": asked})).body["tickets"]
    assert [result.get("status", 201) for result in results] == [201, 503]
    assert (await desk.ask(full)).status == 503


async def test_exclusions_are_those_of_who_asks(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("a"), await desk.store("b"))
    ticket = (await desk.ask(blob, only=["b"])).body
    assert (await desk.api.post(f"/v1/tickets/{ticket['id']}/report", {"store": "b", "outcome": "failed"})).status == 204
    mine, other = await explain(desk, blob), await explain(desk, blob, desk.api.as_(desk.broker.token(subject="bob")))
    assert (stores(mine), mine.body["excluded"]) == (["a"], [{"store": "b", "reason": "recently-failed"}])
    assert set(stores(other)) == {"a", "b"}
    nothing = await explain(desk, blob, avoid=["a"])
    assert (stores(nothing), len(nothing.body["excluded"])) == ([], 2)


async def test_a_ticket_tells_why_later(desk: Desk) -> None:
    """With the numbers of then; a store that has become private meanwhile is no more told of."""
    blob = await desk.blob(await desk.store("a", slots=4), await desk.store("b"), await desk.store("c"), size=10**9)
    ticket = (await desk.ask(blob, avoid=["c"])).body
    path = f"/v1/tickets/{ticket['id']}"
    why = (await desk.api.get(path)).body["why"]
    assert why["excluded"] == [{"store": "c", "reason": "avoided"}]
    assert {each["store"]: each["estimate"] for each in why["candidates"]} == {
        each["store"]: each["estimate"] for each in ticket["sources"]
    }  # fmt: skip
    assert all(each["concurrency"] == 1 for each in why["candidates"])
    for store in "bc":
        await desk.db.execute("UPDATE stores SET exposure = 'service' WHERE name = $1", store)
    await desk.broker.context.memory.catch_up()
    later = (await desk.api.get(path)).body["why"]
    assert ([each["store"] for each in later["candidates"]], later["excluded"]) == (["a"], [])
    plain = (await desk.ask(blob)).body
    assert set(states(plain)) == {each["store"] for each in (await desk.api.get(f"/v1/tickets/{plain['id']}")).body["why"]["candidates"]}


async def test_an_upload_tells_why_too(desk: Desk) -> None:
    await desk.store("a")
    await desk.store("b")
    await desk.db.execute("UPDATE stores SET writable = false WHERE name = 'b'")
    await desk.db.execute(
        """UPDATE stores SET abilities = abilities || '{"refuses_tampering": true, "refuses_expired": true, "refuses_overwrite": true}'"""
    )
    await desk.broker.context.memory.catch_up()
    made = await desk.api.post("/v1/tickets", {"operation": "upload", "image": {"name": "i"}, "size": 10})
    assert made.status == 201, made.body
    why = (await desk.api.get(f"/v1/tickets/{made.body['id']}")).body["why"]
    assert ([each["store"] for each in why["candidates"]], why["excluded"]) == (["a"], [{"store": "b", "reason": "not-writable"}])


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"bytes": 1000, "seconds": 0}, "seconds"),
    ({"bytes": 1000, "seconds": 3600}, "seconds"),
    ({"bytes": 1000 + 10**15, "seconds": 1}, "bytes"),
    ({"seconds": 1, "setup_seconds": 2}, "setup_seconds"),
]


async def test_reports_that_cannot_be_true_are_refused_and_change_nothing(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("a", slots=1))
    ticket = (await desk.ask(blob)).body
    for report, field in IMPOSSIBLE:
        for final in (True, False):
            body = {"store": "a", "outcome": "failed", "final": final, **report}
            refused = await desk.api.post(f"/v1/tickets/{ticket['id']}/report", body)
            assert (refused.status, refused.body["type"], refused.body["field"]) == (400, "/problems/invalid-field", field)
    assert len(await desk.leases()) == 1
    assert (await desk.api.get("/v1/paths")).body["paths"] == []
    stranger = desk.api.as_(desk.broker.token(subject="mallory"))
    assert (await stranger.post(f"/v1/tickets/{ticket['id']}/report", {"store": "a", "outcome": "failed"})).status == 404
    assert (await desk.api.post(f"/v1/tickets/{ticket['id']}/report", {"store": "a", "outcome": "ok"})).status == 204


async def test_broker_why_shows_it_as_a_table_and_as_json(desk: Desk) -> None:
    blob = await desk.blob(await desk.store("near", slots=3), await desk.store("far", site="us"), size=10**9)
    await desk.db.execute("UPDATE replicas SET state = 'missing' WHERE store_id = (SELECT id FROM stores WHERE name = 'far')")
    environment = {"BROKER_URL": desk.broker.url, "BROKER_TOKEN": desk.broker.token("admin")}
    found = [await run(environment, "why", blob, "--site", "us", *options) for options in ((), ("--json",))]
    assert [part for part in ("near", "eu/az1", "prior", "0 of 3", "far", "missing") if part not in found[0]] == []
    document = orjson.loads(found[1])
    assert (document["site"], document["blob"]["id"], document["excluded"]) == ("us", blob, [{"store": "far", "reason": "missing"}])
    assert UUID(document["blob"]["id"])


async def run(environment: dict[str, str], *arguments: str) -> str:
    """What the command prints."""
    process = await asyncio.create_subprocess_exec(
        find_program("broker", "pip install -e '.[test]'"), *arguments, env={**os.environ, **environment}, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()
