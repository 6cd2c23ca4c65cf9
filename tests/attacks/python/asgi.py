"""ASGI: ``uvicorn tests.attacks.python.asgi:app``."""

from __future__ import annotations

from typing import Any

from broker.storeside.asgi import Verified
from broker.storeside.jwks import KeySource
from tests.attacks.python import AUDIENCE, ISSUER, KEYS, answer


async def objects(scope: Any, receive: Any, send: Any) -> None:
    body, more = b"", scope["method"] in ("PUT", "POST")
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    status, content = answer(scope["method"], scope["broker.grant"].token.path, body)
    headers = [] if status == 204 else [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})


app = Verified(objects, KeySource(KEYS, refresh_seconds=1), audience=AUDIENCE, issuer=ISSUER)
