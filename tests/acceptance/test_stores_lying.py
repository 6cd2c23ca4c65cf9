"""Stores that redirect, hang, fail, answer without end or answer nonsense: always `StoreUnavailable`, never a secret in its text."""

from __future__ import annotations

import asyncio
import gzip
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from broker import app, metrics
from broker.errors import StoreUnavailable
from broker.model import PartSeen, Store
from broker.sign.token import TokenSigner, generate_key
from broker.stores import exchange
from broker.stores.base import Store as OpenStore
from broker.stores.probe import probe
from broker.stores.registry import open_store
from tests.parts.records import SEAWEEDFS

SECRET = "the-most-secret-of-secrets"
CREDENTIAL = {
    "s3": {"access_key": "AKIAEXAMPLE", "secret_key": SECRET},
    "swift": {"temp_url_key": SECRET, "user": "u", "key": SECRET},
    "http": {},
}
SETTINGS = {"s3": {"bucket": "b"}, "swift": {"account": "AUTH_a", "container": "c"}, "http": {}}
MD5 = "0" * 32
UPLOAD = "5-upload"
PARTS = [PartSeen(1, 5, {"md5": MD5}, MD5)]

BILLION_LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
    b"<ListPartsResult><Part><PartNumber>1</PartNumber><Size>1</Size><ETag>&b;</ETag></Part></ListPartsResult>"
)

Operation = Callable[[OpenStore], Awaitable[object]]
OPERATIONS: dict[str, Operation] = {
    "stat": lambda store: store.stat("key"),
    "delete": lambda store: store.delete("key"),
    "parts": lambda store: store.parts("key", UPLOAD),
    "finish": lambda store: store.finish("key", UPLOAD, PARTS, {}),
    "abort": lambda store: store.abort("key", UPLOAD),
    "clock": lambda store: store.clock_skew(),
}


