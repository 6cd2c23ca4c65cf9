"""Registered stores, with their slots, their space and what the probe saw.

Rules
- A store and its rows in `slots` and `spaces` are written and removed together. Fewer slots than are leased take nothing
  away: grants stop until enough leases have ended (invariant 3).
- A change counts only on top of the version that it was decided on (If-Match); ``None`` stands for whichever is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import asyncpg

from broker import errors
from broker.catalog.connect import reachable
from broker.catalog.transaction import transaction
from broker.model import Abilities, Direction, Exposure, SlotRange, Store


@dataclass(frozen=True, slots=True)
class StoreRecord:
    """A store as administrators see it. `probe` holds the steps, each ``{"name", "result", "detail"?}``."""

    store: Store
    probe: Sequence[Mapping[str, str]] = ()
    leased_read: int = 0
    leased_write: int = 0


_SELECT = """
SELECT s.id, s.name, s.kind, s.site, s.endpoint, s.internal_endpoint, s.internal, s.settings, s.credential, s.exposure, s.enabled,
       s.writable, s.cost, s.read_bandwidth, s.write_bandwidth, s.abilities, s.probe,
       extract(epoch FROM s.probed_at)::float8 AS probed_at, s.version,
       r.slots AS read_slots, r.leased AS leased_read, w.slots AS write_slots, w.leased AS leased_write,
       r.adapt_min AS read_min, r.adapt_max AS read_max, w.adapt_min AS write_min, w.adapt_max AS write_max,
       p.capacity, p.taken
FROM stores s
JOIN slots r ON r.store_id = s.id AND r.direction = 'read'
JOIN slots w ON w.store_id = s.id AND w.direction = 'write'
JOIN spaces p ON p.store_id = s.id
"""


def _record(row: Any) -> StoreRecord:
    store = Store(
        id=row["id"],
        name=row["name"],
        kind=row["kind"],
        site=row["site"],
        endpoint=row["endpoint"],
        internal_endpoint=row["internal_endpoint"],
        internal=row["internal"],
        settings=row["settings"],
        credential=row["credential"],
        exposure=Exposure(row["exposure"]),
        enabled=row["enabled"],
        writable=row["writable"],
        cost=row["cost"],
        read_slots=row["read_slots"],
        write_slots=row["write_slots"],
        read_adaptive=_range(row["read_min"], row["read_max"]),
        write_adaptive=_range(row["write_min"], row["write_max"]),
        read_bandwidth=row["read_bandwidth"],
        write_bandwidth=row["write_bandwidth"],
        capacity=row["capacity"],
        reserved=row["taken"],
        abilities=_abilities(row["abilities"]),
        probed_at=row["probed_at"],
        version=row["version"],
    )
    return StoreRecord(store, tuple(row["probe"]), row["leased_read"], row["leased_write"])


def _range(least: int | None, most: int | None) -> SlotRange | None:
    return None if least is None or most is None else SlotRange(least, most)


_ABILITIES = frozenset(field.name for field in fields(Abilities))


def _abilities(kept: Mapping[str, Any]) -> Abilities:
    """What was kept; a newer broker may have kept more than this one knows (invariant 12)."""
    known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items() if name in _ABILITIES}
    return Abilities(**known)


async def load(db: Any) -> list[Store]:
    """Every store."""
    with reachable():
        return [_record(row).store for row in await db.fetch(_SELECT + "ORDER BY s.name")]


async def get(db: Any, name: str) -> StoreRecord | None:
    """The store of this name."""
    with reachable():
        row = await db.fetchrow(_SELECT + "WHERE s.name = $1", name)
    return None if row is None else _record(row)


async def page(
    db: Any, *, private: bool, limit: int, after: str = "", site: str | None = None, kind: str | None = None
) -> list[StoreRecord]:
    """Up to `limit` stores by name, those after `after`; at `site` or below it. Those of exposure ``service`` only with `private`."""
    with reachable():
        rows = await db.fetch(
            _SELECT
            + """WHERE s.name > $1 AND ($2 OR s.exposure = 'public') AND ($3::text IS NULL OR s.site = $3 OR starts_with(s.site, $3 || '/'))
                 AND ($4::text IS NULL OR s.kind = $4) ORDER BY s.name LIMIT $5""",
            after, private, site, kind, limit,
        )  # fmt: skip
    return [_record(row) for row in rows]


_INSERT = """
INSERT INTO stores (name, kind, site, endpoint, internal_endpoint, internal, settings, credential, exposure, enabled, writable, cost,
                    read_bandwidth, write_bandwidth, abilities, probe, probed_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, CASE WHEN $17 THEN now() END)
