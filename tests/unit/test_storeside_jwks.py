"""The key source: fresh while the broker answers, patient while it does not, never fooled by rubbish."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from broker.sign.token import generate_key, jwks
from broker.storeside import jwks as module
from broker.storeside.jwks import MAX_JWKS_BYTES, KeySource
from broker.storeside.refused import Refused

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


def says(text: str, status: int = 200) -> Answer:
    return lambda: web.Response(text=text, status=status)


RUBBISH = {
    "empty": says(""),
    "no JSON": says("{"),
    "no keys": says('{"keys": []}'),
    "10 MB": says('{"keys": [' + " " * 10_000_000 + "]}"),
    "just too big": says(json.dumps(jwks([TWO])) + " " * MAX_JWKS_BYTES),
    "500": says("", 500),
    "redirect": lambda: web.Response(status=302, headers={"Location": "/elsewhere"}),
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
