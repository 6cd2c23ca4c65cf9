"""The bytes are there: look, compare, seal, and only then believe it (invariants 4 and 14).

Rules
- Any broker may commit, again and at once with others: one committer works at a time, known by the final key it chose, and shows
  that it lives. When it dies, the next one takes over where it got to. Everybody gets the same answer.
- No transaction is open while a store is asked. What lies at the store may change until it is sealed, so it is looked at
  before sealing, lest a refused object is sealed, and after, since only that counts.
- What is missing, unproven or unreachable leaves the upload open. What differs ends it: the bytes are removed, image and blob
  stay queued, and the blob can be uploaded again by its id.
- The strength of a replica names every digest of the whole that the store confirmed; other declared digests are the client's claim.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from broker import errors
from broker.catalog import blobs, deletions, leases, replicas, upload_ends, uploads
from broker.catalog import tickets as records
from broker.catalog.transaction import transaction
from broker.catalog.uploads import Destination, Upload
from broker.model import Blob, BlobState, Client, Observation, PartSeen, Pieces, Replica, ReplicaState, Store, UploadState, new_id
from broker.service import destinations, parts
from broker.service import replicas as replica_service
from broker.service.context import Context
from broker.service.summary import summary
from broker.service.targets import complain
from broker.service.upload import active_place, forget, own_to_write, seen_parts
from broker.verify import Accepted, Declaration, Mismatched, PartDeclared, Verdict, combined, declaration_problems, parts_problem, verdict

_POLL_SECONDS = 0.25
_PATIENCE_SECONDS = 60.0
_BEAT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Claim:
    """This committer's right to commit, until another one takes over: `place.final_key` is its name."""

    upload: Upload
    place: Destination
    store: Store
    declared: Declaration
    pieces: Pieces | None
    """Those of the commit, to be kept with a new blob."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """Where the sealed bytes lie, and what the store says of them there."""

    key: str
    observed: Observation
    verdict: Accepted


class _Refused(Exception):
    """What lies at the store, perhaps at `key` already, is not what was declared."""

    def __init__(self, found: Mismatched, observed: Observation, key: str | None = None) -> None:
        super().__init__(found.field)
        self.found = found
        self.observed = observed
        self.key = key


class _TakenOver(Exception):
    """Another committer works on this upload now."""


async def commit(context: Context, client: Client, ticket: UUID, request: Mapping[str, Any]) -> dict[str, Any]:
    """Make the uploaded bytes a replica; the same again gives the same answer.

    Raises `NotFound`, `Forbidden`, `Gone`, `Invalid`, `Conflict` (another declaration), `NotUploaded`, `Mismatch`, `Unverifiable`,
    `NoDestination` (no room), `StoreUnavailable`.
    """
    loop = asyncio.get_running_loop()
    patience = loop.time() + _PATIENCE_SECONDS
    while loop.time() < patience:
        upload = await own_to_write(context, client, ticket)
        if upload.state is UploadState.COMMITTED:
            _same(upload, request)
            return await _answer(context, client, upload)
        claim = await _claim(context, upload.id, request)
        if claim is None:
            await asyncio.sleep(_POLL_SECONDS)
            continue
        try:
            await _carry_out(context, claim)
        except _TakenOver:
            continue
    raise errors.Conflict("The upload is being committed by another request.", retry_after=_BEAT_SECONDS)


# -- who commits, and what is declared


async def _claim(context: Context, id: UUID, request: Mapping[str, Any]) -> Claim | None:
    """Become the committer; ``None`` while another one lives, or has finished. Raises `Gone`, `Invalid`, `Conflict`, `NoDestination`."""
    async with transaction(context.db) as connection:
        upload = await uploads.get(connection, id, lock=True)
        if upload is None:
            raise errors.NotFound("No such ticket.")
        if upload.state is UploadState.COMMITTED or (upload.state is UploadState.COMMITTING and not upload.silent):
            return None
        if upload.state in (UploadState.FAILED, UploadState.ABANDONED) or upload.expired:
            raise errors.Gone(f"The upload has ended ({destinations.ended(upload)}); ask for a new one.")
        blob = await blobs.get(connection, upload.blob_id)
        known = None if blob is None else blob.pieces
        declared = _combine(Declaration(size=upload.size, digests=upload.digests, pieces=known), _declaration(request))
        store, place = active_place(context, upload, request.get("store"))
        if declared.size is not None and upload.size is None and not await uploads.bind_size(connection, upload, declared.size):
            raise errors.NoDestination("The store has no room.", extra={"excluded": [{"store": store.name, "reason": "no-capacity"}]})
        final_key = destinations.fresh_key(upload.blob_id)
        await uploads.begin_commit(connection, id, store.id, final_key)
    return Claim(upload, replace(place, final_key=final_key), store, declared, declared.pieces if known is None else None)


def _declaration(request: Mapping[str, Any]) -> Declaration:
    """What the commit says. Parts are given by number and size; each begins where the one before ended."""
    declared_parts: list[PartDeclared] = []
    offset = 0
    for part in sorted(request.get("parts", ()), key=lambda part: int(part["number"])):
        declared_parts.append(PartDeclared(part["number"], offset, part["size"], part.get("digests", {})))
        offset += part["size"]
    told = request.get("pieces")
    pieces = None if told is None else Pieces(told["length"], told["algorithm"], tuple(told["digests"]))
    return Declaration(request["size"], request["digests"], pieces, tuple(declared_parts) or None)


def _combine(start: Declaration, said: Declaration) -> Declaration:
    """Both declarations together. Raises `Conflict` where they differ, `Invalid` where they cannot be right."""
    complain(declaration_problems(said))
    both = combined(start, said)
    if isinstance(both, Mismatched):
        raise errors.Conflict("Something else was declared before.", field=both.field, expected=both.declared)
    complain(declaration_problems(both))
    return both


def _same(upload: Upload, request: Mapping[str, Any]) -> None:
    """Raise `Conflict` when a commit is repeated with another declaration."""
    said = combined(Declaration(size=upload.size, digests=upload.digests), Declaration(request["size"], request["digests"]))
    if isinstance(said, Mismatched):
        raise errors.Conflict("The upload was committed as something else.", field=said.field, expected=said.declared)


# -- the committer's work


async def _carry_out(context: Context, claim: Claim) -> None:
    """Look, seal, settle. Raises what `commit` raises, and `_TakenOver`; the upload is then open again, or has failed."""
    id, store_id, name = claim.upload.id, claim.store.id, claim.place.final_key
    try:
        async with _alive(context, id):
            sealed = await (_seal_single(context, claim) if claim.place.part_size is None else _seal_parts(context, claim))
            refused = await _settle(context, claim, sealed)
    except _Refused as refusal:
        await _refuse(context, claim, refusal)
        raise _mismatch(claim, refusal) from None
    except BaseException as error:
        # Also when this request is cancelled: whoever comes next need not wait until the committer is taken for dead.
        mine = await asyncio.shield(uploads.reopen(context.db, id, store_id, name))
        if isinstance(error, errors.BrokerError) and not mine:
            raise _TakenOver from None  # what went wrong may be the other one's doing
        raise
    await _close(context, claim.upload)
    if refused is not None:
        raise refused


@asynccontextmanager
async def _alive(context: Context, id: UUID) -> AsyncIterator[None]:
    """Show that the committer lives, as long as the block lasts."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            try:
                await uploads.still_committing(context.db, id)
            except errors.Unavailable:
                continue

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()


