"""What a project's images come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from broker.catalog.connect import reachable


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one project: its images, their bytes (each copy of them counts once), and its uploads under way with what they declared."""

    images: int
    bytes: int
    uploads: int
    uploading_bytes: int


async def of_project(db: Any, project: str) -> Usage:
    """What `project` has now."""
    with reachable():
        row = await db.fetchrow(
            """SELECT (SELECT count(*) FROM images WHERE project = $1) AS images,
                      (SELECT coalesce(sum(b.size), 0) FROM images i JOIN image_blobs ib ON ib.image_id = i.id
                       JOIN blobs b ON b.id = ib.blob_id WHERE i.project = $1)::bigint AS bytes,
                      count(*) AS uploads, coalesce(sum(u.size), 0)::bigint AS uploading_bytes
               FROM uploads u WHERE u.state IN ('open', 'committing') AND u.project = $1 AND u.expires_at > clock_timestamp()""",
            project,
        )
    return Usage(**dict(row))
