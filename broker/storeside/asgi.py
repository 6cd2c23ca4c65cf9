"""An ASGI application behind the broker: every HTTP request needs a token, and its body is what the token binds.

::

    app = Verified(app, KeySource("https://broker/.well-known/jwks.json"), audience="disk-1", issuer="https://broker")

The application finds its `broker.storeside.Grant` in ``scope["broker.grant"]``, and no token any more: not in the query, not in
Authorization. Of a body that is not what the token binds it never receives the end: ``receive`` raises `Refused`, and whatever
the application answers then, the client gets the refusal. Nor can it say yes to a write that it has not read to its end.
Websockets are refused. The server's own access log may hold tokens: switch it off.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

import orjson

from broker.storeside.body import Body
from broker.storeside.gate import GRANT, Gate
from broker.storeside.jwks import KeySource
from broker.storeside.refused import Refused
from broker.storeside.target import read_target

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Verified:
    """`app`, for requests that carry a token of `issuer` for `audience`. Keeps `keys` fresh from the first request on."""

    def __init__(self, app: Application, keys: KeySource, *, audience: str, issuer: str) -> None:
        self._app = app
        self._keys = keys
        self._gate = Gate(keys, audience=audience, issuer=issuer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._keys.begin()
        method: str = scope["method"]
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        try:
            grant = await self._gate.admit(method, _path(scope), scope.get("query_string", b"").decode("latin-1"), headers)
        except Refused as refused:
            return await _refuse(send, refused)
        clean = [(name, value) for name, value in scope["headers"] if name.lower() != b"authorization"]
        inner = {**scope, "headers": clean, "query_string": b"", GRANT: grant}
        body, begun, replaced = Body(grant), False, False

        async def take() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.take(message.get("body", b""), last=not message.get("more_body", False))
            elif not body.whole:
                raise body.cut()
            return message

        async def tell(message: Message) -> None:
            nonlocal begun, replaced
            if message["type"] == "http.response.start":
                refused = body.answerable(method, message["status"])
                begun = True
                if refused is not None:
                    replaced = True
                    return await _refuse(send, refused)
            if not replaced:
                await send(message)

        try:
            await self._app(inner, take, tell)
        except Refused as refused:
            if not begun:
                await _refuse(send, refused)
            elif not replaced:
                raise  # half an answer is out: the server has to cut the connection


def _path(scope: Scope) -> str:
    """The path that the application will act on, when it is just the one that was asked for. Raises `Refused` (400)."""
    path: str = scope["path"]
    raw: bytes | None = scope.get("raw_path")
    told, _ = read_target(raw.partition(b"?")[0].decode("latin-1") if raw is not None else quote(path))
    if told != path:
        raise Refused(400, "the path can be read in two ways")
    return path


async def _refuse(send: Send, refused: Refused) -> None:
    body = orjson.dumps(refused.problem())
    fields = {"Content-Type": "application/problem+json", "Content-Length": str(len(body)), **refused.headers}
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
