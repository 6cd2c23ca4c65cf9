"""Waiting for a slot over HTTP, at two brokers on one database: turns, time-outs, clients that leave, limits; and quotas."""

from __future__ import annotations

import asyncio
import os
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import orjson
import pytest

from broker import errors
from broker.client import api as client
from tests.parts.broker import Api, Reply, RunningBroker, broker_on
from tests.parts.condition import until
from tests.parts.process import find_program
from tests.web.test_tickets import S3, SWIFT, Desk

ISSUER = "http://broker.test"
SETTINGS = {"http": {"public_url": ISSUER}, "policy": {"admission": {"most_waiting": 3}}}


@dataclass
class Pair(Desk):
    """Two brokers; a `Desk` is the first one."""

    other: RunningBroker
    session: aiohttp.ClientSession

    def project(self, name: str, role: str = "member", *, at_other: bool = False) -> Api:
        """Somebody of a project."""
        broker = self.other if at_other else self.broker
        return Api(broker.url, self.session, self.broker.token(role, name))

    def wait(self, blob: str, api: Api, seconds: float = 60, **wishes: Any) -> asyncio.Task[Reply]:
        """A request that waits, under way."""
        return asyncio.create_task(self.ask(blob, api, wait=seconds, **wishes))

    async def waiting(self, count: int) -> None:
        """Until the catalogue knows of so many that wait."""

        async def counted() -> bool:
            return bool(await self.db.fetchval("SELECT count(*) = $1 FROM waits", count))

        await until(counted, f"{count} wait")

    async def release(self, reply: Reply, api: Api) -> None:
        assert (await api.delete(f"/v1/tickets/{reply.body['id']}")).status == 204


@pytest.fixture
async def pair(database: str, tmp_path: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(broker_on(database, tmp_path, SETTINGS))
        other = await stack.enter_async_context(broker_on(database, tmp_path, SETTINGS))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        one.credential("s3", S3)
        one.credential("swift", SWIFT)
        pair = Pair(one, Api(one.url, session, one.token()), other, session)
        await pair.db.execute("INSERT INTO sites (path) VALUES ('eu/az1')")
        yield pair


async def known_to_both(pair: Pair) -> None:
    await pair.other.context.memory.reload_stores()
    await pair.broker.context.memory.reload_stores()


async def test_turns_come_in_fair_order_at_whichever_broker_one_waits(pair: Pair) -> None:
    """Two slots, which a holds. It asked for one more before b did, at the other broker: b's turn comes first."""
    blob = await pair.blob(await pair.store("s", slots=2))
    await known_to_both(pair)
    a, b = pair.project("a"), pair.project("b", at_other=True)
    held = [await pair.ask(blob, a), await pair.ask(blob, a)]
    assert [reply.status for reply in held] == [201, 201]
    third = pair.wait(blob, a)
    await pair.waiting(1)
    his = pair.wait(blob, b)
    await pair.waiting(2)
    await pair.release(held[0], a)
    granted = await his
    assert granted.status == 201 and not third.done()
    assert (await pair.ask(blob, a)).status == 429
    await pair.release(held[1], a)
    assert (await third).status == 201
    await pair.waiting(0)
    text = pair.broker.context.metrics.render().decode()
    assert 'broker_wait_seconds_count{direction="read",outcome="granted"} 1.0' in text
    assert 'broker_retry_after_ratio_count{how="waited"} 1.0' in text


async def test_a_wait_ends_in_429_and_other_bounds(pair: Pair) -> None:
    blob = await pair.blob(await pair.store("s", slots=1))
    assert (await pair.ask(blob)).status == 201
    began = time.monotonic()
    reply = await pair.ask(blob, wait=0.6)
    assert (reply.status, reply.body["type"]) == (429, "/problems/busy")
    assert time.monotonic() - began >= 0.6
    assert int(reply.headers["Retry-After"]) >= 1
    for seconds, status in ((60, 400), (60.1, 400), (-1, 400), ("1", 400)):
        body = {"operation": "download", "blob": blob, "wait": seconds}
        if seconds == 60:
            batch = await pair.api.post("/v1/tickets:batch", {"tickets": [{"operation": "download", "blob": blob}, body]})
            assert (batch.status, batch.body["field"]) == (400, "tickets.1.wait")
        else:
            refused = await pair.api.post("/v1/tickets", body)
            assert (refused.status, refused.body["field"]) == (status, "wait")
    crowd = [pair.wait(blob, pair.api) for _ in range(3)]
    await pair.waiting(3)
    assert (await pair.ask(blob, wait=60)).status == 429, "so many of one project may wait, and no more"
    other = pair.wait(blob, pair.project("b"))
    await pair.waiting(4)
    await pair.broker.context.waiting.close()
    assert {(await task).status for task in (*crowd, other)} == {429}, "a broker that ends sends everybody away"


async def test_who_leaves_waits_no_more(pair: Pair) -> None:
    store = await pair.store("s", slots=1)
    blob = await pair.blob(store)
    first = await pair.ask(blob)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(pair.broker.url.rpartition(":")[2]))
    body = orjson.dumps({"operation": "download", "blob": blob, "wait": 60})
    head = f"POST /v1/tickets HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nAuthorization: Bearer {pair.broker.token()}\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await pair.waiting(1)
    writer.close()
    await writer.wait_closed()
    await pair.waiting(0)
    await pair.release(first, pair.api)
    assert (await pair.ask(blob)).status == 201
    assert len(await pair.leases()) == 1
    assert 'outcome="gone"' in pair.broker.context.metrics.render().decode()
    assert reader is not None


