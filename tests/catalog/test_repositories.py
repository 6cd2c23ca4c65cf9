"""Objects of repositories in the catalogue: named once, found by name, gone with their images, known again by their images' names."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from broker.catalog import beginnings, repositories
from broker.catalog.transaction import transaction
from broker.model import BlobState, Image, ImageStatus, Visibility, new_id

OIDS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(50)]


def image(oid: str, project: str = "p") -> Image:
    return Image(new_id(), f"r/{oid}", project, Visibility.PRIVATE, ImageStatus.QUEUED, {"a": "b"}, {"raw": new_id()}, hidden=True)


async def make(connection: Any, oids: list[str]) -> dict[str, UUID]:
    """Make those of the objects that nobody has made; their images."""
    images = {oid: image(oid) for oid in oids}
    taken = await repositories.take(connection, "p", "r", {oid: each.id for oid, each in images.items()})
    await beginnings.images(connection, [images[oid] for oid in taken])
    return {oid: images[oid].id for oid in taken}


async def test_each_object_is_made_once_however_many_make_it(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    async def one(oids: list[str]) -> dict[str, UUID]:
        async with transaction(pool) as connection:
            return await make(connection, oids)

    made = await asyncio.gather(*(one(order) for order in (OIDS, OIDS[::-1], OIDS[10:], OIDS[:40])))
    assert sorted(oid for each in made for oid in each) == sorted(OIDS)
    found = await repositories.find(pool, "p", "r", OIDS, sees_private=False)
    assert {oid: kept.image_id for oid, kept in found.items()} == {oid: id for each in made for oid, id in each.items()}
    assert {(kept.state, kept.size, kept.is_held) for kept in found.values()} == {(BlobState.QUEUED, None, False)}
    assert await pool.fetchval("SELECT count(*) FROM images WHERE hidden AND properties ->> 'a' = 'b'") == len(OIDS)
    assert await repositories.find(pool, "p", "other", OIDS, sees_private=True) == {}
    assert await repositories.find(pool, "other", "r", OIDS, sees_private=True) == {}


async def test_an_object_goes_with_its_image(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    async with transaction(pool) as connection:
        made = await make(connection, OIDS[:2])
    await pool.execute("DELETE FROM images WHERE id = $1", made[OIDS[0]])
    assert list(await repositories.find(pool, "p", "r", OIDS[:2], sees_private=False)) == [OIDS[1]]


@pytest.mark.parametrize(
    ("name", "repository"),
    [(f"r/{OIDS[0]}", "r"), (f"a.b-c/{OIDS[0]}", "a.b-c"), (OIDS[0], None), (f"/{OIDS[0]}", None), (f"r/{OIDS[1]}", None), ("r/x", None)],
)
async def test_an_object_is_known_by_the_name_of_its_image(pool: asyncpg.Pool[asyncpg.Record], name: str, repository: str | None) -> None:
    async with transaction(pool) as connection:
        made = image("x")
        await beginnings.images(connection, [made])
        for _ in range(2):
            await repositories.remember(connection, "p", name, made.id, {"sha256": OIDS[0]})
    rows = await pool.fetch("SELECT repository, oid FROM lfs_objects")
    assert [tuple(row) for row in rows] == ([] if repository is None else [(repository, OIDS[0])])


async def test_stores_that_have_no_room_are_told(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    site = "INSERT INTO sites (path) VALUES ('eu')"
    await pool.execute(site)
    ids = []
    for name, capacity in (("small", 10), ("large", None)):
        id = await pool.fetchval(
            "INSERT INTO stores (name, kind, site, endpoint) VALUES ($1, 's3', 'eu', 'http://x') RETURNING id", name
        )  # fmt: skip
        await pool.execute("INSERT INTO spaces (store_id, capacity) VALUES ($1, $2)", id, capacity)
        ids.append(id)
    async with transaction(pool) as connection:
        assert await beginnings.reserve(connection, [(ids[0], 5), (ids[1], 100), (ids[0], 5)]) == set()
        assert await beginnings.reserve(connection, [(ids[1], 100), (ids[0], 1)]) == {ids[0]}
    assert await pool.fetchval("SELECT taken FROM spaces WHERE store_id = $1", ids[1]) == 200
