"""Where can I put this? The way of an upload ticket, and what can be done with it until it is committed.

Read downwards: `upload` resolves the target, looks whether the bytes are known, ranks the stores, writes the upload with its
places, takes the best place that can be taken, and answers. All of it can be repeated with the same id: what was done is
found, what is missing is done. An upload belongs to the principal that asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from broker import errors
from broker.catalog import blobs, leases, upload_ends, uploads
from broker.catalog import tickets as records
from broker.catalog.transaction import transaction
from broker.catalog.uploads import Destination, NewUpload, Upload
from broker.model import Blob, BlobState, Client, Operation, Store, UploadState, new_id
from broker.service import destinations, parts, places, targets
from broker.service.context import Context
from broker.service.instants import instant
from broker.service.summary import summary
from broker.service.targets import Known, Target
from broker.verify import Declaration, declaration_problems

MOST_TTLS = 7
"""However active, an upload ends after so many times `Policy.upload_ttl_seconds`."""


async def upload(context: Context, client: Client, request: Mapping[str, Any], ticket_id: UUID | None = None) -> dict[str, Any]:
    """An upload ticket. With the id of an earlier request it is that one's ticket, finished if a broker died over it.

    Raises `Forbidden`, `NotFound`, `Conflict`, `Invalid`, `NoDestination`, `TooLarge`, `Busy`, `QuotaExceeded`, `StoreUnavailable`, `Gone`.
    """
    id = ticket_id or new_id(context.clock())
    excluded: list[dict[str, str]] = []
    if await uploads.get(context.db, id) is None:
        try:
            excluded = await _write(context, client, request, id)
        except (errors.Conflict, asyncpg.UniqueViolationError):
            if await uploads.get(context.db, id) is None:
                raise
            # The same request came twice at once, and the other one wrote it.
    try:
        mine = await own_to_write(context, client, id)
        if mine.state is UploadState.OPEN and not mine.expired:
            if not mine.destinations:
                raise errors.NotFound("No such ticket.")
            await _take_one(context, client, mine, excluded)
            mine = await own(context, client, id)
    except (errors.NotFound, errors.Invalid):  # again twice at once, and the other one has found no place for it
        wait = context.policy.admit.min_retry_seconds
        raise errors.Busy("No store can take the upload now.", retry_after=wait, extra={"excluded": excluded}) from None
    await _record(context, client, mine)
    if excluded:
        await records.tell_why(context.db, {id: {"excluded": excluded}})
    context.metrics.ticket("upload", "granted" if mine.destinations else "known", _first_store(context, mine))
    return await _answer(context, mine, excluded, most=request.get("count", 1))


async def _write(context: Context, client: Client, request: Mapping[str, Any], id: UUID) -> list[dict[str, str]]:
    """Decide on a new upload and write it: without places if the bytes are known. Returns what was excluded."""
    target = await targets.resolve(context, client, request)
    known = await targets.known(context, client, target)
    if known is not None and await _link(context, client, id, target, known):
        return []
    ranked = await destinations.rank_stores(context, client, request, target)
    async with transaction(context.db) as connection:
        await targets.write(connection, client, target, context.policy.vetting)
        row = row_of(context, client, id, target, makes_image=target.new_image is not None)
        row = replace(row, carrier=request.get("carrier"), staged=request.get("staged", False))
        await uploads.create(connection, row, ranked.places[: max(request.get("count", 1), _TRIED)])
    if target.image_id is not None:
        context.memory.forget("image", str(target.image_id))
    return ranked.excluded


_TRIED = 5
"""So many of the ranked places are kept with an upload, more if the client asks: another one is taken when the best is full or down."""


def row_of(context: Context, client: Client, id: UUID, target: Target, *, makes_image: bool) -> NewUpload:
    """What is written of a new upload."""
    return NewUpload(
        id=id,
        blob_id=target.blob_id,
        image_id=target.image_id,
        format=target.format,
        purpose=target.purpose,
        project=client.principal.project,
        subject=client.principal.subject,
        size=target.size,
        digests=target.digests,
        makes_image=makes_image,
        ttl_seconds=context.policy.upload_ttl_seconds,
    )


async def _take_one(context: Context, client: Client, upload: Upload, excluded: list[dict[str, str]]) -> None:
    """Take the best place that can be taken, unless one is taken already. Without any, the upload is as if never asked for."""
    ranked = sorted(upload.destinations, key=lambda place: (place.state != "active", place.rank))
    last: errors.BrokerError = errors.NoDestination("No store can take this upload.")
    for place in ranked:
        store = context.memory.store_by_id(place.store_id)
        if store is None:
            continue
        try:
            await destinations.take(context, client, upload.id, store)
            return
        except (errors.Busy, errors.QuotaExceeded, errors.NoDestination) as error:
            excluded += error.extra.get("excluded", [])
            last = _worth_waiting(last, error)
        except errors.StoreUnavailable as error:
            excluded.append({"store": store.name, "reason": destinations.UNREACHABLE})
            last = error if not isinstance(last, errors.Busy) else last
    async with transaction(context.db) as connection:
        now = await uploads.get(connection, upload.id, lock=True)
        if now is not None and now.state is UploadState.OPEN and all(place.state == "standby" for place in now.destinations):
            await upload_ends.discard(connection, now)
    last.extra["excluded"] = excluded
    context.metrics.ticket("upload", last.type)
    raise last


def _worth_waiting(before: errors.BrokerError, error: errors.BrokerError) -> errors.BrokerError:
    """The refusal to tell of two: one that can be waited for, for all stores that can, and the sooner turn."""
    waits = errors.Busy | errors.QuotaExceeded
    if not isinstance(before, waits):
        return error
    if isinstance(error, waits):
        before.stores = {**before.stores, **error.stores}
        before.retry_after = min(before.retry_after or 0.0, error.retry_after or 0.0)
    return before


async def _link(context: Context, client: Client, id: UUID, target: Target, known: Known) -> bool:
    """Make the image of bytes that are there already. False when they went away meanwhile."""
    async with transaction(context.db) as connection:
        if (await blobs.lock(connection, [known.blob_id])).get(known.blob_id) is not BlobState.ACTIVE:
            return False
        linked = replace(target, blob_id=known.blob_id, size=known.size, digests=known.digests, new_blob=False)
        await targets.write(connection, client, linked, context.policy.vetting)
        await uploads.create(connection, row_of(context, client, id, linked, makes_image=linked.new_image is not None), [])
        await upload_ends.linked(connection, id, known.replica_id)
    context.memory.forget("blob", str(known.blob_id))
    context.memory.forget("image", str(target.image_id))
    return True


async def _record(context: Context, client: Client, upload: Upload) -> None:
    """Write the ticket's row, once, so that every verb of tickets finds it."""
    principal = client.principal
    loads = context.memory.write_loads
    recorded = []
    for place in upload.destinations:
        store = context.memory.store_by_id(place.store_id)
        if store is not None:
            at_once = loads[store.name].active if store.name in loads else 1
            told = place.estimate
            recorded.append(
                places.Recorded(
                    store.id, None, place.state == "active", max(1, at_once), told["seconds"], told["rate"], told["setup_seconds"],
                    told["success"], told["basis"], told["weight"],
                )
            )  # fmt: skip
    row = leases.TicketRow(
        Operation.UPLOAD, principal.project, principal.subject, client.instance, client.address, client.site, upload.image_id,
        upload.blob_id, upload.size,
        orjson.Fragment(orjson.dumps([list(place) for place in recorded])), context.policy.upload_ttl_seconds * MOST_TTLS,
    )  # fmt: skip
    await context.grants([leases.GrantRequest(str(upload.id), row, [], False)])