async def test_a_new_copy_ends_a_wait_and_so_does_the_end_of_the_blob(pair: Pair) -> None:
    full, empty = await pair.store("s", slots=1), await pair.store("t", slots=1)
    blob, lost = await pair.blob(full), await pair.blob(full)
    assert (await pair.ask(blob)).status == 201
    waits, in_vain = pair.wait(blob, pair.api), pair.wait(lost, pair.api)
    await pair.waiting(2)
    await pair.db.execute("UPDATE replicas SET state = 'missing' WHERE blob_id = $1", lost)
    await pair.db.execute(
        """INSERT INTO replicas (id, blob_id, store_id, key, state, project, subject, observed_by, observed_strength, observed_at)
           SELECT gen_random_uuid(), blob_id, $2, key, state, project, subject, observed_by, observed_strength, observed_at
           FROM replicas WHERE blob_id = $1""",
        blob, empty,
    )  # fmt: skip
    granted = await waits
    assert (granted.status, granted.body["sources"][0]["store"]) == (201, "t")
    assert (await in_vain).body["type"] == "/problems/no-source"


async def test_the_same_key_keeps_its_place_at_another_broker(pair: Pair) -> None:
    blob = await pair.blob(await pair.store("s", slots=1))
    await known_to_both(pair)
    a, b = pair.project("a"), pair.project("a", at_other=True)
    first = await pair.ask(blob, a)
    mine = pair.wait(blob, a, 4, key="k")
    await pair.waiting(1)
    again = pair.wait(blob, b, 4, key="k")

    async def moved() -> bool:
        return bool(await pair.db.fetchval("SELECT count(DISTINCT desk) = 1 AND count(*) = 1 FROM waits"))

    await until(moved)
    await pair.release(first, a)
    replies = [await mine, await again]
    assert {reply.status for reply in replies} == {201}
    assert len({reply.body["id"] for reply in replies}) == 1
    assert len(await pair.leases()) == 1


async def test_progress_moves_the_expected_end(pair: Pair) -> None:
    blob = await pair.blob(await pair.store("s", slots=1), size=1 << 30)
    ticket = await pair.ask(blob)
    left = """SELECT extract(epoch FROM expected_at - clock_timestamp())::float8,
                     extract(epoch FROM expires_at - expected_at)::float8 FROM leases"""
    assert (await pair.db.fetchrow(left))[1] > 0
    body = {"store": "s", "outcome": "ok", "bytes": 1 << 28, "seconds": 0.001, "final": False}
    assert (await pair.api.post(f"/v1/tickets/{ticket.body['id']}/report", body)).status == 204
    assert (await pair.db.fetchrow(left))[0] < 0.01
    refused = await pair.ask(blob)
    assert (refused.status, refused.headers["Retry-After"]) == (429, "1")


async def test_services_weigh_more_and_starve_nobody(pair: Pair) -> None:
    blob = await pair.blob(await pair.store("s", slots=5))
    held = [await pair.ask(blob, pair.project(f"old-{n}")) for n in range(5)]
    service = pair.project("nova", "service")
    crowd = {name: [] for name in ("nova", "a")}  # type: dict[str, list[asyncio.Task[Reply]]]
    for _ in range(3):
        crowd["a"].append(pair.wait(blob, pair.project("a")))
        crowd["nova"].append(pair.wait(blob, service))
    more = [asyncio.create_task(Api(pair.other.url, pair.session, pair.broker.token("service", "nova")).post(
        "/v1/tickets", {"operation": "download", "blob": blob, "wait": 60})) for _ in range(3)]  # fmt: skip
    await known_to_both(pair)
    await pair.waiting(9)
    for n, reply in enumerate(held):
        await pair.release(reply, pair.project(f"old-{n}"))
    done = lambda: (sum(t.done() for t in (*crowd["nova"], *more)), sum(t.done() for t in crowd["a"]))  # noqa: E731
    await until(lambda: sum(done()) == 5)
    assert done() == (4, 1)
    for task in (*crowd["nova"], *crowd["a"], *more):
        task.cancel()


