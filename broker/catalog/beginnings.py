"""What many uploads begin with: images, blobs, uploads and one place each, all written by one statement a table.

Rules
- Everything is called in a transaction, in the order in which rows are locked everywhere: images and blobs (new ones, so nobody else's),
  uploads, then space by store.
- Each upload goes to one place in one PUT; its URL is signed before, so its end and what it binds are written with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from broker.catalog.connect import reachable
from broker.catalog.contention import json_rows
from broker.catalog.uploads import NewDestination, NewUpload
from broker.model import Image


class Beginning(NamedTuple):
    """An upload with the place that it goes to, until when its URL lives (POSIX seconds), and which digests that binds."""

    upload: NewUpload
    place: NewDestination
    urls_until: float
    bound: Sequence[str]


async def reserve(connection: Any, sizes: Iterable[tuple[int, int]]) -> set[int]:
    """Take the space for all that goes to each store, of (store id, size). Returns the stores that have no room for all of theirs."""
    wanted: dict[int, int] = defaultdict(int)
    for store_id, size in sizes:
        wanted[store_id] += size
    full: set[int] = set()
    with reachable():
        for store_id in sorted(wanted):
            taken = await connection.fetchval(
                "UPDATE spaces SET taken = taken + $2 WHERE store_id = $1 AND (capacity IS NULL OR taken + $2 <= capacity) RETURNING true",
                store_id, wanted[store_id],
            )  # fmt: skip
            if taken is None:
                full.add(store_id)
    return full


async def images(connection: Any, made: Sequence[Image], known: Iterable[UUID] = ()) -> None:
    """Name new private images, each with its blobs; new ones are made, those of `known` are there, locked and active."""
    there = {str(id) for id in known}
    blobs = [(image.id, format, blob) for image in made for format, blob in image.blobs.items()]
    new = [str(blob) for _, _, blob in blobs if str(blob) not in there]
    active = {image.id for image in made if any(str(blob) in there for blob in image.blobs.values())}
    rows = [
        (
            image.id, image.name, image.project, image.subject, dict(image.properties), image.hidden, image.vetting and image.vetting.value,
            "active" if image.id in active else "queued",
        )
        for image in made
    ]  # fmt: skip
    with reachable():
        await connection.execute("INSERT INTO blobs (id) SELECT unnest($1::text[])::uuid", new)
        await connection.execute(
            "INSERT INTO images (id, name, project, subject, properties, hidden, vetting, status)"
            " SELECT (r->>0)::uuid, r->>1, r->>2, r->>3, r->4, (r->>5)::boolean, r->>6, r->>7"
            " FROM jsonb_array_elements($1::text::jsonb) AS t (r)",
            json_rows(rows),
        )
        await connection.execute(
            "INSERT INTO image_blobs (image_id, format, blob_id)"
            " SELECT (r->>0)::uuid, r->>1, (r->>2)::uuid FROM jsonb_array_elements($1::text::jsonb) AS t (r)",
            json_rows(blobs),
        )


async def uploads(connection: Any, begun: Sequence[Beginning]) -> None:
    """Write the uploads and their places, whose space has been taken."""
    with reachable():
        await connection.execute(
            "INSERT INTO uploads (id, blob_id, image_id, format, purpose, project, subject, size, digests, makes_image, expires_at)"
            " SELECT (r->>0)::uuid, (r->>1)::uuid, (r->>2)::uuid, r->>3, r->>4, r->>5, r->>6, (r->>7)::bigint, r->8, (r->>9)::boolean,"
            "        clock_timestamp() + make_interval(secs => (r->>10)::float8)"
            " FROM jsonb_array_elements($1::text::jsonb) AS t (r)",
            json_rows([_upload_row(beginning.upload) for beginning in begun]),
        )
        await connection.execute(
            "INSERT INTO destinations (upload_id, store_id, rank, state, staging_key, final_key, reserved, urls_until, bound, estimate)"
            " SELECT (r->>0)::uuid, (r->>1)::int, 1, 'active', r->>2, r->>3, (r->>4)::bigint, to_timestamp((r->>5)::float8),"
            "        ARRAY(SELECT jsonb_array_elements_text(r->6)), r->7 FROM jsonb_array_elements($1::text::jsonb) AS t (r)",
            json_rows([_place_row(beginning) for beginning in begun]),
        )


def _upload_row(upload: NewUpload) -> tuple[Any, ...]:
    return (
        upload.id, upload.blob_id, upload.image_id, upload.format, upload.purpose.value, upload.project, upload.subject, upload.size,
        dict(upload.digests), upload.makes_image, upload.ttl_seconds,
    )  # fmt: skip


def _place_row(beginning: Beginning) -> tuple[Any, ...]:
    place = beginning.place
    return (
        beginning.upload.id, place.store_id, place.staging_key, place.final_key, beginning.upload.size or 0, beginning.urls_until,
        list(beginning.bound), dict(place.estimate),
    )  # fmt: skip
