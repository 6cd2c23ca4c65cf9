"""What an upload is for: a new image, one more format of an image, one more replica of a blob; or nothing, if the bytes are known.

Rules
- A new image without `format` is ``raw``; an existing image needs one that it does not have yet. A format whose blob never
  came, and for which no upload is under way, may be uploaded again.
- Bytes are known only by a digest (SHA-256 or SHA-512) that a store itself has computed, and only to a principal who may read
  that blob already. For everyone else the answer is that of an ordinary upload: nobody can probe for content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from broker import errors, permit, vet
from broker.catalog import blobs, images, uploads, views
from broker.catalog.connect import reachable
from broker.model import Blob, BlobState, Client, Digests, Image, ImageStatus, Principal, Purpose, ReplicaState, Visibility, new_id
from broker.service import vetting
from broker.service.context import Context
from broker.verify import Declaration, Problem, declaration_problems

DEFAULT_FORMAT = "raw"


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image to be written with the upload."""

    name: str
    visibility: Visibility
    properties: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Target:
    """Which blob the bytes will be, and what has to be written for that.

    `new_blob` and `new_image` say whether the rows are made with the upload, `links` whether image and blob are linked by it.
    """

    blob_id: UUID
    image_id: UUID | None
    format: str | None
    purpose: Purpose
    size: int | None
    digests: Digests
    new_blob: bool = False
    new_image: NewImage | None = None
    links: bool = False
    taken: frozenset[str] = field(default_factory=frozenset)
    """Stores that hold a good replica of the blob already."""


async def resolve(context: Context, client: Client, request: Mapping[str, Any]) -> Target:
    """The target of an upload request. Raises `Forbidden`, `NotFound`, `Conflict`, `Invalid`."""
    if not client.principal.may_write:
        raise errors.Forbidden("The role reader may not upload.")
    size, digests = request.get("size"), request.get("digests", {})
    complain(declaration_problems(Declaration(size=size, digests=digests)))
    if "blob" in request:
        return await _blob(context, client.principal, UUID(request["blob"]), request)
    purpose = Purpose(request.get("purpose", "origin"))
    image, format = request["image"], request.get("format")
    if isinstance(image, str):
        return await _format_of(context, client.principal, UUID(image), format, purpose, size, digests)
    visibility = Visibility(image.get("visibility", "private"))
    if visibility is Visibility.PUBLIC and not permit.may_publish(client.principal, context.policy.vetting.visibilities):
        raise errors.Forbidden("Only administrators make an image public.")
    now = context.clock()
    new_image = NewImage(image["name"], visibility, image.get("properties", {}))
    return Target(new_id(now), new_id(now), format or DEFAULT_FORMAT, purpose, size, digests, True, new_image, True)


def complain(problems: list[Problem]) -> None:
    """Raise `Invalid` for the first of `problems`, if there is one."""
    if problems:
        raise errors.Invalid("The declaration cannot be right.", field=problems[0].field, expected=problems[0].expected)


async def _format_of(
    context: Context, principal: Principal, image_id: UUID, format: str | None, purpose: Purpose, size: int | None, digests: Digests
) -> Target:
    """A format of an existing image."""
    with reachable():
        (image,) = await images.get_many(context.db, [image_id])
    if image is None or not permit.may_see_image(principal, image):
        raise errors.NotFound("No such image.")
    if not permit.may_change_image(principal, image.project):
        raise errors.Forbidden("Only the image's project may add to it.")
    if format is None:
        raise errors.Invalid("The format of the bytes is missing.", field="format", expected="a disk format, such as raw or qcow2")
    blob_id = image.blobs.get(format)
    if blob_id is None:
        return Target(new_id(context.clock()), image_id, format, purpose, size, digests, new_blob=True, links=True)
    with reachable():
        (view,) = await views.blobs(context.db, [blob_id])
    if view is None or view.blob.state is not BlobState.QUEUED or await uploads.under_way(context.db, blob_id):
        raise errors.Conflict("The image has this format already, or it is being uploaded.", field="format", expected="another format")
    return Target(blob_id, image_id, format, purpose, size, digests)