RETURNING id
"""


async def insert(db: Any, store: Store, probe: Sequence[Mapping[str, str]], *, probed: bool = True) -> StoreRecord:
    """Register `store` (its `id`, `reserved`, `probed_at` and `version` do not matter).

    Raises `Conflict` when the name is taken, `Invalid` when the site does not exist.
    """
    values = _columns(store)
    try:
        async with transaction(db) as connection:
            id = await connection.fetchval(_INSERT, store.name, store.kind, *values, asdict(store.abilities), list(probe), probed)
            await connection.executemany(
                "INSERT INTO slots (store_id, direction, slots, adapt_min, adapt_max) VALUES ($1, $2, $3, $4, $5)", _slots(store, id)
            )
            await connection.execute("INSERT INTO spaces (store_id, capacity) VALUES ($1, $2)", id, store.capacity)
            return _record(await connection.fetchrow(_SELECT + "WHERE s.id = $1", id))
    except asyncpg.UniqueViolationError:
        raise errors.Conflict(f"A store {store.name} exists already.", field="name", expected="a name that no store has") from None
    except asyncpg.ForeignKeyViolationError:
        raise _no_site(store.site) from None


_UPDATE = """
UPDATE stores SET site = $3, endpoint = $4, internal_endpoint = $5, internal = $6, settings = $7, credential = $8, exposure = $9,
       enabled = $10, writable = $11, cost = $12, read_bandwidth = $13, write_bandwidth = $14, version = version + 1, updated_at = now()
