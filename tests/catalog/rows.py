"""Rows that catalogue tests begin with, put in by plain SQL."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from broker.model import new_id


async def store(db: Any, name: str = "s1", *, read: int | None = None, write: int | None = None, exposure: str = "public") -> int:
    """A store with so many slots at the site eu/az1, and its number."""
    await db.execute("INSERT INTO sites (path) VALUES ('eu/az1') ON CONFLICT DO NOTHING")
    id = await db.fetchval(
        """INSERT INTO stores (name, kind, site, endpoint, abilities, exposure)
           VALUES ($1, 's3', 'eu/az1', 'http://127.0.0.1:1', '{"reads": true, "writes": true}', $2) RETURNING id""",
        name,
        exposure,
    )
    await db.execute("INSERT INTO slots (store_id, direction, slots) VALUES ($1, 'read', $2), ($1, 'write', $3)", id, read, write)
    await db.execute("INSERT INTO spaces (store_id) VALUES ($1)", id)
    return int(id)


async def blob(db: Any, *stores: int, size: int = 1000, project: str = "p", visibility: str = "public", state: str = "active") -> UUID:
    """An active blob with a replica on each of `stores`, and an image with it."""
    blob_id, image_id = new_id(), new_id()
    await db.execute("INSERT INTO blobs (id, size, digests, state) VALUES ($1, $2, '{}', $3)", blob_id, size, "active")
    for store_id in stores:
        await db.execute(
            """INSERT INTO replicas (id, blob_id, store_id, key, state, project, subject, observed_by, observed_strength, observed_at)
               VALUES ($1, $2, $3, $4, $5, $6, 'u', 'broker', 'sha256', now())""",
            new_id(),
            blob_id,
            store_id,
            f"{blob_id}/{store_id}",
            state,
            project,
        )
    await db.execute(
        "INSERT INTO images (id, name, project, subject, visibility, status) VALUES ($1, 'i', $2, 'u', $3, 'active')",
        image_id,
        project,
        visibility,
    )
    await db.execute("INSERT INTO image_blobs VALUES ($1, 'raw', $2)", image_id, blob_id)
    return blob_id
