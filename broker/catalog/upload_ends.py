"""How uploads end: committed, refused, abandoned, and forgotten after a while.

Rules
- Whatever ends an upload gives its space back and schedules everything that it left at stores: now, and once more after its
  last write URL has expired, since that URL may be used until then. So does deleting what it became.
- A refused upload leaves its queued blob and image, to be tried again; an abandoned one takes them along.
- Everything is called in a transaction with the upload locked, but for what looks for uploads by itself.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from broker.catalog import deletions
from broker.catalog.connect import reachable
from broker.catalog.uploads import SILENT_SECONDS, Upload, get, give_back
from broker.model import Digests

STRAY_SECONDS = 120.0
"""So long after the last write URL has expired (clocks differ, requests take time) a stray object is looked for."""


async def discard(connection: Any, upload: Upload) -> None:
    """Forget, in a transaction, an upload that never got a place: as if it had not been asked for."""
    with reachable():
        await give_back(connection, upload.destinations)
        await connection.execute("DELETE FROM uploads WHERE id = $1", upload.id)
        await _forget_queued(connection, upload)


async def committed(connection: Any, upload: Upload, store_id: int, key: str, replica_id: UUID, size: int, digests: Digests) -> None:
    """End an upload whose bytes are now the replica `replica_id` at `key`, which takes its own space; with the upload locked."""
    with reachable():
        await give_back(connection, upload.destinations)
        await connection.execute(
            "UPDATE uploads SET state = 'committed', replica_id = $2, size = $3, digests = $4, touched_at = clock_timestamp()"
            " WHERE id = $1",
            upload.id, replica_id, size, dict(digests),
        )  # fmt: skip
        await _schedule_leftovers(connection, upload, "left over by an upload", kept=(store_id, key))


async def failed(connection: Any, upload: Upload, problem: str) -> None:
    """End an upload whose bytes were refused, in a transaction with the upload locked. Blob and image stay queued, to be tried again."""
    with reachable():
        await give_back(connection, upload.destinations)
        await connection.execute(
            "UPDATE uploads SET state = 'failed', problem = $2, touched_at = clock_timestamp() WHERE id = $1", upload.id, problem[:2000]
        )
        await _schedule_leftovers(connection, upload, "refused")


async def linked(connection: Any, id: UUID, replica_id: UUID) -> None:
    """End an upload that needs no bytes, since they are at `replica_id` already; in the transaction that created it."""
    with reachable():
        await connection.execute("UPDATE uploads SET state = 'committed', replica_id = $2 WHERE id = $1", id, replica_id)


async def abandoned(connection: Any, upload: Upload) -> None:
    """End an upload that nobody will finish, in a transaction with the upload locked, and forget the queued blob and image it made."""
    with reachable():
        await give_back(connection, upload.destinations)
        await connection.execute("UPDATE uploads SET state = 'abandoned', touched_at = clock_timestamp() WHERE id = $1", upload.id)
        await _schedule_leftovers(connection, upload, "abandoned")
        await _unlink_queued(connection, upload)


async def expired(connection: Any, limit: int) -> list[Upload]:
    """Uploads that nobody will finish, locked until the transaction ends; those that another broker has locked are left to it."""
    with reachable():
        rows = await connection.fetch(
            "SELECT id FROM uploads WHERE state IN ('open', 'committing') AND expires_at <= clock_timestamp()"
            " AND (state = 'open' OR touched_at < clock_timestamp() - make_interval(secs => $2))"
            " ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED",
            limit, SILENT_SECONDS,
        )  # fmt: skip
    found = [await get(connection, row["id"]) for row in rows]
    return [upload for upload in found if upload is not None]


async def forget_ended(connection: Any, seconds: float, limit: int) -> int:
    """Forget up to `limit` uploads that ended `seconds` ago, with what is still queued only because of them. Returns how many."""
    with reachable():
        rows = await connection.fetch(
            "SELECT id FROM uploads WHERE state IN ('committed', 'failed', 'abandoned')"
            " AND touched_at < clock_timestamp() - make_interval(secs => $2) ORDER BY touched_at LIMIT $1 FOR UPDATE SKIP LOCKED",
            limit, seconds,
        )  # fmt: skip
        for row in rows:
            upload = await get(connection, row["id"])
            if upload is not None:
                await _unlink_queued(connection, upload)
                await connection.execute("DELETE FROM uploads WHERE id = $1", upload.id)
                await _forget_queued(connection, upload)
    return len(rows)


async def schedule_return(connection: Any, blob: UUID, store_id: int, key: str) -> None:
    """Have `key`, where a replica of `blob` is being deleted, removed once more if a write URL for it still lives.

    An object that was sealed where it was written can be written there anew, once it is gone.
    """
    with reachable():
        until = await connection.fetchval(
            "SELECT extract(epoch FROM max(d.urls_until))::float8 FROM uploads u JOIN destinations d ON d.upload_id = u.id"
            " WHERE u.blob_id = $1 AND d.store_id = $2 AND d.staging_key = $3 AND d.part_size IS NULL"
            " AND d.urls_until > clock_timestamp() - make_interval(secs => $4)",
            blob, store_id, key, STRAY_SECONDS,
        )  # fmt: skip
    if until is not None:
        await deletions.schedule(connection, store_id, key, reason="may be written again", due_at=until + STRAY_SECONDS)


async def _schedule_leftovers(connection: Any, upload: Upload, reason: str, kept: tuple[int, str] | None = None) -> None:
    """Have everything removed that the upload wrote or may have written, but for the location `kept`.

    What a write URL reaches is removed now and once more after the URL has expired: it may be used until then.
    """
    for place in upload.destinations:
        untouched = place.state == "standby" and place.multipart_id is None
        if untouched:
            continue
        later = place.urls_until + STRAY_SECONDS
        finished = kept is not None and kept[0] == place.store_id
        if place.multipart_id is not None:
            # Also of a finished one: a part's URL that still lives may leave a part behind, and giving up ends no object.
            for at in (later,) if finished else (None, later):
                await deletions.schedule(
                    connection, place.store_id, place.staging_key, multipart_id=place.multipart_id, reason=reason, due_at=at
                )
        if place.part_size is not None:
            await deletions.schedule(
                connection, place.store_id, place.staging_key, multipart_id=deletions.EVERY_MULTIPART, reason=reason, due_at=later
            )
        objects: set[tuple[str, float | None]] = {(key, at) for key in place.sealed_keys for at in (None, later)}
        if place.part_size is None:
            objects |= {(place.staging_key, None), (place.staging_key, later)}
        elif place.seen is not None:
            objects |= {(place.staging_key, None), (place.staging_key, later)}  # an object may have been made of the parts
        for key, at in sorted(objects, key=str):
            if kept != (place.store_id, key):
                await deletions.schedule(connection, place.store_id, key, reason=reason, due_at=at)


async def _unlink_queued(connection: Any, upload: Upload) -> None:
    """Take a blob that never came off its image, and the image away that was made for it, unless another upload may still bring it."""
    await connection.execute(
        "DELETE FROM image_blobs ib USING blobs b WHERE ib.blob_id = $1 AND b.id = ib.blob_id AND b.state = 'queued'"
        " AND NOT EXISTS (SELECT FROM uploads u WHERE u.blob_id = b.id AND u.id <> $2 AND u.state IN ('open', 'committing', 'failed'))",
        upload.blob_id, upload.id,
    )  # fmt: skip
    if upload.image_id is not None:
        await connection.execute(
            "DELETE FROM images i WHERE id = $1 AND status = 'queued'"
            " AND EXISTS (SELECT FROM uploads u WHERE u.image_id = i.id AND u.blob_id = $2 AND u.makes_image)"
            " AND NOT EXISTS (SELECT FROM image_blobs WHERE image_id = i.id)",
            upload.image_id, upload.blob_id,
        )  # fmt: skip


async def _forget_queued(connection: Any, upload: Upload) -> None:
    """Forget a queued blob that no upload brings any more, with its links, and the image that was made for it."""
    await connection.execute(
        "DELETE FROM image_blobs ib USING blobs b WHERE ib.blob_id = $1 AND b.id = ib.blob_id AND b.state = 'queued'"
        " AND NOT EXISTS (SELECT FROM uploads WHERE blob_id = b.id)",
        upload.blob_id,
    )
    if upload.image_id is not None and upload.makes_image:
        await connection.execute(
            "DELETE FROM images i WHERE id = $1 AND status = 'queued' AND NOT EXISTS (SELECT FROM image_blobs WHERE image_id = i.id)",
            upload.image_id,
        )
    await connection.execute(
        "DELETE FROM blobs b WHERE id = $1 AND state = 'queued' AND NOT EXISTS (SELECT FROM uploads WHERE blob_id = b.id)"
        " AND NOT EXISTS (SELECT FROM image_blobs WHERE blob_id = b.id) AND NOT EXISTS (SELECT FROM replicas WHERE blob_id = b.id)",
        upload.blob_id,
    )
