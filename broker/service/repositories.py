"""Git LFS: where a repository's objects can be got, where they can be put, and when they are there.

An object is an image of the project with one blob, named by its SHA-256 within the repository. Repositories need not be made: one that has
no object cannot be told from one that is not there, or that may not be seen.

Rules
- Getting and putting are the verbs of tickets, for a whole batch at once. git-lfs says nothing of how it went; who asks for an object
  again while its transfer may last yet (`broker.service.repeats`) is taken to have failed, and is sent elsewhere where that is possible.
- What is declared is a size and the SHA-256, at once and for all. So only such stores take an object as can prove just that.
- Bytes that a principal may read already, in any of its repositories, need not be sent again; for others the answer is that of an
  ordinary upload.
- Objects belong to the project in the path, and only its own members put some there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

from broker import errors, vet
from broker.catalog import beginnings, blobs, leases, repositories, views
from broker.catalog.connect import reachable
from broker.catalog.repositories import Kept, UnderWay
from broker.catalog.transaction import transaction
from broker.model import BlobState, Client, Digests, Handle, Image, ImageStatus, Purpose, Visibility, new_id, new_ids
from broker.service import commit, negotiate, targets, upload, upload_many, visible
from broker.service.asked import parsed
from broker.service.context import Context
from broker.service.targets import DEFAULT_FORMAT, Target
from broker.service.upload_many import Begun, Wanted
from broker.verify import Declaration, declaration_problems

AT_ONCE = 8
"""Objects that git-lfs moves at the same time (``lfs.concurrenttransfers``)."""

LOOK_SECONDS = 3.0
"""How long it is looked whether an object that is to be put again has arrived meanwhile."""


class Repository(NamedTuple):
    """A project's repository, by name."""

    project: str
    name: str


class Wish(NamedTuple):
    """An object by its SHA-256 and size, as a pointer file has it."""

    oid: str
    size: int


Result = Handle | None | errors.BrokerError
"""What moves the bytes; ``None`` when there is nothing to be done; or why nothing can be."""


async def fetch(context: Context, client: Client, repository: Repository, wishes: Sequence[Wish]) -> list[Result]:
    """What reads each object. Raises `Busy` or `QuotaExceeded` for all of them when one has to wait, `Unavailable`."""
    kept = await _find(context, client, repository, [wish.oid for wish in wishes])
    results: list[Result] = [_unreadable(kept.get(wish.oid), wish) for wish in wishes]
    left = [index for index, result in enumerate(results) if result is None]
    images = [kept[wishes[index].oid] for index in left]
    again = [context.repeats.earlier(client.name, str(each.blob_id), context.clock()) for each in images]
    tickets = await _tickets(context, client, images, again)
    retried = [i for i, ticket in enumerate(tickets) if again[i] is not None and isinstance(ticket, errors.NoSource)]
    if retried:  # there is no other place
        for i, ticket in zip(retried, await _tickets(context, client, [images[i] for i in retried], [None] * len(retried)), strict=True):
            tickets[i] = ticket
    await _turn_away(context, client, images, tickets)
    for index, ticket in zip(left, tickets, strict=True):
        results[index] = _like_none(ticket) if isinstance(ticket, errors.BrokerError) else _handle(ticket)
    return results


async def send(context: Context, client: Client, repository: Repository, wishes: Sequence[Wish]) -> list[Result]:
    """What writes each object. Raises `Busy`, `QuotaExceeded`, `Forbidden`, `NotFound` for all of them, `Unavailable`."""
    _require_own(client, repository)
    results: dict[Wish, Result] = {wish: _problem(wish) for wish in wishes}
    sizes: dict[str, int] = {}
    for wish in wishes:
        if sizes.setdefault(wish.oid, wish.size) != wish.size:
            results[wish] = errors.Invalid("The object is named twice.", field="size", expected="one size for one object")
    pending = [wish for wish, result in results.items() if result is None]
    for _ in range(2):  # what another request has begun to make meanwhile is found the second time
        found = await _send(context, client, repository, pending)
        results |= found
        pending = [wish for wish, result in found.items() if isinstance(result, errors.Conflict) and result.retry_after is not None]
        if not pending:
            break
    return [results[wish] for wish in wishes]


async def confirm(context: Context, client: Client, repository: Repository, wish: Wish) -> None:
    """An object was put: look, and make it one. Raises what `commit.commit` raises, `NotFound` when it was not put, `Forbidden`."""
    _require_own(client, repository)
    kept = (await _find(context, client, repository, [wish.oid])).get(wish.oid)
    if kept is None or kept.blob_id is None:
        raise errors.NotFound("No such object.")
    problem = _unreadable(kept, wish)
    if problem is not None and kept.state is not BlobState.QUEUED:
        raise problem
    own = await _under_way(context, client, [kept])
    if not await _arrived(context, client, own, wish) and not kept.is_held:
        raise errors.NotFound("The object has not been uploaded.")


# -- what is there


async def _find(context: Context, client: Client, repository: Repository, oids: Sequence[str]) -> dict[str, Kept]:
    sees_private = client.principal.sees_private_stores
    return await repositories.find(context.db, repository.project, repository.name, oids, sees_private=sees_private)


