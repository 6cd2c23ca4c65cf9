"""Images: names for blobs, one blob per disk format.

Rules
- An image is ``active`` as soon as one of its blobs is, unless an administrator deactivated it.
- A change counts only on top of the version that it was decided on; ``None`` stands for whichever is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import asyncpg

from broker import errors
from broker.catalog.connect import reachable
from broker.model import Image, ImageStatus, Visibility

_SELECT = """
SELECT i.id, i.name, i.project, i.visibility, i.status, i.properties, extract(epoch FROM i.created_at)::float8 AS created_at,
       extract(epoch FROM i.updated_at)::float8 AS updated_at, i.version,
       coalesce((SELECT jsonb_object_agg(ib.format, ib.blob_id) FROM image_blobs ib WHERE ib.image_id = i.id), '{}') AS blobs
FROM images i
"""


def _image(row: Any) -> Image:
    return Image(
        id=row["id"],
        name=row["name"],
        project=row["project"],
        visibility=Visibility(row["visibility"]),
        status=ImageStatus(row["status"]),
        properties=row["properties"],
        blobs={format: UUID(blob) for format, blob in row["blobs"].items()},
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        version=row["version"],
    )


async def get(db: Any, id: UUID) -> Image | None:
    """One image."""
    with reachable():
        row = await db.fetchrow(_SELECT + "WHERE i.id = $1", id)
    return None if row is None else _image(row)


async def page(
    db: Any,
    *,
    project: str | None,
    limit: int,
    after: UUID | None = None,
    name: str | None = None,
    visibility: Visibility | None = None,
    status: ImageStatus | None = None,
    owner: str | None = None,
    format: str | None = None,
) -> list[Image]:
    """Up to `limit` images by id, those after `after`: the public ones and those of `project`, or all when `project` is ``None``.

    `owner` and the others narrow this down (`broker.permit.lists_image` is the rule).
    """
    with reachable():
        rows = await db.fetch(
            _SELECT
            + """WHERE ($1::text IS NULL OR i.project = $1 OR i.visibility = 'public') AND ($2::uuid IS NULL OR i.id > $2)
                 AND ($3::text IS NULL OR i.name = $3) AND ($4::text IS NULL OR i.visibility = $4) AND ($5::text IS NULL OR i.status = $5)
                 AND ($6::text IS NULL OR i.project = $6)
                 AND ($7::text IS NULL OR EXISTS (SELECT FROM image_blobs ib WHERE ib.image_id = i.id AND ib.format = $7))
                 ORDER BY i.id LIMIT $8""",
            project, after, name, visibility and visibility.value, status and status.value, owner, format, limit,
        )  # fmt: skip
    return [_image(row) for row in rows]


async def insert(
    connection: Any,
    id: UUID,
    *,
    name: str,
    project: str,
    subject: str,
    visibility: Visibility,
    properties: Mapping[str, str],
    blobs: Mapping[str, UUID],
) -> Image:
    """Name an image. Call it in a transaction that locked the blobs. Raises `Conflict` when the id is taken."""
    with reachable():
        inserted = await connection.fetchval(
            """INSERT INTO images (id, name, project, subject, visibility, properties, status)
               VALUES ($1, $2, $3, $4, $5, $6, CASE WHEN EXISTS (SELECT FROM blobs WHERE id = ANY ($7::uuid[]) AND state = 'active')
                                               THEN 'active' ELSE 'queued' END)
               ON CONFLICT DO NOTHING RETURNING true""",
            id, name, project, subject, visibility.value, dict(properties), list(blobs.values()),
        )  # fmt: skip
        if not inserted:
            raise errors.Conflict("This image id is taken.", field="id", expected="an id that no image has, or none")
        await connection.executemany(
            "INSERT INTO image_blobs (image_id, format, blob_id) VALUES ($1, $2, $3)",
            [(id, format, blob) for format, blob in blobs.items()],
        )
        return _image(await connection.fetchrow(_SELECT + "WHERE i.id = $1", id))


async def attach(connection: Any, id: UUID, format: str, blob: UUID) -> None:
    """Give an image one more format. Call it in a transaction that locked the blob.

    Raises `Conflict` when the image has that format already, and `NotFound` when it is gone.
    """
    try:
        async with connection.transaction():
            await connection.execute("INSERT INTO image_blobs (image_id, format, blob_id) VALUES ($1, $2, $3)", id, format, blob)
            await connection.execute(
                """UPDATE images SET version = version + 1, updated_at = now(),
                          status = CASE WHEN status = 'queued' AND EXISTS (SELECT FROM blobs WHERE id = $2 AND state = 'active')
                                   THEN 'active' ELSE status END WHERE id = $1""",
                id, blob,
            )  # fmt: skip
    except asyncpg.UniqueViolationError:
        raise errors.Conflict(f"The image has a blob of format {format} already.", field="format", expected="another format") from None
    except asyncpg.ForeignKeyViolationError:
        raise errors.NotFound("No such image.") from None


async def created_by(db: Any, id: UUID) -> str | None:
    """The subject that made an image."""
    with reachable():
        subject: str | None = await db.fetchval("SELECT subject FROM images WHERE id = $1", id)
    return subject


async def update(
    db: Any, id: UUID, version: int | None, *, name: str, visibility: Visibility, deactivated: bool, properties: Mapping[str, str]
) -> Image:
    """Write what may change of an image; whether it is ``queued`` or ``active`` follows from its blobs.

    Raises `PreconditionFailed` when it is no longer at `version`, and `NotFound`.
    """
    with reachable():
        # Who may read a blob follows from its images: the second update tells whoever keeps the blobs in memory.
        updated = await db.fetchval(
            """WITH changed AS (
                   UPDATE images i SET name = $3, visibility = $4, properties = $5, version = version + 1, updated_at = now(),
                          status = CASE WHEN $6 THEN 'deactivated'
                                        WHEN EXISTS (SELECT FROM image_blobs ib JOIN blobs b ON b.id = ib.blob_id
                                                     WHERE ib.image_id = i.id AND b.state = 'active') THEN 'active' ELSE 'queued' END
                   WHERE id = $1 AND ($2::int IS NULL OR version = $2) RETURNING id
               ), told AS (UPDATE image_blobs SET format = format WHERE image_id IN (SELECT id FROM changed))
               SELECT id FROM changed""",
            id, version, name, visibility.value, dict(properties), deactivated,
        )  # fmt: skip
    if not updated:
        raise await _why_not(db, id)
    image = await get(db, id)
    if image is None:
        raise errors.NotFound("No such image.")
    return image


async def delete(connection: Any, id: UUID, version: int | None) -> None:
    """Drop an image and its hold on its blobs, which the caller has locked. Raises `PreconditionFailed` and `NotFound`."""
    with reachable():
        gone = await connection.fetchval(
            "DELETE FROM images WHERE id = $1 AND ($2::int IS NULL OR version = $2) RETURNING true", id, version
        )
    if not gone:
        raise await _why_not(connection, id)


async def _why_not(db: Any, id: UUID) -> errors.BrokerError:
    """Why no row matched an id and a version."""
    if await get(db, id) is not None:
        return errors.PreconditionFailed("The image has changed since it was read.")
    return errors.NotFound("No such image.")
