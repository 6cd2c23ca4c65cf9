"""An aiohttp application behind the broker: every request needs a token, and its body is what the token binds.

::

    keys = KeySource("https://broker/.well-known/jwks.json")
    app = web.Application(middlewares=[verified(keys, audience="disk-1", issuer="https://broker")])

A handler finds its `broker.storeside.Grant` in ``request["broker.grant"]``. Of a body that is not what the token binds it never
reads the end: ``request.content`` and ``request.read`` raise `Refused`, and whatever the handler answers then, the client gets the
refusal, unless it has begun an answer before. Nor can it say yes to a write that it has not read to its end. aiohttp's access
log holds tokens, and so may its server log on requests that are no HTTP: switch both off.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import StreamReader, web

from broker.storeside.body import Body
from broker.storeside.gate import GRANT, Gate
from broker.storeside.jwks import KeySource
from broker.storeside.refused import Refused
from broker.storeside.target import read_target

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def verified(keys: KeySource, *, audience: str, issuer: str) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """A middleware that lets in what carries a token of `issuer` for `audience`. Keeps `keys` fresh from the first request on."""
    gate = Gate(keys, audience=audience, issuer=issuer)

    @web.middleware
    async def verifying(request: web.Request, handler: Handler) -> web.StreamResponse:
        await keys.begin()
        try:
            path, query = read_target(request.raw_path)
            if path != request.path:
                raise Refused(400, "the path can be read in two ways")
            grant = await gate.admit(request.method, path, query, request.headers)
        except Refused as refused:
            return problem(refused)
        request[GRANT] = grant
        body = Body(grant)
        if request.method in ("PUT", "POST"):
            # aiohttp has no public way to put a filter before a request's body.
            content: Any = _Content(request.content, body)
            request._payload = content
        try:
            response = await handler(request)
        except Refused as refused:
            return problem(refused)
        replaced = None if response.prepared else body.answerable(request.method, response.status)
        return response if replaced is None else problem(replaced)

    return verifying


class _Content:
    """A request's content that gives only what `body` allows; what else aiohttp's StreamReader has is left out."""

    def __init__(self, stream: StreamReader, body: Body) -> None:
        self._stream = stream
        self._body = body
        self._kept = b""
        self.set_exception, self.exception = stream.set_exception, stream.exception
        self.set_read_chunk_size = stream.set_read_chunk_size

    def at_eof(self) -> bool:
        return self._body.whole and not self._kept

    is_eof = at_eof

    async def readany(self) -> bytes:
        if self._kept:
            kept, self._kept = self._kept, b""
            return kept
        if self._body.whole:
            return b""
        try:
            chunk = await self._stream.readany()
        except Exception:  # aiohttp tells a broken body in many ways
            raise self._body.cut() from None
        last = not chunk or (self._stream.is_eof() and self._stream.at_eof())
        return self._body.take(chunk, last=last)

    async def readchunk(self) -> tuple[bytes, bool]:
        return await self.readany(), False

    async def read(self, n: int = -1) -> bytes:
        if n < 0:
            return b"".join([chunk async for chunk in self.iter_any()])
        chunk = await self.readany()
        self._kept = chunk[n:] + self._kept
        return chunk[:n]

    async def readexactly(self, n: int) -> bytes:
        found = b""
        while len(found) < n and (chunk := await self.read(n - len(found))):
            found += chunk
        return found

    async def readline(self) -> bytes:
        found = b""
        while b"\n" not in found and (chunk := await self.readany()):
            found += chunk
        end = found.find(b"\n") + 1 or len(found)
        self._kept = found[end:] + self._kept
        return found[:end]

    async def iter_any(self) -> AsyncIterator[bytes]:
        while chunk := await self.readany():
            yield chunk

    async def iter_chunked(self, n: int) -> AsyncIterator[bytes]:
        while chunk := await self.read(n):
            yield chunk

    async def iter_chunks(self) -> AsyncIterator[tuple[bytes, bool]]:
        while chunk := await self.readany():
            yield chunk, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while line := await self.readline():
            yield line


def problem(refused: Refused) -> web.Response:
    """A refusal as an RFC 9457 answer."""
    headers = refused.headers | {"Content-Type": "application/problem+json"}
    return web.Response(
        status=refused.status, reason=HTTPStatus(refused.status).phrase, body=orjson.dumps(refused.problem()), headers=headers
    )
