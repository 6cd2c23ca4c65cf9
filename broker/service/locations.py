"""Locations of an image: its replicas, named by URLs as Glance's clients name them.

Rules
- A URL is only compared with the registered stores that the principal may know (`broker.stores.location`). What it names is looked
  at by the broker before it counts, exactly as a replica that is registered by store and key, and by the same rules of who may
  register what (`broker.service.replicas`).
- The first location of an image without bytes says what its bytes are: what the store computed of them, together with the digests
  that the request tells. A store that tells no digest proves nothing, and its objects are refused. From then on nothing can change
  what the image is: further locations hold the same bytes, and the last good one stays (OSSN-0065).
- Shown are active replicas on stores that one may know, to administrators, services, and the project that registered them (OSSN-0090).
- What a location was added for is never deleted with it: the right to delete the bytes is delegated by /v1 only (M10).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from broker import errors, formats, permit, verify
from broker.catalog import blobs, copies, images, replicas, uploads
from broker.catalog.replicas import ReplicaRecord
from broker.catalog.transaction import transaction
from broker.model import Blob, BlobState, Client, Digests, Image, ImageStatus, Purpose, Replica, ReplicaState, Role, Store, new_id
from broker.service import adopt, vetting, visible
from broker.service import replicas as replica_service
from broker.service.context import Context
from broker.service.idempotency import Claim
from broker.stores.location import Location, locate, url_of

DEFAULT_FORMAT = "raw"
"""Of bytes whose image does not say what they are."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A location of an image as its URL, and the replica behind it at the version that was read."""

    url: str
    store: str
    replica: UUID
    version: int


@dataclass(frozen=True, slots=True)
class Places:
    """Where an image's bytes are, as far as a principal may know: stores, locations, and the stores that copies are on their way to or
    did not reach."""

    stores: tuple[str, ...] = ()
    locations: tuple[Shown, ...] = ()
    importing: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


async def places(context: Context, client: Client, bytes_of: Mapping[UUID, UUID | None]) -> dict[UUID, Places]:
    """The places of visible images. `bytes_of`: from each image to the blob that is its bytes."""
    by_blob: dict[UUID, list[ReplicaRecord]] = {}
    for record in await replicas.of_blobs(context.db, list({blob for blob in bytes_of.values() if blob is not None})):
        if record.replica.state is ReplicaState.ACTIVE and permit.may_see_store(client.principal, record):
            by_blob.setdefault(record.replica.blob_id, []).append(record)
    by_image: dict[UUID, dict[str, str]] = {}
    for copy in await copies.of_images(context.db, list(bytes_of)):
        if permit.may_see_store(client.principal, copy):
            by_image.setdefault(copy.image_id, {})[copy.store] = copy.state  # the last one is the latest
    found = {}
    for image, blob in bytes_of.items():
        here = by_blob.get(blob, []) if blob is not None else []
        names = sorted({record.replica.store for record in here})
        states = {store: state for store, state in by_image.get(image, {}).items() if store not in names}
        found[image] = Places(
            tuple(names),
            tuple(shown for record in here if (shown := _shown(context, client, record)) is not None),
            tuple(sorted(store for store, state in states.items() if state in (copies.QUEUED, copies.RUNNING))),
            tuple(sorted(store for store, state in states.items() if state == copies.FAILED)),
        )
    return found


async def list_locations(context: Context, client: Client, id: UUID) -> list[Shown]:
    """The locations of an image's bytes that this principal may know, in the order of their registration. Raises `NotFound`."""
    image = await visible.image(context, client, id)
    found = await places(context, client, {id: image.blobs.get(await main_format(context, image))})
    return list(found[id].locations)


async def add_location(context: Context, client: Client, id: UUID, url: str, said: Digests, *, store: str | None = None) -> None:
    """Make the object at `url` a replica of the image, or the image's bytes when it has none. `said`: digests told of it; `store`:
    the store that it is said to be at.

    Raises `NotFound`, `Forbidden`, `Invalid` (the URL, a digest), `Conflict` (it is in use; a deactivated image), `NotUploaded`,
    `Mismatch`, `Unverifiable`, `StoreUnavailable`.
    """
    image = await _addable(context, client, id)
    place = check(context, client, url, said, store)
    format = await main_format(context, image)
    blob_id = image.blobs.get(format)
    blob = None if blob_id is None else await blobs.get(context.db, blob_id)
    if blob is None or blob.state is BlobState.QUEUED:
        await _adopt(context, client, image, format, blob, place, said)
        return
    difference = verify.combined(verify.Declaration(digests=blob.digests), verify.Declaration(digests=said))
    if isinstance(difference, verify.Mismatched):
        raise errors.Mismatch("The image has other bytes.", field=difference.field, expected=difference.declared)
    wanted = {"store": place.store.name, "key": place.key}
    await replica_service.register_replica(context, client, blob.id, wanted, Claim(new_id(context.clock())))


async def remove_location(context: Context, client: Client, shown: Shown) -> None:
    """Forget the replica behind a location. Raises `NotFound`, `Forbidden`, `PreconditionFailed` and `LastReplica`."""
    await replica_service.delete_replica(context, client, shown.replica, shown.version)