async def _seal_single(context: Context, claim: Claim) -> Sealed:
    """Seal an object that was written by one PUT."""
    driver = context.memory.driver(claim.store.name)
    # A committer that died may have moved the object already.
    for source in (claim.place.staging_key, *reversed(claim.place.sealed_keys)):
        observed = await driver.stat(source)
        if observed is not None:
            break
    else:
        raise errors.NotUploaded("The object is not at the store.")
    _accepted(_judge(context, claim, observed), observed)
    await _begin_sealing(context, claim, ())
    final = claim.place.final_key
    about = await parts.metadata(context, claim.upload, final, claim.declared.digests, claim.declared.size)
    key = await driver.seal(source, final, about)
    return await _look_at_sealed(context, claim, key, ())


async def _seal_parts(context: Context, claim: Claim) -> Sealed:
    """Make one sealed object of the parts that have arrived."""
    if claim.place.multipart_id is None:
        raise errors.NotUploaded("No part has been uploaded.")
    if claim.place.seen is not None:
        # A committer that died, or found no proof, may have joined them already.
        try:
            return await _join(context, claim, claim.place.seen)
        except (errors.NotUploaded, errors.Gone, errors.Conflict):
            pass
    seen = tuple(await seen_parts(context, claim.store, claim.place))
    assert claim.place.part_size is not None
    problem = parts_problem(seen, claim.declared.size, claim.place.part_size)
    if problem is not None and problem.missing:
        raise errors.NotUploaded("Parts are missing.", extra={"missing": list(problem.missing)})
    observed = Observation(sum(part.size for part in seen), context.clock(), "broker", parts=seen)
    found = _judge(context, claim, observed)
    whole = set(claim.store.abilities.observes) & set(claim.declared.digests) & set(context.policy.verify.algorithms)
    if isinstance(found, Mismatched) or not whole:
        _accepted(found, observed)
    await _begin_sealing(context, claim, seen)
    return await _join(context, claim, seen)


