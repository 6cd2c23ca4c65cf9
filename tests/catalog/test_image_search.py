"""Searches for images: the same as filtering and sorting all of them in memory, page by page."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from broker import errors
from broker.catalog import image_search
from broker.catalog.image_search import Condition, Search
from broker.model import new_id
from broker.service import images as service
from broker.service.idempotency import Claim
from tests.catalog.registry import ADMIN, ALICE, BOB, Registry


async def make(registry: Registry, client: Any = ALICE, **request: Any) -> str:
    made = await service.create_image(registry.context, client, {"name": "n", **request}, Claim(new_id()))
    return str(made.body["id"])


async def add_bytes(registry: Registry, image: str, format: str, size: int, **digests: str) -> None:
    blob = new_id()
    await registry.db.execute("INSERT INTO blobs (id, size, digests, state) VALUES ($1, $2, $3, 'active')", blob, size, digests)
    await registry.db.execute("INSERT INTO image_blobs VALUES ($1, $2, $3)", UUID(image), format, blob)
    await registry.db.execute("UPDATE images SET status = 'active' WHERE id = $1", UUID(image))


async def find(registry: Registry, client: Any = ALICE, **wanted: Any) -> list[str]:
    """The ids of all pages, in order."""
    found: list[str] = []
    search = Search(**{"limit": 1000, **wanted})
    while True:
        page = await service.search_images(registry.context, client, search)
        found += [image["id"] for image in page["images"]]
        if "next" not in page:
            return found
        search = Search(**{"limit": 1000, **wanted, "marker": UUID(page["next"])})


def condition(field: str, comparison: Any, value: Any) -> tuple[Condition, ...]:
    return (Condition(field, comparison, value),)


async def test_conditions(registry: Registry) -> None:
    raw = await make(registry, name="raw", tags=["a", "b"], min_ram=5, properties={"os": "linux", "x": "1"})
    declared = await make(registry, name="declared", disk_format="qcow2", container_format="ova", hidden=True, protected=True)
    empty = await make(registry, name="empty", tags=["b"], properties={"os": "linux"})
    await add_bytes(registry, raw, "raw", 7, md5="m", sha256="s")
    await add_bytes(registry, declared, "iso", 1)
    await add_bytes(registry, declared, "qcow2", 9, sha512="t", sha256="u")
    early, late = datetime(2020, 1, 1, tzinfo=UTC), datetime(2120, 1, 1, tzinfo=UTC)
    expected: list[tuple[dict[str, Any], set[str]]] = [
        ({}, {raw, declared, empty}),
        ({"conditions": condition("hidden", "eq", False)}, {raw, empty}),
        ({"conditions": condition("name", "in", ["raw", "empty", "none"])}, {raw, empty}),
        ({"conditions": condition("id", "eq", raw)}, {raw}),
        ({"conditions": condition("id", "in", [raw, empty, "none", declared.upper()])}, {raw, empty}),
        ({"conditions": condition("id", "eq", "none")}, set()),
        ({"conditions": condition("status", "eq", "queued")}, {empty}),
        ({"conditions": condition("project", "eq", "p")}, {raw, declared, empty}),
        ({"conditions": condition("disk_format", "eq", "qcow2")}, {declared}),
        ({"conditions": condition("disk_format", "in", ["raw", "iso"])}, {raw}),
        ({"conditions": condition("container_format", "eq", "bare")}, {raw}),
        ({"conditions": condition("size", "gte", 7)}, {raw, declared}),
        ({"conditions": condition("size", "lte", 8)}, {raw}),
        ({"conditions": condition("size", "gte", 2**62)}, set()),
        ({"conditions": condition("md5", "eq", "m")}, {raw}),
        ({"conditions": condition("sha", "eq", "s")}, {raw}),
        ({"conditions": condition("sha", "eq", "t")}, {declared}),
        ({"conditions": condition("sha", "eq", "m")}, set()),
        ({"conditions": condition("min_ram", "gte", 5)}, {raw}),
        ({"conditions": condition("protected", "eq", True)}, {declared}),
        ({"conditions": condition("created_at", "gt", early)}, {raw, declared, empty}),
        ({"conditions": condition("updated_at", "gt", late)}, set()),
        ({"properties": {"os": "linux"}}, {raw, empty}),
        ({"properties": {"os": "linux", "x": "1"}}, {raw}),
        ({"properties": {"x": "2"}}, set()),
        ({"tags": ("b",)}, {raw, empty}),
        ({"tags": ("a", "b")}, {raw}),
        ({"visibility": "private"}, {raw, declared, empty}),
        ({"visibility": "shared"}, set()),
    ]
    for wanted, ids in expected:
        assert set(await find(registry, **wanted)) == ids, wanted


async def test_whose_images_are_found(registry: Registry) -> None:
    """As `permit.lists_image` says; community images of others when they are asked for."""
    own = {kind: await make(registry, ALICE, visibility=kind) for kind in ("private", "shared", "community")}
    other = {kind: await make(registry, BOB, visibility=kind) for kind in ("private", "shared", "community")}
    public = await make(registry, ADMIN, visibility="public")
    member = await make(registry, BOB, visibility="shared")
    await registry.db.execute("INSERT INTO image_members (image_id, project, status) VALUES ($1, $2, 'accepted')", UUID(member), "p")
    asked = await make(registry, BOB, visibility="shared")
    await registry.db.execute("INSERT INTO image_members (image_id, project) VALUES ($1, $2)", UUID(asked), "p")
    assert set(await find(registry)) == {*own.values(), public, member}
    assert set(await find(registry, visibility="all")) == {*own.values(), public, member, other["community"]}
    assert set(await find(registry, visibility="community")) == {own["community"], other["community"]}
    assert set(await find(registry, visibility="public")) == {public}
    assert set(await find(registry, visibility="shared")) == {own["shared"], member}
    assert set(await find(registry, visibility="shared", member_status="pending")) == {own["shared"], asked}
    assert set(await find(registry, visibility="shared", member_status=None)) == {own["shared"], member, asked}
    everything = {*own.values(), *other.values(), public, member, asked}
    assert set(await find(registry, ADMIN, visibility="all")) == everything
    await registry.db.execute("UPDATE images SET vetting = 'pending' WHERE id = $1", UUID(public))
    assert public not in await find(registry)
    assert public in await find(registry, ADMIN)


@pytest.mark.parametrize("seed", range(2))
async def test_pages_in_any_order(seed: int, registry: Registry) -> None:
    """No image is met twice or left out, whatever is sorted by, however many have the same value, and whatever the page's length."""
    rng = random.Random(seed)
    known = []
    for number in range(17):
        name, format = rng.choice("abc"), rng.choice([None, "raw", "iso"])
        id = await make(registry, name=name, **({"disk_format": format} if format else {}))
        size = rng.choice([None, 1, 2])
        if size is not None:
            await add_bytes(registry, id, format or "qcow2", size)
        shown = format or ("qcow2" if size is not None else "")
        known.append({"id": id, "name": name, "disk_format": shown, "size": -1 if size is None else size, "created_at": number})
    for keys in (["name"], ["size", "name"], ["disk_format"], ["id"], ["created_at"], ["size", "disk_format", "name"]):
        sort = tuple((key, rng.random() < 0.5) for key in keys)
        expected = list(known)
        for key, descending in reversed([*sort, *((key, True) for key in ("created_at", "id") if key not in keys)]):
            expected.sort(key=lambda image: image[key], reverse=descending)
        for limit in (1, 5, 17):
            assert await find(registry, sort=sort, limit=limit) == [image["id"] for image in expected], (sort, limit)


