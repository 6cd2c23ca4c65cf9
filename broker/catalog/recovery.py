"""What has to be kept with objects, and how a catalogue is made again from what was kept.

Rules
- Everything here may be done again: what is there already stays as it is.
- What the catalogue knows counts more than what was recorded when an object was written: images of a blob that it knows, names,
  visibilities, states. Only what it does not know at all is made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

from broker import errors
from broker.catalog import blobs, replicas, repositories
from broker.catalog.connect import reachable
from broker.model import Blob, Digests, ImageStatus, Replica, ReplicaState, Vetting, Visibility, new_id
from broker.recover import Recovered
from broker.sign.record import RecordedImage

REBUILT = "rebuild"
"""The subject of rows that were made again: whose they were is not kept with objects."""

_WRITTEN_FOR = """
SELECT b.size, b.digests, b.state = 'active' AS known, i.id, i.format, i.name, i.project, i.visibility
FROM blobs b LEFT JOIN LATERAL (
    SELECT i.id, ib.format, i.name, i.project, i.visibility FROM image_blobs ib JOIN images i ON i.id = ib.image_id
    WHERE ib.blob_id = b.id ORDER BY i.id IS NOT DISTINCT FROM $2 DESC, i.project = $3 DESC, i.id LIMIT 1
) i ON true
WHERE b.id = $1
"""


@dataclass(frozen=True, slots=True)
class WrittenFor:
    """What an object is written for: `size` and `digests` of its blob where an earlier commit has settled them."""

    settled: bool
    size: int | None
    digests: Digests
    image: RecordedImage | None


async def written_for(db: Any, blob_id: UUID, image_id: UUID | None, project: str) -> WrittenFor:
    """What the catalogue says of the blob that is being uploaded: its image `image_id`, else one of `project`, else its oldest."""
    with reachable():
        row = await db.fetchrow(_WRITTEN_FOR, blob_id, image_id, project)
    if row is None:
        return WrittenFor(False, None, {}, None)
    image = None
    if row["id"] is not None:
        image = RecordedImage(row["id"], row["format"], row["name"], row["project"], Visibility(row["visibility"]))
    return WrittenFor(row["known"], row["size"], row["digests"], image)


# -- made again


@dataclass(frozen=True, slots=True)
class Known:
    """A replica that the catalogue has."""

    id: UUID
    key: str
    state: ReplicaState
    version: int


class Made(NamedTuple):
    """How many rows were new."""

    images: int
    blobs: int
    replicas: int


async def known(db: Any, store_id: int) -> dict[str, Known]:
    """The replicas on a store, by key."""
    with reachable():
        rows = await db.fetch("SELECT id, key, state, version FROM replicas WHERE store_id = $1", store_id)
    return {row["key"]: Known(row["id"], row["key"], ReplicaState(row["state"]), row["version"]) for row in rows}


async def busy(db: Any, store_id: int, *, uploads: bool) -> set[str]:
    """The keys on a store that are about to be deleted, and with `uploads` those that an upload under way writes to."""
    with reachable():
        rows = await db.fetch(
            "SELECT key FROM deletions WHERE store_id = $1 AND multipart_id IS NULL"
            " UNION SELECT unnest(array[d.staging_key, d.final_key] || d.sealed_keys) FROM destinations d"
            " JOIN uploads u ON u.id = d.upload_id WHERE $2 AND d.store_id = $1 AND u.state IN ('open', 'committing')",
            store_id, uploads,
        )  # fmt: skip
    return {row["key"] for row in rows}


async def restore(
    connection: Any,
    recovered: Recovered,
    stores: Mapping[str, int],
    *,
    recorded_visibility: bool,
    deactivated: bool,
    vetted: Collection[Visibility],
) -> Made:
    """Write a blob, its images and its replicas, as far as they are missing, in a transaction that has locked the blob.

    Raises `Conflict` when the catalogue has an image of that id in another project, another blob for its format, or something else
    under the blob's id.
    """
    blob = recovered.blob
    with reachable():
        images = sum([await _restore_image(connection, image, recorded_visibility, deactivated, vetted) for image in recovered.images])
        blobs_made = await _restore_blob(connection, blob)
        for image in recovered.images:
            await _link(connection, image, blob.id)
            await repositories.remember(connection, image.project, image.name, image.id, blob.digests)
    made = 0
    for copy in recovered.copies:
        replica = Replica(
            id=new_id(),
            blob_id=blob.id,
            store=copy.found.store,
            key=copy.found.key,
            purpose=copy.found.record.purpose,
            state=copy.state,
            deletable=True,  # a broker chose the key and had the bytes put there
            project=copy.found.record.project,
            observed_by=copy.found.observed.by,
            observed_strength=copy.strength,
        )
        await replicas.insert(connection, replica, stores[copy.found.store], REBUILT)
        made += 1
    return Made(images, blobs_made, made)


async def _restore_image(
    connection: Any, image: RecordedImage, recorded_visibility: bool, deactivated: bool, vetted: Collection[Visibility]
) -> int:
    """1 when the image was made, 0 when it is there. Raises `Conflict` when it is another project's."""
    visibility = image.visibility if recorded_visibility else Visibility.PRIVATE
    made = await connection.fetchval(
        "INSERT INTO images (id, name, project, subject, visibility, status, vetting) VALUES ($1, $2, $3, $4, $5, $6, $7)"
        " ON CONFLICT (id) DO NOTHING RETURNING true",
        image.id, image.name, image.project, REBUILT,
        visibility.value,
        (ImageStatus.DEACTIVATED if deactivated else ImageStatus.ACTIVE).value,
        Vetting.PENDING.value if visibility in vetted else None,
    )  # fmt: skip
    if made:
        return 1
    if await connection.fetchval("SELECT project FROM images WHERE id = $1", image.id) != image.project:
        raise errors.Conflict("Its image is another project's.")
    return 0


