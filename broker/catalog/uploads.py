"""Uploads and their destinations: what is written where, how far it got, and what becomes of it.

Rules
- An upload's row is the lock of everything about it. Functions that say "in a transaction" take a connection that has one,
  and lock in the order: upload, blob, image, space.
- Space is reserved while a destination is active and the size is known; it is kept for the replica or given back.
- A commit belongs to one committer at a time, known by the final key that it chose (`begin_commit`). Another one may take
  over when the first was silent for `SILENT_SECONDS`; the first one's result then counts no more.
- How uploads end is `broker.catalog.upload_ends`' affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from broker.catalog import deletions, views
from broker.catalog.connect import reachable
from broker.model import Digests, PartSeen, Purpose, UploadState

SILENT_SECONDS = 20.0
"""A committer that was not heard of for so long is taken for dead."""


@dataclass(frozen=True, slots=True)
class Destination:
    """One place of an upload, as its row says. `part_size` is ``None`` for a single PUT; sizes in bytes, instants as POSIX seconds."""

    upload_id: UUID
    store_id: int
    rank: int
    state: str
    staging_key: str
    final_key: str
    multipart_id: str | None
    part_size: int | None
    reserved: int
    urls_until: float
    estimate: Mapping[str, Any]
    seen: tuple[PartSeen, ...] | None
    sealed_keys: tuple[str, ...]
    bound: tuple[str, ...] = ()
    """Algorithms of digests that every URL for a single PUT bound (`broker.verify.verdict`)."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A write under way, with its destinations by rank. `silent` says that its committer has not been heard of for a while, `staged` that
    somebody else will ask for its commit, when the bytes are there."""

    id: UUID
    blob_id: UUID
    image_id: UUID | None
    format: str | None
    purpose: Purpose
    project: str
    subject: str
    size: int | None
    digests: Digests
    state: UploadState
    makes_image: bool
    replica_id: UUID | None
    problem: str | None
    expires_at: float
    expired: bool
    silent: bool
    staged: bool
    destinations: tuple[Destination, ...]

    def destination(self, store_id: int) -> Destination | None:
        """Its place on that store."""
        return next((place for place in self.destinations if place.store_id == store_id), None)


@dataclass(frozen=True, slots=True)
class NewUpload:
    """What `create` writes into the upload's row."""

    id: UUID
    blob_id: UUID
    image_id: UUID | None
    format: str | None
    purpose: Purpose
    project: str
    subject: str
    size: int | None
    digests: Digests
    makes_image: bool
    ttl_seconds: float
    carrier: bytes | None = None
    """SHA-256 of the secret that whoever carries the bytes is known by, where that is not the client itself."""
    staged: bool = False


@dataclass(frozen=True, slots=True)
class NewDestination:
    """A ranked place to write; all begin as standby."""

    store_id: int
    rank: int
    staging_key: str
    final_key: str
    part_size: int | None
    estimate: Mapping[str, Any]


_UPLOAD = """
SELECT id, blob_id, image_id, format, purpose, project, subject, size, digests, state, makes_image, replica_id, problem, staged,
       extract(epoch FROM expires_at)::float8 AS expires_at, expires_at <= clock_timestamp() AS expired,
       touched_at < clock_timestamp() - make_interval(secs => $2) AS silent
FROM uploads WHERE id = $1
"""

_DESTINATIONS = """
SELECT upload_id, store_id, rank, state, staging_key, final_key, multipart_id, part_size, reserved,
       extract(epoch FROM urls_until)::float8 AS urls_until, estimate, seen, sealed_keys, bound
FROM destinations WHERE upload_id = $1 ORDER BY rank
"""


async def get(db: Any, id: UUID, *, lock: bool = False) -> Upload | None:
    """The upload as it stands; with `lock` in a transaction, until whose end nobody else changes it."""
    with reachable():
        row = await db.fetchrow(_UPLOAD + ("FOR UPDATE" if lock else ""), id, SILENT_SECONDS)
        places = [] if row is None else await db.fetch(_DESTINATIONS, id)
    return None if row is None else _upload(row, places)


