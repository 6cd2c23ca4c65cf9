"""What a decision needs to know of a blob, read for many at once.

Piece digests are left out: they may be megabytes, and no ticket shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from broker.catalog.images import MEMBERS, STATUS, VETTED, VISIBILITY, members_of
from broker.model import Blob, BlobState, ImageStatus, Purpose, Replica, ReplicaState, Visibility
from broker.permit import ImageAccess


@dataclass(frozen=True, slots=True)
class BlobView:
    """A blob, where copies of it lie, and the images through which it may be read."""

    blob: Blob
    replicas: tuple[Replica, ...]
    images: tuple[ImageAccess, ...]


_BLOBS = """
SELECT b.id, b.size, b.digests, b.state, r.id, s.name, r.key, r.purpose, r.state, r.deletable, r.project, r.observed_by,
       r.observed_strength, extract(epoch FROM r.observed_at)::float8, r.version
FROM blobs b LEFT JOIN replicas r ON r.blob_id = b.id LEFT JOIN stores s ON s.id = r.store_id
WHERE b.id = ANY ($1::uuid[]) ORDER BY b.id, r.id
"""

_ACCESS = f"""
SELECT ib.blob_id, i.id, i.project, {VISIBILITY}, {STATUS}, ib.format, {MEMBERS}, NOT {VETTED}
FROM image_blobs ib JOIN images i ON i.id = ib.image_id WHERE ib.blob_id = ANY ($1::uuid[])
"""  # noqa: S608 - no value of a request is in it


async def blobs(connection: Any, ids: Sequence[UUID | str]) -> list[BlobView | None]:
    """The views of these blobs, in order; ``None`` for each that does not exist."""
    wanted = list(set(ids))
    rows = await connection.fetch(_BLOBS, wanted)
    access: dict[UUID, list[ImageAccess]] = {}
    for blob_id, image_id, project, visibility, status, format, members, is_withheld in await connection.fetch(_ACCESS, wanted):
        access.setdefault(blob_id, []).append(
            ImageAccess(image_id, project, Visibility(visibility), ImageStatus(status), format, members_of(members), is_withheld)
        )
    found: dict[UUID, Blob] = {}
    replicas: dict[UUID, list[Replica]] = {}
    for row in rows:
        id = row[0]
        if id not in found:
            found[id] = Blob(id, row[1], row[2], BlobState(row[3]))
            replicas[id] = []
        if row[4] is not None:
            replicas[id].append(_replica(row))
    views = {str(id): BlobView(blob, tuple(replicas[id]), tuple(access.get(id, ()))) for id, blob in found.items()}
    return [views.get(str(id)) for id in ids]


def _replica(row: Any) -> Replica:
    return Replica(
        id=row[4],
        blob_id=row[0],
        store=row[5],
        key=row[6],
        purpose=Purpose(row[7]),
        state=ReplicaState(row[8]),
        deletable=row[9],
        project=row[10],
        observed_by=row[11],
        observed_strength=row[12],
        observed_at=row[13],
        version=row[14],
    )