async def _restore_blob(connection: Any, blob: Blob) -> int:
    """1 when the blob was made or was queued. Raises `Conflict` when another one has its id."""
    made = await connection.fetchval(
        "INSERT INTO blobs (id, size, digests, state) VALUES ($1, $2, $3, 'active') ON CONFLICT (id) DO NOTHING RETURNING true",
        blob.id, blob.size, dict(blob.digests),
    )  # fmt: skip
    if made or await blobs.activate(connection, blob.id, blob.size or 0, blob.digests):
        return 1
    there = await blobs.get(connection, blob.id)
    if there is None or there.size != blob.size or any(there.digests.get(name, value) != value for name, value in blob.digests.items()):
        raise errors.Conflict("The catalogue has another blob of this id.")
    return 0


async def _link(connection: Any, image: RecordedImage, blob_id: UUID) -> None:
    linked = await connection.fetchval(
        "INSERT INTO image_blobs (image_id, format, blob_id) VALUES ($1, $2, $3)"
        " ON CONFLICT (image_id, format) DO UPDATE SET format = excluded.format WHERE image_blobs.blob_id = excluded.blob_id"
        " RETURNING true",
        image.id, image.format, blob_id,
    )  # fmt: skip
    if not linked:
        raise errors.Conflict(f"Its image has another blob as its {image.format}.")
    await connection.execute("UPDATE images SET status = 'active' WHERE id = $1 AND status = 'queued'", image.id)


async def mark_missing(db: Any, gone: Sequence[Known]) -> None:
    """Note of replicas that they are not at their stores, unless they have changed since they were looked for."""
    with reachable():
        await db.executemany(
            "UPDATE replicas SET state = 'missing', observed_by = 'broker', observed_at = clock_timestamp(), version = version + 1"
            " WHERE id = $1 AND version = $2 AND state = 'active'",
            [(known.id, known.version) for known in gone],
        )  # fmt: skip
