"""Copies that agents make: asked for by who may write the blob, taken one by one by agents, and looked at before they count.

Rules
- The broker moves no byte. An agent (`broker agent`) takes a copy, reads the blob by an ordinary ticket and writes it by an
  ordinary upload, whose commit looks at the store; what it says of the end only closes the entry.
- A copy is asked for once: the same blob to the same store is the same copy while it is under way. Whoever has an image of the blob
  sees it as the copy of that image, whoever asked for it.
- The replica belongs to the project that asked, which may remove it again, and not to the agent's.
- What one may not know of (an image, a private store) is not told, in lists neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

from broker import errors, permit
from broker.catalog import copies, replicas, views
from broker.catalog.connect import reachable
from broker.catalog.copies import Copy
from broker.model import Client, Image, Purpose, ReplicaState, Store
from broker.service import replicas as replica_service
from broker.service import visible
from broker.service.blobs import readable
from broker.service.context import Context
from broker.service.idempotency import Claim
from broker.service.instants import instant
from broker.service.listing import id_marker, limit_of, render_page
from broker.service.locations import main_format


async def list_copies(context: Context, client: Client, query: Mapping[str, Any]) -> dict[str, Any]:
    """A page of copies, by id. Raises `Invalid` for a marker that is none."""
    principal = client.principal
    limit = limit_of(query)
    found = await copies.page(
        context.db,
        project=None if principal.sees_private_stores else principal.project,
        private=principal.sees_private_stores,
        limit=limit + 1,
        after=id_marker(query),
        image=UUID(query["image"]) if "image" in query else None,
        state=query.get("state"),
        purpose=Purpose(query["purpose"]) if "purpose" in query else None,
    )
    return render_page("copies", found, limit, render, lambda copy: str(copy.id))


async def create_copy(context: Context, client: Client, request: Mapping[str, Any], claim: Claim) -> dict[str, Any]:
    """Ask for a copy of an image's bytes to a store.

    Raises `NotFound` (the image, its format, the store: not there, or not for this principal), `Forbidden`, `Conflict` (it is there).
    """
    if claim.repeated and (known := await copies.get(context.db, claim.id)) is not None:
        return render(known)
    image = await visible.image(context, client, UUID(request["image"]))
    purpose = Purpose(request.get("purpose", "origin"))
    return render(await ask(context, client, image, request["store"], purpose, id=claim.id, format=request.get("format")))


async def ask(context: Context, client: Client, image: Image, store: str, purpose: Purpose, *, id: UUID, format: str | None = None) -> Copy:
    """Ask for a copy of a visible image. Raises what `create_copy` raises."""
    blob = image.blobs.get(format or await main_format(context, image))
    if blob is None:
        raise errors.NotFound("The image has no such bytes.", field="format", expected="one of " + ", ".join(sorted(image.blobs)))
    view = await readable(context, client, blob)
    if not permit.may_write_blob(client.principal, view.images):
        raise errors.Forbidden("No image of your project has this blob, or your role may not write.")
    target = replica_service.writable_store(context, client, store, True)
    found = await replicas.of_blobs(context.db, [blob])
    if any(record.replica.store == target.name and record.replica.state is ReplicaState.ACTIVE for record in found):
        raise errors.Conflict("The store has this image already.", field="store", expected="another store")
    principal = client.principal
    made = await copies.insert(
        context.db, id, image=image.id, blob=blob, store_id=target.id, purpose=purpose, project=principal.project, subject=principal.subject
    )
    return replace(made, image_id=image.id)  # another project may have asked for it, for an image that this one may not know


async def get_copy(context: Context, client: Client, id: UUID) -> dict[str, Any]:
    """One copy. Raises `NotFound`."""
    return render(await _known(context, client, id))


async def cancel_copy(context: Context, client: Client, id: UUID) -> None:
    """Take a request back, or forget how it went. An agent that is at it is told with its next report. Raises `NotFound`, `Forbidden`."""
    copy = await _known(context, client, id)
    if not permit.may_change_image(client.principal, copy.project):
        raise errors.Forbidden("Another project asked for this copy, or your role may not write.")
    await copies.forget(context.db, [copy.id])


async def take_copy(context: Context, client: Client, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The next copy for this agent, if there is one."""
    found = await copies.take(context.db, client.instance, request.get("stores", ()))
    return None if found is None else render(found)


async def report_copy(context: Context, client: Client, id: UUID, request: Mapping[str, Any]) -> dict[str, Any]:
    """How a copy goes or went. ``ok`` counts only when the store has a replica.

    Raises `NotFound`, `Gone` (taken back, or taken by another agent), `Conflict` (nothing was committed at the store).
    """
    copy = await _known(context, client, id)
    outcome, bytes = request["outcome"], request.get("bytes", 0)
    if outcome == "ok":
        found = await replicas.of_blobs(context.db, [copy.blob_id])
        if not any(record.replica.store == copy.store and record.replica.state is ReplicaState.ACTIVE for record in found):
            raise errors.Conflict("The store has no replica of this blob: commit the upload first.", field="outcome")
    state = {"ok": copies.DONE, "failed": copies.FAILED, "running": copies.RUNNING}[outcome]
    if not await copies.report(context.db, id, request["turn"], state=state, bytes=bytes, problem=request.get("problem")):
        raise errors.Gone("The copy is another agent's now, or has ended.")
    if outcome == "ok":
        await copies.hand_over(context.db, copy, client.principal.project)
    return render(await _known(context, client, id))


def targets(context: Context, client: Client) -> list[Store]:
    """The stores to which this principal may have copies made, by name."""
    found = (store for store in context.memory.stores().values() if permit.may_write_store(client.principal, store))
    return sorted(found, key=lambda store: store.name)


async def _known(context: Context, client: Client, id: UUID) -> Copy:
    """The copy, if this principal may know of it. Raises `NotFound`."""
    copy, principal = await copies.get(context.db, id), client.principal
    if copy is None or not permit.may_see_store(principal, copy):
        raise errors.NotFound("No such copy.")
    if copy.project == principal.project or principal.sees_private_stores:
        return copy
    with reachable():
        (view,) = await views.blobs(context.db, [copy.blob_id])
    own = [] if view is None else [image.id for image in view.images if image.project == principal.project]
    if not own:
        raise errors.NotFound("No such copy.")
    return copy if copy.image_id in own else replace(copy, image_id=own[0])


def render(copy: Copy) -> dict[str, Any]:
    """A copy as JSON."""
    shown: dict[str, Any] = {
        "id": str(copy.id),
        "image": str(copy.image_id),
        "blob": str(copy.blob_id),
        "store": copy.store,
        "purpose": copy.purpose.value,
        "state": copy.state,
        "turn": copy.attempts,
        "bytes": copy.bytes,
        "created_at": instant(copy.created_at),
        "updated_at": instant(copy.updated_at),
    }
    if copy.size is not None:
        shown["size"] = copy.size
    return shown if copy.problem is None else shown | {"problem": copy.problem}
