"""A store that can be made to misbehave: it passes every request to a real one behind it, until it is told to fail, redirect, hang,
or lie.

The host name of a request is passed on as it came, so that signatures made for the tap are right for the store behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass
class Tap:
    """Passes requests to `behind`. `misbehaves` answers instead of the store; `alters` changes the headers of its answers to HEAD."""

    behind: str
    session: aiohttp.ClientSession
    url: str = ""
    misbehaves: str | None = None
    alters: Callable[[dict[str, str]], None] | None = None
    seen: list[tuple[str, str]] = field(default_factory=list)
    fields: list[Mapping[str, str]] = field(default_factory=list)
    """The header fields of every request."""
    left: dict[str, int] = field(default_factory=dict)
    """By method, so many requests are passed on yet, then every connection is cut."""
    trapped: int = 0
    """Requests that followed a redirect."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/trap":
            self.trapped += 1
            return web.Response()
        self.seen.append((request.method, request.path))
        self.fields.append(request.headers)
        if request.method in self.left:
            self.left[request.method] -= 1
            if self.left[request.method] < 0:
                self.misbehaves = "cuts"
        match self.misbehaves:
            case "fails":
                return web.Response(status=500, text="boom")
            case "redirects":
                return web.Response(status=307, headers={"Location": f"{self.url}/trap"})
            case "hangs":
                await asyncio.sleep(120)
            case "cuts":
                assert request.transport is not None
                request.transport.close()
                return web.Response()
        return await self._pass(request)

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in {"transfer-encoding", "connection"}}
        body = await request.read()
        url = URL(self.behind + request.raw_path, encoded=True)
        async with self.session.request(request.method, url, headers=headers, data=body or None, allow_redirects=False) as answer:
            told = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
            if request.method == "HEAD":
                told["Content-Length"] = answer.headers.get("Content-Length", "0")
                if self.alters is not None and answer.status == 200:
                    self.alters(told)
                response = web.StreamResponse(status=answer.status, headers=told)
                await response.prepare(request)
                return response
            return web.Response(status=answer.status, headers=told, body=await answer.read())


@contextlib.asynccontextmanager
async def tapped(behind: str) -> AsyncIterator[Tap]:
    """A tap in front of the store at the URL `behind`."""
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        tap = Tap(behind, session)
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", tap.handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        tap.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield tap
        finally:
            await runner.cleanup()


def other_size(told: dict[str, str]) -> None:
    """The object is a byte longer than it is."""
    told["Content-Length"] = str(int(told["Content-Length"]) + 1)


def other_digests(told: dict[str, str]) -> None:
    """Every digest of the object is another one."""
    for name in told:
        if name.lower() in ("etag", "x-amz-checksum-sha256"):
            told[name] = _turned(told[name])
        elif name.lower() == "repr-digest":
            told[name] = ", ".join(f"{algorithm}=:{_turned(value.strip(':'))}:" for algorithm, _, value in _fields(told[name]))


def no_digests(told: dict[str, str]) -> None:
    """No digest of the object is told."""
    for name in [name for name in told if name.lower() in ("etag", "x-amz-checksum-sha256", "repr-digest")]:
        del told[name]


def _fields(header: str) -> list[tuple[str, str, str]]:
    return [entry.strip().partition("=") for entry in header.split(",")]


def _turned(digest: str) -> str:
    """Another digest of the same form: its first letter or figure is changed."""
    first = next(i for i, sign in enumerate(digest) if sign.isalnum())
    return digest[:first] + ("0" if digest[first] != "0" else "1") + digest[first + 1 :]


LIES: Mapping[str, Any] = {"size": other_size, "digests": other_digests, "silence": no_digests}
