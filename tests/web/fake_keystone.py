"""A Keystone that does all that a real one does not: hangs, lies, redirects. `fake` is the fixture."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer


def stamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def described(*roles: str, project: str | None = "p1", lives: float = 3600, **more: Any) -> dict[str, Any]:
    """A token as Keystone describes it."""
    now = time.time()
    entry: dict[str, Any] = {
        "methods": ["password"],
        "user": {"id": "u1", "name": "alice", "domain": {"id": "default", "name": "Default"}},
        "issued_at": stamp(now),
        "expires_at": stamp(now + lives),
        "roles": [{"id": name, "name": name} for name in roles],
    }
    if project is not None:
        entry["project"] = {"id": project, "name": "demo", "domain": {"id": "default", "name": "Default"}}
    return entry | more


@dataclass
class FakeKeystone:
    """Knows the tokens in `tokens`, and answers as `behaviour` says."""

    url: str = ""
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    logins: int = 0
    behaviour: str = "good"
    own: str = "broker-0"
    own_lives: float = 3600
    at_once: int = 0
    most_at_once: int = 0
    hold: asyncio.Event | None = None
    queries: list[str] = field(default_factory=list)

    async def login(self, request: web.Request) -> web.StreamResponse:
        self.logins += 1
        if self.behaviour == "refuses the broker":
            return web.json_response({"error": {"code": 401, "message": "no"}}, status=401)
        self.own = f"broker-{self.logins}"
        token = described("service", lives=self.own_lives)
        return web.json_response({"token": token}, status=201, headers={"X-Subject-Token": self.own})

    async def validate(self, request: web.Request) -> web.StreamResponse:
        subject = request.headers["X-Subject-Token"]
        self.asked[subject] += 1
        self.queries.append(request.query_string)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.hold is not None:
                await self.hold.wait()
            return self._answer(request, subject)
        finally:
            self.at_once -= 1

    def _answer(self, request: web.Request, subject: str) -> web.StreamResponse:
        named = {"X-Subject-Token": subject}
        match self.behaviour:
            case "down":
                return web.Response(status=500)
            case "redirect":
                return web.Response(status=302, headers={"Location": "/v3/elsewhere"})
            case "huge":
                return web.Response(body=b'{"token": "' + b"x" * (10 << 20) + b'"}', content_type="application/json", headers=named)
            case "packed":
                return web.Response(body=gzip.compress(b'{"token": {}}'), headers={"Content-Encoding": "gzip", **named})
            case "html":
                return web.Response(text="<html>", content_type="text/html", headers=named)
            case "another":
                return web.json_response({"token": described("admin")}, headers={"X-Subject-Token": "another"})
            case "forbids":
                return web.Response(status=403)
        if request.headers.get("X-Auth-Token") != self.own:
            return web.Response(status=401)
        if subject not in self.tokens:
            return web.json_response({"error": {"code": 404}}, status=404)
        return web.json_response({"token": self.tokens[subject]}, headers=named)

    async def elsewhere(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"token": described("admin")}, headers={"X-Subject-Token": request.headers["X-Subject-Token"]})


@pytest.fixture
async def fake() -> AsyncIterator[FakeKeystone]:
    found = FakeKeystone()
    application = web.Application()
    application.router.add_post("/v3/auth/tokens", found.login)
    application.router.add_get("/v3/auth/tokens", found.validate)
    application.router.add_get("/v3/elsewhere", found.elsewhere)
    server = TestServer(application)
    await server.start_server()
    found.url = str(server.make_url("")).rstrip("/")
    yield found
    if found.hold is not None:
        found.hold.set()
    await server.close()
