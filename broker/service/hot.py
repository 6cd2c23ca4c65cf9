"""Blobs and images that were asked for lately, within a bound of bytes, so that a ticket for one costs no look-up.

Rules
- Entries are bounded together by an estimate of their memory; the least recently used go first.
- Cold look-ups of the same moment share one statement. One that was under way when its subject changed is not kept.
- Ids are texts here, as requests and the change log have them: to parse one costs more than to find its entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg
import orjson

from broker import accept
from broker.catalog import views
from broker.catalog.coalesce import Coalescer
from broker.catalog.views import BlobView
from broker.metrics import Metrics
from broker.model import Image, Store
from broker.permit import anyone_may_read
from broker.service.summary import summary

BLOB_BYTES = 1300
REPLICA_BYTES = 900
IMAGE_BYTES = 1500
PROPERTY_BYTES = 150
"""Estimated memory of what is kept, by measurement of a process with 100,000 blobs of 5 replicas."""


class HotBlob(NamedTuple):
    """A blob as tickets need it: its view, its replicas as candidates, in the same order, and what follows from them."""

    view: BlobView
    candidates: tuple[accept.Candidate, ...]
    offered_to_all: bool
    """Nothing is against any candidate, as long as a request has no wishes (`accept.is_offered_to_all`)."""
    read_by_all: bool
    """Every principal may read it through some image."""
    summary: orjson.Fragment
    """The blob as tickets show it, in JSON."""
    size: int


class HotImage(NamedTuple):
    image: Image
    size: int


class Hot:
    """The blobs and images kept. `stores` gives every store by name, `fresh` whether memory may be believed."""

    def __init__(
        self,
        pool: asyncpg.Pool[asyncpg.Record],
        metrics: Metrics,
        hot_bytes: int,
        stores: Callable[[], Mapping[str, Store]],
        fresh: Callable[[], bool],
    ) -> None:
        self._metrics = metrics
        self._hot_bytes = hot_bytes
        self._stores = stores
        self._fresh = fresh
        self._kept: OrderedDict[str, HotBlob | HotImage] = OrderedDict()
        self._held = 0
        self._under_way: list[set[str]] = []  # for each look-up, what has changed since it began
        self._cold_blobs: Coalescer[str, BlobView | None] = Coalescer(pool, views.blobs, "blobs", metrics)
        self._cold_images: Coalescer[str, Image | None] = Coalescer(pool, views.images, "images", metrics)

    async def close(self) -> None:
        """Give the connections back."""
        await self._cold_blobs.close()
        await self._cold_images.close()

    def forget(self, id: str) -> None:
        """Drop what is known of a blob or an image, also if a look-up under way is just about to tell it."""
        for changed in self._under_way:
            changed.add(id)
        entry = self._kept.pop(id, None)
        if entry is not None:
            self._held -= entry.size

    def forget_all(self) -> None:
        """Drop everything."""
        for id in list(self._kept):
            self.forget(id)

    def rebuild(self) -> None:
        """Stores have changed, and candidates are built from stores."""
        for id, entry in self._kept.items():
            if isinstance(entry, HotBlob):
                self._kept[id] = self._hot_blob(entry.view)

    async def blobs(self, ids: Sequence[str]) -> list[HotBlob | None]:
        """These blobs, those not here by one look-up; ``None`` for each that does not exist. Raises `errors.Unavailable`."""
        kept = self._kept
        found: list[HotBlob | None] = []
        cold: dict[str, HotBlob | None] = {}
        fresh = self._fresh()
        for id in ids:
            entry = kept.get(id) if fresh else None
            if isinstance(entry, HotBlob):
                kept.move_to_end(id)
                found.append(entry)
            else:
                cold[id] = None
                found.append(None)
        self._metrics.hot_hits.inc(by=len(ids) - found.count(None))
        if not cold:
            return found
        self._metrics.hot_misses.inc(by=len(cold))
        looked_up, changed = await self._load(list(cold), self._cold_blobs)
        for id, view in zip(cold, looked_up, strict=True):
            cold[id] = None if view is None else self._hot_blob(view)
        self._keep(cold, changed)
        return [entry or cold[id] for id, entry in zip(ids, found, strict=True)]

    async def images(self, ids: Sequence[str]) -> list[Image | None]:
        """These images, as `blobs`. Raises `errors.Unavailable`."""
        found: dict[str, HotImage | None] = {}
        fresh = self._fresh()
        for id in ids:
            entry = self._kept.get(id) if fresh else None
            if isinstance(entry, HotImage):
                self._kept.move_to_end(id)
                found[id] = entry
            else:
                found[id] = None
        cold = [id for id, entry in found.items() if entry is None]
        if cold:
            looked_up, changed = await self._load(cold, self._cold_images)
            for id, image in zip(cold, looked_up, strict=True):
                if image is not None:
                    found[id] = HotImage(image, IMAGE_BYTES + PROPERTY_BYTES * len(image.properties))
            self._keep({id: found[id] for id in cold}, changed)
        return [entry.image if (entry := found[id]) else None for id in ids]

    async def _load(self, ids: Sequence[str], look_up: Coalescer[str, Any]) -> tuple[Sequence[Any], set[str]]:
        """What the catalogue has, and the ids that changed since it was asked."""
        changed: set[str] = set()
        self._under_way.append(changed)
        try:
            return await look_up(ids), changed
        finally:
            self._under_way = [other for other in self._under_way if other is not changed]

    def _keep(self, entries: Mapping[str, HotBlob | HotImage | None], changed: set[str]) -> None:
        """Keep what was looked up, unless it changed meanwhile, and let go what was not used for longest."""
        for id, entry in entries.items():
            if entry is None or id in changed or id in self._kept:
                continue
            self._kept[id] = entry
            self._held += entry.size
        while self._held > self._hot_bytes and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self._held -= dropped.size
            self._metrics.hot_evictions.inc()
        self._metrics.hot_bytes.set(self._held)

    def _hot_blob(self, view: BlobView) -> HotBlob:
        candidates = tuple(_candidates(view, self._stores()))
        return HotBlob(
            view,
            candidates,
            all(map(accept.is_offered_to_all, candidates)),
            anyone_may_read(view.images),
            orjson.Fragment(orjson.dumps(summary(view.blob))),
            BLOB_BYTES + REPLICA_BYTES * len(view.replicas) + 200 * len(view.images),
        )


def _candidates(view: BlobView, stores: Mapping[str, Store]) -> Iterable[accept.Candidate]:
    for replica in view.replicas:
        store = stores.get(replica.store)
        if store is not None:
            yield accept.source(replica, store, store.endpoint.partition(":")[0])
