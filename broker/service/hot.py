"""Blobs and images that were asked for lately, within a bound of bytes, so that a ticket for one costs no look-up.

Rules
- Entries are bounded together by an estimate of their memory. They stand in a queue: the first one goes, unless it was used since it
  came to the front; then it goes to the end. A hit marks its entry only, where to move it would touch its neighbours' memory too.
- Cold look-ups of the same moment share one statement. One that was under way when its subject changed is not kept.
- Ids are texts here, as requests and the change log have them: to parse one costs more than to find its entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import asyncpg

from broker import errors
from broker.catalog import compact, images
from broker.catalog.coalesce import Coalescer
from broker.catalog.compact import CompactBlob
from broker.metrics import Metrics
from broker.model import Image

IMAGE_BYTES = 1500
PROPERTY_BYTES = 150
MEMBER_BYTES = 100
"""Estimated memory of an image that is kept, by measurement."""


class HotImage:
    """An image that is kept; `used` is as of `CompactBlob`."""

    __slots__ = ("held_bytes", "image", "used")

    def __init__(self, image: Image) -> None:
        self.image = image
        self.held_bytes = IMAGE_BYTES + PROPERTY_BYTES * len(image.properties) + MEMBER_BYTES * len(image.members)
        self.used = False


Entry = TypeVar("Entry", CompactBlob, HotImage)


class Known:
    """What was kept when the catalogue was last reached; what is not there cannot be told from what does not exist."""

    def __init__(self, kept: Mapping[str, CompactBlob | HotImage]) -> None:
        self._kept = kept

    async def blobs(self, ids: Sequence[str]) -> list[CompactBlob | None]:
        """These blobs. Raises `errors.Unavailable` for one that is not kept."""
        return [*_all([entry for id in ids if isinstance(entry := self._kept.get(id), CompactBlob)], ids)]

    async def images(self, ids: Sequence[str]) -> list[Image | None]:
        """These images, as `blobs`."""
        found = [entry for id in ids if isinstance(entry := self._kept.get(id), HotImage)]
        return [entry.image for entry in _all(found, ids)]


def _all(found: list[Entry], ids: Sequence[str]) -> list[Entry]:
    if len(found) < len(ids):
        raise errors.Unavailable("The catalogue cannot be reached.", retry_after=1.0)
    return found


class Hot:
    """The blobs and images kept. `fresh` tells whether memory may be believed."""

    def __init__(
        self,
        pool: asyncpg.Pool[asyncpg.Record],
        metrics: Metrics,
        hot_bytes: int,
        fresh: Callable[[], bool],
    ) -> None:
        self._metrics = metrics
        self._hot_bytes = hot_bytes
        self._fresh = fresh
        self._kept: OrderedDict[str, CompactBlob | HotImage] = OrderedDict()
        self._held = 0
        self._under_way: list[set[str]] = []  # for each look-up, what has changed since it began
        self._cold_blobs: Coalescer[str, CompactBlob | None] = Coalescer(pool, compact.blobs, "blobs", metrics)
        self._cold_images: Coalescer[str, Image | None] = Coalescer(pool, images.get_many, "images", metrics)

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
            self._held -= entry.held_bytes

    def forget_all(self) -> None:
        """Drop everything."""
        for id in list(self._kept):
            self.forget(id)

    async def blobs(self, ids: Sequence[str]) -> list[CompactBlob | None]:
        """These blobs, those not here by one look-up; ``None`` for each that does not exist. Raises `errors.Unavailable`."""
        fresh = self._fresh()
        found: list[CompactBlob | None] = []
        cold: dict[str, CompactBlob | None] = {}
        for id in ids:
            entry = self._kept.get(id) if fresh else None
            if isinstance(entry, CompactBlob):
                entry.used = True
                found.append(entry)
            else:
                cold[id] = None
                found.append(None)
        self._metrics.hot_hits.inc(by=len(ids) - found.count(None))
        if not cold:
            return found
        self._metrics.hot_misses.inc(by=len(cold))
        looked_up, changed = await self._load(list(cold), self._cold_blobs)
        cold.update(zip(cold, looked_up, strict=True))
        self._keep(cold, changed)
        return [entry or cold[id] for id, entry in zip(ids, found, strict=True)]

    async def images(self, ids: Sequence[str]) -> list[Image | None]:
        """These images, as `blobs`. Raises `errors.Unavailable`."""
        found: dict[str, HotImage | None] = {}
        fresh = self._fresh()
        for id in ids:
            entry = self._kept.get(id) if fresh else None
            if isinstance(entry, HotImage):
                entry.used = True
                found[id] = entry
            else:
                found[id] = None
        cold = [id for id, entry in found.items() if entry is None]
        if cold:
            looked_up, changed = await self._load(cold, self._cold_images)
            for id, image in zip(cold, looked_up, strict=True):
                if image is not None:
                    found[id] = HotImage(image)
            self._keep({id: found[id] for id in cold}, changed)
        return [entry.image if (entry := found[id]) else None for id in ids]

    def known(self) -> Known:
        """The same without look-ups, whether fresh or not."""
        return Known(self._kept)

    async def _load(self, ids: Sequence[str], look_up: Coalescer[str, Any]) -> tuple[Sequence[Any], set[str]]:
        """What the catalogue has, and the ids that changed since it was asked."""
        changed: set[str] = set()
        self._under_way.append(changed)
        try:
            return await look_up(ids), changed
        finally:
            self._under_way = [other for other in self._under_way if other is not changed]

    def _keep(self, entries: Mapping[str, CompactBlob | HotImage | None], changed: set[str]) -> None:
        """Keep what was looked up, unless it changed meanwhile, and let go what was not used for longest."""
        if not self._hot_bytes:
            return
        for id, entry in entries.items():
            if entry is None or id in changed or id in self._kept:
                continue
            self._kept[id] = entry
            self._held += entry.held_bytes
        while self._held > self._hot_bytes:
            id, oldest = self._kept.popitem(last=False)
            if oldest.used:  # once more through the queue
                oldest.used = False
                self._kept[id] = oldest
            else:
                self._held -= oldest.held_bytes
                self._metrics.hot_evictions.inc()
        self._metrics.hot_bytes.set(self._held)