class Liar:
    """A server that logs in whoever asks (as tempauth does), and answers all else as `behaviour` says."""

    def __init__(self) -> None:
        self.behaviour: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.fails
        self.trapped = 0
        self.packed = b""
        self.seen: list[str] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/trap":
            self.trapped += 1
            return web.Response()
        if request.path == "/auth/v1.0":
            return web.Response(headers={"X-Auth-Token": "AUTH_tk", "X-Storage-Url": "http://192.0.2.1/"})
        self.seen.append(request.method)
        return await self.behaviour(request)

    async def fails(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text=f"boom {SECRET} {request.path_qs}")

    async def redirects(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": "/trap"})

    async def hangs(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    async def cuts(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(160):
            await response.write(b"<" * (1 << 16))
        return response

    async def html(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>It works!</html>", content_type="text/html")

    async def drips(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while request.transport is not None and not request.transport.is_closing():
            await response.write(b"<")
            await asyncio.sleep(0.02)
        return response

    async def long_field(self, request: web.Request) -> web.StreamResponse:
        return web.Response(headers={"X-Long": "x" * (1 << 20)})

    async def many_fields(self, request: web.Request) -> web.StreamResponse:
        return web.Response(headers={f"X-{number}": "x" for number in range(10_000)})

    async def bomb(self, request: web.Request) -> web.StreamResponse:
        self.packed = gzip.compress(b"<" * (64 << 20))
        return web.Response(body=self.packed, headers={"Content-Encoding": "gzip"})

    async def laughs(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=BILLION_LAUGHS, content_type="application/xml")


@pytest_asyncio.fixture
async def liar() -> AsyncIterator[tuple[Liar, str]]:
    served, server = web.Application(), Liar()
    served.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(served, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield server, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def open_at(url: str, kind: str, session: aiohttp.ClientSession) -> OpenStore:
    credential = {**CREDENTIAL[kind], **({"auth_url": f"{url}/auth/v1.0"} if kind == "swift" else {})}
    record = Store(1, "liar", kind, "x", url, settings=SETTINGS[kind], credential="c", abilities=SEAWEEDFS)
    signer = TokenSigner([generate_key("ES256", time.time() - 3600)], "http://broker.test")
    return open_store(record, {"c": credential}, signer, session)


async def fails_cleanly(operation: Operation, store: OpenStore) -> None:
    with pytest.raises(StoreUnavailable) as error:
        await operation(store)
    text = "".join(traceback.format_exception(error.value)) + repr(error.value.problem())
    assert "liar" in text
    for secret in (SECRET, "Signature", "temp_url_sig", "eyJ", "AUTH_tk"):
        assert secret not in text


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ["s3", "swift", "http"])
@pytest.mark.parametrize("behaviour", ["fails", "redirects", "cuts"])
async def test_refused_by_everything(
    behaviour: str, kind: str, name: str, liar: tuple[Liar, str], http_session: aiohttp.ClientSession
) -> None:
    server, url = liar
    server.behaviour = getattr(server, behaviour)
    await fails_cleanly(OPERATIONS[name], open_at(url, kind, http_session))
    assert server.seen
    assert server.trapped == 0


@pytest.mark.parametrize("kind", ["s3", "swift", "http"])
@pytest.mark.parametrize("name", ["stat", "parts"])
async def test_a_hanging_store(
    name: str, kind: str, liar: tuple[Liar, str], http_session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = liar
    server.behaviour = server.hangs
    monkeypatch.setattr(exchange, "TOTAL_SECONDS", 0.2)
    await fails_cleanly(OPERATIONS[name], open_at(url, kind, http_session))


@pytest_asyncio.fixture
async def own_session() -> AsyncIterator[aiohttp.ClientSession]:
    """A session as the broker makes it for internal stores."""
    async with app.store_session(metrics.create(), internal=True) as session:
        yield session


@pytest.mark.parametrize("kind", ["s3", "swift", "http"])
@pytest.mark.parametrize("behaviour", ["drips", "long_field", "many_fields", "bomb", "endless", "hangs"])
async def test_an_answer_is_bounded_in_time_head_and_size(
    behaviour: str, kind: str, liar: tuple[Liar, str], own_session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when each byte comes in time, and when little is sent that would unpack to much."""
    server, url = liar
    server.behaviour = getattr(server, behaviour)
    monkeypatch.setattr(exchange, "TOTAL_SECONDS", 2.0)
    await fails_cleanly(OPERATIONS["parts"], open_at(url, kind, own_session))


async def test_nothing_is_unpacked(liar: tuple[Liar, str], own_session: aiohttp.ClientSession) -> None:
    server, url = liar
    server.behaviour = server.bomb
    answer = await exchange.Exchange(own_session, "liar").ask("GET", f"{url}/x", {}, expect=(200,))
    assert answer.body == server.packed


@pytest.mark.parametrize("kind", ["s3", "swift", "http"])
@pytest.mark.parametrize("behaviour", ["endless", "html", "laughs"])
async def test_an_answer_that_is_none(behaviour: str, kind: str, liar: tuple[Liar, str], http_session: aiohttp.ClientSession) -> None:
    server, url = liar
    server.behaviour = getattr(server, behaviour)
    await fails_cleanly(OPERATIONS["parts"], open_at(url, kind, http_session))


async def test_only_reads_are_tried_again(liar: tuple[Liar, str], http_session: aiohttp.ClientSession) -> None:
    server, url = liar
    server.behaviour = server.cuts
    store = open_at(url, "s3", http_session)
    await fails_cleanly(OPERATIONS["stat"], store)
    # At least three: the HTTP library asks again by itself where the method allows it.
    assert set(server.seen) == {"HEAD"}
    assert len(server.seen) >= 3
    server.seen.clear()
    await fails_cleanly(OPERATIONS["finish"], store)
    assert server.seen == ["POST"]


async def test_an_error_under_status_200_is_an_error(liar: tuple[Liar, str], http_session: aiohttp.ClientSession) -> None:
    async def late_error(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"<Error><Code>InternalError</Code></Error>", content_type="application/xml")

    server, url = liar
    server.behaviour = late_error
    await fails_cleanly(OPERATIONS["finish"], open_at(url, "s3", http_session))


@pytest.mark.parametrize("kind", ["s3", "swift", "http"])
async def test_a_part_list_without_end(kind: str, liar: tuple[Liar, str], http_session: aiohttp.ClientSession) -> None:
    async def same_page(request: web.Request) -> web.StreamResponse:
        if kind == "s3":
            part = f"<Part><PartNumber>7</PartNumber><Size>1</Size><ETag>{MD5}</ETag></Part>"
            return web.Response(text=f"<ListPartsResult><IsTruncated>true</IsTruncated>{part}</ListPartsResult>")
        if kind == "swift":
            return web.json_response([{"name": "staging/5-upload/00000001", "bytes": 1, "hash": MD5}] * 1000)
        return web.json_response({"parts": [{"offset": "x"}]})

    server, url = liar
    server.behaviour = same_page
    await fails_cleanly(OPERATIONS["parts"], open_at(url, kind, http_session))


@pytest.mark.parametrize("kind", ["s3", "swift", "http"])
@pytest.mark.parametrize("behaviour", ["fails", "redirects", "cuts"])
async def test_a_probe_gives_up(behaviour: str, kind: str, liar: tuple[Liar, str], http_session: aiohttp.ClientSession) -> None:
    server, url = liar
    server.behaviour = getattr(server, behaviour)
    record = Store(1, "liar", kind, "x", url, settings=SETTINGS[kind], credential="c")
    store = open_at(url, kind, http_session)
    await fails_cleanly(lambda _: probe(store, record, http_session, time.time()), store)
    assert server.trapped == 0
