"""What was decided of images that need approval, and what agents said of their signatures: kept with the image, newest last.

An image keeps the last `KEPT` of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

from broker.catalog.connect import reachable

KEPT = 100


class Recorded(NamedTuple):
    """`outcome` is ``approved`` or ``rejected`` (by an administrator), ``valid`` or ``invalid`` (a signature, by an agent).

    `blobs` are those that it is about, by format, and `signature` the properties that an agent looked at.
    """

    outcome: str
    blobs: Mapping[str, UUID]
    signature: Mapping[str, str]
    subject: str
    project: str
    detail: str
    at: float = 0.0


async def record(connection: Any, image: UUID, verdict: Recorded) -> None:
    """Keep a verdict; call it in the transaction that acts on it, if there is one."""
    with reachable():
        await connection.execute(
            """INSERT INTO image_verdicts (image_id, outcome, blobs, signature, subject, project, detail)
               VALUES ($1, $2, $3, $4, $5, $6, $7)""",
            image, verdict.outcome, {format: str(blob) for format, blob in verdict.blobs.items()}, dict(verdict.signature),
            verdict.subject, verdict.project, verdict.detail,
        )  # fmt: skip
        await connection.execute(
            """DELETE FROM image_verdicts WHERE image_id = $1 AND id <= (
                   SELECT id FROM image_verdicts WHERE image_id = $1 ORDER BY id DESC OFFSET $2 LIMIT 1)""",
            image, KEPT,
        )  # fmt: skip


async def of_image(db: Any, image: UUID) -> list[Recorded]:
    """What was said of an image, newest last."""
    with reachable():
        rows = await db.fetch(
            """SELECT outcome, blobs, signature, subject, project, detail, extract(epoch FROM at)::float8
               FROM image_verdicts WHERE image_id = $1 ORDER BY id""",
            image,
        )  # fmt: skip
    return [Recorded(row[0], {format: UUID(id) for format, id in row[1].items()}, *list(row)[2:]) for row in rows]


async def waiting_seconds(db: Any) -> float:
    """For how long the image has waited for approval that has waited longest; 0 when none does."""
    with reachable():
        return float(
            await db.fetchval(
                """SELECT coalesce(extract(epoch FROM now() - min(vetting_at)), 0)::float8 FROM images
                   WHERE vetting = 'pending' AND status = 'deactivated'"""
            )
        )
