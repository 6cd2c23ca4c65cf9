"""What a connection may take: slow and endless heads, too many connections, answers that nobody reads, tokens by the thousand."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from broker.errors import Unavailable
from broker.model import Role
from broker.web import connections
from broker.web.bodies import Bodies
from tests.parts.broker import Api, RunningBroker, broker_on
from tests.parts.condition import until

SHORT = connections.Bounds(head_seconds=2.0, idle_seconds=20.0, answer_seconds=1.0)
WAIT_SECONDS = 60.0
ASK = b"GET /v1 HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
async def hasty(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningBroker]:
    """A broker that waits for nobody."""

    class Short(connections.Gate):
        def __init__(self, bounds: connections.Bounds, *rest: object) -> None:
            super().__init__(
                connections.Bounds(bounds.connections, bounds.connections_per_address, SHORT.head_seconds, idle_seconds=SHORT.idle_seconds,
                              answer_seconds=SHORT.answer_seconds),
                *rest,  # type: ignore[arg-type]
            )  # fmt: skip

    monkeypatch.setattr(connections, "Gate", Short)
    async with broker_on(database, tmp_path) as broker:
        yield broker


@pytest.fixture
async def small(database: str, tmp_path: Path) -> AsyncIterator[RunningBroker]:
    """A broker that has few places."""
    async with broker_on(database, tmp_path, {"http": {"max_connections": 8, "max_connections_per_address": 6}}) as broker:
        yield broker


@contextlib.asynccontextmanager
async def connected(broker: RunningBroker, source: str = "127.0.0.1") -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = broker.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), local_addr=(source, 0))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the broker closes."""
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), WAIT_SECONDS)
    return b""


async def counted(broker: RunningBroker, line: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{broker.metrics_url}/metrics") as response:
        found = [text for text in (await response.text()).splitlines() if text.startswith(line)]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("before", [b"", ASK])
async def test_a_head_that_never_ends_is_given_up(hasty: RunningBroker, before: bytes) -> None:
    """Slowloris: however steadily bytes come, and also on a connection that has brought a request."""
    async with connected(hasty) as (reader, writer):
        if before:
            writer.write(before)
            assert (await asyncio.wait_for(reader.readuntil(b"}"), WAIT_SECONDS)).startswith(b"HTTP/1.1 200 ")
        dripping = asyncio.create_task(drip(writer, b"GET /v1 HTTP/1.1\r\n" + b"X-Y: z\r\n" * 1000))
        answer = await rest(reader)
        dripping.cancel()
    assert b"HTTP/1.1 408 Request Timeout\r\n" in answer
    assert b"/problems/head-timeout" in answer
    assert await counted(hasty, 'broker_http_refusals_total{reason="head-late"}') == 1


async def test_a_connection_that_says_nothing_is_closed_without_a_word(hasty: RunningBroker) -> None:
    async with connected(hasty) as (reader, _):
        assert await rest(reader) == b""


async def test_a_request_in_pieces_and_many_on_one_connection_are_answered(hasty: RunningBroker) -> None:
    async with connected(hasty) as (reader, writer):
        for _ in range(2):
            for piece in (ASK[:7], ASK[7:-1], ASK[-1:]):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            assert (await asyncio.wait_for(reader.readuntil(b"}"), WAIT_SECONDS)).lstrip(b"\r\n").startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(SHORT.head_seconds * 1.2)  # idle is not late


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"".join(b"X-%d: y\r\n" % number for number in range(98)), b"200"),  # and Host and the terminator's place: 100
        (b"".join(b"X-%d: y\r\n" % number for number in range(101)), b"431"),
        (b"X: " + b"y" * 8000 + b"\r\n", b"200"),
        (b"X: " + b"y" * 8200 + b"\r\n", b"431"),
        (b"".join(b"X-%d: %s\r\n" % (number, b"y" * 4000) for number in range(20)), b"431"),
    ],
)
async def test_a_head_has_a_largest_size(broker: RunningBroker, head: bytes, status: bytes) -> None:
    async with connected(broker) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            whole = b"GET /v1 HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n"
            for at in range(0, len(whole), 4096):  # what comes after the answer would reset the connection before it is read
                writer.write(whole[at : at + 4096])
                await writer.drain()
                await asyncio.sleep(0.005)
        answer = await asyncio.wait_for(reader.readuntil(b"}"), WAIT_SECONDS)
        assert answer.split()[1] == status
        assert status == b"200" or (b"/problems/head-too-large" in answer and await rest(reader) == b"")


