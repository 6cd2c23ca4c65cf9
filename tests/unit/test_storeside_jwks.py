"""The key source: fresh while the broker answers, patient while it does not, never fooled by rubbish."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from broker.sign.token import generate_key, jwks, public_jwk
from broker.storeside import jwks as module
from broker.storeside.jwks import MAX_JWKS_BYTES, BackgroundKeys, KeySource
from broker.storeside.refused import Refused
from broker.storeside.verify import MAX_KEYS
from tests.parts.condition import wait_for

Answer = Callable[[], web.StreamResponse]

ONE, TWO = generate_key("ES256", 0), generate_key("EdDSA", 0)


class Issuer:
    """Answers whatever it is told to, and counts."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer: Answer = web.Response

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked += 1
        if request.path == "/elsewhere":
            return web.Response(text=json.dumps(jwks([ONE])))
        return self.answer()


@pytest.fixture
async def issuer() -> AsyncIterator[tuple[Issuer, str]]:
    answers = Issuer()
    app = web.Application()
    app.router.add_get("/{path:.*}", answers.serve)
    async with TestServer(app) as server:
        yield answers, str(server.make_url("/jwks.json"))


def says(text: str, status: int = 200, kind: str = "application/json") -> Answer:
    return lambda: web.Response(text=text, status=status, content_type=kind)


def packed(text: str) -> web.Response:
    return web.Response(body=gzip.compress(text.encode()), headers={"Content-Encoding": "gzip"}, content_type="application/json")


RUBBISH: dict[str, Answer] = {
    "empty": says(""),
    "no JSON": says("{"),
    "no key set": says("{}"),
    "keys of another type": says('{"keys": {}}'),
    "HTML": says("<!DOCTYPE html><html><body>Sign in</body></html>", kind="text/html"),
    "10 MB": says('{"keys": [' + " " * 10_000_000 + "]}"),
    "10 MB, packed": lambda: packed('{"keys": [' + " " * 10_000_000 + "]}"),
    "packed": lambda: packed(json.dumps(jwks([ONE]))),
    "just too big": says(json.dumps(jwks([ONE])) + " " * MAX_JWKS_BYTES),
    "too many keys": says(json.dumps({"keys": [public_jwk(ONE)] * (MAX_KEYS + 1)})),
    "500": says(json.dumps(jwks([ONE])), 500),
    "204": says("", 204),
    "redirect": lambda: web.Response(status=302, headers={"Location": "/elsewhere"}),
    "deep": says("[" * 200_000),
}


@pytest.mark.parametrize("rubbish", RUBBISH.values(), ids=RUBBISH.keys())
async def test_rubbish_leaves_the_known_keys(issuer: tuple[Issuer, str], rubbish: Answer) -> None:
    answers, url = issuer
    answers.answer = says(json.dumps(jwks([TWO])))
    source = KeySource(url)
    assert await source.first()
    answers.answer = rubbish
    assert await source.first()
    assert set(source.keys()) == {TWO.id}
    assert answers.asked == 2  # nothing is followed


async def test_the_biggest_set_that_is_read(issuer: tuple[Issuer, str]) -> None:
    answers, url = issuer
    text = json.dumps({"keys": [public_jwk(ONE)] * MAX_KEYS})
    answers.answer = says(text + " " * (MAX_JWKS_BYTES - len(text)))
    assert await KeySource(url).first()


NO_USABLE_KEY = {"none": {"keys": []}, "of another kind": {"keys": [{"kty": "oct", "kid": "a", "k": "AAAA"}]}}


@pytest.mark.parametrize("document", NO_USABLE_KEY.values(), ids=NO_USABLE_KEY.keys())
async def test_an_issuer_without_keys_is_taken_at_its_word(issuer: tuple[Issuer, str], document: dict[str, Any]) -> None:
    answers, url = issuer
    answers.answer = says(json.dumps(jwks([TWO])))
    source = KeySource(url)
    assert await source.first()
    answers.answer = says(json.dumps(document))
    assert not await source.first()
    with pytest.raises(Refused, match="no usable key") as refused:
        source.keys()
    assert refused.value.status == 503
    answers.answer = says(json.dumps(jwks([TWO])))
    assert await source.first()
    assert set(source.keys()) == {TWO.id}


