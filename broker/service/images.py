"""Images over the API.

Rules
- What a principal may not see does not exist (`broker.permit`). An id that is taken is a conflict for everyone alike, and so is that of
  an image that had bytes and was deleted: hypervisors keep images by their ids (OSSN-0075). Administrators may give it again.
- Only administrators publish, where public images need no approval, deactivate and reactivate (M16), and give an image to another
  project. What a change means for an image's approval is decided in `broker.vet`; to set the status of one that waits for it, or was
  refused it, is a decision on it.
- A protected image is deleted by nobody; whoever may change it takes the protection away first.
- A blob can be named only by who may read it: nobody gets at bytes by guessing a blob's id. One whose bytes are still to come can be
  named only by who may bring them: else others would say what they are.
- Deleting an image deletes the bytes that no other image needs, where that right was delegated (invariant 7); other replicas
  are forgotten and their bytes stay. Who deletes is told what stays on the stores that he may know, and of no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

from broker import errors, formats, permit, vet
from broker.catalog import blobs, image_search, images, replicas, views
from broker.catalog.connect import reachable
from broker.catalog.image_search import Search
from broker.catalog.replicas import ReplicaRecord
from broker.catalog.transaction import transaction
from broker.model import Blob, BlobState, Client, Image, ImageStatus, MemberStatus, ReplicaState, Role, Vetting, Visibility
from broker.service import vetting, visible
from broker.service.context import Context
from broker.service.idempotency import Claim
from broker.service.instants import instant
from broker.service.listing import Versioned, id_marker, limit_of, render_page
from broker.service.summary import summary

MAX_PROPERTIES = 128
"""How many properties an image may have; the contract bounds each request by the same number."""

_KEPT = "the right to delete it was not delegated to the broker"


async def list_images(context: Context, client: Client, query: Mapping[str, Any]) -> dict[str, Any]:
    """A page of images, by id. Raises `Invalid` for a marker that is none."""
    principal = client.principal
    limit = limit_of(query)
    found = await images.page(
        context.db,
        project=None if principal.role is Role.ADMIN else principal.project,
        limit=limit + 1,
        after=id_marker(query),
        name=query.get("name"),
        visibility=Visibility(query["visibility"]) if "visibility" in query else None,
        status=ImageStatus(query["status"]) if "status" in query else None,
        owner=query.get("project"),
        format=query.get("format"),
        member_status=_answered(query),
    )
    known = await blobs.summaries(context.db, {blob for image in found for blob in image.blobs.values()})
    return render_page("images", found, limit, lambda image: _render(image, known), lambda image: str(image.id))


def _answered(query: Mapping[str, Any]) -> MemberStatus | None:
    """What must have been said to images that are shared with who asks; ``None``: anything."""
    given = query.get("member_status", MemberStatus.ACCEPTED.value)
    return None if given == "all" else MemberStatus(given)


async def search_images(context: Context, client: Client, wanted: Search) -> dict[str, Any]:
    """A page of images that fit a search, in its order, as `list_images` shows them; ``next`` when there are more.

    Raises `Invalid` for a marker that is no image this principal may list.
    """
    principal = client.principal
    more = replace(wanted, limit=wanted.limit + 1)
    ids = await image_search.search(context.db, more, principal.project, everything=principal.role is Role.ADMIN)
    if ids is None:
        raise errors.Invalid("No such image.", field="marker", expected="the id of the last image of the page before")
    with reachable():
        found = [image for image in await images.get_many(context.db, ids) if image is not None]
    known = await blobs.summaries(context.db, {blob for image in found for blob in image.blobs.values()})
    return render_page("images", found, wanted.limit, lambda image: _render(image, known), lambda image: str(image.id))


async def create_image(context: Context, client: Client, request: Mapping[str, Any], claim: Claim) -> Versioned:
    """Name an image. Raises `Forbidden`, `NotFound` (a blob that cannot be read) and `Conflict` (the id is taken)."""
    principal = client.principal
    visibility = Visibility(request.get("visibility", "private"))
    if not principal.may_write:
        raise errors.Forbidden("Readers make no images.")
    _require_publisher(context, client, visibility)
    id = UUID(request["id"]) if "id" in request else claim.id
    formats = {format: UUID(blob) for format, blob in request.get("blobs", {}).items()}
    wanted = Image(
        id=id,
        name=request["name"],
        project=_owner(client, request, principal.project),
        subject=principal.subject,
        visibility=visibility,
        status=ImageStatus.QUEUED,
        properties=request.get("properties", {}),
        blobs=formats,
        **_described(request),
        vetting=vet.of_new(context.policy.vetting, visibility, principal.role),
    )
    try:
        async with transaction(context.db) as connection:
            await _require_readable(connection, client, formats)
            image = await images.insert(connection, wanted)
            if ("id" in request or claim.repeated) and principal.role is not Role.ADMIN:
                await images.require_unused(connection, id)
    except errors.Conflict:
        known = await images.get(context.db, id) if claim.repeated else None
        if known is None or (known.project, known.subject, known.name) != (wanted.project, wanted.subject, wanted.name):
            raise
        return await _shown(context, known)
    context.memory.forget_image(id, formats.values())
    return await _shown(context, image)


async def get_image(context: Context, client: Client, id: UUID) -> Versioned:
    """One image. Raises `NotFound`."""
    return await _shown(context, await visible.image(context, client, id))


async def change_image(context: Context, client: Client, id: UUID, version: int | None, request: Mapping[str, Any]) -> Versioned:
    """Apply a merge patch; a property set to ``None`` is removed.

    Raises `NotFound`, `Forbidden`, `PreconditionFailed`, `Invalid` (too many properties), and `Conflict` for ``active`` while no blob is.
    """
    image = await _changeable(context, client, id, version)
    visibility = Visibility(request.get("visibility", image.visibility))
    if visibility is not image.visibility:
        _require_publisher(context, client, visibility)
    properties = {name: value for name, value in {**image.properties, **request.get("properties", {})}.items() if value is not None}
    if len(properties) > MAX_PROPERTIES:
        raise errors.Invalid("Too many properties.", field="properties", expected=f"at most {MAX_PROPERTIES} in all")
    deactivated = _deactivated(client, image, request)
    if image.is_withheld and request.get("status", image.status) != image.status:
        image = await vetting.decide(context, client, image, Vetting.REJECTED if deactivated else Vetting.APPROVED)
    changed = replace(
        image,
        name=request.get("name", image.name),
        project=_owner(client, request, image.project),
        visibility=visibility,
        properties=properties,
        **_described(request),
    )
    changed = replace(changed, vetting=vet.of_changed(context.policy.vetting, image, changed, client.principal.role))
    image = await images.update(context.db, changed, image.version, deactivated=deactivated)
    context.memory.forget_image(id, image.blobs.values())
    return await _shown(context, image)


async def delete_image(context: Context, client: Client, id: UUID, version: int | None) -> dict[str, Any]:
    """Delete an image and what only it needs. Raises `NotFound`, `Forbidden` (a protected one, too) and `PreconditionFailed`."""
    image = await _changeable(context, client, id, version)
    if image.protected:
        raise errors.Forbidden("The image is protected and cannot be deleted.", field="protected", expected="false, set before")
    deleting: list[ReplicaRecord] = []
    kept: list[ReplicaRecord] = []
    async with transaction(context.db) as connection:
        await blobs.lock(connection, image.blobs.values())
        await images.delete(connection, id, image.version)
        unneeded = await blobs.retire_unneeded(connection, list(image.blobs.values()))
        # By store, so that two who delete lock the stores' space in the same order.
        for record in sorted(await replicas.of_blobs(connection, unneeded), key=lambda record: record.store_id):
            if record.replica.state is ReplicaState.DELETING:
                continue
            if record.replica.deletable:
                await replicas.start_deleting(connection, record, None, f"image {id} was deleted")
                deleting.append(record)
            else:
                await replicas.forget(connection, record, None)
                kept.append(record)
    context.memory.forget_image(id, image.blobs.values())
    return {
        "id": str(id),
        "deleting": [_location(record) for record in _known(client, deleting)],
        "kept": [_location(record) | {"reason": _KEPT} for record in _known(client, kept)],
    }


def _require_publisher(context: Context, client: Client, visibility: Visibility) -> None:
    if visibility is Visibility.PUBLIC and not permit.may_publish(client.principal, context.policy.vetting.visibilities):
        raise errors.Forbidden("Only administrators make images public.", field="visibility", expected="private, shared or community")


def _known(client: Client, records: Iterable[ReplicaRecord]) -> Iterable[ReplicaRecord]:
    """Those on stores that this principal may know (M13)."""
    return (record for record in records if permit.may_see_store(client.principal, record))


def main_format(shown: Mapping[str, Any]) -> str | None:
    """The format that stands for an image, as `get_image` shows it; ``None`` while it has no bytes."""
    held = [format for format, blob in shown["blobs"].items() if blob["state"] == BlobState.ACTIVE]
    return formats.main(shown["disk_format"], held)


def _location(record: ReplicaRecord) -> dict[str, Any]:
    return {"store": record.replica.store, "key": record.replica.key}


async def _changeable(context: Context, client: Client, id: UUID, version: int | None) -> Image:
    """The image, if this principal may change it and it is at that version. Raises `NotFound`, `Forbidden`, `PreconditionFailed`."""
    image = await visible.image(context, client, id)
    if not permit.may_change_image(client.principal, image.project):
        raise errors.Forbidden("This image belongs to another project, or your role may not write.")
    if version is not None and image.version != version:
        raise errors.PreconditionFailed("The image has changed since it was read.")
    return image


_DESCRIBING = ("protected", "hidden", "min_disk", "min_ram", "disk_format", "container_format")


def _described(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says of an image that is kept as it comes."""
    described = {name: request[name] for name in _DESCRIBING if name in request}
    if "tags" in request:
        described["tags"] = tuple(request["tags"])
    return described


