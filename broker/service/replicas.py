"""Replicas over the API: objects that lie at a store already become sources, or stop being any.

Rules
- The broker looks at the store before a replica counts (invariant 4), and refuses, with nothing registered, what differs
  from the blob or cannot be proven to be it. No transaction is open while a store is asked.
- Where it cannot look (`broker.stores.handed`), an agent has: a service or an administrator says what it observed, and that is
  recorded as an agent's word. Where the broker can look, it believes nobody's.
- Members register keys below ``PROJECT/`` only (a slash in the project's name is ``%2F`` there). Else they could find out
  what others keep, delegate the deletion of others' bytes, or offer them as their own. Administrators and services
  register any key.
- Nobody registers on a store that he may not write; only administrators, on one that is registered as read-only, and then
  nothing deletable.
- The last good replica of an active blob is not deleted: the blob's row is locked while that is decided (invariant 6).
  One on a private store does not count for who must not know of it: that it may go would tell, and nobody could read the rest.
- Keys and projects are shown to administrators, services, and the project that registered the replica.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote
from uuid import UUID

from broker import errors, permit, verify
from broker.catalog import blobs, replicas, views
from broker.catalog.connect import reachable
from broker.catalog.replicas import ReplicaRecord
from broker.catalog.transaction import transaction
from broker.catalog.views import BlobView
from broker.model import Blob, BlobState, Client, Observation, Principal, Purpose, Replica, ReplicaState, Role, Store
from broker.service import visible
from broker.service.blobs import readable
from broker.service.context import Context
from broker.service.idempotency import Claim
from broker.service.instants import instant
from broker.service.listing import Versioned, id_marker, limit_of, render_page
from broker.stores.handed import HandedStore
from broker.stores.registry import is_handed

MAX_KEY_BYTES = 1024
"""S3's limit ("Object key names"); no kind of store has a smaller one."""

_BROKER, _AGENT = "broker", "agent"
"""Who observed."""


async def list_blob_replicas(context: Context, client: Client, blob: UUID) -> dict[str, Any]:
    """Where copies of a blob lie, on stores that this principal may know; other projects' only if active. Raises `NotFound`."""
    await readable(context, client, blob)
    found = await replicas.of_blobs(context.db, [blob])
    shown = [record for record in found if _listed(client.principal, record)]
    return {"replicas": [_render(client, record) for record in shown]}


async def list_replicas(context: Context, client: Client, query: Mapping[str, Any]) -> dict[str, Any]:
    """A page of replicas, by id: all for administrators and services, else those that the own project registered.

    Raises `Invalid` for a marker that is none.
    """
    principal = client.principal
    limit = limit_of(query)
    found = await replicas.page(
        context.db,
        project=None if principal.sees_private_stores else principal.project,
        private=principal.sees_private_stores,
        limit=limit + 1,
        after=id_marker(query),
        store=query.get("store"),
        purpose=Purpose(query["purpose"]) if "purpose" in query else None,
        state=ReplicaState(query["state"]) if "state" in query else None,
    )
    return render_page("replicas", found, limit, lambda record: _render(client, record), lambda record: str(record.replica.id))


async def get_replica(context: Context, client: Client, id: UUID) -> Versioned:
    """One replica. Raises `NotFound`."""
    return shown(client, await _visible(context, client, id))


async def register_replica(context: Context, client: Client, blob: UUID, request: Mapping[str, Any], claim: Claim) -> Versioned:
    """Register an object that lies at a store.

    Raises `NotFound` (the blob, or the store: not there, or not for this principal), `Forbidden`, `Invalid` (the key), `Conflict`
    (the key is in use, or nothing is declared of the blob yet), `NotUploaded`, `Mismatch`, `Unverifiable`, `StoreUnavailable`.
    """
    if claim.repeated and (known := await replicas.get(context.db, claim.id)) is not None:
        return shown(client, known)
    view = await _writable_blob(context, client, blob)
    store = writable_store(context, client, request["store"], request.get("deletable", False))
    key = allowed_key(client, request["key"])
    declared = await blobs.get(context.db, view.blob.id)
    if declared is None or declared.state is BlobState.DELETING or declared.size is None:
        raise errors.Conflict("This blob takes no replicas: it is being deleted, or nothing has been declared of it yet.")
    strength = _proof(context, declared, await look(context, client.principal, store, key, request.get("observed")))
    replica = Replica(
        id=claim.id,
        blob_id=blob,
        store=store.name,
        key=key,
        purpose=Purpose(request.get("purpose", "origin")),
        state=ReplicaState.ACTIVE,
        deletable=request.get("deletable", False),
        project=client.principal.project,
        observed_by=_AGENT if is_handed(store.kind) else _BROKER,
        observed_strength=strength,
    )
    async with transaction(context.db) as connection:
        await _require_same(connection, declared)
        record = await replicas.insert(connection, replica, store.id, client.principal.subject)
        if declared.state is BlobState.QUEUED:
            await blobs.activate(connection, blob, declared.size, declared.digests, declared.pieces)
    _forget(context, view)
    return shown(client, record)