def _unreadable(kept: Kept | None, wish: Wish) -> errors.BrokerError | None:
    """Why there is nothing to get, as far as the object itself tells."""
    if kept is None or kept.blob_id is None or kept.state is BlobState.QUEUED:
        return _NONE
    if kept.state is BlobState.DELETING:
        return errors.Gone("The object has been deleted.")
    if kept.size != wish.size:
        return errors.Invalid("The object has another size.", field="size", expected="the size in its pointer file")
    return None


_NONE = errors.NotFound("No such object.")


def _like_none(error: errors.BrokerError) -> errors.BrokerError:
    """What may not be seen answers as what is not there."""
    return _NONE if isinstance(error, errors.NotFound) else error


def _require_own(client: Client, repository: Repository) -> None:
    principal = client.principal
    if principal.project != repository.project:
        raise errors.NotFound("No such repository.")
    if not principal.may_write:
        raise errors.Forbidden("The role reader may not upload.")


def _problem(wish: Wish) -> errors.BrokerError | None:
    problems = declaration_problems(Declaration(wish.size, _digests(wish)))
    return errors.Invalid("The declaration cannot be right.", field=problems[0].field, expected=problems[0].expected) if problems else None


def _digests(wish: Wish) -> Digests:
    return {"sha256": wish.oid}


# -- getting


async def _tickets(context: Context, client: Client, images: Sequence[Kept], avoid: Sequence[str | None]) -> list[Any]:
    """A ticket as JSON or an error for each, in one trip."""
    ids = new_ids(len(images), context.clock())
    asked = []
    for id, image, store in zip(ids, images, avoid, strict=True):
        elsewhere = [store] if store is not None and visible.store(context, client, store) is not None else []
        asked.append((id, {"image": str(image.image_id), "count": 1, **({"avoid": elsewhere} if elsewhere else {})}))
    tickets = await negotiate.download_many(context, client, asked, at_once=AT_ONCE) if asked else []
    return [ticket if isinstance(ticket, errors.BrokerError) else parsed(ticket) for ticket in tickets]


async def _turn_away(context: Context, client: Client, images: Sequence[Kept], tickets: Sequence[Any]) -> None:
    """When one object has to wait, all do: git-lfs takes an error of a single object for final. Raises `Busy`, `QuotaExceeded`."""
    waits = [ticket for ticket in tickets if isinstance(ticket, errors.Busy | errors.QuotaExceeded)]
    given = [ticket for ticket in tickets if not isinstance(ticket, errors.BrokerError)]
    if not waits or (given and not any(isinstance(ticket, errors.Busy) for ticket in waits)):
        return  # a quota that lets in a part of the batch will never let in the whole
    await leases.release(context.db, [(UUID(ticket["id"]), None) for ticket in given])
    for image in images:
        if image.blob_id is not None:
            context.repeats.settled(client.name, image.blob_id)
    longest = max(waits, key=lambda ticket: ticket.retry_after or 0.0)
    raise type(longest)(longest.detail, retry_after=longest.retry_after)


def _handle(ticket: Mapping[str, Any]) -> Handle:
    source = ticket["sources"][0]
    return Handle(source["method"], source["url"], source["headers"], datetime.fromisoformat(source["expires_at"]).timestamp())


# -- putting


async def _send(context: Context, client: Client, repository: Repository, wishes: Sequence[Wish]) -> dict[Wish, Result]:
    kept = await _find(context, client, repository, [wish.oid for wish in wishes])
    results: dict[Wish, Result] = {}
    missing: list[Wish] = []
    for wish in wishes:
        found = kept.get(wish.oid)
        if found is not None and found.state is BlobState.ACTIVE and (found.size != wish.size or found.is_held):
            results[wish] = _unreadable(found, wish)
        else:
            missing.append(wish)
    own = await _under_way(context, client, [kept[wish.oid] for wish in missing if wish.oid in kept])
    results |= dict.fromkeys(await _arrived_of(context, client, [wish for wish in missing if wish.oid in kept], kept, own))
    results |= dict.fromkeys(await _link(context, client, repository, [wish for wish in missing if wish.oid not in kept]))
    left = [wish for wish in missing if wish not in results]
    wanted = [_wanted(context, client, repository, wish, kept.get(wish.oid), own) for wish in left]
    take = partial(_take, repository)
    begun = await upload_many.upload_many(context, client, wanted, at_once=AT_ONCE, take=take) if wanted else []
    for wish, result in zip(left, begun, strict=True):
        results[wish] = result.handle if isinstance(result, Begun) else result
    return results