async def under_way(db: Any, blob_id: UUID) -> bool:
    """Whether an upload of this blob may still be committed."""
    with reachable():
        return bool(
            await db.fetchval(
                "SELECT EXISTS (SELECT FROM uploads WHERE blob_id = $1 AND state IN ('open', 'committing')"
                " AND expires_at > clock_timestamp())",
                blob_id,
            )
        )


async def of_image_under_way(db: Any, image_id: UUID) -> Upload | None:
    """The latest upload for this image that may still be committed."""
    with reachable():
        id = await db.fetchval(
            "SELECT id FROM uploads WHERE image_id = $1 AND state IN ('open', 'committing') AND expires_at > clock_timestamp()"
            " ORDER BY id DESC LIMIT 1",
            image_id,
        )
    return None if id is None else await get(db, id)


async def latest_of(db: Any, blob_id: UUID) -> Upload | None:
    """The latest upload of this blob."""
    with reachable():
        id = await db.fetchval("SELECT id FROM uploads WHERE blob_id = $1 ORDER BY id DESC LIMIT 1", blob_id)
    return None if id is None else await get(db, id)


async def with_proven_digest(db: Any, size: int, digests: Digests) -> list[views.BlobView]:
    """Active blobs of that size with the SHA-256 or SHA-512 given, computed by a store over an active replica of the whole."""
    with reachable():
        rows = await db.fetch(
            "SELECT b.id FROM blobs b WHERE b.state = 'active' AND b.size = $1"
            " AND ((b.digests ->> 'sha256' = $2 AND EXISTS (SELECT FROM replicas r WHERE r.blob_id = b.id AND r.state = 'active'"
            "       AND 'sha256' = ANY (string_to_array(r.observed_strength, ','))))"
            "   OR (b.digests ->> 'sha512' = $3 AND EXISTS (SELECT FROM replicas r WHERE r.blob_id = b.id AND r.state = 'active'"
            "       AND 'sha512' = ANY (string_to_array(r.observed_strength, ','))))) ORDER BY b.id LIMIT 16",
            size, digests.get("sha256"), digests.get("sha512"),
        )  # fmt: skip
        found = await views.blobs(db, [row["id"] for row in rows]) if rows else []
    return [view for view in found if view is not None]


# -- beginning


async def create(connection: Any, upload: NewUpload, places: Sequence[NewDestination]) -> None:
    """Write an upload and its destinations, in a transaction that has written blob and image. Raises `asyncpg.UniqueViolationError`."""
    with reachable():
        await connection.execute(
            "INSERT INTO uploads (id, blob_id, image_id, format, purpose, project, subject, size, digests, makes_image, expires_at,"
            " carrier, staged)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, clock_timestamp() + make_interval(secs => $11), $12, $13)",
            upload.id, upload.blob_id, upload.image_id, upload.format, upload.purpose.value, upload.project, upload.subject,
            upload.size, dict(upload.digests), upload.makes_image, upload.ttl_seconds, upload.carrier, upload.staged,
        )  # fmt: skip
        await connection.executemany(
            "INSERT INTO destinations (upload_id, store_id, rank, state, staging_key, final_key, part_size, estimate)"
            " VALUES ($1, $2, $3, 'standby', $4, $5, $6, $7)",
            [(upload.id, p.store_id, p.rank, p.staging_key, p.final_key, p.part_size, dict(p.estimate)) for p in places],
        )


async def activate(connection: Any, upload: Upload, store_id: int) -> bool:
    """Make a standby place active, in a transaction with the upload locked, and reserve its space. False: there is no room."""
    with reachable():
        size = upload.size or 0
        if size and not await _reserve(connection, store_id, size):
            return False
        await connection.execute(
            "UPDATE destinations SET state = 'active', reserved = $3 WHERE upload_id = $1 AND store_id = $2", upload.id, store_id, size
        )
    return True