# -- what can be done with it


async def sign_parts(context: Context, client: Client, ticket: UUID, request: Mapping[str, Any]) -> dict[str, Any]:
    """URLs for parts, bound to what is known of them by now.

    Raises `NotFound`, `Forbidden`, `Gone`, `Invalid`, `Conflict`, `StoreUnavailable`.
    """
    mine = destinations.open_(await own_to_write(context, client, ticket))
    size = request.get("size")
    if size is not None and size != mine.size:
        mine = await _bind_size(context, mine, size)
    store, place = active_place(context, mine, request.get("store"))
    if place.part_size is None or place.multipart_id is None:
        raise errors.Conflict("This upload goes in one PUT; refresh the ticket for another URL.")
    digests = {int(number): told for number, told in request.get("digests", {}).items()}
    try:
        await destinations.lease(context, client, mine, place, store)
    except errors.Busy as error:
        told = error.retry_after
        raise errors.Conflict("The lease has ended and the store is at its limit; refresh the ticket later.", retry_after=told) from None
    mine = await _touch(context, client, mine)
    return {"store": store.name, "parts": await parts.sign(context, mine, place, store, request["numbers"], digests)}


async def activate_destination(context: Context, client: Client, ticket: UUID, request: Mapping[str, Any]) -> dict[str, Any]:
    """Take a standby place. Raises `NotFound`, `Gone`, `Invalid`, `Busy`, `NoDestination`, `StoreUnavailable`."""
    mine = destinations.open_(await own_to_write(context, client, ticket))
    store = context.memory.store(request["store"])
    if store is None or mine.destination(store.id) is None:
        raise errors.Invalid("The ticket names no such store.", field="store", expected="a store of the ticket's destinations")
    await destinations.take(context, client, mine.id, store)
    return await _answer(context, await _touch(context, client, mine), [], most=len(mine.destinations))


