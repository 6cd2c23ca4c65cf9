"""What a broker keeps in memory, so that a ticket costs no look-up: stores and sites whole, hot blobs and images within a bound.

Rules
- The truth is in PostgreSQL (invariant 11). What is here may be forgotten at any moment, and is, as the change log says
  (`broker.catalog.changes`), polled at least once a second; NOTIFY makes it sooner.
- If the log cannot be read for `FRESH_SECONDS`, nothing from memory is believed: everything is looked up (invariant 5).
- Cold look-ups of the same moment share one statement. A look-up that was under way when its subject changed is not kept.
- Blobs and images are bounded together by an estimate of their bytes; the least recently used go first.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import structlog

from broker import accept, errors
from broker.catalog import changes, leases, paths, sites, stores, views
from broker.catalog.coalesce import Coalescer
from broker.catalog.views import BlobView
from broker.metrics import Metrics
from broker.model import Direction, Handle, Image, Store
from broker.paths import Load, PathAverage
from broker.rank import Averages
from broker.sites import ancestors
from broker.stores.base import Store as Driver

FRESH_SECONDS = 1.5
"""For so long after the change log was last read is memory believed."""

POLL_SECONDS = 0.5
"""How often the log and the loads are read. Together with `FRESH_SECONDS` less than the 2 s of invariant 5."""

BLOB_BYTES = 1100
REPLICA_BYTES = 900
IMAGE_BYTES = 1500
PROPERTY_BYTES = 150
"""Estimated memory of what is kept, by measurement of a process with 100,000 blobs of 5 replicas."""

SHARED_HANDLES = 50_000
"""Shared handles kept at most, about 1 KB each."""

log = structlog.get_logger()


class HotBlob(NamedTuple):
    """A blob as tickets need it: its view, and its replicas as candidates, in the same order."""

    view: BlobView
    candidates: tuple[accept.Candidate, ...]
    size: int


class HotImage(NamedTuple):
    image: Image
    size: int


OpenStore = Callable[[Store], Driver]
"""Makes the driver of a store; raises `errors.StoreUnavailable` when its credential is missing."""


class Memory:
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
        self._pool = pool
        self._open_store = open_store
        self._metrics = metrics
        self._clock = clock
        self._hot_bytes = hot_bytes
        self._on_key_change = on_key_change
        self._stores: dict[str, Store] = {}
        self._by_id: dict[int, Store] = {}
        self._drivers: dict[str, Driver] = {}
        self._shared: OrderedDict[tuple[str, str, float], Handle] = OrderedDict()
        self._sites: dict[str, sites.Site] = {}
        self._networks: list[tuple[sites.Network, str]] = []
        self._hot: OrderedDict[UUID, HotBlob | HotImage] = OrderedDict()
        self._held = 0
        self._loading: dict[UUID, bool] = {}  # subject under look-up → changed meanwhile
        self._cold_blobs: Coalescer[UUID, BlobView | None] = Coalescer(pool, views.blobs)
        self._cold_images: Coalescer[UUID, Image | None] = Coalescer(pool, views.images)
        self.read_loads: dict[str, Load] = {}
        self.write_loads: dict[str, Load] = {}
        self._averages: dict[str, dict[tuple[str, str], PathAverage]] = {"read": {}, "write": {}}
        self._averages_at = 0.0
        self._failures: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._position = changes.Position(0, 0)
        self._read_at = float("-inf")
        self._poller: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    # -- life

    async def start(self) -> None:
        """Load what is kept whole, then follow the change log. Raises `errors.Unavailable`."""
        self._position = await changes.position(self._pool)
        await self.reload_stores()
        await self._read_averages()
        self._read_at = self._now()
        self._poller = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stop following, and give the connections back."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait([self._poller])
        await self._cold_blobs.close()
        await self._cold_images.close()

    def wake(self, *_: Any) -> None:
        """Read the change log now: what NOTIFY calls."""
        self._wake.set()

    async def _follow(self) -> None:
        while True:
            try:
                async with self._pool.acquire(timeout=5) as connection:
                    await connection.add_listener("changes", self.wake)
                    try:
                        while True:
                            await asyncio.wait_for(self.catch_up(connection), 5)
                            await self._sleep()
                    finally:
                        if not connection.is_closed():
                            await connection.remove_listener("changes", self.wake)
            except (errors.Unavailable, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.warning("change log cannot be read", error=type(error).__name__)
                await self._sleep()

    async def _sleep(self) -> None:
        """Until the next poll, or until NOTIFY."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)
        self._wake.clear()

    async def catch_up(self, db: Any = None) -> None:
        """Forget what has changed since the last time, and read how full and how fast the stores are."""
        db = self._pool if db is None else db
        now = self._now()
        more = True
        while more:
            found, self._position = await changes.since(db, self._position)
            await self._apply(found)
            more = len(found) >= 10_000
        await self._read_loads(db)
        await self._read_averages(db)
        self._read_at = now

    async def _apply(self, found: Sequence[changes.Change]) -> None:
        reload = keys = False
        for kind, subject in found:
            if kind in ("store", "slots", "site"):
                reload = True
            elif kind == "key":
                keys = True
            else:
                self.forget(kind, subject)
        if keys and self._on_key_change is not None:
            await self._on_key_change()
            self.forget_drivers()
        if reload:
            await self.reload_stores()

    def forget(self, kind: str, subject: str) -> None:
        """Drop what is known of one ``blob`` or ``image``: after a write of one's own, or as the log says."""
        id = UUID(subject)
        if id in self._loading:
            self._loading[id] = True
        entry = self._hot.pop(id, None)
        if entry is not None:
            self._held -= entry.size

    @property
    def fresh(self) -> bool:
        """Whether the change log was read lately enough to believe what is here."""
        return self._now() - self._read_at < FRESH_SECONDS

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # -- stores and sites

    async def reload_stores(self) -> None:
        """Read every store and site anew; the drivers of stores that changed are opened again when next used."""
        found = {store.name: store for store in await stores.load(self._pool)}
        self._sites = {site.path: site for site in await sites.load(self._pool)}
        before, self._stores = self._stores, found
        self._by_id = {store.id: store for store in found.values()}
        for name in list(self._drivers):
            if name not in found or found[name] != before.get(name):
                del self._drivers[name]
                self._shared.clear()
        networks = [(network, site.path) for site in self._sites.values() for network in site.networks]
        self._networks = sorted(networks, key=lambda entry: -entry[0].prefixlen)
        self._forget_candidates()
        await self._read_loads(self._pool)

    def _forget_candidates(self) -> None:
        """Candidates are built from stores, so they are built anew."""
        for id, entry in self._hot.items():
            if isinstance(entry, HotBlob):
                self._hot[id] = entry._replace(candidates=self._candidates(entry.view))

    def store(self, name: str) -> Store | None:
        """The store of that name."""
        return self._stores.get(name)

    def store_by_id(self, id: int) -> Store | None:
        """The store with that number."""
        return self._by_id.get(id)

    def stores(self) -> Mapping[str, Store]:
        """Every store by name."""
        return self._stores

    def driver(self, name: str) -> Driver:
        """What talks to the store and signs for it. Raises `errors.StoreUnavailable`."""
        driver = self._drivers.get(name)
        if driver is None:
            store = self._stores.get(name)
            if store is None:
                raise errors.StoreUnavailable("The store is not registered.")
            driver = self._drivers[name] = self._open_store(store)
        return driver

    def shared_handle(self, name: str, key: str, expires_at: float, now: float, bucket_seconds: float) -> Handle:
        """A handle for reading that all share who ask in the same stretch of `bucket_seconds`: it ends with a stretch."""
        ends_at = expires_at - expires_at % bucket_seconds
        if ends_at <= now:
            return self.driver(name).sign_get(key, expires_at, now)
        handle = self._shared.get((name, key, ends_at))
        if handle is None:
            handle = self._shared[name, key, ends_at] = self.driver(name).sign_get(key, ends_at, now)
            while len(self._shared) > SHARED_HANDLES:
                self._shared.popitem(last=False)
        return handle

    def forget_drivers(self) -> None:
        """Open every driver anew when next used: credentials or keys have changed."""
        self._drivers.clear()
        self._shared.clear()

    def has_site(self, path: str) -> bool:
        """Whether the site is registered, or lies below one that is."""
        return any(known in self._sites for known in ancestors(path))

    def site_of(self, address: str) -> str | None:
        """The site whose network holds the address; the narrowest network decides."""
        if not self._networks:
            return None
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return None
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        return next((site for network, site in self._networks if ip.version == network.version and ip in network), None)

    # -- blobs and images

    async def blob(self, id: UUID) -> BlobView | None:
        """A blob with its replicas and images. Raises `errors.Unavailable`."""
        hot = await self.hot_blob(id)
        return None if hot is None else hot.view

    async def hot_blob(self, id: UUID) -> HotBlob | None:
        """A blob with its candidates."""
        return self.known_blob(id) or (await self.hot_blobs([id]))[0]

    def known_blob(self, id: UUID) -> HotBlob | None:
        """The blob if it is here and may be believed; no look-up."""
        entry = self._hot.get(id)
        if isinstance(entry, HotBlob) and self.fresh:
            self._hot.move_to_end(id)
            self._metrics.hot_hits.inc()
            return entry
        return None

    async def hot_blobs(self, ids: Sequence[UUID]) -> list[HotBlob | None]:
        """Many blobs, those not here in one look-up. Raises `errors.Unavailable`."""
        found = {id: self.known_blob(id) for id in ids}
        cold = [id for id, entry in found.items() if entry is None]
        if cold:
            self._metrics.hot_misses.inc(len(cold))
            for id, view in zip(cold, await self._load(cold, self._cold_blobs), strict=True):
                if view is not None:
                    size = BLOB_BYTES + REPLICA_BYTES * len(view.replicas) + 200 * len(view.images)
                    found[id] = HotBlob(view, self._candidates(view), size)
            self._keep({id: found[id] for id in cold})
        return [found[id] for id in ids]

    async def image(self, id: UUID) -> Image | None:
        """One image. Raises `errors.Unavailable`."""
        return (await self.images([id]))[0]

    async def images(self, ids: Sequence[UUID]) -> list[Image | None]:
        """Many images, those not here in one look-up. Raises `errors.Unavailable`."""
        fresh = self.fresh
        found: dict[UUID, HotImage | None] = {}
        for id in ids:
            entry = self._hot.get(id) if fresh else None
            found[id] = entry if isinstance(entry, HotImage) else None
        cold = [id for id, entry in found.items() if entry is None]
        if cold:
            for id, image in zip(cold, await self._load(cold, self._cold_images), strict=True):
                if image is not None:
                    found[id] = HotImage(image, IMAGE_BYTES + PROPERTY_BYTES * len(image.properties))
            self._keep({id: found[id] for id in cold})
        return [entry.image if (entry := found[id]) else None for id in ids]

    async def _load(self, ids: Sequence[UUID], look_up: Coalescer[UUID, Any]) -> Sequence[Any]:
        for id in ids:
            self._loading.setdefault(id, False)
        try:
            return await look_up(ids)
        except BaseException:
            for id in ids:
                self._loading.pop(id, None)
            raise

    def _keep(self, entries: Mapping[UUID, HotBlob | HotImage | None]) -> None:
        """Keep what was looked up, unless it changed meanwhile, and let go what was not used for longest."""
        for id, entry in entries.items():
            changed = self._loading.pop(id, False)
            if entry is None or changed or id in self._hot:
                continue
            self._hot[id] = entry
            self._held += entry.size
        while self._held > self._hot_bytes and self._hot:
            _, dropped = self._hot.popitem(last=False)
            self._held -= dropped.size
            self._metrics.hot_evictions.inc()
        self._metrics.hot_bytes.set(self._held)

    def _candidates(self, view: BlobView) -> tuple[accept.Candidate, ...]:
        found = []
        for replica in view.replicas:
            store = self._stores.get(replica.store)
            if store is not None:
                found.append(accept.source(replica, store, store.endpoint.partition(":")[0]))
        return tuple(found)

    # -- loads and averages

    async def _read_loads(self, db: Any) -> None:
        read: dict[str, Load] = {}
        write: dict[str, Load] = {}
        for store_id, direction, leased, taken in await leases.slots_taken(db):
            store = self._by_id.get(store_id)
            if store is not None:
                (read if direction == Direction.READ else write)[store.name] = Load(active=leased, reserved=taken)
        self.read_loads, self.write_loads = read, write

    def note_leases(self, held: Mapping[tuple[int, str], int]) -> None:
        """Take over how many leases stores hold, as a grant has just seen it."""
        for (store_id, direction), leased in held.items():
            store = self._by_id.get(store_id)
            if store is not None:
                loads = self.read_loads if direction == Direction.READ else self.write_loads
                before = loads.get(store.name)
                loads[store.name] = Load(active=leased, reserved=before.reserved if before else 0)

    async def _read_averages(self, db: Any = None) -> None:
        for key, average in (await paths.since(self._pool if db is None else db, self._averages_at)).items():
            store = self._by_id.get(key.store_id)
            self._averages_at = max(self._averages_at, average.updated_at)
            if store is not None:
                self._averages[key.direction][key.site, store.name] = average

    def averages(self, direction: Direction) -> Averages:
        """What transfers in that direction reported, by (site, store)."""
        return self._averages[direction.value]

    # -- failures

    def note_failure(self, client: str, store: str, until: float) -> None:
        """A client was failed by a store: it is not offered it until then."""
        known = self._failures.setdefault(client, {})
        known[store] = until
        self._failures.move_to_end(client)
        while len(self._failures) > 10_000:
            self._failures.popitem(last=False)

    def failures(self, client: str) -> Mapping[str, float]:
        """Stores that failed this client, with the instants until which that counts."""
        return self._failures.get(client, _NO_FAILURES) if self._failures else _NO_FAILURES


_NO_FAILURES: Mapping[str, float] = {}