async def rest(connection: Any, upload: Upload, store_id: int, fresh_key: str) -> None:
    """Undo `activate`, in a transaction with the upload locked. A multipart upload may have been begun at the place's staging key
    without our knowing, so that key is given up for `fresh_key`."""
    place = upload.destination(store_id)
    if place is None or place.state != "active":
        return
    with reachable():
        await give_back(connection, [place])
        lost = place.part_size is not None and place.multipart_id is None
        await connection.execute(
            "UPDATE destinations SET state = 'standby', staging_key = $3 WHERE upload_id = $1 AND store_id = $2",
            upload.id, store_id, fresh_key if lost else place.staging_key,
        )  # fmt: skip
        if lost:
            await deletions.schedule(
                connection, store_id, place.staging_key, multipart_id=deletions.EVERY_MULTIPART, reason="perhaps begun"
            )


async def begun(db: Any, id: UUID, store_id: int, multipart_id: str) -> str:
    """Keep the id of a multipart upload; the first one that was kept is the one that counts, and is returned."""
    with reachable():
        kept = await db.fetchval(
            "UPDATE destinations SET multipart_id = coalesce(multipart_id, $3)"
            " WHERE upload_id = $1 AND store_id = $2 RETURNING multipart_id",
            id, store_id, multipart_id,
        )  # fmt: skip
    return str(kept)


async def signed(db: Any, id: UUID, store_id: int, until: float, bound: Sequence[str] = ()) -> None:
    """Note until when write URLs live, and the digests that they bind, before they are handed out. What not all of them bind is not."""
    with reachable():
        await db.execute(
            "UPDATE destinations SET urls_until = greatest(urls_until, to_timestamp($3)), bound = CASE WHEN bound IS NULL THEN $4::text[]"
            " ELSE ARRAY(SELECT unnest(bound) INTERSECT SELECT unnest($4::text[])) END WHERE upload_id = $1 AND store_id = $2",
            id, store_id, until, list(bound),
        )  # fmt: skip


async def touch(db: Any, id: UUID, ttl_seconds: float, most_seconds: float) -> float | None:
    """Activity: an open upload lives on for `ttl_seconds`, at most `most_seconds` in all. Its end, or ``None`` if it is not open."""
    with reachable():
        at = await db.fetchval(
            "UPDATE uploads SET touched_at = clock_timestamp(), expires_at = greatest(expires_at,"
            " least(clock_timestamp() + make_interval(secs => $2), created_at + make_interval(secs => $3)))"
            " WHERE id = $1 AND state = 'open' AND expires_at > clock_timestamp() RETURNING extract(epoch FROM expires_at)::float8",
            id, ttl_seconds, most_seconds,
        )  # fmt: skip
    return None if at is None else float(at)


async def carried_by(db: Any, id: UUID, carrier: bytes) -> Upload | None:
    """The upload, if it has this carrier."""
    with reachable():
        known = await db.fetchval("SELECT true FROM uploads WHERE id = $1 AND carrier = $2", id, carrier)
    return await get(db, id) if known else None


async def cut_short(db: Any, id: UUID, seconds: float) -> None:
    """Let an open upload end in `seconds` at the latest, unless somebody commits it."""
    with reachable():
        await db.execute(
            "UPDATE uploads SET expires_at = least(expires_at, clock_timestamp() + make_interval(secs => $2))"
            " WHERE id = $1 AND state = 'open'",
            id,
            seconds,
        )


async def bind_size(connection: Any, upload: Upload, size: int) -> bool:
    """Take over a size that was not known so far, in a transaction with the upload locked. False: an active place has no room for it."""
    with reachable():
        for place in sorted(upload.destinations, key=lambda place: place.store_id):
            if place.state == "active" and not await _reserve(connection, place.store_id, size - place.reserved):
                return False
        await connection.execute("UPDATE destinations SET reserved = $2 WHERE upload_id = $1 AND state = 'active'", upload.id, size)
        await connection.execute("UPDATE uploads SET size = $2 WHERE id = $1", upload.id, size)
    return True


async def still_wanted(connection: Any, blob_id: UUID) -> bool:
    """Whether an image refers to this blob."""
    with reachable():
        return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM image_blobs WHERE blob_id = $1)", blob_id))


# -- committing


async def begin_commit(connection: Any, id: UUID, store_id: int, final_key: str) -> None:
    """Become the committer, known by `final_key`, in a transaction with the upload locked and found open or silent."""
    with reachable():
        await connection.execute(
            "UPDATE uploads SET state = 'committing', touched_at = clock_timestamp(), sent_at = coalesce(sent_at, clock_timestamp())"
            " WHERE id = $1",
            id,
        )
        await connection.execute("UPDATE destinations SET final_key = $3 WHERE upload_id = $1 AND store_id = $2", id, store_id, final_key)