async def test_connections_are_counted_by_address_and_in_all(small: RunningBroker) -> None:
    async with contextlib.AsyncExitStack() as stack:
        kept = [await stack.enter_async_context(connected(small)) for _ in range(6)]
        for reader, writer in kept:
            writer.write(ASK)
            assert (await asyncio.wait_for(reader.readuntil(b"}"), WAIT_SECONDS)).startswith(b"HTTP/1.1 200 ")
        async with connected(small) as (reader, _):
            answer = await rest(reader)
            assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"/problems/too-many-connections" in answer
        others = [await stack.enter_async_context(connected(small, "127.0.0.2")) for _ in range(2)]
        for reader, writer in others:
            writer.write(ASK)
            assert (await asyncio.wait_for(reader.readuntil(b"}"), WAIT_SECONDS)).startswith(b"HTTP/1.1 200 ")
        assert await counted(small, "broker_http_connections ") == 8
        assert await counted(small, 'broker_http_refusals_total{reason="connections-of-address"}') == 1

    async def all_places_are_free() -> bool:
        return not await counted(small, "broker_http_connections ")

    await until(all_places_are_free)
    async with connected(small) as (reader, writer):
        writer.write(ASK)
        assert (await asyncio.wait_for(reader.readuntil(b"}"), WAIT_SECONDS)).startswith(b"HTTP/1.1 200 ")


async def test_whoever_says_nothing_keeps_no_place_from_others(small: RunningBroker) -> None:
    """Full of connections that wait, from many addresses: the one that has waited longest gives way. Those at work stay."""

    async def full() -> bool:
        return await counted(small, "broker_http_connections ") == 8

    async def empty() -> bool:
        return not await counted(small, "broker_http_connections ")

    async def turned_away() -> bool:
        async with connected(small, "127.0.0.20") as (reader, writer):
            writer.write(ASK)
            return await asyncio.wait_for(reader.read(12), WAIT_SECONDS) == b"HTTP/1.1 503"

    async with contextlib.AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(connected(small, f"127.0.0.{number}")) for number in range(2, 10)]
        await until(full)
        silent[1][1].write(b"GET /v1 HTTP/1.1\r\nX: half")
        for number in range(2):
            reader, writer = await stack.enter_async_context(connected(small, "127.0.0.20"))
            writer.write(ASK)
            assert (await asyncio.wait_for(reader.readuntil(b"}"), WAIT_SECONDS)).startswith(b"HTTP/1.1 200 ")
            assert await rest(silent[number][0]) == b""
        assert await full()
        assert await counted(small, 'broker_http_refusals_total{reason="made-room"}') == 2
        silent[7][1].write(ASK)
        assert (await asyncio.wait_for(silent[7][0].readuntil(b"}"), WAIT_SECONDS)).startswith(b"HTTP/1.1 200 ")
    await until(empty)
    async with contextlib.AsyncExitStack() as stack:
        head = f"POST /v1/images HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {small.token()}\r\nContent-Length: 9\r\n"
        for number in range(8):
            _, writer = await stack.enter_async_context(connected(small, f"127.0.0.{number + 2}"))
            writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n")
        await until(full)
        await until(turned_away)  # once each of the eight waits for its body
        assert await counted(small, 'broker_http_refusals_total{reason="connections"}') >= 1
        assert await full()


async def test_who_does_not_read_its_answers_is_hung_up_on(hasty: RunningBroker) -> None:
    async with connected(hasty) as (reader, writer):
        reader._transport.pause_reading()  # type: ignore[attr-defined]

        async def hung_up() -> bool:
            with contextlib.suppress(ConnectionError, TimeoutError):
                writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
                async with asyncio.timeout(0.2):
                    await writer.drain()
            return await counted(hasty, 'broker_http_refusals_total{reason="answer-unread"}') == 1

        await until(hung_up)


