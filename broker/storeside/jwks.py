"""The broker's published keys, kept so that the store goes on verifying when the broker is away.

Read from a URL or a file. Read again every `refresh_seconds`, which bounds how long a revoked key lives while the broker can be
reached; when it cannot, the last good set serves on for `keep_seconds` after it was read, and then nothing is accepted. A
token with an unknown key causes one reading more, at most one each `REFETCH_SECONDS`. A set that is malformed, too big or
without a usable key counts as not read.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from time import monotonic
from types import MappingProxyType

import aiohttp
import orjson

from broker.storeside.refused import Refused
from broker.storeside.verify import Keys, keys_of

MAX_JWKS_BYTES = 256 * 1024
TIMEOUT_SECONDS = 5.0
REFETCH_SECONDS = 10.0

_log = logging.getLogger("broker.storeside")


class KeySource:
    """Keys from `location`: an http(s) URL, or the path of a file. `run` keeps them fresh."""

    def __init__(self, location: str, *, refresh_seconds: float = 60.0, keep_seconds: float = 24 * 3600.0) -> None:
        self._location = location
        self._refresh_seconds = refresh_seconds
        self._keep_seconds = keep_seconds
        self._keys: Keys = MappingProxyType({})
        self._read_at = float("-inf")
        self._missed = False
        self._tried_at = float("-inf")
        self._reading = asyncio.Lock()

    def keys(self) -> Keys:
        """The keys known now. Raises `Refused` (503) when none were read for `keep_seconds`."""
        if monotonic() - self._read_at > self._keep_seconds:
            raise Refused(503, "the issuer's keys cannot be read", {"Retry-After": "10"})
        return self._keys

    async def refetch(self) -> None:
        """Read the keys again, since one was missing; unless that was just done."""
        asked_at = monotonic()
        async with self._reading:
            if self._tried_at < asked_at and asked_at - self._tried_at >= REFETCH_SECONDS:
                await self._read()

    async def run(self) -> None:
        """Read now and every `refresh_seconds`, until cancelled; sooner again while nothing was read yet."""
        while True:
            async with self._reading:
                await self._read()
            await asyncio.sleep(self._refresh_seconds if self._keys else min(1.0, self._refresh_seconds))

    async def first(self) -> bool:
        """Read once, before serving. Whether there are keys now."""
        async with self._reading:
            await self._read()
        return bool(self._keys)

    async def _read(self) -> None:
        self._tried_at = monotonic()
        try:
            text = await self._fetch() if self._location.startswith(("http://", "https://")) else await asyncio.to_thread(self._load)
            self._keys = keys_of(orjson.loads(text))
            if self._missed:
                _log.warning("keys read again")
            self._read_at, self._missed = self._tried_at, False
        except (OSError, ValueError, aiohttp.ClientError, TimeoutError) as error:
            if not self._missed:  # once, not at every try
                _log.warning("keys not read (%s); going on with %d known", type(error).__name__, len(self._keys))
            self._missed = True

    def _load(self) -> bytes:
        with Path(self._location).open("rb") as file:
            return _bounded(file.read(MAX_JWKS_BYTES + 1))

    async def _fetch(self) -> bytes:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(self._location, allow_redirects=False) as answer:
            if answer.status != 200:
                raise ValueError("the issuer did not answer 200")
            body = b""
            while len(body) <= MAX_JWKS_BYTES and (chunk := await answer.content.readany()):
                body += chunk
            return _bounded(body)


def _bounded(text: bytes) -> bytes:
    if len(text) > MAX_JWKS_BYTES:
        raise ValueError("the key set is too big")
    return text
