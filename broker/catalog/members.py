"""Members: projects that a shared image is shared with, and what they said to it.

The rows stay when an image is no longer shared, and count for nothing then. A change reaches every broker by the change log.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from uuid import UUID

from broker import errors
from broker.catalog.connect import reachable
from broker.model import MemberStatus


class Member(NamedTuple):
    """A project that an image is shared with."""

    project: str
    status: MemberStatus
    created_at: float
    updated_at: float


_COLUMNS = "project, status, extract(epoch FROM created_at)::float8, extract(epoch FROM updated_at)::float8"


def _member(row: Any) -> Member:
    return Member(row[0], MemberStatus(row[1]), row[2], row[3])


async def of_image(db: Any, image: UUID) -> list[Member]:
    """All members of an image, those that were added first first."""
    with reachable():
        rows = await db.fetch(f"SELECT {_COLUMNS} FROM image_members WHERE image_id = $1 ORDER BY created_at, project", image)  # noqa: S608
    return [_member(row) for row in rows]


async def get(db: Any, image: UUID, project: str) -> Member | None:
    """One member."""
    with reachable():
        row = await db.fetchrow(f"SELECT {_COLUMNS} FROM image_members WHERE image_id = $1 AND project = $2", image, project)  # noqa: S608
    return None if row is None else _member(row)


async def add(connection: Any, image: UUID, project: str, most: int) -> Member:
    """Share an image with a project, in a transaction. Raises `NotFound`, `Conflict` (it is a member) and `TooLarge` (`most` are there)."""
    with reachable():
        # Two who add at once count one after the other; and nothing here changes the row, so its version stays.
        if await connection.fetchval("SELECT true FROM images WHERE id = $1 FOR NO KEY UPDATE", image) is None:
            raise errors.NotFound("No such image.")
        row = await connection.fetchrow(
            f"INSERT INTO image_members (image_id, project) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING {_COLUMNS}",  # noqa: S608
            image, project,
        )  # fmt: skip
        if row is None:
            raise errors.Conflict("The image is shared with this project already.", field="member", expected="another project")
        if await connection.fetchval("SELECT count(*) FROM image_members WHERE image_id = $1", image) > most:
            raise errors.TooLarge(f"An image has at most {most} members.", field="member", expected=f"at most {most} in all")
    return _member(row)


async def answer(db: Any, image: UUID, project: str, status: MemberStatus) -> Member | None:
    """Note what a member says. ``None`` when it is none."""
    with reachable():
        row = await db.fetchrow(
            f"UPDATE image_members SET status = $3, updated_at = now() WHERE image_id = $1 AND project = $2 RETURNING {_COLUMNS}",  # noqa: S608
            image, project, status.value,
        )  # fmt: skip
    return None if row is None else _member(row)


async def remove(db: Any, image: UUID, project: str) -> bool:
    """Share an image with a project no more. ``False`` when it was not."""
    with reachable():
        gone = await db.fetchval("DELETE FROM image_members WHERE image_id = $1 AND project = $2 RETURNING true", image, project)
    return gone is not None