async def refresh_upload(context: Context, client: Client, ticket: UUID) -> dict[str, Any]:
    """The same places with new URLs, for parts those that have not arrived. Raises `NotFound`, `Gone`, `Busy`, `StoreUnavailable`."""
    mine = await own_to_write(context, client, ticket)
    if mine.state is UploadState.COMMITTED or mine.state is UploadState.COMMITTING:
        return await _answer(context, mine, [])
    mine = destinations.open_(mine)
    for place in mine.destinations:
        store = context.memory.store_by_id(place.store_id)
        if store is not None and place.state == "active":
            await destinations.take(context, client, mine.id, store)
    return await _answer(context, await _touch(context, client, mine), [], most=len(mine.destinations))


async def upload_state(context: Context, client: Client, ticket: UUID) -> dict[str, Any]:
    """The upload as it stands, with the parts that the stores have seen. Raises `NotFound`, `StoreUnavailable`."""
    mine = await own(context, client, ticket)
    held = {lease.store_id: lease.expires_at for lease in await leases.held(context.db, ticket)}
    shown_places: list[dict[str, Any]] = []
    for place in mine.destinations:
        store = context.memory.store_by_id(place.store_id)
        if store is None:
            continue
        shown: dict[str, Any] = {"store": store.name, "state": place.state}
        if store.id in held:
            shown["lease_expires_at"] = instant(held[store.id])
        if place.part_size is not None:
            shown["part_size"] = place.part_size
            if mine.state is UploadState.OPEN and place.state == "active":
                shown["seen"] = [{"number": part.number, "size": part.size} for part in await seen_parts(context, store, place)]
        shown_places.append(shown)
    answer = await _head(context, mine)
    answer["places"] = shown_places
    if mine.problem:
        answer["problem"] = mine.problem
    return answer


async def release_upload(context: Context, client: Client, ticket: UUID) -> None:
    """Abandon the upload now; what it wrote is removed. One that has ended stays as it is. Raises `NotFound`, `Conflict`."""
    await own(context, client, ticket)
    async with transaction(context.db) as connection:
        mine = await uploads.get(connection, ticket, lock=True)
        if mine is None:
            raise errors.NotFound("No such ticket.")
        if mine.state is UploadState.COMMITTING and not mine.silent:
            raise errors.Conflict("The upload is being committed.", retry_after=1.0)
        if mine.state in (UploadState.OPEN, UploadState.COMMITTING):
            await upload_ends.abandoned(connection, mine)
    await records.release(context.db, ticket)
    await leases.release(context.db, [(ticket, None)])
    forget(context, mine)


def forget(context: Context, upload: Upload) -> None:
    """Read one's own write."""
    context.memory.forget("blob", str(upload.blob_id))
    if upload.image_id is not None:
        context.memory.forget("image", str(upload.image_id))


def active_place(context: Context, upload: Upload, name: str | None) -> tuple[Store, Destination]:
    """The active place on the store called `name`; without a name, the one that is active. Raises `Invalid`."""
    found = []
    for place in upload.destinations:
        store = context.memory.store_by_id(place.store_id)
        if store is not None and place.state == "active" and name in (None, store.name):
            found.append((store, place))
    if len(found) != 1:
        raise errors.Invalid("Name the store that the bytes are on.", field="store", expected="a store of the ticket's active destinations")
    return found[0]


async def seen_parts(context: Context, store: Store, place: Destination) -> Sequence[Any]:
    """The parts that the store has; none when it does not know the multipart upload. Raises `StoreUnavailable`."""
    if place.multipart_id is None:
        return []
    try:
        return await context.memory.driver(store.name).parts(place.staging_key, place.multipart_id)
    except errors.Gone:
        return []


# -- its parts


