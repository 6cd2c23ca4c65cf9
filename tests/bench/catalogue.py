"""The catalogue that the benchmarks ask: 100,000 blobs of 5 replicas over 50 stores, leases on half of the stores."""

from __future__ import annotations

import bisect
import itertools
import random
from typing import Any
from uuid import UUID

BLOBS, REPLICAS, STORES, PRINCIPALS = 100_000, 5, 50, 100
SITES = [f"r{region}/az{zone}" for region in range(5) for zone in range(2)]
KINDS = {"hmac": ("s3", "swift"), "tokens": ("http", "http")}
_SETTINGS = {
    "s3": {"bucket": "images", "region": "eu-1"},
    "swift": {"account": "AUTH_images", "container": "images"},
    "http": {},
}
_ABILITIES = {"reads": True, "ranges": True, "writes": True, "observes": ["sha256"], "refuses_overwrite": True}


def blob_id(number: int) -> UUID:
    """The id of a blob by its number: the same in every run, in the form of a UUID version 7."""
    return UUID(int=(0x019000000000 + number) << 80 | 0x7 << 76 | 0x2 << 62 | number)


async def fill(connection: Any, kind: str, *, blobs: int = BLOBS) -> None:
    """Write the catalogue by COPY; triggers are off meanwhile, nobody listens yet."""
    rng = random.Random(7)
    await connection.execute("SET session_replication_role = replica")
    await connection.copy_records_to_table("sites", records=[(site,) for site in SITES], columns=["path"])
    for number in range(STORES):
        name = KINDS[kind][number % 2]
        id = await connection.fetchval(
            """INSERT INTO stores (name, kind, site, endpoint, settings, credential, abilities) VALUES ($1, $2, $3, $4, $5, $6, $7)
               RETURNING id""",
            f"store-{number:02}", name, SITES[number % len(SITES)], f"http://store-{number:02}.example:8080", _SETTINGS[name],
            None if name == "http" else name, _ABILITIES,
        )  # fmt: skip
        slots = 10_000_000 if number % 4 < 2 else None  # half of the stores of each kind
        await connection.execute("INSERT INTO slots (store_id, direction, slots) VALUES ($1, 'read', $2), ($1, 'write', NULL)", id, slots)
        await connection.execute("INSERT INTO spaces (store_id) VALUES ($1)", id)
    ids = [row[0] for row in await connection.fetch("SELECT id FROM stores ORDER BY name")]
    digest = '{"sha256": "' + "ab" * 32 + '"}'
    await connection.execute("CREATE TEMP TABLE b (n int, id uuid, size bigint)")
    await connection.copy_records_to_table("b", records=[(n, blob_id(n), rng.randint(1 << 20, 8 << 30)) for n in range(blobs)])
    await connection.execute(f"INSERT INTO blobs (id, size, digests, state) SELECT id, size, '{digest}', 'active' FROM b")
    await connection.execute(
        """INSERT INTO images (id, name, project, subject, visibility, status)
           SELECT id, 'image ' || n, 'p' || n % 100, 'u', 'public', 'active' FROM b"""
    )
    await connection.execute("INSERT INTO image_blobs (image_id, format, blob_id) SELECT id, 'raw', id FROM b")
    places = ((n, place) for n in range(blobs) for place in rng.sample(ids, REPLICAS))
    await connection.execute("CREATE TEMP TABLE r (n int, store_id int)")
    await connection.copy_records_to_table("r", records=places)
    await connection.execute(
        """INSERT INTO replicas (id, blob_id, store_id, key, state, project, subject, observed_by, observed_strength, observed_at)
           SELECT gen_random_uuid(), b.id, r.store_id, b.id || '/' || r.store_id, 'active', 'p', 'u', 'broker', 'sha256', now()
           FROM r JOIN b USING (n)"""
    )
    await connection.execute("SET session_replication_role = DEFAULT")
    await connection.execute("ANALYZE")


def zipf(count: int, *, blobs: int = BLOBS, seed: int = 7) -> list[int]:
    """Numbers of blobs, drawn by Zipf's law with exponent 1."""
    rng = random.Random(seed)
    cumulative = list(itertools.accumulate(1 / rank for rank in range(1, blobs + 1)))
    order = list(range(blobs))
    rng.shuffle(order)
    return [order[bisect.bisect_left(cumulative, rng.random() * cumulative[-1])] for _ in range(count)]
