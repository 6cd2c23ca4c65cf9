"""Replicas: where copies of blobs lie, and what is known of each.

Rules
- A replica takes its blob's size of its store's space from the moment it is registered until its bytes are deleted or it
  is forgotten, whatever its state.
- What the broker may delete goes through `start_deleting`: the replica is ``deleting``, named by no ticket, and goes with its
  bytes (`broker.catalog.deletions`). What it may not delete is forgotten at once (`forget`); the bytes stay.
- A change counts only on top of the version that it was decided on; ``None`` stands for whichever is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from broker import errors
from broker.catalog import deletions, upload_ends
from broker.catalog.connect import reachable
from broker.catalog.stores import take_space
from broker.model import Exposure, Purpose, Replica, ReplicaState


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """A replica with what must be known of its store to show it."""

    replica: Replica
    store_id: int
    site: str
    exposure: Exposure


_COLUMNS = """
r.id, r.blob_id, s.name AS store, r.key, r.purpose, r.state, r.deletable, r.project, r.observed_by, r.observed_strength,
extract(epoch FROM r.observed_at)::float8 AS observed_at, r.version, r.store_id, s.site, s.exposure
"""
_SELECT = f"SELECT {_COLUMNS} FROM replicas r JOIN stores s ON s.id = r.store_id "  # noqa: S608 - a constant of ours


def _record(row: Any) -> ReplicaRecord:
    replica = Replica(
        id=row["id"],
        blob_id=row["blob_id"],
        store=row["store"],
        key=row["key"],
        purpose=Purpose(row["purpose"]),
        state=ReplicaState(row["state"]),
        deletable=row["deletable"],
        project=row["project"],
        observed_by=row["observed_by"],
        observed_strength=row["observed_strength"],
        observed_at=row["observed_at"],
        version=row["version"],
    )
    return ReplicaRecord(replica, row["store_id"], row["site"], Exposure(row["exposure"]))


async def get(db: Any, id: UUID) -> ReplicaRecord | None:
    """One replica."""
    with reachable():
        row = await db.fetchrow(_SELECT + "WHERE r.id = $1", id)
    return None if row is None else _record(row)


async def of_blobs(db: Any, blobs: list[UUID]) -> list[ReplicaRecord]:
    """Every replica of these blobs, by id."""
    with reachable():
        return [_record(row) for row in await db.fetch(_SELECT + "WHERE r.blob_id = ANY ($1::uuid[]) ORDER BY r.id", blobs)]


async def page(
    db: Any,
    *,
    project: str | None,
    private: bool,
    limit: int,
    after: UUID | None = None,
    store: str | None = None,
    purpose: Purpose | None = None,
    state: ReplicaState | None = None,
) -> list[ReplicaRecord]:
    """Up to `limit` replicas by id, those after `after`: registered by `project`, or by anyone when ``None``.

    Those on stores of exposure ``service`` only with `private`.
    """
    with reachable():
        rows = await db.fetch(
            _SELECT
            + """WHERE ($1::text IS NULL OR r.project = $1) AND ($2 OR s.exposure = 'public') AND ($3::uuid IS NULL OR r.id > $3)
                 AND ($4::text IS NULL OR s.name = $4) AND ($5::text IS NULL OR r.purpose = $5) AND ($6::text IS NULL OR r.state = $6)
                 ORDER BY r.id LIMIT $7""",
            project, private, after, store, purpose and purpose.value, state and state.value, limit,
        )  # fmt: skip
    return [_record(row) for row in rows]


@dataclass(frozen=True, slots=True)
class Cached:
    """An image of which there are cached replicas: how large its bytes are, and when the latest of them was registered."""

    image: UUID
    size: int
    at: float


async def cached_images(db: Any, limit: int) -> list[Cached]:
    """Up to `limit` images with active replicas of purpose ``cache``, by id."""
    with reachable():
        rows = await db.fetch(
            """SELECT ib.image_id, max(b.size) AS size, extract(epoch FROM max(r.created_at))::float8 AS at
               FROM replicas r JOIN blobs b ON b.id = r.blob_id JOIN image_blobs ib ON ib.blob_id = b.id
               WHERE r.purpose = 'cache' AND r.state = 'active' GROUP BY ib.image_id ORDER BY ib.image_id LIMIT $1""",
            limit,
        )
    return [Cached(row["image_id"], row["size"], row["at"]) for row in rows]


async def sizes(db: Any, ids: list[UUID]) -> dict[UUID, int]:
    """How large the blobs of these replicas are."""
    with reachable():
        rows = await db.fetch(
            "SELECT r.id, coalesce(b.size, 0) FROM replicas r JOIN blobs b ON b.id = r.blob_id WHERE r.id = ANY ($1::uuid[])", ids
        )
    return dict(map(tuple, rows))


async def insert(connection: Any, replica: Replica, store_id: int, subject: str) -> ReplicaRecord:
    """Keep a replica whose blob the caller has locked, observed just now unless `observed_by` is ``None``, and count its space.

    Raises `Conflict` when the location is registered, the target of an upload under way or about to be deleted, or its store is gone.
    """
    try:
        async with connection.transaction():
            # Held until the end, so that the store is not forgotten and nothing of this location starts in between.
            there = await connection.fetchval("SELECT true FROM stores WHERE id = $1 FOR KEY SHARE", store_id)
            busy = await connection.fetchval(
                """SELECT EXISTS (SELECT FROM deletions WHERE store_id = $1 AND key = $2 AND multipart_id IS NULL)
                       OR EXISTS (SELECT FROM destinations d JOIN uploads u ON u.id = d.upload_id WHERE d.store_id = $1
                                  AND $2 IN (d.staging_key, d.final_key) AND u.state IN ('open', 'committing') AND u.blob_id <> $3)""",
                store_id, replica.key, replica.blob_id,
            )  # fmt: skip
            if busy or not there:
                raise _taken()
            await connection.execute(
                """INSERT INTO replicas (id, blob_id, store_id, key, purpose, state, deletable, project, subject, observed_by,
                                         observed_strength, observed_at)
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, CASE WHEN $10::text IS NOT NULL THEN clock_timestamp() END)""",
                replica.id, replica.blob_id, store_id, replica.key, replica.purpose.value, replica.state.value, replica.deletable,
                replica.project, subject, replica.observed_by, replica.observed_strength,
            )  # fmt: skip
    except asyncpg.UniqueViolationError:
        raise _taken() from None
    with reachable():
        size = await connection.fetchval("SELECT coalesce(size, 0) FROM blobs WHERE id = $1", replica.blob_id)
        await take_space(connection, store_id, size)
        return _record(await connection.fetchrow(_SELECT + "WHERE r.id = $1", replica.id))


async def good_at(connection: Any, store_id: int, key: str, blob: UUID) -> UUID | None:
    """The active replica of `blob` at this location."""
    with reachable():
        id: UUID | None = await connection.fetchval(
            "SELECT id FROM replicas WHERE store_id = $1 AND key = $2 AND blob_id = $3 AND state = 'active'", store_id, key, blob
        )
    return id


async def change(
    connection: Any,
    id: UUID,
    version: int | None,
    *,
    purpose: Purpose,
    deletable: bool,
    state: ReplicaState,
    observed: tuple[str, str | None] | None = None,
) -> ReplicaRecord:
    """Write what may change of a replica; `observed` is who looked just now and how strong that was.

    Raises `PreconditionFailed` when it is no longer at `version` or is being deleted, and `NotFound`.
    """
    by, strength = observed or (None, None)
    with reachable():
        updated = await connection.fetchval(
            """UPDATE replicas SET purpose = $3, deletable = $4, state = $5, version = version + 1,
                      observed_by = coalesce($6, observed_by),
                      observed_strength = CASE WHEN $6::text IS NULL THEN observed_strength ELSE $7 END,
                      observed_at = CASE WHEN $6::text IS NULL THEN observed_at ELSE clock_timestamp() END
               WHERE id = $1 AND ($2::int IS NULL OR version = $2) AND state <> 'deleting' RETURNING true""",
            id, version, purpose.value, deletable, state.value, by, strength,
        )  # fmt: skip
    if not updated:
        raise await _why_not(connection, id)
    record = await get(connection, id)
    if record is None:
        raise errors.NotFound("No such replica.")
    return record


async def others_active(connection: Any, blob: UUID, id: UUID, *, private: bool) -> bool:
    """Whether the blob, which the caller has locked, has an active replica besides `id`; those on private stores count if `private`."""
    with reachable():
        return bool(
            await connection.fetchval(
                "SELECT EXISTS (SELECT FROM replicas r JOIN stores s ON s.id = r.store_id"
                " WHERE r.blob_id = $1 AND r.id <> $2 AND r.state = 'active' AND ($3 OR s.exposure = 'public'))",
                blob, id, private,
            )
        )  # fmt: skip


async def start_deleting(connection: Any, record: ReplicaRecord, version: int | None, reason: str) -> None:
    """Let nobody read a replica any more and have its bytes deleted. Its blob is locked by the caller, who has checked that it may go.

    Raises `PreconditionFailed` when it is no longer at `version` or is being deleted already, and `NotFound`.
    """
    id = record.replica.id
    with reachable():
        size = await connection.fetchval(
            """UPDATE replicas r SET state = 'deleting', version = version + 1 FROM (SELECT id, coalesce(size, 0) AS size FROM blobs) b
               WHERE r.id = $1 AND b.id = r.blob_id AND ($2::int IS NULL OR version = $2) AND state <> 'deleting' RETURNING b.size""",
            id, version,
        )  # fmt: skip
    if size is None:
        raise await _why_not(connection, id)
    await deletions.schedule(connection, record.store_id, record.replica.key, replica_id=id, frees=size, reason=reason)
    await upload_ends.schedule_return(connection, record.replica.blob_id, record.store_id, record.replica.key)


async def forget(connection: Any, record: ReplicaRecord, version: int | None) -> None:
    """Drop a replica and give its space back; the bytes stay. Its blob is locked by the caller, who has checked that it may go.

    Raises `PreconditionFailed` when it is no longer at `version` or is being deleted, and `NotFound`.
    """
    id = record.replica.id
    with reachable():
        size = await connection.fetchval(
            """DELETE FROM replicas r USING blobs b WHERE r.id = $1 AND b.id = r.blob_id AND ($2::int IS NULL OR version = $2)
               AND r.state <> 'deleting' RETURNING coalesce(b.size, 0)""",
            id, version,
        )  # fmt: skip
        if size is None:
            raise await _why_not(connection, id)
        await take_space(connection, record.store_id, -size)


async def _why_not(db: Any, id: UUID) -> errors.BrokerError:
    """Why no row matched an id and a version."""
    if await get(db, id) is not None:
        return errors.PreconditionFailed("The replica has changed since it was read, or is being deleted.")
    return errors.NotFound("No such replica.")


def _taken() -> errors.Conflict:
    return errors.Conflict("This key is registered, being written or being deleted.", field="key", expected="a key that nothing else uses")
