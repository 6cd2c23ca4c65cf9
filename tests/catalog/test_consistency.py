"""What is counted is what there is: faults that are put in by hand are told, and mended."""

from __future__ import annotations

from typing import Any

import pytest

from broker.catalog import consistency
from broker.service.commit import commit
from broker.service.upload import upload
from tests.parts.desk import Desk, client, digests

BODY = b"x" * 1000


async def _filled(desk: Desk) -> None:
    """A store with a replica, an open upload and its lease."""
    fake = await desk.fake(write_slots=3, capacity=100_000)
    context = await desk.broker()
    asked = {"operation": "upload", "image": {"name": "a"}, "size": len(BODY), "digests": digests(BODY)}
    ticket = await upload(context, client(), asked)
    fake.put(ticket["destinations"][0]["url"], BODY)
    await commit(context, client(), ticket["id"], {"size": len(BODY), "digests": digests(BODY)})
    await upload(context, client(), asked | {"image": {"name": "b"}, "digests": {}})


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("SELECT 1", []),
        ("UPDATE slots SET leased = leased + 2 WHERE direction = 'write'", [("leases", 3, 1)]),
        ("UPDATE spaces SET taken = taken - 7", [("space", 1993, 2000)]),
        ("INSERT INTO changes (xact, kind, subject) VALUES ('99999999999', 'blob', 'x')", [("changes", 1, 0)]),
    ],
)
async def test_faults_are_told_and_mended(desk: Desk, pool: Any, fault: str, told: list[tuple[str, int, int]]) -> None:
    await _filled(desk)
    await pool.execute(fault)
    found = await consistency.findings(pool)
    assert [(each.what, each.is_now, each.should_be) for each in found] == told
    await consistency.mend(pool)
    assert await consistency.findings(pool) == []
    assert await pool.fetchval("SELECT sum(taken) FROM spaces") == 2000


async def test_what_needs_a_judgement_is_told_and_left(desk: Desk, pool: Any) -> None:
    await _filled(desk)
    await pool.execute("UPDATE replicas SET state = 'missing'")
    (found,) = await consistency.findings(pool)
    assert (found.what, found.subject, found.is_now, found.mends) == ("blobs", "active, without a good replica", 1, False)
    await consistency.mend(pool)
    assert await consistency.findings(pool) == [found]
