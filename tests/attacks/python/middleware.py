"""aiohttp: ``python -m tests.attacks.python.middleware PORT``."""

from __future__ import annotations

import logging
import sys

from aiohttp import web

from broker.storeside.jwks import KeySource
from broker.storeside.middleware import verified
from tests.attacks.python import AUDIENCE, ISSUER, KEYS, answer


async def objects(request: web.Request) -> web.Response:
    body = await request.read() if request.method in ("PUT", "POST") else b""
    status, content = answer(request.method, request["broker.grant"].token.path, body)
    return web.Response(status=status, body=content or None)


app = web.Application(middlewares=[verified(KeySource(KEYS, refresh_seconds=1), audience=AUDIENCE, issuer=ISSUER)])
app.router.add_route("*", "/{path:.*}", objects)

if __name__ == "__main__":
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL + 1)  # it quotes requests that are no HTTP
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None)
