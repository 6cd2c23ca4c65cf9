"""Cached images: replicas of purpose ``cache``, wherever they lie (M5, M7), and the copies that are to become such.

Rules
- Stores with the setting ``cache=yes`` are caches: an image that is queued is to be copied to each of them that lacks it, by agents.
- What leaves the cache is forgotten, and its bytes go where that right was delegated (M10). The last good replica of an image stays.
- Pruning brings each cache down to the capacity that its store was registered with, the oldest replicas first: when a replica was last
  read is not known by the replica.
- All of it is for administrators (the dialects' contracts say so).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from broker import errors
from broker.catalog import copies, deletions, replicas
from broker.catalog import stores as store_catalog
from broker.catalog.replicas import Cached, ReplicaRecord
from broker.model import CACHE, Client, ImageStatus, Purpose, ReplicaState, Store, new_id
from broker.service import copies as copy_service
from broker.service import replicas as replica_service
from broker.service import visible
from broker.service.context import Context
from broker.service.locations import main_format

MOST = 10_000
"""Images that a list of the cache tells of."""


@dataclass(frozen=True, slots=True)
class CacheState:
    """What is cached, and the images that wait to be."""

    cached: list[Cached]
    queued: list[UUID]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was taken out."""

    files: int
    bytes: int


async def state(context: Context, client: Client) -> CacheState:
    """Everything that is cached or queued, `MOST` images of each at most."""
    waiting = {copy.image_id: None for copy in await _waiting(context)}
    return CacheState(await replicas.cached_images(context.db, MOST), list(waiting))


async def queue(context: Context, client: Client, id: UUID) -> None:
    """Have an image copied to every cache. Raises `NotFound` (no such image, or there is no cache) and `Invalid` (it has no bytes)."""
    image = await visible.image(context, client, id)
    if image.status is not ImageStatus.ACTIVE:
        raise errors.Invalid("Only active images can be cached.", field="status", expected="active")
    caches = [store for store in copy_service.targets(context, client) if is_cache(store)]
    if not caches:
        raise errors.NotFound("No store is a cache. An administrator makes one by the setting cache=yes.")
    found = await replicas.of_blobs(context.db, [image.blobs[await main_format(context, image)]])
    there = {record.replica.store for record in found if record.replica.state is ReplicaState.ACTIVE}
    for store in caches:
        if store.name not in there:
            await copy_service.ask(context, client, image, store.name, Purpose.CACHE, id=new_id(context.clock()))


async def remove(context: Context, client: Client, id: UUID) -> None:
    """Take an image out of every cache and out of the queue. Raises `NotFound` (it is no image) and `LastReplica`."""
    image = await visible.image(context, client, id)
    await copies.forget(context.db, [copy.id for copy in await _waiting(context) if copy.image_id == id])
    for record in await replicas.of_blobs(context.db, list(image.blobs.values())):
        if record.replica.purpose is Purpose.CACHE and record.replica.state is not ReplicaState.DELETING:
            await replica_service.delete_replica(context, client, record.replica.id, record.replica.version)


async def nodes(context: Context, client: Client, id: UUID) -> list[str]:
    """The endpoints of the stores with cached replicas of an image. Raises `NotFound`."""
    image = await visible.image(context, client, id)
    found = await replicas.of_blobs(context.db, list(image.blobs.values()))
    names = {each.replica.store for each in found if each.replica.purpose is Purpose.CACHE and each.replica.state is ReplicaState.ACTIVE}
    return sorted({store.endpoint for name in names if (store := context.memory.store(name)) is not None})


async def clear_queue(context: Context) -> int:
    """Take back what was queued. Returns how many copies."""
    return await copies.forget(context.db, [copy.id for copy in await _waiting(context)])


async def clear_cache(context: Context, client: Client) -> int:
    """Take everything out of the caches but what has no other good replica. Returns how many replicas went."""
    removed = 0
    after: UUID | None = None
    while found := await _cache_replicas(context, after):
        removed += len(await _drop(context, client, found))
        after = found[-1].replica.id
    return removed


async def clean(context: Context, client: Client) -> int:
    """Take cached replicas out that are no copies any more: corrupt or missing ones. Returns how many."""
    removed = 0
    for wrong in (ReplicaState.CORRUPT, ReplicaState.MISSING):
        after: UUID | None = None
        while found := await _cache_replicas(context, after, state=wrong):
            removed += len(await _drop(context, client, found))
            after = found[-1].replica.id
    return removed


async def prune(context: Context, client: Client) -> Pruned:
    """Bring every cache that is over its capacity down to it."""
    files = size = 0
    for store in await store_catalog.load(context.db):
        if not is_cache(store) or store.capacity is None:
            continue
        over = store.reserved - await deletions.pending_bytes(context.db, store.id) - store.capacity
        after: UUID | None = None
        while over > 0 and (found := await _cache_replicas(context, after, store=store.name)):
            sizes = await replicas.sizes(context.db, [each.replica.id for each in found])
            for each in found:
                if over <= 0:
                    break
                for gone in await _drop(context, client, [each]):
                    files, size, over = files + 1, size + sizes[gone], over - sizes[gone]
            after = found[-1].replica.id
    return Pruned(files, size)


def is_cache(store: Store) -> bool:
    """Whether images that are queued are copied to this store."""
    return store.settings.get(CACHE) == "yes"


async def _waiting(context: Context) -> list[copies.Copy]:
    found = []
    for state in (copies.QUEUED, copies.RUNNING):
        found += await copies.page(context.db, project=None, private=True, limit=MOST, state=state, purpose=Purpose.CACHE)
    return found


async def _cache_replicas(
    context: Context, after: UUID | None, *, store: str | None = None, state: ReplicaState | None = ReplicaState.ACTIVE
) -> list[ReplicaRecord]:
    """The next of them, the oldest first."""
    return await replicas.page(
        context.db, project=None, private=True, limit=100, after=after, store=store, purpose=Purpose.CACHE, state=state
    )


async def _drop(context: Context, client: Client, found: Iterable[ReplicaRecord]) -> list[UUID]:
    """Forget these, but for those that are an image's last, or have changed meanwhile. Returns the ids of those that went."""
    gone = []
    for record in found:
        try:
            await replica_service.delete_replica(context, client, record.replica.id, record.replica.version)
        except (errors.LastReplica, errors.NotFound, errors.PreconditionFailed):
            continue
        gone.append(record.replica.id)
    return gone