async def change_replica(context: Context, client: Client, id: UUID, version: int | None, request: Mapping[str, Any]) -> Versioned:
    """Change a replica. State ``active`` makes the broker look at the store; the answer has the state that it found.

    Raises `NotFound`, `Forbidden`, `PreconditionFailed`, `Conflict` (its state allows no such change), `Unverifiable`, `StoreUnavailable`.
    """
    record = await _changeable(context, client, id, version)
    replica = record.replica
    state, observed = replica.state, None
    if state in (ReplicaState.DELETING, ReplicaState.PENDING):
        raise errors.Conflict(f"The replica is {state.value}.")
    deletable = request.get("deletable", replica.deletable)
    if deletable and not replica.deletable:
        writable_store(context, client, replica.store, True)
        allowed_key(client, replica.key)
    if request.get("state") == ReplicaState.CORRUPT:
        state = ReplicaState.CORRUPT
    elif request.get("state") == ReplicaState.ACTIVE:
        by, state, strength = await _look_again(context, record, client.principal, request.get("observed"))
        observed = (by, strength or replica.observed_strength)
    elif "observed" in request:
        raise errors.Invalid("An observation comes with the state active.", field="observed", expected="none, or `state`: active")
    async with transaction(context.db) as connection:
        await blobs.lock(connection, [replica.blob_id])
        purpose = Purpose(request.get("purpose", replica.purpose))
        record = await replicas.change(
            connection, id, replica.version, purpose=purpose, deletable=deletable, state=state, observed=observed
        )
    context.memory.forget("blob", str(replica.blob_id))
    return shown(client, record)


async def delete_replica(context: Context, client: Client, id: UUID, version: int | None) -> None:
    """Forget a replica, and have its bytes deleted where that was delegated.

    Raises `NotFound`, `Forbidden`, `PreconditionFailed`, and `LastReplica` for the only active one of an active blob.
    """
    record = await _changeable(context, client, id, version)
    replica = record.replica
    async with transaction(context.db) as connection:
        states = await blobs.lock(connection, [replica.blob_id])
        good = replica.state is ReplicaState.ACTIVE and states.get(replica.blob_id) is BlobState.ACTIVE
        private = client.principal.sees_private_stores
        if good and not await replicas.others_active(connection, replica.blob_id, id, private=private):
            raise errors.LastReplica("Delete the images that need it, or register another replica first.")
        if replica.state is ReplicaState.DELETING:
            return
        if replica.deletable:
            await replicas.start_deleting(connection, record, replica.version, "the replica was deleted")
        else:
            await replicas.forget(connection, record, replica.version)
    context.memory.forget("blob", str(replica.blob_id))


async def _visible(context: Context, client: Client, id: UUID) -> ReplicaRecord:
    """The replica as the catalogue has it now. Raises `NotFound` also when its store or its blob may not be known."""
    principal = client.principal
    record = await replicas.get(context.db, id)
    if record is None or not permit.may_see_store(principal, record):
        raise errors.NotFound("No such replica.")
    if not permit.may_change_replica(principal, record.replica):
        if not _listed(principal, record):
            raise errors.NotFound("No such replica.")
        with reachable():
            (view,) = await views.blobs(context.db, [record.replica.blob_id])
        if view is None or not permit.may_read_blob(principal, view.images):
            raise errors.NotFound("No such replica.")
    return record