async def test_bodies_that_never_end_fill_no_memory(broker: RunningBroker, session: aiohttp.ClientSession) -> None:
    """Of one principal four of the largest are kept, whatever number of connections it opens; everybody else goes on."""
    size = 8 << 20
    large = b'{"tickets":[{"operation":"download","image":"x"}]}'.ljust(size)

    async def send(token: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        head = f"POST /v1/tickets:batch HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {size}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        await writer.drain()

    async with contextlib.AsyncExitStack() as stack:
        token = broker.token(Role.READER, subject="mallory")
        connections = [await stack.enter_async_context(connected(broker)) for _ in range(6)]
        for reader, writer in connections:
            await send(token, reader, writer, large[:-1])
        refused = [asyncio.create_task(reader.readuntil(b"\r\n\r\n")) for reader, _ in connections]
        async with asyncio.timeout(60):
            while sum(task.done() for task in refused) < 2:
                await asyncio.sleep(0.05)
        answers = [task.result() for task in refused if task.done()]
        assert len(answers) == 2
        assert all(answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in answer for answer in answers)
        async with connected(broker) as (reader, writer):
            await send(broker.token(subject="alice"), reader, writer, large)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
        assert (await Api(broker.url, session, token).get("/v1/images")).status == 200
        for (_, writer), task in zip(connections, refused, strict=True):
            if not task.done():
                writer.write(large[-1:])
                assert (await task).startswith(b"HTTP/1.1 400 ")
    async with connected(broker) as (reader, writer):
        await send(token, reader, writer, large)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")


def test_what_bodies_may_hold() -> None:
    bodies = Bodies(all_bytes=100, bytes_of_one=40)
    with bodies.arriving("a") as first, bodies.arriving("a") as second, bodies.arriving("b") as other:
        first.take(30)
        second.take(10)
        with pytest.raises(Unavailable):
            second.take(1)
        other.take(40)
        with bodies.arriving("c") as late:
            late.take(20)
            with pytest.raises(Unavailable):
                late.take(1)
        with bodies.arriving("c") as late:
            late.take(20)
    assert (bodies.held, bodies._of) == (0, {})


async def test_tokens_by_the_thousand_are_not_looked_at(database: str, tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """Also when each looks right: good ones that are known go on, and what stands behind a proxy is told apart."""
    settings = {"auth": {"refusals_per_minute": 10}, "http": {"trusted_proxies": ["127.0.0.0/8"]}}
    async with broker_on(database, tmp_path, settings) as broker:
        good, renewed = broker.token(), broker.token(ttl=100)
        api = Api(broker.url, session, good)
        mine = api.as_(good, X_Forwarded_For="192.0.2.1")
        assert (await mine.get("/v1/images")).status == 200
        bad = [f"{broker.token(subject='mallory', ttl=200 + number)[:-6]}AAAAAA" for number in range(30)]
        began = time.monotonic()
        replies = [await api.as_(token, X_Forwarded_For="192.0.2.1").get("/v1/images") for token in bad]
        refilled = (time.monotonic() - began) * 10 / 60
        assert [reply.status for reply in replies[:10]] == [401] * 10
        unchecked = [reply for reply in replies[10:] if reply.status != 401]
        assert len(unchecked) >= 20 - math.ceil(refilled)
        assert unchecked and {reply.status for reply in unchecked} == {429}
        assert unchecked[-1].body["type"] == "/problems/too-many-refusals"
        assert int(unchecked[-1].headers["Retry-After"]) >= 1
        assert (await mine.get("/v1/images")).status == 200
        assert (await api.as_(renewed, X_Forwarded_For="192.0.2.1").get("/v1/images")).status == 200, "the same subject"
        assert (await api.as_(bad[0], X_Forwarded_For="192.0.2.2").get("/v1/images")).status == 401
        assert await counted(broker, 'broker_tokens_unchecked_total{reason="address"}') >= len(unchecked)
