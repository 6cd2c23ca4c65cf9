"""Images: names for blobs, one blob per disk format.

Rules
- An image is ``active`` as soon as one of its blobs is, unless an administrator deactivated it or it waits for approval.
- A change counts only on top of the version that it was decided on; ``None`` stands for whichever is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import asyncpg

from broker import errors
from broker.catalog.connect import reachable
from broker.model import Image, ImageStatus, MemberStatus, Vetting, Visibility

VISIBILITY = "CASE WHEN i.shared AND i.visibility = 'private' THEN 'shared' ELSE i.visibility END"
STATUS = "CASE WHEN i.status = 'deactivated' AND i.vetting = 'pending' THEN 'pending' ELSE i.status END"
VETTED = "(i.vetting IS NULL OR i.vetting = 'approved')"
"""As the model has them; how they are stored is told in schemas/sql/0004_dialects.sql."""

MEMBERS = """CASE WHEN i.shared AND i.visibility = 'private'
       THEN (SELECT string_agg(m.project, chr(10) ORDER BY m.project) FROM image_members m WHERE m.image_id = i.id) END"""
"""The projects that an image is shared with, one a line (no project's name holds a line feed); see `members_of`."""

_SELECT = f"""
SELECT i.id, i.name, i.project, i.subject, i.visibility, i.shared, i.status, i.vetting, i.properties, i.tags, i.protected, i.hidden,
       i.min_disk, i.min_ram, i.disk_format, i.container_format, extract(epoch FROM i.created_at)::float8 AS created_at,
       extract(epoch FROM i.updated_at)::float8 AS updated_at, i.version,
       coalesce((SELECT jsonb_object_agg(ib.format, ib.blob_id) FROM image_blobs ib WHERE ib.image_id = i.id), '{{}}') AS blobs,
       {MEMBERS} AS members
FROM images i
"""  # noqa: S608 - no value of a request is in it


_FREE = "an id that no image has or had, or none"


def members_of(lines: str | None) -> tuple[str, ...]:
    """What `MEMBERS` gave, taken apart."""
    return tuple(lines.split("\n")) if lines else ()


def _image(row: Any) -> Image:
    vetting = None if row["vetting"] is None else Vetting(row["vetting"])
    shared = row["shared"] and row["visibility"] == Visibility.PRIVATE
    withheld = row["status"] == ImageStatus.DEACTIVATED and vetting is Vetting.PENDING
    return Image(
        id=row["id"],
        name=row["name"],
        project=row["project"],
        visibility=Visibility.SHARED if shared else Visibility(row["visibility"]),
        status=ImageStatus.PENDING if withheld else ImageStatus(row["status"]),
        properties=row["properties"],
        blobs={format: UUID(blob) for format, blob in row["blobs"].items()},
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        version=row["version"],
        subject=row["subject"],
        tags=tuple(row["tags"]),
        protected=row["protected"],
        hidden=row["hidden"],
        min_disk=row["min_disk"],
        min_ram=row["min_ram"],
        disk_format=row["disk_format"],
        container_format=row["container_format"],
        vetting=vetting,
        members=members_of(row["members"]),
    )


def _stored(visibility: Visibility) -> tuple[str, bool]:
    """The columns ``visibility`` and ``shared``."""
    return (Visibility.PRIVATE.value, True) if visibility is Visibility.SHARED else (visibility.value, False)


# $1 whose lists, $9 what they said to what is shared with them.
_PAGE = f"""{_SELECT}
WHERE ($1::text IS NULL OR i.project = $1 OR (i.visibility = 'public' AND {VETTED})
       OR (i.shared AND i.visibility = 'private' AND i.id IN (
           SELECT image_id FROM image_members WHERE project = $1 AND ($9::text IS NULL OR status = $9))))
  AND ($2::uuid IS NULL OR i.id > $2) AND ($3::text IS NULL OR i.name = $3) AND ($4::text IS NULL OR {VISIBILITY} = $4)
  AND ($5::text IS NULL OR {STATUS} = $5) AND ($6::text IS NULL OR i.project = $6)
  AND ($7::text IS NULL OR EXISTS (SELECT FROM image_blobs ib WHERE ib.image_id = i.id AND ib.format = $7))
ORDER BY i.id LIMIT $8
"""  # noqa: S608 - no value of a request is in it


async def get(db: Any, id: UUID) -> Image | None:
    """One image."""
    with reachable():
        row = await db.fetchrow(_SELECT + "WHERE i.id = $1", id)
    return None if row is None else _image(row)


async def get_many(connection: Any, ids: Sequence[UUID | str]) -> list[Image | None]:
    """These images, in order; ``None`` for each that does not exist."""
    found = {str(row["id"]): _image(row) for row in await connection.fetch(_SELECT + "WHERE i.id = ANY ($1::uuid[])", list(set(ids)))}
    return [found.get(str(id)) for id in ids]


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
    member_status: MemberStatus | None = MemberStatus.ACCEPTED,
) -> list[Image]:
    """Up to `limit` images by id, those after `after`: the public ones, those of `project` and those that are shared with it, as far as
    it answered `member_status` to that (``None``: whatever it answered); or all when `project` is ``None``.

    `owner` and the others narrow this down (`broker.permit.lists_image` is the rule).
    """
    with reachable():
        rows = await db.fetch(
            _PAGE,
            project, after, name, visibility and visibility.value, status and status.value, owner, format, limit,
            member_status and member_status.value,
        )  # fmt: skip
    return [_image(row) for row in rows]