async def _join(context: Context, claim: Claim, seen: Sequence[PartSeen]) -> Sealed:
    driver = context.memory.driver(claim.store.name)
    assert claim.place.multipart_id is not None
    about = await parts.metadata(context, claim.upload, claim.place.staging_key, claim.declared.digests, claim.declared.size)
    key = await driver.finish(claim.place.staging_key, claim.place.multipart_id, seen, about)
    return await _look_at_sealed(context, claim, key, tuple(seen))


async def _begin_sealing(context: Context, claim: Claim, seen: Sequence[PartSeen]) -> None:
    if not await uploads.begin_sealing(context.db, claim.upload.id, claim.store.id, claim.place.final_key, seen):
        raise _TakenOver


async def _look_at_sealed(context: Context, claim: Claim, key: str, seen: tuple[PartSeen, ...]) -> Sealed:
    """The look that counts: nobody can write to `key` any more."""
    observed = await context.memory.driver(claim.store.name).stat(key)
    if observed is None:
        raise errors.StoreUnavailable("The store does not show the object that it has just sealed.", retry_after=1.0)
    if seen and not observed.parts:
        observed = replace(observed, parts=seen)
    return Sealed(key, observed, _accepted(_judge(context, claim, observed), observed, key))


def _judge(context: Context, claim: Claim, observed: Observation) -> Verdict:
    """What the look means. A digest that came with the commit was bound by no URL."""
    bound = [name for name in claim.place.bound if name in claim.upload.digests] if claim.place.part_size is None else []
    return verdict(claim.declared, observed, context.policy.verify, bound)


def _accepted(found: Verdict, observed: Observation, key: str | None = None) -> Accepted:
    """The acceptance. Raises `_Refused`, `Unverifiable`."""
    if isinstance(found, Accepted):
        return found
    if isinstance(found, Mismatched):
        raise _Refused(found, observed, key)
    raise errors.Unverifiable(f"The content cannot be verified: {found.reason}.")


# -- what becomes of it


async def _settle(context: Context, claim: Claim, sealed: Sealed) -> errors.BrokerError | None:
    """One transaction makes blob, replica and image active. An error instead, when the catalogue has moved on. Raises `_TakenOver`."""
    size, digests = sealed.observed.size, claim.declared.digests
    if sealed.verdict.strength not in sealed.verdict.proven:
        # Proven by other means than a digest that the store tells: what it does tell of these bytes is kept, to know them again by.
        digests = {**sealed.observed.digests, **digests}
    async with transaction(context.db) as connection:
        upload = await uploads.get(connection, claim.upload.id, lock=True)
        _still_mine(upload, claim)
        assert upload is not None
        await blobs.lock(connection, [upload.blob_id])
        blob = await blobs.get(connection, upload.blob_id)
        refused = await _against(connection, upload, blob, claim)
        if refused is not None:
            await upload_ends.failed(connection, upload, str(refused))
            await deletions.schedule(connection, claim.store.id, sealed.key, reason="refused")
            return refused
        if blob is not None and blob.state is BlobState.QUEUED:
            await blobs.activate(connection, upload.blob_id, size, digests, claim.pieces)
        replica_id = await replicas.good_at(connection, claim.store.id, sealed.key, upload.blob_id)
        if replica_id is None:  # else a rebuild after a restore has registered it already
            replica_id = await _register(context, connection, upload, claim, sealed)
        await upload_ends.committed(connection, upload, claim.store.id, sealed.key, replica_id, size, digests)
    return None


