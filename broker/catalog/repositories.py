"""The objects of Git LFS repositories: which image an object is, by project, repository and SHA-256.

Rules
- An object's image is called REPOSITORY/SHA-256, so that a catalogue that is made again from the stores has it again (`remember`).
- An object's row goes with its image. A row is taken before its image is made (`take`), in the order of the SHA-256, so that brokers that
  take the same objects at once wait for each other in one order and only one makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from broker.catalog.connect import reachable
from broker.catalog.contention import json_rows
from broker.model import BlobState, Digests


class Kept(NamedTuple):
    """An object as the catalogue has it. `blob_id` is ``None`` when an upload was given up and the image was kept for other formats;
    `size` while nothing has been declared or committed. `is_held`: an active replica lies on an enabled store that all may know, or, for
    who sees them, a private one."""

    oid: str
    image_id: UUID
    blob_id: UUID | None
    state: BlobState | None
    size: int | None
    digests: Digests
    is_held: bool


class UnderWay(NamedTuple):
    """An upload of a blob that may still be committed, and the store that its URL writes to."""

    id: UUID
    blob_id: UUID
    store_id: int


async def find(db: Any, project: str, repository: str, oids: Sequence[str], *, sees_private: bool) -> dict[str, Kept]:
    """The objects that the repository has, by SHA-256."""
    with reachable():
        rows = await db.fetch(
            """SELECT o.oid, o.image_id, b.id, b.state, b.size, b.digests,
                      EXISTS (SELECT FROM replicas r JOIN stores s ON s.id = r.store_id WHERE r.blob_id = b.id AND r.state = 'active'
                              AND s.enabled AND ($4 OR s.exposure = 'public'))
               FROM lfs_objects o LEFT JOIN image_blobs ib ON ib.image_id = o.image_id LEFT JOIN blobs b ON b.id = ib.blob_id
               WHERE o.project = $1 AND o.repository = $2 AND o.oid = ANY ($3::text[]) ORDER BY ib.format""",
            project, repository, list(oids), sees_private,
        )  # fmt: skip
    return {row[0]: Kept(row[0], row[1], row[2], None if row[3] is None else BlobState(row[3]), *list(row)[4:]) for row in rows}


async def take(connection: Any, project: str, repository: str, objects: Mapping[str, UUID]) -> set[str]:
    """Name objects, in the transaction that makes their images, by SHA-256. Returns those that were taken; the others are there."""
    rows = [(project, repository, oid, objects[oid]) for oid in sorted(objects)]
    with reachable():
        taken = await connection.fetch(
            "INSERT INTO lfs_objects (project, repository, oid, image_id)"
            " SELECT r->>0, r->>1, r->>2, (r->>3)::uuid FROM jsonb_array_elements($1::text::jsonb) AS t (r)"
            " ON CONFLICT DO NOTHING RETURNING oid",
            json_rows(rows),
        )
    return {row[0] for row in taken}


async def remember(connection: Any, project: str, name: str, image_id: UUID, digests: Digests) -> None:
    """Name the object that an image is, if its name says so and its blob has that SHA-256. One that has a name keeps it."""
    repository, _, oid = name.rpartition("/")
    if repository and oid == digests.get("sha256"):
        with reachable():
            await connection.execute(
                "INSERT INTO lfs_objects (project, repository, oid, image_id) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
                project, repository, oid, image_id,
            )  # fmt: skip


async def under_way(db: Any, blobs: Sequence[UUID], project: str, subject: str) -> list[UnderWay]:
    """A principal's own uploads of these blobs that may still be committed, the latest first."""
    with reachable():
        rows = await db.fetch(
            """SELECT u.id, u.blob_id, d.store_id FROM uploads u JOIN destinations d ON d.upload_id = u.id AND d.state = 'active'
               WHERE u.blob_id = ANY ($1::uuid[]) AND u.project = $2 AND u.subject = $3 AND u.state IN ('open', 'committing')
                 AND u.expires_at > clock_timestamp() ORDER BY u.id DESC""",
            list(blobs), project, subject,
        )  # fmt: skip
    return [UnderWay(*row) for row in rows]


async def proven(db: Any, oids: Sequence[str], project: str) -> list[UUID]:
    """A few active blobs for each SHA-256 that a store itself has computed over a replica; those with an image of `project` first."""
    with reachable():
        rows = await db.fetch(
            """SELECT f.id FROM unnest($1::text[]) AS w (oid) CROSS JOIN LATERAL (
                   SELECT b.id FROM blobs b WHERE b.state = 'active' AND b.digests ->> 'sha256' = w.oid
                     AND EXISTS (SELECT FROM replicas r WHERE r.blob_id = b.id AND r.state = 'active'
                                 AND 'sha256' = ANY (string_to_array(r.observed_strength, ',')))
                   ORDER BY EXISTS (SELECT FROM image_blobs ib JOIN images i ON i.id = ib.image_id
                                    WHERE ib.blob_id = b.id AND i.project = $2) DESC, b.id LIMIT 4) f""",
            list(oids), project,
        )  # fmt: skip
    return [row[0] for row in rows]