def _owner(client: Client, request: Mapping[str, Any], otherwise: str) -> str:
    """The project that an image is to belong to. Raises `Forbidden`."""
    project: str = request.get("project") or otherwise
    if project != otherwise and client.principal.role is not Role.ADMIN:
        raise errors.Forbidden("Only administrators say whose an image is.", field="project", expected=otherwise)
    return project


def _deactivated(client: Client, image: Image, request: Mapping[str, Any]) -> bool:
    """Whether the image will be deactivated. Raises `Forbidden`, and `Conflict` for ``active`` while no blob is."""
    now = image.status is ImageStatus.DEACTIVATED
    wanted = ImageStatus(request.get("status", image.status))
    if wanted is image.status:
        return now
    if image.status is ImageStatus.QUEUED and wanted is ImageStatus.ACTIVE:
        raise errors.Conflict("The image has no verified bytes yet.", field="status", expected="an upload, or a registered replica, first")
    if client.principal.role is not Role.ADMIN:
        raise errors.Forbidden("Only administrators deactivate and reactivate images.", field="status")
    return wanted is ImageStatus.DEACTIVATED


async def _require_readable(connection: Any, client: Client, formats: Mapping[str, UUID]) -> None:
    """Lock the blobs. Raises `NotFound` for one that does not exist, is being deleted or may not be named."""
    states = await blobs.lock(connection, formats.values())
    seen = await views.blobs(connection, list(formats.values()))
    for format, view in zip(formats, seen, strict=True):
        if view is None or not permit.may_name_blob(client.principal, view.images, states.get(view.blob.id)):
            raise errors.NotFound("No such blob.", field=f"blobs.{format}", expected="a blob that you may read")


async def _shown(context: Context, image: Image) -> Versioned:
    known = await blobs.summaries(context.db, image.blobs.values())
    return Versioned(_render(image, known), image.version)


def _render(image: Image, known: Mapping[UUID, Blob]) -> dict[str, Any]:
    shown = {
        "id": str(image.id),
        "name": image.name,
        "project": image.project,
        "visibility": image.visibility.value,
        "status": image.status.value,
        "properties": dict(image.properties),
        "tags": list(image.tags),
        "protected": image.protected,
        "hidden": image.hidden,
        "min_disk": image.min_disk,
        "min_ram": image.min_ram,
        "disk_format": image.disk_format,
        "container_format": image.container_format,
        "blobs": {format: summary(known[blob]) for format, blob in image.blobs.items() if blob in known},
        "created_at": instant(image.created_at),
        "updated_at": instant(image.updated_at),
    }
    return shown if image.vetting is None else shown | {"vetting": image.vetting.value}