def _wanted(context: Context, client: Client, repository: Repository, wish: Wish, kept: Kept | None, own: Sequence[UnderWay]) -> Wanted:
    """What is to be uploaded: a new image and blob, the blob that never came, or a further replica of one whose replicas are gone."""
    now, digests = context.clock(), _digests(wish)
    if kept is None or kept.blob_id is None:
        image = _image(context, client, repository, wish, new_id(now), new_id(now))
        return Wanted(Target(image.blobs[DEFAULT_FORMAT], image.id, DEFAULT_FORMAT, Purpose.ORIGIN, wish.size, digests), image, True)
    image = _image(context, client, repository, wish, kept.image_id, kept.blob_id)
    avoid = {each.store_id for each in own if each.blob_id == kept.blob_id}
    if kept.state is BlobState.ACTIVE:
        target = Target(kept.blob_id, None, None, Purpose.ORIGIN, kept.size, {**digests, **kept.digests})
    else:
        target = Target(kept.blob_id, kept.image_id, DEFAULT_FORMAT, Purpose.ORIGIN, wish.size, digests)
    return Wanted(target, image, False, avoid)


def _image(context: Context, client: Client, repository: Repository, wish: Wish, id: UUID, blob: UUID) -> Image:
    """The image that an object is. It is hidden: nobody boots it, and a list of images is not for thousands of them."""
    return Image(
        id=id,
        name=f"{repository.name}/{wish.oid}",
        project=client.principal.project,
        visibility=Visibility.PRIVATE,
        status=ImageStatus.QUEUED,
        properties={"lfs_repository": repository.name},
        blobs={DEFAULT_FORMAT: blob},
        subject=client.principal.subject,
        hidden=True,
        vetting=vet.of_new(context.policy.vetting, Visibility.PRIVATE, client.principal.role),
    )


async def _take(repository: Repository, connection: Any, wanted: Sequence[Wanted]) -> list[bool]:
    """Name the new objects. Those that somebody else has named meanwhile are not ours to make."""
    new = {each.target.digests["sha256"]: each.image.id for each in wanted if each.makes_image}
    taken = await repositories.take(connection, repository.project, repository.name, new) if new else set()
    return [not each.makes_image or each.target.digests["sha256"] in taken for each in wanted]


async def _link(context: Context, client: Client, repository: Repository, wishes: Sequence[Wish]) -> list[Wish]:
    """Make objects of bytes that the client may read already. Returns those that were made."""
    known = await _known(context, client, wishes) if wishes else {}
    if not known:
        return []
    now = context.clock()
    images = {wish: _image(context, client, repository, wish, new_id(now), blob) for wish, blob in known.items()}
    async with transaction(context.db) as connection:
        states = await blobs.lock(connection, known.values())
        good = {wish: image for wish, image in images.items() if states.get(known[wish]) is BlobState.ACTIVE}
        taken = await repositories.take(connection, repository.project, repository.name, {wish.oid: good[wish].id for wish in good})
        made = [image for wish, image in good.items() if wish.oid in taken]
        await beginnings.images(connection, made, known.values())
    for blob in known.values():
        context.memory.forget("blob", str(blob))
    return [wish for wish in good if wish.oid in taken]


async def _known(context: Context, client: Client, wishes: Sequence[Wish]) -> dict[Wish, UUID]:
    """The blobs that hold just these bytes, as a store has computed, and that the client may read and get."""
    by_oid = {wish.oid: wish for wish in wishes}
    candidates = await repositories.proven(context.db, list(by_oid), client.principal.project)
    if not candidates:
        return {}
    with reachable():
        found = await views.blobs(context.db, candidates)
    known: dict[Wish, UUID] = {}
    for view in found:
        wish = None if view is None else by_oid.get(view.blob.digests.get("sha256", ""))
        if view is not None and wish is not None and targets.known_in(context, client, view, wish.size, _digests(wish)) is not None:
            known.setdefault(wish, view.blob.id)
    return known


# -- uploads under way


async def _under_way(context: Context, client: Client, kept: Sequence[Kept]) -> list[UnderWay]:
    ids = [each.blob_id for each in kept if each.blob_id is not None]
    principal = client.principal
    return await repositories.under_way(context.db, ids, principal.project, principal.subject) if ids else []


async def _arrived_of(
    context: Context, client: Client, wishes: Sequence[Wish], kept: Mapping[str, Kept], own: Sequence[UnderWay]
) -> list[Wish]:
    """Of the objects that are to be put again, those that have arrived: the client was not told, or never asked."""
    if not own:
        return []
    gate = asyncio.Semaphore(AT_ONCE)

    async def look(wish: Wish) -> bool:
        uploads = [each for each in own if each.blob_id == kept[wish.oid].blob_id]
        async with gate:
            with contextlib.suppress(errors.BrokerError, TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    return await _arrived(context, client, uploads, wish)
        return False

    found = await asyncio.gather(*(look(wish) for wish in wishes))
    return [wish for wish, arrived in zip(wishes, found, strict=True) if arrived]


async def _arrived(context: Context, client: Client, uploads: Sequence[UnderWay], wish: Wish) -> bool:
    """Whether one of these uploads of an object can be committed, the latest first. Then the others are given up. Raises as `commit`."""
    for number, each in enumerate(uploads):
        try:
            await commit.commit(context, client, each.id, {"size": wish.size, "digests": _digests(wish)})
        except errors.NotUploaded:
            continue
        for other in (*uploads[:number], *uploads[number + 1 :]):
            with contextlib.suppress(errors.Conflict, errors.NotFound):
                await upload.release_upload(context, client, other.id)
        return True
    return False