async def _changeable(context: Context, client: Client, id: UUID, version: int | None) -> ReplicaRecord:
    """The replica, if this principal may change it and it is at that version. Raises `NotFound`, `Forbidden`, `PreconditionFailed`."""
    record = await _visible(context, client, id)
    if not permit.may_change_replica(client.principal, record.replica):
        raise errors.Forbidden("Another project registered this replica, or your role may not write.")
    if version is not None and record.replica.version != version:
        raise errors.PreconditionFailed("The replica has changed since it was read.")
    return record


async def _writable_blob(context: Context, client: Client, id: UUID) -> BlobView:
    """The blob, if this principal may add replicas to it. Raises `NotFound` and `Forbidden`."""
    view = await readable(context, client, id)
    if not permit.may_write_blob(client.principal, view.images):
        raise errors.Forbidden("No image of your project has this blob, or your role may not write.")
    return view


def writable_store(context: Context, client: Client, name: str, deletable: bool) -> Store:
    """The store, if this principal may register replicas there. Raises `NotFound` (also for what it may not know) and `Forbidden`."""
    principal = client.principal
    store = visible.store(context, client, name)
    if store is None:
        raise errors.NotFound("No such store.", field="store", expected="the name of a store")
    if permit.may_write_store(principal, store) or (principal.role is Role.ADMIN and not deletable):
        return store
    if is_handed(store.kind):
        return _mounted(principal, store, deletable)
    raise errors.Forbidden("You may not write this store.", field="store", expected="a store that is enabled and writable")


def _mounted(principal: Principal, store: Store, deletable: bool) -> Store:
    """The store, which the broker cannot open, if this principal may say what lies there. Raises `Forbidden`."""
    if not principal.sees_private_stores or not store.enabled:
        expected = "the role service or admin" if store.enabled else "a store that is enabled"
        raise errors.Forbidden("You may not register what lies at this store.", field="store", expected=expected)
    if deletable:
        raise errors.Forbidden("The broker cannot delete at this store.", field="deletable", expected="false")
    return store


def allowed_key(client: Client, key: str) -> str:
    """The key, if it can be one and this principal may name it. Raises `Invalid` and `Forbidden`."""
    if len(key.encode()) > MAX_KEY_BYTES or any(segment in ("", ".", "..") for segment in key.split("/")) or not key.isprintable():
        raise errors.Invalid(
            "This cannot be a key.",
            field="key",
            expected=f"printable segments other than . and .. between single slashes, {MAX_KEY_BYTES} bytes in all",
        )
    principal = client.principal
    folder = quote(principal.project, safe="") + "/"
    if principal.role is Role.MEMBER and not key.startswith(folder):
        raise errors.Forbidden("Members register keys below their project's name only.", field="key", expected=f"{folder}…")
    return key


async def look(
    context: Context, principal: Principal | None, store: Store, key: str, observed: Mapping[str, Any] | None
) -> Observation | None:
    """What is at that key: seen by the broker, or by the agent that asks where only it can look.

    Raises `StoreUnavailable`, `Invalid` and `Forbidden`.
    """
    driver = context.memory.driver(store.name)
    if not isinstance(driver, HandedStore):
        if observed is not None:
            raise errors.Invalid("The broker looks at this store itself.", field="observed", expected="none")
        return await driver.stat(key)
    driver.check_key(key)
    if observed is None or principal is None:
        raise errors.Invalid("The broker cannot look at this store.", field="observed", expected="size and digests that an agent saw there")
    if not principal.sees_private_stores:
        expected = "the role service or admin"
        raise errors.Forbidden("Only services and administrators say what they observed.", field="observed", expected=expected)
    return Observation(observed["size"], context.clock(), _AGENT, observed["digests"])


def _proof(context: Context, blob: Blob, observation: Observation | None) -> str:
    """How strong the proof is that the object is the blob. Raises `NotUploaded`, `Mismatch` and `Unverifiable`."""
    if observation is None:
        raise errors.NotUploaded("The store has no object under this key.", field="key")
    verdict = verify.reverify(blob, observation, context.policy.verify).verdict
    if isinstance(verdict, verify.Accepted):
        return verdict.strength
    if isinstance(verdict, verify.Mismatched):
        raise errors.Mismatch(
            f"The object's {verdict.field} differs from the blob's. Nothing was registered, nothing will be deleted.",
            extra={"declared": {verdict.field: verdict.declared}, "observed": {verdict.field: verdict.observed}},
        )
    raise errors.Unverifiable(f"{verdict.reason}. Nothing was registered.")