async def insert(connection: Any, image: Image) -> Image:
    """Name an image. Call it in a transaction that locked the blobs. Its status, version and instants are the database's to tell.

    Raises `Conflict` when the id is taken.
    """
    visibility, shared = _stored(image.visibility)
    with reachable():
        inserted = await connection.fetchval(
            """INSERT INTO images (id, name, project, subject, visibility, shared, properties, tags, protected, hidden, min_disk, min_ram,
                                   disk_format, container_format, vetting, status)
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15,
                       CASE WHEN EXISTS (SELECT FROM blobs WHERE id = ANY ($16::uuid[]) AND state = 'active')
                       THEN 'active' ELSE 'queued' END)
               ON CONFLICT DO NOTHING RETURNING true""",
            image.id, image.name, image.project, image.subject, visibility, shared, dict(image.properties), list(image.tags),
            image.protected, image.hidden, image.min_disk, image.min_ram, image.disk_format, image.container_format,
            image.vetting and image.vetting.value, list(image.blobs.values()),
        )  # fmt: skip
        if not inserted:
            raise errors.Conflict("This image id is taken.", field="id", expected=_FREE)
        await connection.executemany(
            "INSERT INTO image_blobs (image_id, format, blob_id) VALUES ($1, $2, $3)",
            [(image.id, format, blob) for format, blob in image.blobs.items()],
        )
        return _image(await connection.fetchrow(_SELECT + "WHERE i.id = $1", image.id))


async def require_unused(connection: Any, id: UUID) -> None:
    """That no image with bytes ever had this id. Ask after `insert`, which waits for who deletes the image. Raises `Conflict`."""
    with reachable():
        if await connection.fetchval("SELECT EXISTS (SELECT FROM former_images WHERE id = $1)", id):
            raise errors.Conflict("This image id is taken.", field="id", expected=_FREE)


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


async def update(db: Any, image: Image, version: int | None, *, deactivated: bool) -> Image:
    """Write what may change of an image: all but id, subject and blobs. Whether it is ``queued``, ``pending`` or ``active``
    follows from its blobs and its vetting.

    Raises `PreconditionFailed` when it is no longer at `version`, and `NotFound`.
    """
    visibility, shared = _stored(image.visibility)
    with reachable():
        # Who may read a blob follows from its images: the second update tells whoever keeps the blobs in memory.
        updated = await db.fetchval(
            """WITH changed AS (
                   UPDATE images i SET name = $3, visibility = $4, shared = $5, properties = $6, tags = $7, protected = $8, hidden = $9,
                          min_disk = $10, min_ram = $11, disk_format = $12, container_format = $13, vetting = $14, project = $16,
                          version = version + 1, updated_at = now(),
                          status = CASE WHEN $15 THEN 'deactivated'
                                        WHEN EXISTS (SELECT FROM image_blobs ib JOIN blobs b ON b.id = ib.blob_id
                                                     WHERE ib.image_id = i.id AND b.state = 'active') THEN 'active' ELSE 'queued' END
                   WHERE id = $1 AND ($2::int IS NULL OR version = $2) RETURNING id
               ), told AS (UPDATE image_blobs SET format = format WHERE image_id IN (SELECT id FROM changed))
               SELECT id FROM changed""",
            image.id, version, image.name, visibility, shared, dict(image.properties), list(image.tags), image.protected, image.hidden,
            image.min_disk, image.min_ram, image.disk_format, image.container_format, image.vetting and image.vetting.value, deactivated,
            image.project,
        )  # fmt: skip
    if not updated:
        raise await _why_not(db, image.id)
    found = await get(db, image.id)
    if found is None:
        raise errors.NotFound("No such image.")
    return found


async def set_vetting(connection: Any, id: UUID, vetting: Vetting | None) -> None:
    """Have an image wait for approval, or no longer; its status follows (schemas/sql/0004_dialects.sql)."""
    with reachable():
        await connection.execute("UPDATE images SET vetting = $2 WHERE id = $1", id, vetting and vetting.value)


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