async def test_a_marker_is_an_image_that_may_be_listed(registry: Registry) -> None:
    hidden_from_bob = await make(registry)
    for marker in (UUID(hidden_from_bob), new_id()):
        with pytest.raises(errors.Invalid) as raised:
            await service.search_images(registry.context, BOB, Search(limit=5, marker=marker))
        assert raised.value.field == "marker"
    assert (await service.search_images(registry.context, ALICE, Search(limit=5, marker=UUID(hidden_from_bob))))["images"] == []


class Explained:
    """A connection that notes how many images the server read for what was fetched through it."""

    def __init__(self, db: Any) -> None:
        self.db = db
        self.read = 0

    async def fetch(self, statement: str, *values: Any) -> list[Any]:
        (plan,) = await self.db.fetchval("EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, FORMAT JSON) " + statement, *values)
        self._count(plan["Plan"])
        return list(await self.db.fetch(statement, *values))

    async def fetchval(self, statement: str, *values: Any) -> Any:
        return await self.db.fetchval(statement, *values)

    def _count(self, node: dict[str, Any]) -> None:
        if node.get("Relation Name") == "images":
            self.read += int((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
        for child in node.get("Plans", ()):
            self._count(child)


async def test_lists_go_by_an_index(registry: Registry) -> None:
    """Of many images a page reads not many more than it shows: the newest, those after a marker, by name, by id."""
    await registry.db.execute(
        """INSERT INTO images (id, name, project, subject, visibility, status, created_at)
           SELECT gen_random_uuid(), 'n' || n, CASE n % 2 WHEN 0 THEN 'p' ELSE 'q' END, 'u', 'private', 'active',
                  now() - make_interval(secs => n) FROM generate_series(1, 5000) n"""
    )
    await registry.db.execute("ANALYZE images")
    middle = await registry.db.fetchval("SELECT id FROM images WHERE name = 'n3000'")
    searches = [
        (Search(limit=10), 10),
        (Search(limit=10, marker=middle), 10),
        (Search(limit=10, sort=(("name", False),)), 10),
        (Search(limit=10, sort=(("name", True),), marker=middle), 10),
        (Search(limit=10, sort=(("id", False),), marker=middle), 10),
        (Search(limit=10, conditions=condition("name", "eq", "n3000")), 1),
        (Search(limit=10, conditions=condition("id", "in", [str(middle)])), 1),
    ]
    for wanted, count in searches:
        for everything in (False, True):
            db = Explained(registry.db)
            found = await image_search.search(db, wanted, "p", everything=everything)
            assert found is not None
            assert len(found) == count, wanted
            assert 0 < db.read <= 200, (db.read, wanted, everything)
