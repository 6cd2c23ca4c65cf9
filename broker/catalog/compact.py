"""Blobs as tickets need them, in a form of which memory can hold very many, looked up for many at once by one statement.

Rules
- A blob is one object; all else in it are atoms and tuples of atoms, which the collector of cycles soon leaves alone. What a
  decision needs seldom, such as an image's id, is made from texts when it is asked for.
- Texts that recur in very many blobs, such as states and projects, are shared.
- Nothing in it depends on stores, so that a change of a store touches no blob.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import intern
from typing import Any, NamedTuple
from uuid import UUID

from broker.catalog.images import MEMBERS, STATUS, VETTED, VISIBILITY, members_of
from broker.model import ImageStatus, ReplicaState, Visibility
from broker.permit import ImageAccess, anyone_may_read

BLOB_BYTES = 600
REPLICA_BYTES = 280
IMAGE_BYTES = 200
MEMBER_BYTES = 60
"""Estimated memory: 100,000 blobs of 5 replicas and an image took 2,130 bytes each, their entries in `service.hot` included."""

_ReplicaRow = tuple[int, str, str, str, str]
"""Store id, key, replica id, state, project."""

_ImageRow = tuple[str, str, str, str, str, tuple[str, ...], bool]
"""Image id, project, visibility, status, format, the projects that it is shared with, whether it waits for approval or was refused it."""


class PlacedReplica(NamedTuple):
    """A replica as ranking needs it."""

    store_id: int
    key: str
    id: str
    state: ReplicaState
    project: str


class CompactBlob:
    """A blob, where copies of it lie, and the images through which it may be read."""

    __slots__ = ("_images", "all_active", "id", "read_by_all", "replica_rows", "size", "summary", "used")

    def __init__(self, id: str, size: int | None, summary: str, replicas: tuple[_ReplicaRow, ...], images: tuple[_ImageRow, ...]) -> None:
        self.id = id
        self.size = size
        self.summary = summary
        """The blob as every answer shows it, in JSON."""
        self.replica_rows = replicas
        """The replicas in the order of their ids, as `PlacedReplica` without its types: what reads a hundred of them wants no objects."""
        self.all_active = all(row[3] == ReplicaState.ACTIVE for row in replicas)
        self._images = images
        self.read_by_all = anyone_may_read((visibility, status) for _, _, visibility, status, _, _, _ in images)
        """Every principal may read it through some image."""
        self.used = False
        """For whoever keeps it, to know whether it was asked for since he last looked."""

    @property
    def replicas(self) -> list[PlacedReplica]:
        """Its replicas, whatever their states."""
        return [PlacedReplica(store_id, key, id, ReplicaState(state), project) for store_id, key, id, state, project in self.replica_rows]

    @property
    def images(self) -> list[ImageAccess]:
        """The images that refer to it."""
        return [
            ImageAccess(UUID(id), project, Visibility(visibility), ImageStatus(status), format, members, is_withheld)
            for id, project, visibility, status, format, members, is_withheld in self._images
        ]

    @property
    def held_bytes(self) -> int:
        """What it takes in memory, estimated."""
        members = sum(len(row[5]) for row in self._images)
        return BLOB_BYTES + REPLICA_BYTES * len(self.replica_rows) + IMAGE_BYTES * len(self._images) + MEMBER_BYTES * members


# One row a blob: the driver reads an array at a fraction of the cost of as many rows.
_BLOBS = f"""
SELECT b.id::text, b.size, b.digests::text, b.state, r.*, i.*
FROM blobs b
LEFT JOIN LATERAL (
    SELECT array_agg(o.store_id), array_agg(o.key), array_agg(o.id::text), array_agg(o.state), array_agg(o.project)
    FROM (SELECT store_id, key, id, state, project FROM replicas WHERE blob_id = b.id ORDER BY id) o
) r ON true
LEFT JOIN LATERAL (
    SELECT array_agg(i.id::text), array_agg(i.project), array_agg({VISIBILITY}), array_agg({STATUS}), array_agg(ib.format),
           array_agg({MEMBERS}), array_agg(NOT {VETTED})
    FROM image_blobs ib JOIN images i ON i.id = ib.image_id WHERE ib.blob_id = b.id
) i ON true
WHERE b.id = ANY ($1::text::uuid[])
"""  # noqa: S608 - no value of a request is in it


async def blobs(connection: Any, ids: Sequence[str]) -> list[CompactBlob | None]:
    """These blobs, in order; ``None`` for each that does not exist. Ids are UUIDs in canonical form."""
    rows = await connection.fetch(_BLOBS, f"{{{','.join(set(ids))}}}")
    found = {row[0]: _blob(*row) for row in rows}
    return [found.get(id) for id in ids]


def _blob(id: str, size: int | None, digests: str, state: str, *columns: list[Any] | None) -> CompactBlob:
    shown_size = "null" if size is None else size
    summary = f'{{"id":"{id}","size":{shown_size},"digests":{digests},"state":"{state}"}}'
    replicas, images = columns[:5], columns[5:]
    return CompactBlob(
        id,
        size,
        summary,
        tuple((store_id, key, each, intern(state), intern(project)) for store_id, key, each, state, project in _rows(replicas)),
        tuple(
            (
                image,
                intern(project),
                intern(visibility),
                intern(status),
                intern(format),
                tuple(map(intern, members_of(members))),
                is_withheld,
            )
            for image, project, visibility, status, format, members, is_withheld in _rows(images)
        ),
    )


def _rows(columns: Sequence[list[Any] | None]) -> Any:
    """The rows of aggregated columns, which are ``None`` where there was no row."""
    return zip(*columns, strict=True) if columns[0] is not None else ()
