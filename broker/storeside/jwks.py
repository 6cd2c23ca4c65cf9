"""The broker's published keys, kept so that the store goes on verifying when the broker is away.

Read from a URL or a file, again every `refresh_seconds`, and rules for what comes back:

* A key set replaces what was known, at once and whole: a key that is no longer in it is revoked. So a revoked key lives for
  `refresh_seconds` and one reading (`TIMEOUT_SECONDS` at most) while the issuer can be reached.
* That holds for a set without a usable key as well: the issuer says that nobody may sign, so nothing is accepted (fail closed).
  Taken for a glitch, it would keep a revoked key alive for a day; taken at its word, a glitch costs no more than some refused
  requests until the next reading, which comes after `RETRY_SECONDS`.
* Whatever is no key set was not read: no answer within `TIMEOUT_SECONDS` in all, however slowly it drips; a status other than 200; a
  redirect; a content coding; more than `MAX_JWKS_BYTES` or `broker.storeside.verify.MAX_KEYS`; HTML. Then the last good set
  serves on until `keep_seconds` after it was read, and then nothing is accepted. The next try comes after `RETRY_SECONDS`.
* A token with an unknown key causes one reading more, at most one each `REFETCH_SECONDS` whatever number of such tokens come. Requests
  with known keys never wait for a reading.
* What goes wrong is logged when it begins and when it ends, at most one line each `LOG_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import monotonic
from types import MappingProxyType, TracebackType
from typing import Self
from urllib.parse import urlsplit

import aiohttp
import orjson

from broker.storeside.refused import Refused
from broker.storeside.verify import Keys, keys_of

MAX_JWKS_BYTES = 256 * 1024
TIMEOUT_SECONDS = 5.0
REFETCH_SECONDS = 10.0
RETRY_SECONDS = 5.0
LOG_SECONDS = 10.0

_FIRST_RETRY_SECONDS = 1.0
"""While nothing was read since the start."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_log = logging.getLogger("broker.storeside")


class KeySource:
    """Keys from `location`: an http(s) URL, or the path of a file. `run` keeps them fresh."""

    def __init__(self, location: str, *, refresh_seconds: float = 60.0, keep_seconds: float = 24 * 3600.0) -> None:
        self._location = location
        self._refresh_seconds = refresh_seconds
        self._keep_seconds = keep_seconds
        self._keys: Keys = MappingProxyType({})
        self._read_at = float("-inf")
        self._tried_at = float("-inf")
        self._trouble: str | None = None
        self._logged_at = float("-inf")
        self._reading = asyncio.Lock()
        self._tried = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self.clock_offset: float | None = None
        """How far this machine's clock is ahead of the issuer's (seconds, whole ones), as the last answer said."""
        if location.startswith("http://") and urlsplit(location).hostname not in _LOOPBACK:
            _log.warning("the keys come by plain HTTP: whoever is on the way can put in keys of his own")

    def keys(self) -> Keys:
        """The keys known now. Raises `Refused` (503) when there are none, or none were read for `keep_seconds`."""
        if self.age_seconds > self._keep_seconds:
            raise Refused(503, "the issuer's keys cannot be read", {"Retry-After": "10"})
        if not self._keys:
            raise Refused(503, "the issuer publishes no usable key", {"Retry-After": "10"})
        return self._keys

    @property
    def age_seconds(self) -> float:
        """Seconds since the keys were read; infinite before that."""
        return monotonic() - self._read_at

    async def refetch(self) -> None:
        """Read the keys again, since one was missing; unless that was just done."""
        asked_at = monotonic()
        if asked_at - self._tried_at < REFETCH_SECONDS:
            return
        async with self._reading:
            if self._tried_at < asked_at:
                await self._read()

    async def run(self) -> None:
        """Read now and every `refresh_seconds`, until cancelled; sooner again after a failure."""
        while True:
            async with self._reading:
                await self._read()
            again = RETRY_SECONDS if self._read_at > float("-inf") else _FIRST_RETRY_SECONDS
            await asyncio.sleep(min(again, self._refresh_seconds) if self._trouble else self._refresh_seconds)

    async def begin(self) -> None:
        """Keep them fresh from now on by a task of this event loop, unless that was begun already; wait for the first reading."""
        if self._running is None:
            self._running = asyncio.create_task(self.run())
        await self._tried.wait()

    async def first(self) -> bool:
        """Read once, before serving. Whether there are keys now."""
        async with self._reading:
            await self._read()
        return bool(self._keys)

    async def _read(self) -> None:
        self._tried_at = monotonic()
        try:
            await self._take()
        finally:
            self._tried.set()

    async def _take(self) -> None:
        try:
            text = await self._fetch() if self._location.startswith(("http://", "https://")) else await asyncio.to_thread(self._load)
            self._keys = keys_of(orjson.loads(text))
        except (OSError, ValueError, aiohttp.ClientError, TimeoutError) as error:
            self._note(f"keys not read ({type(error).__name__}); going on with {len(self._keys)} known")
            return
        self._read_at = self._tried_at
        self._note(None if self._keys else "the issuer publishes no usable key: everything is refused")

    def _note(self, trouble: str | None) -> None:
        """Log what went wrong when it is new, and when it is over."""
        kind = trouble and trouble.partition(";")[0]
        if kind != self._trouble and monotonic() - self._logged_at >= LOG_SECONDS:
            _log.warning("%s", trouble or "keys read again")
            self._logged_at = monotonic()
        self._trouble = kind

    def _load(self) -> bytes:
        with Path(self._location).open("rb") as file:
            return _bounded(file.read(MAX_JWKS_BYTES + 1))

    async def _fetch(self) -> bytes:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        # Nothing is unpacked: a few kilobytes could become many.
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers, auto_decompress=False) as session,
            session.get(self._location, allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise ValueError("the issuer did not answer 200")
            body = b""
            while len(body) <= MAX_JWKS_BYTES and (chunk := await answer.content.readany()):
                body += chunk
            self.clock_offset = _clock_offset(answer)
            return _bounded(body)


class BackgroundKeys:
    """A `KeySource` for servers without an event loop: kept fresh by a thread while the block lasts, or until the process ends."""

    def __init__(self, source: KeySource) -> None:
        self._source = source
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="broker keys", daemon=True)
        self._read = threading.Event()
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def keys(self) -> Keys:
        """As `KeySource.keys`; the first call waits until they were read once."""
        self._read.wait(TIMEOUT_SECONDS + 1)
        return self._source.keys()

    def refetch(self) -> None:
        """As `KeySource.refetch`."""
        asked = asyncio.run_coroutine_threadsafe(self._source.refetch(), self._loop)
        with contextlib.suppress(TimeoutError):
            asked.result(TIMEOUT_SECONDS + 1)

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError), contextlib.closing(self._loop):
            self._task = self._loop.create_task(self._keep())
            self._loop.run_until_complete(self._task)

    async def _keep(self) -> None:
        await self._source.first()
        self._read.set()
        await self._source.run()


def _bounded(text: bytes) -> bytes:
    if len(text) > MAX_JWKS_BYTES:
        raise ValueError("the key set is too big")
    return text


def _clock_offset(answer: aiohttp.ClientResponse) -> float | None:
    """From Date, unless a cache has kept the answer."""
    try:
        return None if "Age" in answer.headers else time.time() - parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return None