async def remove_from_store(context: Context, client: Client, id: UUID, store: str) -> None:
    """Forget the replicas of the image at a store, whose bytes are deleted where that was delegated.

    Raises `NotFound` (the image, the store, or the one at the other), `Forbidden`, `LastReplica`.
    """
    image = await visible.image(context, client, id)
    if visible.store(context, client, store) is None:
        raise errors.NotFound("No such store.", field="store")
    found = await replicas.of_blobs(context.db, list(image.blobs.values()))
    here = [record for record in found if record.replica.store == store and record.replica.state is not ReplicaState.DELETING]
    if not here:
        raise errors.NotFound("The image is not in this store.", field="store")
    if not permit.may_change_image(client.principal, image.project):
        raise errors.Forbidden("This image belongs to another project, or your role may not write.")
    for record in here:
        await replica_service.delete_replica(context, client, record.replica.id, record.replica.version)


def locate_for(context: Context, client: Client, url: str) -> Location:
    """The store, of those that this principal may know, and the key that `url` names. Raises `Invalid`."""
    return locate(url, visible.stores(context, client), internal=client.principal.sees_private_stores)


async def main_format(context: Context, image: Image) -> str:
    """The format that stands for the image: of those that it has bytes in, while it has none, of those that are awaited."""
    known = await blobs.summaries(context.db, image.blobs.values())
    active = [format for format, blob in image.blobs.items() if blob in known and known[blob].state is BlobState.ACTIVE]
    return formats.main(image.disk_format, active or image.blobs) or image.disk_format or DEFAULT_FORMAT


def check(context: Context, client: Client, url: str, said: Digests, store: str | None) -> Location:
    """The place that a request to add a location names. Raises `Invalid` (the URL, a digest, the store)."""
    problems = verify.digest_problems(said, "validation_data")
    if problems:
        raise errors.Invalid("The digest cannot be right.", field=problems[0].field, expected=problems[0].expected)
    place = locate_for(context, client, url)
    if store is not None and store != place.store.name:
        raise errors.Invalid("The URL names an object at another store.", field="metadata.store", expected=place.store.name)
    return place


async def _addable(context: Context, client: Client, id: UUID) -> Image:
    """The image, if this principal may add locations to it. Raises `NotFound`, `Forbidden`, `Conflict`."""
    image, principal = await visible.image(context, client, id), client.principal
    # A service adds what it has made for somebody else: a snapshot of a volume, say.
    if not permit.may_change_image(principal, image.project) and principal.role is not Role.SERVICE:
        raise errors.Forbidden("This image belongs to another project, or your role may not write.")
    if image.status not in (ImageStatus.QUEUED, ImageStatus.ACTIVE) and principal.role is not Role.ADMIN:
        raise errors.Conflict(f"The image is {image.status.value}.", field="status", expected="a queued or active image")
    return image


async def _adopt(context: Context, client: Client, image: Image, format: str, queued: Blob | None, place: Location, said: Digests) -> None:
    """Make the object the bytes, in that format, of an image that has none. Raises what `add_location` raises."""
    store = replica_service.writable_store(context, client, place.store.name, False)
    key = replica_service.allowed_key(client, place.key)
    if queued is not None and await uploads.under_way(context.db, queued.id):
        raise errors.Conflict("The image's bytes are being uploaded.", field="status", expected="the end of the upload")
    about, proof = adopt.declared_by(context, await replica_service.look(context, client.principal, store, key, None), said)
    blob = queued or Blob(new_id(context.clock()), None, {}, BlobState.QUEUED)
    async with transaction(context.db) as connection:
        if queued is None:
            await blobs.insert(connection, blob)
            await images.attach(connection, image.id, format, blob.id)
        elif (await blobs.lock(connection, [blob.id])).get(blob.id) is not BlobState.QUEUED:
            raise errors.Conflict("The image has changed meanwhile. Send the request again.")
        await vetting.expect_bytes(connection, client.principal, image.id, context.policy.vetting)
        await adopt.take_over(connection, client, _first_replica(context, client, blob, store, key), store, about, proof)
    context.memory.forget_image(image.id, [blob.id])


def _first_replica(context: Context, client: Client, blob: Blob, store: Store, key: str) -> Replica:
    return Replica(
        id=new_id(context.clock()),
        blob_id=blob.id,
        store=store.name,
        key=key,
        purpose=Purpose.ORIGIN,
        state=ReplicaState.ACTIVE,
        deletable=False,
        project=client.principal.project,
    )


def _shown(context: Context, client: Client, record: ReplicaRecord) -> Shown | None:
    replica, principal = record.replica, client.principal
    store = visible.store(context, client, replica.store)
    if replica.state is not ReplicaState.ACTIVE or store is None:
        return None
    if replica.project != principal.project and not principal.sees_private_stores:
        return None
    url = url_of(store, replica.key)
    return None if url is None else Shown(url, replica.store, replica.id, replica.version)
