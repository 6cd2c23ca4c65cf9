"""Slots that adapt, on a real catalogue: windows of reports move them, one broker at a time, within what was set."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker.catalog import adapting
from broker.model import new_id
from broker.service.adapting import adapt_slots
from tests.parts.broker import Api, RunningBroker, broker_on
from tests.parts.cluster import SITE, ok
from tests.parts.condition import until
from tests.parts.seaweedfs import S3Part

KNEE, BYTES = 7, 1_000_000


@pytest.fixture
async def place(
    database: str, seaweedfs: S3Part, session: aiohttp.ClientSession, tmp_path: Path
) -> AsyncIterator[tuple[RunningBroker, Api]]:
    """A broker whose own job never finds a window that is over, and a store with the name ``adaptive``."""
    async with broker_on(database, tmp_path, {"policy": {"admission": {"adapt_seconds": 1000.0}}}) as broker:
        admin = Api(broker.url, session, broker.token("admin"))
        ok(await admin.post("/v1/sites", {"path": SITE}), 201)
        settings = {"bucket": seaweedfs.bucket, "region": seaweedfs.region, "prefix": f"{tmp_path.name}/"}
        store: dict[str, Any] = {"name": "adaptive", "kind": "s3", "site": SITE, "endpoint": seaweedfs.endpoint, "settings": settings}
        store |= {"internal": True, "credential": broker.credential("adaptive", seaweedfs.credential)}
        made = ok(await admin.post("/v1/stores", {**store, "read_adaptive": {"min": 2, "max": 20}}), 201)
        assert (made["read_slots"], made["read_adaptive"], made["write_adaptive"]) == (2, {"min": 2, "max": 20}, None)
        yield broker, admin


async def window(broker: RunningBroker) -> int:
    """A window ends in which the store moved what it can; the slots that the next one has."""
    db, id = broker.context.db, new_id()
    store_id, slots = await db.fetchrow(
        "UPDATE slots SET searched_at = clock_timestamp() - interval '1001 seconds', leased = slots WHERE adapt_max IS NOT NULL"
        " RETURNING store_id, slots"
    )
    await db.execute("DELETE FROM reports")  # those of the windows before
    await db.execute(
        "INSERT INTO tickets (id, operation, project, subject, instance, address, blob_id, places, expires_at)"
        " VALUES ($1, 'download', 'p', 's', '', '', $1, '[]', now())",
        id,
    )
    await db.execute(
        "INSERT INTO reports (ticket_id, store_id, outcome, bytes, seconds) VALUES ($1, $2, 'ok', $3, 1)",
        id, store_id, BYTES * min(slots, KNEE) * 1001,
    )  # fmt: skip
    await adapt_slots(broker.context)
    return int(await db.fetchval("SELECT slots FROM slots WHERE adapt_max IS NOT NULL"))


async def test_reports_move_the_slots(place: tuple[RunningBroker, Api]) -> None:
    broker, admin = place
    await until(lambda: _kept(broker))
    levels = [await window(broker) for _ in range(60)]
    assert min(levels) >= 2
    assert max(levels) <= 20
    assert all(abs(level - KNEE) <= 3 for level in levels[-20:]), levels
    assert ok(await admin.get("/v1/stores/adaptive"))["read_slots"] == levels[-1]
    # Too few transfers tell nothing: the slots stay, or go home.
    await broker.context.db.execute("UPDATE slots SET searched_at = clock_timestamp() - interval '1001 seconds', leased = 0")
    await adapt_slots(broker.context)
    assert abs(int(await broker.context.db.fetchval("SELECT slots FROM slots WHERE adapt_max IS NOT NULL")) - KNEE) <= 2


async def _kept(broker: RunningBroker) -> bool:
    """The broker's job has begun the first window."""
    return bool(await broker.context.db.fetchval("SELECT count(*) FROM slots WHERE search IS NOT NULL"))


async def test_one_broker_at_a_time(place: tuple[RunningBroker, Api]) -> None:
    broker, _ = place
    await until(lambda: _kept(broker))
    before = await window(broker)
    async with adapting.alone(broker.context.db) as first, adapting.alone(broker.context.db) as second:
        assert first is not None
        assert second is None
        assert await window(broker) == before


async def test_what_an_administrator_sets(place: tuple[RunningBroker, Api]) -> None:
    broker, admin = place
    refused = await admin.patch("/v1/stores/adaptive", {"read_adaptive": {"min": 9, "max": 8}}, "*")
    assert (refused.status, refused.body["field"]) == (400, "read_adaptive")
    assert ok(await admin.patch("/v1/stores/adaptive", {"read_slots": 100}, "*"))["read_slots"] == 20
    assert ok(await admin.patch("/v1/stores/adaptive", {"read_adaptive": {"min": 4, "max": 4}}, "*"))["read_slots"] == 4
    await until(lambda: _kept(broker))
    assert {await window(broker) for _ in range(4)} == {4}
    ended = ok(await admin.patch("/v1/stores/adaptive", {"read_adaptive": None, "read_slots": None}, "*"))
    assert (ended["read_slots"], ended["read_adaptive"]) == (None, None)
    assert not await _kept(broker)


async def test_slots_are_locked_for_no_longer_than_a_statement(place: tuple[RunningBroker, Api], monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that is stopped while it adapts holds up no grant."""
    broker, _ = place
    await until(lambda: _kept(broker))
    write, written = adapting.write, []

    async def and_stop(*arguments: Any) -> None:
        await write(*arguments)
        written.append(await broker.context.db.fetch("SELECT slots FROM slots FOR UPDATE NOWAIT"))

    monkeypatch.setattr(adapting, "write", and_stop)
    await window(broker)
    assert written