async def test_quotas_from_birth_to_death(pair: Pair) -> None:
    free, limited = await pair.store("free"), await pair.store("s", slots=9)
    blob, other = await pair.blob(free, size=1000), await pair.blob(limited, size=1000)
    await known_to_both(pair)
    admin, member = pair.project("ops", "admin"), pair.project("p / q")
    path = "/v1/quotas/p%20%2F%20q"
    assert (await member.get(path)).status == (await member.send("PUT", path, {"max_leases": 1})).status == 403
    assert (await admin.get(path)).status == (await admin.delete(path)).status == 404
    for wrong, field in (
        ({"max_leases": -1}, "max_leases"),
        ({"max_bytes": 2**53 + 1}, "max_bytes"),
        ({"weight": 0}, "weight"),
        ({"x": 1}, "x"),
    ):
        reply = await admin.send("PUT", path, wrong)
        assert (reply.status, reply.body["field"]) == (400, field)
    made = await admin.send("PUT", path, {"max_leases": 2, "max_bytes": 2000})
    assert (made.status, made.body) == (200, {"project": "p / q", "max_leases": 2, "max_bytes": 2000, "leases": 0, "bytes": 0})
    first, second = await pair.ask(blob, member), await pair.ask(other, member)
    assert first.status == second.status == 201
    assert (await admin.get(path)).body | {"leases": 2, "bytes": 2000} == (await admin.get(path)).body
    refused = await pair.ask(blob, member)
    assert (refused.status, refused.body["type"]) == (429, "/problems/quota-exceeded")
    assert int(refused.headers["Retry-After"]) >= 1
    assert (await pair.ask(blob, pair.project("others"))).status == 201
    standby = pair.wait(blob, member)
    await pair.waiting(1)
    await pair.release(second, member)
    granted = await standby
    assert granted.status == 201
    await pair.release(granted, member)
    # At the other broker within seconds, which holds to it as well.
    assert (await admin.send("PUT", path, {"max_bytes": 1000, "weight": 2.5})).body["weight"] == 2.5
    await until(lambda: pair.other.context.memory.quotas["p / q"].max_bytes == 1000)
    there = pair.project("p / q", at_other=True)
    assert (await pair.ask(blob, there)).body["type"] == "/problems/quota-exceeded"
    listed = await admin.get("/v1/quotas?limit=1")
    assert [quota["project"] for quota in listed.body["quotas"]] == ["p / q"] and "next" not in listed.body
    assert (await admin.send("PUT", "/v1/quotas/z", {})).status == 200
    page = await admin.get("/v1/quotas?limit=1")
    assert [
        q["project"] for q in (await admin.get(f"/v1/quotas?limit=1&marker={page.body['next'].replace('%', '%25')}")).body["quotas"]
    ] == ["z"]
    assert (await admin.delete(path)).status == 204
    assert (await pair.ask(blob, member)).status == 201
    assert "broker_quota_refusals_total" in pair.broker.context.metrics.render().decode()


async def test_who_comes_back_when_told_to_gets_a_turn_among_those_who_wait(pair: Pair) -> None:
    """It never asks to wait. Between those who do, no slot would ever be free for it."""
    blob = await pair.blob(await pair.store("s", slots=1))
    waiting, returning = pair.project("a"), pair.project("b")

    async def busy() -> None:
        while True:
            reply = await pair.ask(blob, waiting, wait=60)
            if reply.status == 201:
                await asyncio.sleep(0.05)
                await pair.release(reply, waiting)

    first = await pair.ask(blob, waiting)
    crowd = [asyncio.create_task(busy()) for _ in range(2)]
    await pair.waiting(2)
    reply = await pair.ask(blob, returning)
    assert reply.status == 429
    await pair.release(first, waiting)
    end = time.monotonic() + 60
    while reply.status == 429:
        assert time.monotonic() < end
        await asyncio.sleep(reply.body["retry_after"])
        reply = await pair.ask(blob, returning)
    assert reply.status == 201
    for task in crowd:
        task.cancel()
    assert 'broker_retry_after_ratio_count{how="returned"} 1.0' in pair.broker.context.metrics.render().decode()


async def test_our_client_waits_at_the_broker(pair: Pair) -> None:
    blob = await pair.blob(await pair.store("s", slots=1))
    first = await pair.ask(blob)
    async with client.Broker(pair.broker.url, pair.broker.token()) as broker:
        asked = asyncio.create_task(broker.download_ticket(blob=UUID(blob)))
        await pair.waiting(1)
        await pair.release(first, pair.api)
        assert [source.state for source in (await asked).sources] == ["active"]
    async with client.Broker(pair.broker.url, pair.broker.token(), patience=0) as broker:
        with pytest.raises(errors.Busy) as refused:
            await broker.download_ticket(blob=UUID(blob))
        assert refused.value.retry_after


async def test_quotas_from_the_command_line(pair: Pair) -> None:
    environment = {"BROKER_URL": pair.broker.url, "BROKER_TOKEN": pair.broker.token("admin")}

    async def run(*arguments: str) -> tuple[int, bytes]:
        program = find_program("broker", "pip install -e .")
        process = await asyncio.create_subprocess_exec(
            program, "quota", *arguments, env={**os.environ, **environment}, stdout=PIPE, stderr=PIPE
        )
        output, _ = await process.communicate()
        return process.returncode or 0, output

    assert (await run("set", "p"))[0] == 2
    code, made = await run("set", "p", "--max-leases", "3", "--weight", "2", "--json")
    assert (code, orjson.loads(made)) == (0, {"project": "p", "max_leases": 3, "weight": 2, "leases": 0, "bytes": 0})
    assert b"as configured" in (await run("list"))[1]
    assert (await run("remove", "p"))[0] == 0
    assert (await run("show", "p"))[0] == 4
