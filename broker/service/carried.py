"""Images whose bytes somebody else carries: an edge, in front of clients that know nothing of tickets, asks for them where to.

Rules
- The edge asks as its client, with the client's token; the upload is the client's. What ends the upload needs that token no more, which
  may have expired while the bytes were on their way: the edge has a secret of the upload's own for it, of which the catalogue knows the
  SHA-256. Whoever has it can have the broker look at the store, or give the upload up, and nothing else.
- The bytes go in one PUT: an edge does not cut. Their length is bound where it is known before they come.
- Such clients declare no digest. So what is committed is what the store says of the object before it is sealed, and has to say again of
  the sealed one; the store must tell a content digest, and the replica records which. A size that the client told has to be right.
- What was refused is over: these clients cannot declare anew. Who hangs up in the middle finds the image busy for `PAUSE_SECONDS`: Nova
  tries again by itself then, with what is left of the stream, and the rest of an image would pass for the whole.
- Staged bytes are looked at when they have come, and committed when the image is imported.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from secrets import token_urlsafe
from typing import Any, NamedTuple
from uuid import UUID

from broker import errors
from broker.catalog import uploads
from broker.catalog.uploads import Upload
from broker.model import Client, Observation, Outcome, Principal, Role, Store, UploadState
from broker.service import commit, report, tickets, upload
from broker.service.context import Context

PAUSE_SECONDS = 30.0


class Carried(NamedTuple):
    """Where the bytes are to go: one PUT with these header fields. `ticket` is the edge's alone."""

    ticket: str
    store: Store
    url: str
    headers: Mapping[str, str]


async def begin(context: Context, client: Client, image_id: UUID, asked: Mapping[str, Any], *, staged: bool = False) -> Carried:
    """A place for the bytes of an image. `asked` are further fields of POST /v1/tickets: ``format``, and ``size`` if it is known.

    Raises `NotFound`, `Forbidden`, `Conflict` (it has bytes, or gets some now), `Invalid`, `NoDestination`, `TooLarge`, `Busy`,
    `QuotaExceeded`, `StoreUnavailable`.
    """
    secret = token_urlsafe(32)
    request = {
        "operation": "upload", "image": str(image_id), "schemes": ["https", "http"], **asked,
        "whole": True, "carrier": _carrier(secret), "staged": staged,
    }  # fmt: skip
    ticket = await upload.upload(context, client, request)
    place = ticket["destinations"][0]
    store = context.memory.store(place["store"])
    if store is None:
        raise errors.StoreUnavailable("The store has just been removed.", retry_after=1.0)
    return Carried(f"{ticket['id']}.{secret}", store, place["url"], place["headers"])


async def finish(context: Context, ticket: str, size: int | None = None) -> None:
    """The store has taken all bytes, `size` of them if the client told that: make them the image's, or keep them if they are staged.

    Raises `NotFound`, `Gone`, `NotUploaded`, `Mismatch`, `Invalid` (nothing came), `Unverifiable`, `NoDestination`, and
    `StoreUnavailable` and `Unavailable`, after which it may be asked again.
    """
    mine = await _of_carrier(context, ticket)
    async with _over_when_refused(context, mine):
        await (_keep(context, mine, size) if mine.staged else _commit(context, mine, size))


async def fail(context: Context, ticket: str, by: str) -> None:
    """The bytes did not get there. `by` the ``store``, which refused them or broke off: that counts against it; by the ``edge``: the upload
    is given up at once; by the ``client``: soon. Raises `NotFound`, `Conflict`."""
    mine = await _of_carrier(context, ticket)
    if by == "client":
        await uploads.cut_short(context.db, mine.id, PAUSE_SECONDS)
        return
    owner = await _owner(context, mine)
    if by == "store" and mine.state is UploadState.OPEN:
        store, _ = upload.active_place(context, mine, None)
        told = {"store": store.name, "outcome": Outcome.FAILED.value, "detail": "seen by an edge"}
        await report.report_transfer(context, owner, mine.id, told)
    await upload.release_upload(context, owner, mine.id)


async def import_staged(context: Context, client: Client, image_id: UUID) -> None:
    """Commit the bytes that were staged for an image. Raises what `finish` raises, `NotFound` where none are, and `Forbidden`."""
    mine = await uploads.of_image_under_way(context.db, image_id)
    if mine is None or not mine.staged:
        raise errors.NotFound("Nothing is staged for this image.")
    await upload.own_to_write(context, client, mine.id)
    async with _over_when_refused(context, mine):
        await _commit(context, mine, None)


async def progress(context: Context, image_id: UUID) -> str | None:
    """``saving`` while the bytes of a queued image are on their way, ``uploading`` for staged ones until their import."""
    mine = await uploads.of_image_under_way(context.db, image_id)
    return None if mine is None else "uploading" if mine.staged else "saving"


@asynccontextmanager
async def _over_when_refused(context: Context, mine: Upload) -> AsyncIterator[None]:
    """Give the upload up after a refusal; not after a failure, which may pass."""
    try:
        yield
    except (errors.StoreUnavailable, errors.Unavailable):
        raise
    except errors.BrokerError:
        with suppress(errors.Conflict):  # it is being committed by the same request, sent twice
            await upload.release_upload(context, await _owner(context, mine), mine.id)
        raise


async def _keep(context: Context, mine: Upload, size: int | None) -> None:
    """See that staged bytes are there, and as many as were told."""
    _, observed = await _look(context, mine)
    if size is not None and size != observed.size:
        raise errors.Mismatch(f"The store has {observed.size} bytes, and {size} were to come.")


async def _commit(context: Context, mine: Upload, size: int | None) -> None:
    """Commit what the store says that it has."""
    if mine.state is UploadState.COMMITTED:
        return
    store, observed = await _look(context, mine)
    counted = {name: value for name, value in observed.digests.items() if name in context.policy.verify.algorithms}
    declared = {"store": store.name, "size": observed.size if size is None else size, "digests": counted}
    await commit.commit(context, await _owner(context, mine), mine.id, declared)


async def _look(context: Context, mine: Upload) -> tuple[Store, Observation]:
    """The store, and what it says of the object that was sent to it. Raises `NotUploaded`, `Invalid` (0 bytes), `StoreUnavailable`,
    `Gone`."""
    if mine.state not in (UploadState.OPEN, UploadState.COMMITTING):
        raise errors.Gone("The upload has ended; send the bytes again.")
    store, place = upload.active_place(context, mine, None)
    driver = context.memory.driver(store.name)
    for key in (place.staging_key, *reversed(place.sealed_keys)):
        observed = await driver.stat(key)
        if observed is not None:
            if observed.size == 0:
                raise errors.Invalid("An image of 0 bytes is not taken.", expected="at least one byte")
            return store, observed
    raise errors.NotUploaded("The store does not have the object.")


async def _of_carrier(context: Context, ticket: str) -> Upload:
    """Raises `NotFound`."""
    id, _, secret = ticket.partition(".")
    with suppress(ValueError):
        found = await uploads.carried_by(context.db, UUID(id), _carrier(secret))
        if found is not None:
            return found
    raise errors.NotFound("No such upload.")


def _carrier(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


async def _owner(context: Context, mine: Upload) -> Client:
    """Whoever began it, as the ticket knows them. Raises `NotFound`."""
    principal = Principal(mine.subject, mine.project, Role.MEMBER, mine.expires_at)
    record = await tickets.find(context, Client(principal, "", "", None), mine.id)
    return Client(principal, record.instance, record.address, record.site)
