"""What a broker keeps in memory, so that a ticket costs no look-up: stores and sites (`topology`), how they fare (`conditions`),
hot blobs and images (`hot`). This file keeps the three in step with the catalogue.

Rules
- The truth is in PostgreSQL (invariant 11). What is here may be forgotten at any moment, and is, as the change log says
  (`broker.catalog.changes`), polled at least once a second; NOTIFY makes it sooner.
- If the log cannot be read for `FRESH_SECONDS`, nothing from memory is believed: everything is looked up (invariant 5).
- What was read is noted in the catalogue (`broker.catalog.brokers`), so that others can wait until this broker knows (`spread`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from broker import errors, suspicion
from broker.catalog import brokers, changes, failures, leases, paths, quotas, reports, sites, stores
from broker.catalog.compact import CompactBlob
from broker.catalog.quotas import Quota
from broker.metrics import Metrics
from broker.model import Image, new_id
from broker.service.conditions import CLIENTS, Conditions
from broker.service.hot import Hot
from broker.service.spread import Spread
from broker.service.topology import OpenStore, Topology

FRESH_SECONDS = 1.5
"""For so long after the change log was last read is memory believed."""

POLL_SECONDS = 0.5
"""How often the log and the loads are read. Together with `FRESH_SECONDS` less than the 2 s of invariant 5."""

DOUBT_SECONDS = 2.0
"""How often last words on stores that have failed somebody are read."""

ANEW_SECONDS = 1800.0
"""After so long without the log everything is read anew: entries are dropped from it after an hour (`broker.catalog.changes`)."""

log = structlog.get_logger()


class Memory(Topology, Conditions):
    """One broker's memory. `start` before use, `close` at the end."""

    def __init__(
        self,
        pool: asyncpg.Pool[asyncpg.Record],
        open_store: OpenStore,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        hot_bytes: int = 64 << 20,
        on_key_change: Callable[[], Any] | None = None,
    ) -> None:
        Topology.__init__(self, open_store, metrics.signing_seconds)
        Conditions.__init__(self)
        self.hot = Hot(pool, metrics, hot_bytes, self.is_fresh)
        self.spread = Spread(pool, FRESH_SECONDS, metrics)
        self._metrics = metrics
        self._id = new_id()
        self._doubted_at = float("-inf")
        self.quotas: dict[str, Quota] = {}
        self._pool = pool
        self._clock = clock
        self._on_key_change = on_key_change
        self._position = changes.Position(0, 0)
        self._read_at = float("-inf")
        self._poller: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._closing = False
        self._reloading = asyncio.Lock()

    # -- life

    async def start(self) -> None:
        """Load what is kept whole, then follow the change log. Raises `errors.Unavailable`."""
        self._position = await changes.position(self._pool)
        await self.reload_stores()
        await self._read_averages(self._pool)
        await self._read_failures(self._pool)
        await self.catch_up()
        self._poller = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stop following, and give the connections back."""
        if self._poller is not None:
            self._closing = True
            self._poller.cancel()
            await asyncio.wait([self._poller])
        await self.spread.close()
        await self.hot.close()
        with contextlib.suppress(errors.Unavailable):
            await brokers.forget(self._pool, self._id)

    def wake(self, *_: Any) -> None:
        """Read the change log now: what NOTIFY calls."""
        self._wake.set()

    async def _follow(self) -> None:
        while not self._closing:
            try:
                async with self._pool.acquire(timeout=5) as connection:
                    await connection.add_listener("changes", self.wake)
                    try:
                        while not self._closing:
                            async with asyncio.timeout(5):
                                await self.catch_up(connection)
                            await self._sleep()
                    finally:
                        if not connection.is_closed():
                            await connection.remove_listener("changes", self.wake)
            except (errors.Unavailable, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.warning("change log cannot be read", error=type(error).__name__)
                await self._sleep()

    async def _sleep(self) -> None:
        """Until the next poll, or until NOTIFY."""
        with contextlib.suppress(TimeoutError):  # not wait_for: in Python 3.11 that loses a cancellation that comes with the event
            async with asyncio.timeout(POLL_SECONDS):
                await self._wake.wait()
        self._wake.clear()

    async def catch_up(self, db: Any = None) -> None:
        """Forget what has changed since the last time, and read how full and how fast the stores are."""
        db = self._pool if db is None else db
        if ANEW_SECONDS < self._now() - self._read_at < float("inf"):
            await self._begin_anew(db)
        while True:
            now = self._now()
            found, position, seen = await changes.since(db, self._position)
            await self._apply(found)
            self._position = position  # only now: what could not be applied is told again
            if len(found) < 10_000 and await brokers.note(db, self._id, seen, FRESH_SECONDS):
                break
        self._read_at = now
        await self._read_loads(db)
        await self._read_averages(db)
        await self._read_doubts(db)

    async def _begin_anew(self, db: Any) -> None:
        """Believe nothing of what is here: the log may have been cut meanwhile."""
        position = await changes.position(db)
        self.hot.forget_all()
        if self._on_key_change is not None:
            await self._on_key_change()
        self.forget_drivers()
        await self.reload_stores()
        await self._read_failures(db)
        self._position = position

    async def _apply(self, found: Sequence[changes.Change]) -> None:
        reload = keys = False
        failed: set[str] = set()
        for kind, subject in found:
            if kind in ("store", "slots", "site", "quota"):
                reload = True
            elif kind == "key":
                keys = True
            elif kind == "failure":
                failed.add(subject)
            else:
                self.forget(kind, subject)
        if keys and self._on_key_change is not None:
            await self._on_key_change()
            self.forget_drivers()
        if reload:
            await self.reload_stores()
        if failed:
            self.take_over_failures(await failures.of_clients(self._pool, list(failed)), self._clock(), self._by_id)

    def forget(self, kind: str, subject: str) -> None:
        """Drop what is known of one ``blob`` or ``image``: after a write of one's own, or as the log says."""
        self.hot.forget(subject)

    def forget_image(self, id: UUID, blobs: Iterable[UUID]) -> None:
        """Drop what is known of an image and its blobs, after a write of one's own: who may read a blob follows from its images."""
        self.forget("image", str(id))
        for blob in blobs:
            self.forget("blob", str(blob))

    def is_fresh(self) -> bool:
        """Whether the change log was read lately enough to believe what is here."""
        return self.unread_seconds() < FRESH_SECONDS

    def unread_seconds(self) -> float:
        """How long ago the change log was last read."""
        return self._now() - self._read_at

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # -- what is read whole

    async def reload_stores(self) -> None:
        """Read every store, site and quota anew; the drivers of stores that changed are opened again when next used."""
        async with self._reloading:  # else an older read could overwrite a newer one
            self.take_over(await stores.load(self._pool), await sites.load(self._pool))
            self.quotas = {quota.project: quota for quota in await quotas.load(self._pool)}
        self.forget_outlooks()
        await self._read_loads(self._pool)

    async def _read_loads(self, db: Any) -> None:
        self.take_over_loads(await leases.slots_taken(db), self._by_id)

    async def _read_averages(self, db: Any) -> None:
        self.take_over_averages(await paths.since(db, self.averages_at), self._by_id)

    async def _read_failures(self, db: Any) -> None:
        self.take_over_failures(await failures.in_force(db, CLIENTS), self._clock(), self._by_id)

    async def _read_doubts(self, db: Any) -> None:
        """How far stores are suspected; not at every turn, since it takes minutes to change."""
        if self._now() < self._doubted_at + DOUBT_SECONDS:
            return
        self._doubted_at = self._now()
        self.take_over_doubts({key: suspicion.doubt(words) for key, words in (await reports.last_words(db)).items()}, self._by_id)

    async def failures_of(self, client: str) -> Mapping[str, float]:
        """Stores that failed this client, with the instants until which that counts; looked up unless memory is fresh and has all.

        Raises `errors.Unavailable`.
        """
        now = self._clock()
        if not self.is_fresh() or not self.has_all_failures(now):
            self.take_over_failures(await failures.of_clients(self._pool, [client]), now, self._by_id)
        return self.failures(client)

    def note_leases(self, held: Mapping[tuple[int, str], int]) -> None:
        """Take over how many leases stores hold, as a grant has just seen it."""
        self.take_over_leases(held, self._by_id)

    # -- blobs and images

    async def blob(self, id: UUID) -> CompactBlob | None:
        """A blob with its replicas and images. Raises `errors.Unavailable`."""
        return (await self.hot.blobs([str(id)]))[0]

    async def image(self, id: UUID) -> Image | None:
        """One image. Raises `errors.Unavailable`."""
        return (await self.hot.images([str(id)]))[0]
