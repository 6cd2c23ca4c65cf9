"""Blobs: immutable bytes, and whether they are wanted.

Rules
- Who takes a blob's last replica or last image away, or adds one, locks the blob's row first (`lock`), rows always in the
  order of their ids; so two who would each take the last but one wait for each other (invariants 6 and 7).
- ``queued`` becomes ``active`` by a verified replica, both become ``deleting`` with their last image; nothing leads back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from broker.catalog.connect import reachable
from broker.model import Blob, BlobState, Digests, Pieces

_COLUMNS = "id, size, digests, state, piece_length, piece_algorithm, piece_digests"


def _blob(row: Any) -> Blob:
    pieces = None
    if row["piece_length"] is not None:
        pieces = Pieces(row["piece_length"], row["piece_algorithm"], _split(row["piece_digests"], row["piece_algorithm"]))
    return Blob(row["id"], row["size"], row["digests"], BlobState(row["state"]), pieces)


_DIGEST_BYTES = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}


def _split(packed: bytes, algorithm: str) -> tuple[str, ...]:
    """Piece digests are kept end to end, in binary."""
    text = packed.hex()
    step = 2 * _DIGEST_BYTES[algorithm]
    return tuple(text[i : i + step] for i in range(0, len(text), step))


def _packed(pieces: Pieces | None) -> tuple[int | None, str | None, bytes | None]:
    if pieces is None:
        return None, None, None
    return pieces.length, pieces.algorithm, bytes.fromhex("".join(pieces.digests))


async def get(db: Any, id: UUID) -> Blob | None:
    """One blob, with its pieces."""
    with reachable():
        row = await db.fetchrow(f"SELECT {_COLUMNS} FROM blobs WHERE id = $1", id)  # noqa: S608 - a constant of ours
    return None if row is None else _blob(row)


async def summaries(db: Any, ids: Iterable[UUID]) -> Mapping[UUID, Blob]:
    """These blobs without their pieces; those that do not exist are left out."""
    with reachable():
        rows = await db.fetch("SELECT id, size, digests, state FROM blobs WHERE id = ANY ($1::uuid[])", list(ids))
    return {row[0]: Blob(row[0], row[1], row[2], BlobState(row[3])) for row in rows}


async def lock(connection: Any, ids: Iterable[UUID]) -> Mapping[UUID, BlobState]:
    """Lock these blobs until the transaction ends and tell their states; those that do not exist are left out."""
    with reachable():
        rows = await connection.fetch("SELECT id, state FROM blobs WHERE id = ANY ($1::uuid[]) ORDER BY id FOR UPDATE", list(ids))
    return {row["id"]: BlobState(row["state"]) for row in rows}


async def insert(db: Any, blob: Blob) -> None:
    """Keep a new blob."""
    with reachable():
        await db.execute(
            """INSERT INTO blobs (id, size, digests, state, piece_length, piece_algorithm, piece_digests)
               VALUES ($1, $2, $3, $4, $5, $6, $7)""",
            blob.id, blob.size, dict(blob.digests), blob.state.value, *_packed(blob.pieces),
        )  # fmt: skip


async def activate(connection: Any, id: UUID, size: int, digests: Digests, pieces: Pieces | None = None) -> bool:
    """A first replica was verified: the queued blob is ``active`` with what was declared, and so are the queued images that hold it.

    ``False`` when the blob was not queued; then nothing changes.
    """
    with reachable():
        done = await connection.fetchval(
            """UPDATE blobs SET state = 'active', size = $2, digests = $3, piece_length = $4, piece_algorithm = $5, piece_digests = $6
               WHERE id = $1 AND state = 'queued' RETURNING true""",
            id, size, dict(digests), *_packed(pieces),
        )  # fmt: skip
        if not done:
            return False
        await connection.execute(
            # One that waits for approval is another one from now on: whoever decides has not seen these bytes.
            """UPDATE images SET status = CASE status WHEN 'queued' THEN 'active' ELSE status END, version = version + 1, updated_at = now()
               WHERE (status = 'queued' OR vetting IN ('pending', 'rejected'))
               AND id IN (SELECT image_id FROM image_blobs WHERE blob_id = $1)""",
            id,
        )
    return True


async def retire_unneeded(connection: Any, ids: Sequence[UUID]) -> list[UUID]:
    """Of these blobs, which the caller has locked, make those ``deleting`` that no image refers to. Returns them."""
    with reachable():
        rows = await connection.fetch(
            """UPDATE blobs b SET state = 'deleting' WHERE id = ANY ($1::uuid[]) AND state <> 'deleting'
               AND NOT EXISTS (SELECT FROM image_blobs ib WHERE ib.blob_id = b.id) RETURNING id""",
            list(ids),
        )
    return [row["id"] for row in rows]


async def forget_deleted(db: Any, limit: int = 1000) -> int:
    """Drop up to `limit` ``deleting`` blobs of which no replica and no upload is left. Returns how many there were."""
    with reachable():
        return int(
            await db.fetchval(
                """WITH gone AS (
                       DELETE FROM blobs WHERE id IN (
                           SELECT id FROM blobs b WHERE state = 'deleting'
                             AND NOT EXISTS (SELECT FROM replicas r WHERE r.blob_id = b.id)
                             AND NOT EXISTS (SELECT FROM uploads u WHERE u.blob_id = b.id)
                             AND NOT EXISTS (SELECT FROM image_blobs ib WHERE ib.blob_id = b.id)
                           ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED)
                       RETURNING id)
                   SELECT count(*) FROM gone""",
                limit,
            )
        )
