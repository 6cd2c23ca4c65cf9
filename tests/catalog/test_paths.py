"""Averages kept in SQL are those of `broker.paths`, and a report counts once."""

from __future__ import annotations

from typing import Any

import pytest

from broker.catalog import paths
from broker.catalog.paths import PathKey, ReportRow
from broker.model import Outcome, new_id
from broker.paths import Contribution, PathAverage, Policy, Report, contribution, observe
from tests.catalog import rows

HALF_LIFE = 600.0


def report(store: int, added: Contribution, site: str = "eu", ticket: Any = None) -> ReportRow:
    return ReportRow(ticket or new_id(), store, "ok", 10, 1.0, None, {PathKey(site, store, "read"): added})


async def test_sums_decay_as_the_pure_update_says(pool: Any) -> None:
    store = await rows.store(pool)
    policy = Policy(half_life_seconds=HALF_LIFE)
    reports = [
        Report(Outcome.OK, 50_000_000, 2.0, setup_seconds=0.1),
        Report(Outcome.FAILED, 0, 1.0),
        Report(Outcome.OK, 10_000_000, 3.0),
    ]
    expected: PathAverage | None = None
    for each in reports:
        async with pool.acquire() as connection:
            assert await paths.report(connection, [report(store, contribution(each, policy))], HALF_LIFE) == [True]
        expected = observe(expected, each, 0.0 if expected is None else expected.updated_at + HALF_LIFE, policy)
        await pool.execute("UPDATE paths SET updated_at = updated_at - make_interval(secs => $1)", HALF_LIFE)
    (kept,) = (await paths.since(pool, 0)).values()
    assert expected is not None
    for name in ("weight", "good", "bytes", "busy_seconds", "setup_weight", "setup"):
        assert getattr(kept, name) == pytest.approx(getattr(expected, name), rel=1e-3), name


async def test_reports_of_one_batch_add_up_and_repeats_count_once(pool: Any) -> None:
    store = await rows.store(pool)
    one = Contribution(1.0, 1.0, 100.0, 2.0, 0.0, 0.0)
    ticket = new_id()
    async with pool.acquire() as connection:
        assert await paths.report(
            connection, [report(store, one), report(store, one, ticket=ticket), report(store, one, ticket=ticket)], 600
        ) == [
            True,
            True,
            False,
        ]
        assert await paths.report(connection, [report(store, one, ticket=ticket)], 600) == [False]
    kept = (await paths.since(pool, 0))[PathKey("eu", store, "read")]
    assert (kept.weight, kept.bytes) == (pytest.approx(2.0, rel=1e-3), pytest.approx(200.0, rel=1e-3))


async def test_only_what_changed_is_read_again(pool: Any) -> None:
    store = await rows.store(pool)
    one = Contribution(1.0, 1.0, 100.0, 2.0, 0.0, 0.0)
    async with pool.acquire() as connection:
        await paths.report(connection, [report(store, one, "eu")], 600)
        first = await paths.since(pool, 0)
        at = max(average.updated_at for average in first.values())
        await paths.report(connection, [report(store, one, "us")], 600)
    assert {key.site for key in await paths.since(pool, at + 1e-6)} == {"us"}
