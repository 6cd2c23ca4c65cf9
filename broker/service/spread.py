"""Waiting until every broker knows what was just written: a failure excludes its store everywhere before the report is answered.

Rules
- A broker knows once the snapshot that it noted (`broker.catalog.brokers`) shows the transaction. Brokers that believe nothing
  from memory need not know: they look it up.
- Nobody waits longer than `SPREAD_SECONDS`: a broker that was killed or stopped counts as present for as long as it would believe
  its memory. What could not be waited for in time is in force there as soon as it reads the log.
- All that is waited for by one broker is asked for by one statement at a time.
"""

from __future__ import annotations

import asyncio

import asyncpg

from broker import errors
from broker.catalog import brokers
from broker.metrics import Metrics

SPREAD_SECONDS = 2.0
"""No report waits longer."""

_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.05


class Spread:
    """What this broker has written and waits for. `fresh_seconds`: how long brokers believe their memory."""

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record], fresh_seconds: float, metrics: Metrics) -> None:
        self._pool = pool
        self._fresh_seconds = fresh_seconds
        self._metrics = metrics
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._asker: asyncio.Task[None] | None = None

    async def wait(self, xact: int) -> bool:
        """Wait until every broker knows what that transaction wrote. False when one did not within `SPREAD_SECONDS`."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        known: asyncio.Future[None] = loop.create_future()
        self._waiting[known] = xact
        if self._asker is None or self._asker.done():
            self._asker = loop.create_task(self._ask())
        try:
            async with asyncio.timeout(SPREAD_SECONDS):
                await known
        except (TimeoutError, errors.Unavailable):
            self._metrics.spread_seconds.observe(loop.time() - began, "late")
            return False
        finally:
            self._waiting.pop(known, None)
        self._metrics.spread_seconds.observe(loop.time() - began, "known")
        return True

    async def close(self) -> None:
        """Stop asking."""
        if self._asker is not None:
            self._asker.cancel()
            await asyncio.wait([self._asker])

    async def _ask(self) -> None:
        pause = _FIRST_PAUSE
        while self._waiting:
            asked = dict(self._waiting)
            try:
                seen = await brokers.seen(self._pool, self._fresh_seconds)
            except errors.Unavailable:
                seen = None
            for known, xact in asked.items():
                if seen is not None and not known.done() and all(brokers.shows(snapshot, xact) for snapshot in seen):
                    known.set_result(None)
                    self._waiting.pop(known, None)
                    pause = _FIRST_PAUSE
            if self._waiting:
                await asyncio.sleep(pause)
                pause = min(_LONGEST_PAUSE, 1.5 * pause)