async def still_committing(db: Any, id: UUID) -> None:
    """The committer lives."""
    with reachable():
        await db.execute("UPDATE uploads SET touched_at = clock_timestamp() WHERE id = $1 AND state = 'committing'", id)


async def begin_sealing(db: Any, id: UUID, store_id: int, final_key: str, seen: Sequence[PartSeen]) -> bool:
    """Note, before it happens, that bytes may come to lie at `final_key`, and the parts seen. False: another committer took over."""
    told = [[part.number, part.size, dict(part.digests), part.etag] for part in seen] or None
    with reachable():
        still = await db.fetchval(
            "UPDATE destinations d SET sealed_keys = array_append(array_remove(sealed_keys, $3), $3), seen = coalesce($4::jsonb, seen)"
            " FROM uploads u WHERE u.id = d.upload_id AND u.state = 'committing'"
            " AND d.upload_id = $1 AND d.store_id = $2 AND d.final_key = $3 RETURNING true",
            id, store_id, final_key, told,
        )  # fmt: skip
    return still is not None


async def reopen(db: Any, id: UUID, store_id: int, final_key: str) -> bool:
    """The committer gives up without a verdict: the upload is open again. False: another committer had taken over."""
    with reachable():
        mine = await db.fetchval(
            "UPDATE uploads u SET state = 'open', touched_at = clock_timestamp() FROM destinations d"
            " WHERE u.id = $1 AND u.state = 'committing' AND d.upload_id = u.id AND d.store_id = $2 AND d.final_key = $3 RETURNING true",
            id, store_id, final_key,
        )  # fmt: skip
    return mine is not None


# -- the parts of the above


async def _reserve(connection: Any, store_id: int, size: int) -> bool:
    """Take `size` bytes of a store's space if they are free."""
    return (
        await connection.fetchval(
            "UPDATE spaces SET taken = taken + $2 WHERE store_id = $1 AND (capacity IS NULL OR taken + $2 <= capacity) RETURNING true",
            store_id,
            size,
        )
        is not None
    )


async def give_back(connection: Any, places: Sequence[Destination]) -> None:
    """Give back the space that these places have reserved, in a transaction with the upload locked."""
    for place in sorted(places, key=lambda place: place.store_id):
        if place.reserved:
            await connection.execute(
                "UPDATE spaces SET taken = greatest(0, taken - $2) WHERE store_id = $1", place.store_id, place.reserved
            )
            await connection.execute(
                "UPDATE destinations SET reserved = 0 WHERE upload_id = $1 AND store_id = $2", place.upload_id, place.store_id
            )


def _upload(row: Any, places: Sequence[asyncpg.Record]) -> Upload:
    return Upload(
        id=row["id"],
        blob_id=row["blob_id"],
        image_id=row["image_id"],
        format=row["format"],
        purpose=Purpose(row["purpose"]),
        project=row["project"],
        subject=row["subject"],
        size=row["size"],
        digests=row["digests"],
        state=UploadState(row["state"]),
        makes_image=row["makes_image"],
        replica_id=row["replica_id"],
        problem=row["problem"],
        expires_at=row["expires_at"],
        expired=row["expired"],
        silent=row["silent"],
        staged=row["staged"],
        destinations=tuple(_destination(place) for place in places),
    )


def _destination(row: Any) -> Destination:
    seen = row["seen"]
    return Destination(
        upload_id=row["upload_id"],
        store_id=row["store_id"],
        rank=row["rank"],
        state=row["state"],
        staging_key=row["staging_key"],
        final_key=row["final_key"],
        multipart_id=row["multipart_id"],
        part_size=row["part_size"],
        reserved=row["reserved"],
        urls_until=row["urls_until"],
        estimate=row["estimate"],
        seen=None if seen is None else tuple(PartSeen(number, size, digests, etag) for number, size, digests, etag in seen),
        sealed_keys=tuple(row["sealed_keys"]),
        bound=tuple(row["bound"] or ()),
    )
