"""Requests let in or refused, by the issuer's keys as they are now: what the file server and the asynchronous adapters share."""

from __future__ import annotations

import time

from broker.storeside.jwks import KeySource
from broker.storeside.target import Headers, read_token
from broker.storeside.verify import Grant, Keys, UnknownKey, verify

GRANT = "broker.grant"
"""Where an application behind an adapter finds the `Grant` of its request: in ASGI's scope, WSGI's environ, aiohttp's request."""


class Gate:
    """Lets in what carries a token of `issuer` for `audience`."""

    def __init__(self, keys: KeySource, *, audience: str, issuer: str) -> None:
        self._keys = keys
        self._audience = audience
        self._issuer = issuer

    async def admit(self, method: str, path: str, query: str, headers: Headers) -> Grant:
        """What the request may do. Raises `Refused`."""
        token = read_token(query, headers)
        try:
            return self._verify(token, method, path, headers, self._keys.keys())
        except UnknownKey:
            await self._keys.refetch()
        return self._verify(token, method, path, headers, self._keys.keys())

    def _verify(self, token: str, method: str, path: str, headers: Headers, keys: Keys) -> Grant:
        return verify(token, method, path, headers, keys, time.time(), audience=self._audience, issuer=self._issuer)