async def own(context: Context, client: Client, id: UUID) -> Upload:
    """The client's own upload. Raises `NotFound`."""
    found = await uploads.get(context.db, id)
    principal = client.principal
    if found is None or (found.project, found.subject) != (principal.project, principal.subject):
        raise errors.NotFound("No such ticket.")
    return found


async def own_to_write(context: Context, client: Client, id: UUID) -> Upload:
    """The client's own upload, which opens nothing more once the role that it was given by is gone. Raises `NotFound`, `Forbidden`."""
    found = await own(context, client, id)
    if not client.principal.may_write:
        raise errors.Forbidden("The role reader may not upload.")
    return found


async def _touch(context: Context, client: Client, upload: Upload) -> Upload:
    """Note activity. Raises `Gone`, `Conflict`."""
    ttl = context.policy.upload_ttl_seconds
    if await uploads.touch(context.db, upload.id, ttl, ttl * MOST_TTLS) is None:
        destinations.open_(await own(context, client, upload.id))
    return await own(context, client, upload.id)


async def _bind_size(context: Context, upload: Upload, size: int) -> Upload:
    """Take over the size of an upload that began without one. Raises `Conflict`, `NoDestination`."""
    targets.complain(declaration_problems(Declaration(size=size)))
    async with transaction(context.db) as connection:
        current = destinations.open_(await uploads.get(connection, upload.id, lock=True))
        if current.size is not None and current.size != size:
            raise errors.Conflict("Another size was declared before.", field="size", expected=str(current.size))
        if current.size is None and not await uploads.bind_size(connection, current, size):
            raise errors.NoDestination("The store has no room for that size.", extra={"excluded": []})
        bound = await uploads.get(connection, upload.id)
    return destinations.open_(bound)


def _first_store(context: Context, upload: Upload) -> str:
    for place in upload.destinations:
        store = context.memory.store_by_id(place.store_id)
        if place.state == "active" and store is not None:
            return store.name
    return ""


async def _head(context: Context, upload: Upload) -> dict[str, Any]:
    """What a ticket and its state have in common."""
    state = "expired" if upload.state is UploadState.OPEN and upload.expired else upload.state.value
    blob_state = BlobState.ACTIVE if upload.state is UploadState.COMMITTED else BlobState.QUEUED
    head: dict[str, Any] = {
        "id": str(upload.id),
        "operation": "upload",
        "state": state,
        "blob": summary(Blob(upload.blob_id, upload.size, upload.digests, blob_state)),
        "expires_at": instant(upload.expires_at),
    }
    if upload.image_id is not None:
        head["image"] = str(upload.image_id)
    if upload.format is not None:
        head["format"] = upload.format
    return head


async def _answer(context: Context, upload: Upload, excluded: Sequence[dict[str, str]], most: int = 1) -> dict[str, Any]:
    """The ticket: active places with URLs, and so many standby ones that there are `most` in all."""
    answer = await _head(context, upload)
    shown: list[dict[str, Any]] = []
    if upload.state is UploadState.OPEN:
        ranked = sorted(upload.destinations, key=lambda place: (place.state != "active", place.rank))
        for place in ranked:
            store = context.memory.store_by_id(place.store_id)
            if store is not None and (place.state == "active" or (place.state == "standby" and len(shown) < most)):
                shown.append(await _show(context, upload, place, store, len(shown) + 1))
    answer["destinations"] = shown
    answer["excluded"] = list(excluded)
    if upload.state is UploadState.COMMITTED and not upload.destinations:
        answer["known"] = True
    return answer


async def _show(context: Context, upload: Upload, place: Destination, store: Store, rank: int) -> dict[str, Any]:
    """One destination as JSON, signed if it is active."""
    told = place.estimate
    row = places.Place(
        store.name, store.site, store.kind, place.staging_key, place.state, told["seconds"], told["rate"], told["setup_seconds"],
        told["success"], told["basis"], told["weight"],
    )  # fmt: skip
    if place.state == "active" and place.part_size is None:
        return places.render(row, rank, await parts.sign_single(context, upload, place, store))
    shown = places.render(row, rank, None) | {"expires_at": instant(upload.expires_at)}
    if place.part_size is not None:
        shown["part_size"] = place.part_size
        if upload.size is not None:
            shown["part_count"] = parts.count(upload.size, place.part_size)
        if place.state == "active" and place.multipart_id is not None:
            seen = [part.number for part in await seen_parts(context, store, place)]
            numbers = parts.first_numbers(upload, place, seen, context.policy.first_parts)
            shown["parts"] = await parts.sign(context, upload, place, store, numbers, {})
    return shown
