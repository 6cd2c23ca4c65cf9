"""What is to be removed from stores: scheduled in the transaction that makes it superfluous, tried until it is gone.

Rules
- No location that a replica counts on (active, unsealed or pending) is ever handed out, whatever was scheduled
  (invariant 6): such a row waits. A location that is scheduled here cannot be registered (`broker.catalog.replicas`),
  so the two never meet.
- Giving up a multipart upload touches no object, so nothing keeps that back.
- A row is claimed by moving its `due_at` on, not by a lock: the broker that claimed it may die, and the next one finds it due.
- Its space is given back, and its replica forgotten, only once the store said that the bytes are gone (`done`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from broker.catalog.connect import reachable

EVERY_MULTIPART = ""
"""As a multipart id: every multipart upload that was begun at the key, also one whose id got lost with a broker."""

CLAIM_SECONDS = 300.0
"""After so long without an outcome another broker may try a claimed row."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """One object, or with `multipart_id` one multipart upload, to be removed from a store. `attempts` includes the one now due."""

    id: int
    store_id: int
    key: str
    multipart_id: str | None
    replica_id: UUID | None
    attempts: int


async def schedule(
    db: Any,
    store_id: int,
    key: str,
    *,
    replica_id: UUID | None = None,
    frees: int = 0,
    reason: str,
    due_at: float | None = None,
    multipart_id: str | None = None,
) -> None:
    """Have `key` (or the multipart upload of it) removed at `due_at` (POSIX seconds; now by default) or soon after.

    `frees` bytes are given back to the store's space when it is gone, and the replica `replica_id` is then forgotten.
    Call it in the transaction that makes the replica ``deleting`` or ends the upload.
    """
    with reachable():
        await db.execute(
            "INSERT INTO deletions (store_id, key, multipart_id, replica_id, frees, reason, due_at)"
            " VALUES ($1, $2, $3, $4, $5, $6, coalesce($7, clock_timestamp()))",
            store_id,
            key,
            multipart_id,
            replica_id,
            frees,
            reason,
            None if due_at is None else datetime.fromtimestamp(due_at, UTC),
        )


async def due(db: Any, limit: int) -> Sequence[Deletion]:
    """Claim up to `limit` rows that are due, oldest first. Brokers that ask at once get different rows."""
    with reachable():
        rows = await db.fetch(
            "UPDATE deletions SET attempts = attempts + 1, due_at = clock_timestamp() + make_interval(secs => $2)"
            " WHERE id IN (SELECT d.id FROM deletions d WHERE d.due_at <= clock_timestamp()"
            "   AND (d.multipart_id IS NOT NULL OR NOT EXISTS (SELECT FROM replicas r WHERE r.store_id = d.store_id AND r.key = d.key"
            "                                                  AND r.state IN ('active', 'unsealed', 'pending')))"
            "   ORDER BY d.due_at LIMIT $1 FOR UPDATE OF d SKIP LOCKED)"
            " RETURNING id, store_id, key, multipart_id, replica_id, attempts",
            limit,
            CLAIM_SECONDS,
        )
    return [_deletion(row) for row in sorted(rows, key=lambda row: row["id"])]


async def pending_bytes(db: Any, store_id: int) -> int:
    """What a store will have back once everything that is scheduled there is gone."""
    with reachable():
        return int(await db.fetchval("SELECT coalesce(sum(frees), 0) FROM deletions WHERE store_id = $1", store_id))


async def done(db: Any, deletion: Deletion) -> None:
    """The store has it no more: give back the space, forget the replica. Calling it twice changes nothing."""
    with reachable():
        await db.execute(
            "WITH gone AS (DELETE FROM deletions WHERE id = $1 RETURNING store_id, replica_id, frees),"
            " freed AS (UPDATE spaces SET taken = greatest(0, taken - gone.frees) FROM gone"
            "           WHERE spaces.store_id = gone.store_id AND gone.frees > 0)"
            " DELETE FROM replicas USING gone WHERE replicas.id = gone.replica_id AND replicas.state = 'deleting'",
            deletion.id,
        )


async def retry_later(db: Any, deletion: Deletion, seconds: float, problem: str) -> None:
    """It could not be removed now: try again after `seconds`. `problem` is for the operator and holds no secret."""
    with reachable():
        await db.execute(
            "UPDATE deletions SET due_at = clock_timestamp() + make_interval(secs => $2), problem = $3 WHERE id = $1",
            deletion.id,
            seconds,
            problem[:500],
        )


def _deletion(row: Any) -> Deletion:
    return Deletion(row["id"], row["store_id"], row["key"], row["multipart_id"], row["replica_id"], row["attempts"])