WHERE id = $1 AND ($2::int IS NULL OR version = $2) RETURNING id
"""


async def update(db: Any, store: Store, version: int | None, *, probe: Sequence[Mapping[str, str]] | None = None) -> StoreRecord:
    """Write everything that may change of the store with `store.id`; with `probe`, also its abilities as seen just now.

    Raises `PreconditionFailed` when it is no longer at `version`, `NotFound`, and `Invalid` when the site does not exist.
    """
    try:
        async with transaction(db) as connection:
            if await connection.fetchval(_UPDATE, store.id, version, *_columns(store)) is None:
                raise await _why_not(connection, store.id)
            await connection.executemany(
                """UPDATE slots SET slots = $3, adapt_min = $4, adapt_max = $5, search = CASE WHEN $4 IS NULL THEN NULL ELSE search END
                   WHERE store_id = $1 AND direction = $2 AND (slots, adapt_min, adapt_max) IS DISTINCT FROM ($3, $4, $5)""",
                _slots(store, store.id),
            )
            await connection.execute(
                "UPDATE spaces SET capacity = $2 WHERE store_id = $1 AND capacity IS DISTINCT FROM $2", store.id, store.capacity
            )
            if probe is not None:
                await _write_probe(connection, store.id, store.abilities, probe)
            return _record(await connection.fetchrow(_SELECT + "WHERE s.id = $1", store.id))
    except asyncpg.ForeignKeyViolationError:
        raise _no_site(store.site) from None


async def record_probe(db: Any, store: Store, probe: Sequence[Mapping[str, str]]) -> StoreRecord:
    """Keep what a probe saw of `store`. Raises `PreconditionFailed` when the store changed while it was probed, and `NotFound`."""
    async with transaction(db) as connection:
        bumped = await connection.fetchval(
            "UPDATE stores SET version = version + 1, updated_at = now() WHERE id = $1 AND version = $2 RETURNING id",
            store.id, store.version,
        )  # fmt: skip
        if bumped is None:
            raise await _why_not(connection, store.id)
        await _write_probe(connection, store.id, store.abilities, probe)
        return _record(await connection.fetchrow(_SELECT + "WHERE s.id = $1", store.id))


async def delete(db: Any, id: int, version: int | None) -> None:
    """Forget a store. Raises `Conflict` while it holds replicas, uploads or objects to be deleted, `PreconditionFailed`, `NotFound`."""
    try:
        async with transaction(db) as connection:
            # FOR UPDATE keeps new replicas and destinations away: their foreign keys wait for this row.
            found = await connection.fetchval(
                "SELECT id FROM stores WHERE id = $1 AND ($2::int IS NULL OR version = $2) FOR UPDATE", id, version
            )
            if found is None:
                raise await _why_not(connection, id)
            # Uploads that have ended are history.
            await connection.execute(
                """DELETE FROM destinations d USING uploads u
                   WHERE d.store_id = $1 AND u.id = d.upload_id AND u.state NOT IN ('open', 'committing')""",
                id,
            )
            uses = await connection.fetchrow(
                """SELECT (SELECT count(*) FROM replicas WHERE store_id = $1) AS replicas,
                          (SELECT count(*) FROM destinations WHERE store_id = $1) AS uploads,
                          (SELECT count(*) FROM deletions WHERE store_id = $1) AS deletions""",
                id,
            )
            if any(uses.values()):
                raise errors.Conflict(
                    f"The store is in use: {uses['replicas']} replicas, {uses['uploads']} uploads under way, "
                    f"{uses['deletions']} objects to be deleted. Delete its replicas first."
                )
            await connection.execute("DELETE FROM stores WHERE id = $1", id)
    except asyncpg.ForeignKeyViolationError:
        raise errors.Conflict("The store is in use.") from None


async def take_space(connection: Any, store_id: int, size: int) -> None:
    """Count `size` bytes more on a store; fewer, never below none, when negative."""
    with reachable():
        await connection.execute("UPDATE spaces SET taken = greatest(0, taken + $2) WHERE store_id = $1", store_id, size)


def _slots(store: Store, id: int) -> list[tuple[Any, ...]]:
    """The rows of `slots`."""
    ways = ((Direction.READ, store.read_slots, store.read_adaptive), (Direction.WRITE, store.write_slots, store.write_adaptive))
    return [(id, way.value, slots, *(bounds or (None, None))) for way, slots, bounds in ways]


def _columns(store: Store) -> tuple[Any, ...]:
    """What may change, in the order that `_INSERT` and `_UPDATE` share from the site on."""
    return (
        store.site,
        store.endpoint,
        store.internal_endpoint,
        store.internal,
        dict(store.settings),
        store.credential,
        store.exposure.value,
        store.enabled,
        store.writable,
        store.cost,
        store.read_bandwidth,
        store.write_bandwidth,
    )


async def _write_probe(connection: Any, id: int, abilities: Abilities, probe: Sequence[Mapping[str, str]]) -> None:
    await connection.execute(
        "UPDATE stores SET abilities = $2, probe = $3, probed_at = now() WHERE id = $1", id, asdict(abilities), list(probe)
    )


async def _why_not(connection: Any, id: int) -> errors.BrokerError:
    """Why no row matched an id and a version."""
    if await connection.fetchval("SELECT true FROM stores WHERE id = $1", id):
        return errors.PreconditionFailed("The store has changed since it was read.")
    return errors.NotFound("No such store.")


def _no_site(site: str) -> errors.Invalid:
    return errors.Invalid(f"There is no site {site}.", field="site", expected="the path of an existing site")