async def test_a_set_that_is_another_at_every_request(issuer: tuple[Issuer, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one counts, and whoever asks for keys of the others causes no flood."""
    answers, url = issuer
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    answers.answer = lambda: web.Response(text=json.dumps(jwks([generate_key("ES256", 0)])))
    source = KeySource(url)
    assert await source.first()
    for _ in range(3):
        before = set(source.keys())
        now += module.REFETCH_SECONDS
        await asyncio.gather(*(source.refetch() for _ in range(200)))
        assert len(source.keys()) == 1
        assert set(source.keys()) != before
    assert answers.asked == 4


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def hang_in_the_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"keys": [')
    await reader.read()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One byte at a time: no single wait is long."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not reader.at_eof():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.01)


async def drip_the_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not reader.at_eof():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b" " * 65536)
        await writer.drain()


async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"keys": [')


async def refuse_to_speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")


@contextlib.asynccontextmanager
async def talking(talk: Talk) -> AsyncIterator[str]:
    """The URL of a server that does what no HTTP server should."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            await talk(reader, writer)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json"
    finally:
        server.close()


@pytest.mark.parametrize("talk", [hang, hang_in_the_body, drip, drip_the_head, endless, cut, refuse_to_speak])
async def test_an_issuer_that_hangs_or_drips_is_left_in_time(talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.3)
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(jwks([ONE])))
    source = KeySource(str(file))
    assert await source.first()
    async with talking(talk) as url:
        source._location = url
        reading = asyncio.create_task(source.first())
        while not reading.done():
            assert set(source.keys()) == {ONE.id}  # whoever has a known key does not wait
            await asyncio.sleep(0.01)
        assert await reading
    assert set(source.keys()) == {ONE.id}


async def test_a_flapping_issuer_floods_no_log(issuer: tuple[Issuer, str], monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    answers, url = issuer
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    source = KeySource(url)
    for turn in range(100):
        answers.answer = says(json.dumps(jwks([ONE]))) if turn % 2 else says("<html>", kind="text/html")
        await source.first()
        now += 0.5
    assert 1 <= len(caplog.records) <= 1 + 50 / module.LOG_SECONDS


async def test_the_issuers_clock(issuer: tuple[Issuer, str]) -> None:
    answers, url = issuer
    document = json.dumps(jwks([ONE]))
    source = KeySource(url)
    for headers, expected in (
        ({"Date": format_datetime(datetime.now(UTC) - timedelta(minutes=10), usegmt=True)}, 600),
        ({"Date": "yesterday"}, None),
        ({"Date": format_datetime(datetime.now(UTC), usegmt=True), "Age": "500"}, None),
    ):
        answers.answer = functools.partial(web.Response, text=document, headers=headers)
        assert await source.first()
        assert source.clock_offset is None if expected is None else abs((source.clock_offset or 0) - expected) < 30


def test_keys_for_servers_without_a_loop(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(jwks([ONE])))
    with BackgroundKeys(KeySource(str(file), refresh_seconds=0.05)) as keys:
        assert set(keys.keys()) == {ONE.id}
        file.write_text(json.dumps(jwks([TWO])))
        wait_for(lambda: set(keys.keys()) == {TWO.id})
        keys.refetch()
    assert set(keys.keys()) == {TWO.id}
    assert "broker keys" not in [thread.name for thread in threading.enumerate()]


def test_plain_http_from_afar_is_warned_of(caplog: Any) -> None:
    KeySource("http://127.0.0.1:1/jwks.json")
    KeySource("https://broker.example/jwks.json")
    assert caplog.records == []
    KeySource("http://broker.example/jwks.json")
    assert "plain HTTP" in caplog.text


async def test_without_a_first_reading_nothing_is_accepted(tmp_path: Path) -> None:
    source = KeySource(str(tmp_path / "missing.json"))
    assert not await source.first()
    with pytest.raises(Refused) as refused:
        source.keys()
    assert refused.value.status == 503


async def test_a_rotation_in_a_file_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(jwks([ONE])))
    source = KeySource(str(file))
    assert await source.first()
    file.write_text(json.dumps(jwks([TWO])))
    assert await source.first()
    assert set(source.keys()) == {TWO.id}


async def test_known_keys_serve_on_for_a_bounded_time(issuer: tuple[Issuer, str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers, url = issuer
    answers.answer = says(json.dumps(jwks([ONE])))
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    source = KeySource(url, keep_seconds=60)
    assert await source.first()
    answers.answer = says("", 503)
    now = 1060.0
    assert await source.first()
    assert set(source.keys()) == {ONE.id}
    now = 1060.5
    with pytest.raises(Refused):
        source.keys()


async def test_unknown_keys_cause_few_readings(issuer: tuple[Issuer, str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers, url = issuer
    answers.answer = says(json.dumps(jwks([ONE])))
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    source = KeySource(url)
    await source.first()
    await source.refetch()
    assert answers.asked == 1  # read a moment ago
    now += module.REFETCH_SECONDS
    answers.answer = says(json.dumps(jwks([ONE, TWO])))
    await asyncio.gather(*(source.refetch() for _ in range(20)))
    assert answers.asked == 2
    assert set(source.keys()) == {ONE.id, TWO.id}