async def _blob(context: Context, principal: Principal, blob_id: UUID, request: Mapping[str, Any]) -> Target:
    """One more replica of a blob, or its first one when an earlier upload failed."""
    with reachable():
        (view,) = await views.blobs(context.db, [blob_id])
    if view is None:
        raise errors.NotFound("No such blob.")
    purpose, size, digests = Purpose(request.get("purpose", "origin")), request.get("size"), request.get("digests", {})
    if view.blob.state is BlobState.QUEUED:
        earlier = await uploads.latest_of(context.db, blob_id)
        if earlier is None or earlier.project != principal.project:
            raise errors.NotFound("No such blob.")
        return Target(blob_id, earlier.image_id, earlier.format, purpose, size, digests)
    if view.blob.state is not BlobState.ACTIVE or not permit.may_read_blob(principal, view.images):
        raise errors.NotFound("No such blob.")
    if not permit.may_write_blob(principal, view.images):
        raise errors.Forbidden("Only a project with an image of this blob may add a replica.")
    if "format" in request:
        raise errors.Invalid("A blob has no format; its images have.", field="format", expected="none with `blob`")
    if size is not None and size != view.blob.size:
        raise errors.Conflict("The blob has another size.", field="size", expected=str(view.blob.size))
    for name, value in digests.items():
        if view.blob.digests.get(name, value) != value:
            raise errors.Conflict("The blob has another digest.", field=f"digests.{name}", expected=view.blob.digests[name])
    taken = frozenset(replica.store for replica in view.replicas if replica.state in (ReplicaState.ACTIVE, ReplicaState.PENDING))
    return Target(blob_id, None, None, purpose, view.blob.size, {**digests, **view.blob.digests}, taken=taken)


async def write(connection: Any, client: Client, target: Target, policy: vet.Policy) -> None:
    """Write what a new target needs, in the transaction that makes the upload: what is vetted waits from now on. Raises `Conflict`,
    `NotFound`."""
    principal, image = client.principal, target.new_image
    if target.new_blob:
        await blobs.insert(connection, Blob(target.blob_id, None, {}, BlobState.QUEUED))
    if target.image_id is None or target.format is None:
        return
    if image is not None:
        made = Image(
            id=target.image_id,
            name=image.name,
            project=principal.project,
            subject=principal.subject,
            visibility=image.visibility,
            status=ImageStatus.QUEUED,
            properties=image.properties,
            blobs={target.format: target.blob_id},
            vetting=vet.of_new(policy, image.visibility, principal.role),
        )
        await images.insert(connection, made)
    elif target.links:
        await images.attach(connection, target.image_id, target.format, target.blob_id)
    if image is None:
        await vetting.expect_bytes(connection, principal, target.image_id, policy)


@dataclass(frozen=True, slots=True)
class Known:
    """An active blob that is what a client is about to upload, and one of its replicas."""

    blob_id: UUID
    replica_id: UUID
    size: int
    digests: Digests


async def known(context: Context, client: Client, target: Target) -> Known | None:
    """The blob with these bytes, if there is one that this principal may read and get."""
    if not target.new_blob or target.size is None:
        return None
    for view in await uploads.with_proven_digest(context.db, target.size, target.digests):
        found = known_in(context, client, view, target.size, target.digests)
        if found is not None:
            return found
    return None


def known_in(context: Context, client: Client, view: views.BlobView, size: int, digests: Digests) -> Known | None:
    """The blob of `view`, if it is of that size and has none of the digests otherwise, and this principal may read and get it."""
    blob = view.blob
    if blob.state is not BlobState.ACTIVE or blob.size != size or not permit.may_read_blob(client.principal, view.images):
        return None
    if any(blob.digests.get(name, value) != value for name, value in digests.items()):
        return None
    for replica in view.replicas:
        store = context.memory.store(replica.store)
        if replica.state is not ReplicaState.ACTIVE or store is None or not store.enabled:
            continue
        if permit.may_see_store(client.principal, store):
            return Known(blob.id, replica.id, size, blob.digests)
    return None
