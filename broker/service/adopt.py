"""Objects that lie at a store already become the bytes of an image: its first ones, or one more format of it.

Rules
- What is seen at the store says what the bytes are: by the broker, or by an agent where only it can look (`broker.service.replicas`).
  Digests that the request tells are compared with it, and one has to be tied to it by what was seen.
- Who may register what is as for replicas. That siblings are the same disk in other formats is the word of whoever may change the
  image; nothing here compares disks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from broker import errors, verify
from broker.catalog import blobs
from broker.catalog import replicas as records
from broker.catalog.transaction import transaction
from broker.model import BlobState, Client, Digests, Observation, Purpose, Replica, ReplicaState, Store
from broker.service import replicas, targets
from broker.service.context import Context
from broker.service.idempotency import Claim
from broker.service.listing import Versioned


async def adopt_object(context: Context, client: Client, image: UUID, request: Mapping[str, Any], claim: Claim) -> Versioned:
    """Make an object at a store the bytes of one more format of an image; its replica.

    Raises `NotFound`, `Forbidden`, `Invalid`, `Conflict` (the image has the format, or the key is in use), `NotUploaded`, `Mismatch`,
    `Unverifiable`, `StoreUnavailable`.
    """
    if claim.repeated and (known := await records.get(context.db, claim.id)) is not None:
        return replicas.shown(client, known)
    target = await targets.resolve(context, client, {"image": str(image), "format": request["format"]})
    deletable = request.get("deletable", False)
    store = replicas.writable_store(context, client, request["store"], deletable)
    key = replicas.allowed_key(client, request["key"])
    seen = await replicas.look(context, client.principal, store, key, request.get("observed"))
    about, proof = declared_by(context, seen, request.get("digests", {}))
    replica = Replica(
        id=claim.id,
        blob_id=target.blob_id,
        store=store.name,
        key=key,
        purpose=Purpose(request.get("purpose", "origin")),
        state=ReplicaState.ACTIVE,
        deletable=deletable,
        project=client.principal.project,
    )
    async with transaction(context.db) as connection:
        await targets.write(connection, client, target, context.policy.vetting)
        if not target.new_blob and (await blobs.lock(connection, [target.blob_id])).get(target.blob_id) is not BlobState.QUEUED:
            raise errors.Conflict("The image has changed meanwhile. Send the request again.")
        record = await take_over(connection, client, replica, store, about, proof)
    context.memory.forget_image(image, [target.blob_id])
    return replicas.shown(client, record)


def declared_by(context: Context, seen: Observation | None, said: Digests) -> tuple[verify.Declaration, verify.Accepted]:
    """What an object is, by what was seen of it and what is said. Raises `NotUploaded`, `Mismatch` and `Unverifiable`."""
    if seen is None:
        raise errors.NotUploaded("The store has no object under this key.", field="key")
    about = verify.adopted(said, seen, context.policy.verify)
    if isinstance(about, verify.Mismatched):
        raise errors.Mismatch(
            f"The object's {about.field} differs. Nothing was registered, nothing will be deleted.",
            extra={"declared": {about.field: about.declared}, "observed": {about.field: about.observed}},
        )
    if isinstance(about, verify.Unproven):
        raise errors.Unverifiable(f"The content cannot be verified: {about.reason}. Nothing was registered.")
    return about


async def take_over(
    connection: Any, client: Client, replica: Replica, store: Store, about: verify.Declaration, proof: verify.Accepted
) -> records.ReplicaRecord:
    """Make a queued blob what was seen, with this its first replica. Raises `Conflict` (the key is in use)."""
    assert about.size is not None
    strength = ",".join(dict.fromkeys((proof.strength, *proof.proven)))
    await blobs.activate(connection, replica.blob_id, about.size, about.digests, about.pieces)
    observed = dataclasses.replace(replica, observed_by=proof.observed_by, observed_strength=strength)
    return await records.insert(connection, observed, store.id, client.principal.subject)
