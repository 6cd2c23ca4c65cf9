"""WSGI: ``gunicorn tests.attacks.python.wsgi:app``."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from broker.storeside.jwks import BackgroundKeys, KeySource
from broker.storeside.wsgi import Verified
from tests.attacks.python import AUDIENCE, ISSUER, KEYS, answer


def objects(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    method = environ["REQUEST_METHOD"]
    body = environ["wsgi.input"].read() if method in ("PUT", "POST") else b""
    status, content = answer(method, environ["broker.grant"].token.path, body)
    headers = [] if status == 204 else [("Content-Length", str(len(content)))]
    start_response(f"{status} {HTTPStatus(status).phrase}", headers)
    return [] if method == "HEAD" else [content]


app = Verified(objects, BackgroundKeys(KeySource(KEYS, refresh_seconds=1)), audience=AUDIENCE, issuer=ISSUER)