async def _look_again(
    context: Context, record: ReplicaRecord, principal: Principal | None = None, observed: Mapping[str, Any] | None = None
) -> tuple[str, ReplicaState, str | None]:
    """Who looked, the state that the look gives, and the proof's strength. Raises `Conflict`, `Unverifiable`, `StoreUnavailable`, and
    what `_look` raises."""
    replica = record.replica
    if replica.state is ReplicaState.UNSEALED:
        raise errors.Conflict(
            "The replica is not sealed: its bytes may still change. Upload it again to a store that can seal.", field="state"
        )
    blob = await blobs.get(context.db, replica.blob_id)
    if blob is None or blob.state is not BlobState.ACTIVE:
        raise errors.Conflict("Its blob is not active.", field="state")
    store = context.memory.store(replica.store)
    if store is None:
        raise errors.StoreUnavailable("The store is not registered.")
    observation = await look(context, principal, store, replica.key, observed)
    told_before = set((replica.observed_strength or "").split(",")) & set(store.abilities.observes)
    recheck = verify.reverify(blob, observation, context.policy.verify, told_before)
    if recheck.state is None:
        assert isinstance(recheck.verdict, verify.Unproven)
        raise errors.Unverifiable(f"{recheck.verdict.reason}. Nothing was changed.")
    by = _BROKER if observation is None else observation.by
    return by, recheck.state, recheck.verdict.strength if isinstance(recheck.verdict, verify.Accepted) else None


async def _require_same(connection: Any, declared: Blob) -> None:
    """Lock the blob. Raises `Conflict` when it is no longer what was held against the object."""
    states = await blobs.lock(connection, [declared.id])
    if states.get(declared.id) in (None, BlobState.DELETING) or await blobs.get(connection, declared.id) != declared:
        raise errors.Conflict("The blob has changed meanwhile. Send the request again.")


def _intimate(principal: Principal, record: ReplicaRecord) -> bool:
    """Whether the principal is shown where exactly the replica lies and whose it is."""
    return principal.sees_private_stores or record.replica.project == principal.project


def _listed(principal: Principal, record: ReplicaRecord) -> bool:
    """Whether a replica of a readable blob is shown at all."""
    return permit.may_see_store(principal, record) and (_intimate(principal, record) or record.replica.state is ReplicaState.ACTIVE)


def _forget(context: Context, view: BlobView) -> None:
    """Let this broker know its own write at once; a blob that became active makes its images so."""
    context.memory.forget("blob", str(view.blob.id))
    for image in view.images:
        context.memory.forget("image", str(image.id))


def shown(client: Client, record: ReplicaRecord) -> Versioned:
    """A replica as JSON, as far as the client is shown it."""
    return Versioned(_render(client, record), record.replica.version)


def _render(client: Client, record: ReplicaRecord) -> dict[str, Any]:
    replica = record.replica
    shown: dict[str, Any] = {
        "id": str(replica.id),
        "blob": str(replica.blob_id),
        "store": replica.store,
        "site": record.site,
        "purpose": replica.purpose.value,
        "state": replica.state.value,
        "deletable": replica.deletable,
    }
    if _intimate(client.principal, record):
        shown |= {"key": replica.key, "project": replica.project}
    if replica.observed_by is not None and replica.observed_at is not None:
        observed = {"by": replica.observed_by, "strength": replica.observed_strength or "none", "at": instant(replica.observed_at)}
        shown["observed"] = observed
    return shown


async def look_again(context: Context, id: UUID) -> None:
    """Look at the store because somebody said that the bytes are wrong; what is seen decides (invariant 5).

    A store that cannot be reached or proves nothing leaves the replica as it is. Of many who look at once, one decides.
    """
    record = await replicas.get(context.db, id)
    if record is None:
        return
    try:
        by, state, strength = await _look_again(context, record)
    except errors.BrokerError:
        return
    replica = record.replica
    if state is replica.state:
        return
    with contextlib.suppress(errors.PreconditionFailed, errors.NotFound):  # it was changed since it was read
        async with transaction(context.db) as connection:
            await blobs.lock(connection, [replica.blob_id])
            observed = (by, strength or replica.observed_strength)
            await replicas.change(
                connection, id, replica.version, purpose=replica.purpose, deletable=replica.deletable, state=state, observed=observed
            )
    context.memory.forget("blob", str(replica.blob_id))