async def _register(context: Context, connection: Any, upload: Upload, claim: Claim, sealed: Sealed) -> UUID:
    replica = Replica(
        id=new_id(context.clock()),
        blob_id=upload.blob_id,
        store=claim.store.name,
        key=sealed.key,
        purpose=upload.purpose,
        state=ReplicaState.ACTIVE,
        deletable=True,  # the broker chose the key and had the bytes put there
        project=upload.project,
        observed_by=sealed.verdict.observed_by,
        observed_strength=",".join(dict.fromkeys((sealed.verdict.strength, *sealed.verdict.proven))),
    )
    await replicas.insert(connection, replica, claim.store.id, upload.subject)
    return replica.id


async def _against(connection: Any, upload: Upload, blob: Blob | None, claim: Claim) -> errors.BrokerError | None:
    """What the catalogue has against the bytes, however good they are."""
    if blob is None or blob.state is BlobState.DELETING:
        return errors.Gone("The blob has been deleted meanwhile.")
    if blob.state is BlobState.QUEUED:
        wanted = await uploads.still_wanted(connection, upload.blob_id)
        return None if wanted else errors.Gone("The image has been deleted meanwhile.")
    differs = combined(Declaration(size=blob.size, digests=blob.digests), claim.declared)
    if isinstance(differs, Mismatched):
        return errors.Mismatch("The blob is something else.", field=differs.field, expected=differs.declared)
    return None


def _still_mine(upload: Upload | None, claim: Claim) -> None:
    """Raise `_TakenOver` when this committer's work counts no more."""
    place = None if upload is None else upload.destination(claim.store.id)
    if upload is None or place is None or upload.state is not UploadState.COMMITTING or place.final_key != claim.place.final_key:
        raise _TakenOver


async def _refuse(context: Context, claim: Claim, refusal: _Refused) -> None:
    """The upload has failed, and its bytes are to go. Raises `_TakenOver`."""
    found = refusal.found
    async with transaction(context.db) as connection:
        upload = await uploads.get(connection, claim.upload.id, lock=True)
        _still_mine(upload, claim)
        assert upload is not None
        await upload_ends.failed(connection, upload, f"{found.field}: declared {found.declared}, observed {found.observed}")
        if refusal.key is not None:
            await deletions.schedule(connection, claim.store.id, refusal.key, reason="refused")
    await _close(context, claim.upload)


async def _close(context: Context, upload: Upload) -> None:
    """The upload has ended, well or not: leases are free."""
    await leases.release(context.db, [(upload.id, None)])
    await records.release(context.db, upload.id)
    forget(context, upload)


def _mismatch(claim: Claim, refusal: _Refused) -> errors.Mismatch:
    found, observed = refusal.found, refusal.observed
    return errors.Mismatch(
        "The stored bytes differ from the declaration and will be deleted.",
        field=found.field,
        expected=found.declared,
        extra={
            "declared": {found.field: found.declared, "size": claim.declared.size, "digests": dict(claim.declared.digests)},
            "observed": {found.field: found.observed, "size": observed.size, "digests": dict(observed.digests)},
        },
    )


async def _answer(context: Context, client: Client, upload: Upload) -> dict[str, Any]:
    """What a committed upload is now. Raises `Gone` when its replica is no more."""
    blob = await blobs.get(context.db, upload.blob_id)
    try:
        if blob is None or upload.replica_id is None:
            raise errors.NotFound
        replica = await replica_service.get_replica(context, client, upload.replica_id)
    except errors.NotFound:
        raise errors.Gone("The upload was committed; its replica has been removed since.") from None
    answer = {"id": str(upload.id), "state": "committed", "blob": summary(blob), "replica": replica.body}
    if upload.image_id is not None:
        answer["image"] = str(upload.image_id)
    if upload.format is not None:
        answer["format"] = upload.format
    return answer
