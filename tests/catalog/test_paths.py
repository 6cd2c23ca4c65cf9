"""Averages kept in SQL are those of `broker.paths`, voices those of `broker.voices`, and a report counts once."""

from __future__ import annotations

from typing import Any

import pytest

from broker.catalog import failures, paths, reports
from broker.catalog.paths import PathKey
from broker.catalog.reports import ReportRow
from broker.model import Outcome, new_id
from broker.paths import Contribution, PathAverage, Policy, Report, contribution, observe
from broker.suspicion import HALF_LIFE_SECONDS, Words
from broker.voices import MOST, moderated, share, voice
from tests.catalog import rows

HALF_LIFE = 600.0
ONE = Contribution(1.0, 1.0, 100.0, 2.0, 0.0, 0.0)


def report(
    store: int, added: Contribution = ONE, site: str = "eu", *wider: str, ticket: Any = None, client: str = "10.0.0.1",
    trouble: float = 0.0, implied: bool = False, excludes: str | None = None, project: str = "p",
) -> ReportRow:  # fmt: skip
    return ReportRow(
        ticket or new_id(), store, "read", "failed" if trouble else "ok", 10, 1.0, None, implied, voice(project, "u", client), added.weight,
        trouble, excludes, 60.0, site, dict.fromkeys((site, *wider), added),
    )  # fmt: skip


async def record(pool: Any, *told: ReportRow) -> list[bool]:
    async with pool.acquire() as connection:
        return [noted.counted for noted in await reports.record(connection, told, HALF_LIFE)]


async def pass_time(pool: Any, seconds: float) -> None:
    """As if everything had been reported so long ago."""
    await pool.execute("UPDATE paths SET updated_at = updated_at - make_interval(secs => $1)", seconds)
    await pool.execute("UPDATE voices SET heard_at = heard_at - make_interval(secs => $1)", seconds)


@pytest.mark.parametrize("setup", [5e-324, 1e-320, 1e-200, 1e-9])
async def test_what_is_too_small_for_a_number_refuses_no_report(pool: Any, setup: float) -> None:
    """Neither this report, nor one that comes after any time."""
    store = await rows.store(pool)
    told = contribution(Report(Outcome.OK, 10**9, 1.0, setup_seconds=setup), Policy(half_life_seconds=HALF_LIFE))
    await record(pool, report(store, told, "eu/az1", "eu", ""))
    without = told._replace(setup=0.0, setup_weight=0.0)
    for _ in range(4):
        await pass_time(pool, 2000 * HALF_LIFE)
        assert await record(pool, report(store, without, "eu/az1", "eu", "")) == [True]
    assert {average.setup for average in (await paths.since(pool, 0)).values()} == {0.0}


async def test_sums_decay_as_the_pure_update_says(pool: Any) -> None:
    store = await rows.store(pool)
    policy = Policy(half_life_seconds=HALF_LIFE)
    told = [
        Report(Outcome.OK, 50_000_000, 2.0, setup_seconds=0.1),
        Report(Outcome.FAILED, 0, 1.0),
        Report(Outcome.OK, 10_000_000, 3.0),
    ]
    expected: PathAverage | None = None
    for each in told:
        assert await record(pool, report(store, contribution(each, policy))) == [True]
        expected = observe(expected, each, 0.0 if expected is None else expected.updated_at + HALF_LIFE, policy)
        await pass_time(pool, HALF_LIFE)
    (kept,) = (await paths.since(pool, 0)).values()
    assert expected is not None
    for name in ("weight", "good", "bytes", "busy_seconds", "setup_weight", "setup"):
        assert getattr(kept, name) == pytest.approx(getattr(expected, name), rel=1e-3), name


async def test_reports_of_one_batch_add_up_and_repeats_count_once(pool: Any) -> None:
    store = await rows.store(pool)
    ticket = new_id()
    assert await record(pool, report(store), report(store, ticket=ticket), report(store, ticket=ticket)) == [True, True, False]
    assert await record(pool, report(store, ticket=ticket)) == [False]
    kept = (await paths.since(pool, 0))[PathKey("eu", store, "read")]
    assert (kept.weight, kept.bytes) == (pytest.approx(2.0, rel=1e-3), pytest.approx(200.0, rel=1e-3))


async def test_only_what_changed_is_read_again(pool: Any) -> None:
    store = await rows.store(pool)
    await record(pool, report(store))
    at = max(average.updated_at for average in (await paths.since(pool, 0)).values())
    await record(pool, report(store, ONE, "us"))
    assert {key.site for key in await paths.since(pool, at + 1e-6)} == {"us"}


async def test_wider_sites_hear_what_the_pure_decision_says(pool: Any) -> None:
    """One by one, in batches, and after a half-life; the own site hears everything."""
    store = await rows.store(pool)
    expected = weight = 0.0
    for batch in (1, 1, 3, 1):
        await record(pool, *(report(store, ONE, "eu/az1", "eu", "") for _ in range(batch)))
        expected += batch * share(weight, batch)
        weight += batch
        await pass_time(pool, HALF_LIFE)
        expected, weight = expected / 2, weight / 2
    found = {key.site: average.weight / 2 for key, average in (await paths.since(pool, 0)).items()}
    assert found == pytest.approx({"eu/az1": weight, "eu": expected, "": expected}, rel=1e-3)


async def test_wider_sites_hear_extremes_as_the_pure_decision_says(pool: Any) -> None:
    store = await rows.store(pool)
    known: Contribution | None = None
    for number, told in enumerate(
        [
            Contribution(1, 1, 1e9, 100, 1, 90.0),  # nothing is known: time is bounded
            Contribution(1, 1, 1e9, 0.001, 1, 0.5),
            Contribution(1, 0, 0, 0, 0, 0),
            Contribution(1, 1, 1e9, 4e4, 1, 3e4),
            Contribution(0.5, 0.5, 1e12, 1, 0, 0),
        ]
    ):
        added = moderated(told, known)
        known = added if known is None else Contribution(*(a + b for a, b in zip(known, added, strict=True)))
        await record(pool, report(store, told, "eu/az1", "eu", client=f"10.0.{number}.1"))
        found = (await paths.since(pool, 0))[PathKey("eu", store, "read")]
        assert Contribution(*(getattr(found, name) for name in Contribution._fields)) == pytest.approx(known, rel=1e-2), told


async def test_a_thousand_reports_of_one_voice_weigh_less_than_the_bound_elsewhere(pool: Any) -> None:
    """The instance that a client names itself is no part of its voice; another address is another voice."""
    store = await rows.store(pool)
    for _ in range(10):
        await record(pool, *(report(store, ONE, "eu/az1", "eu") for _ in range(100)))
    found = await paths.since(pool, 0)
    assert found[PathKey("eu/az1", store, "read")].weight == pytest.approx(1000, rel=1e-2)
    alone = found[PathKey("eu", store, "read")].weight
    assert 0.95 * MOST < alone < MOST
    await record(pool, report(store, ONE, "eu/az2", "eu", client="10.0.0.2"))
    assert (await paths.since(pool, 0))[PathKey("eu", store, "read")].weight == pytest.approx(alone + 1, rel=1e-3)


async def test_a_client_of_unknown_site_is_heard_as_from_elsewhere(pool: Any) -> None:
    store = await rows.store(pool)
    await record(pool, *(report(store, ONE, "") for _ in range(50)))
    assert (await paths.since(pool, 0))[PathKey("", store, "read")].weight < MOST


async def test_years_of_silence_are_no_error(pool: Any) -> None:
    """PostgreSQL refuses to compute what is too small for a number."""
    store = await rows.store(pool)
    await record(pool, report(store, trouble=1.0))
    await pass_time(pool, 3 * 365 * 86400)
    assert await record(pool, report(store, trouble=1.0)) == [True]
    assert (await paths.since(pool, 0))[PathKey("eu", store, "read")].weight == pytest.approx(1, rel=1e-3)


async def test_what_is_implied_counts_only_without_a_report_and_leaves_none(pool: Any) -> None:
    store, ticket, other = await rows.store(pool), new_id(), new_id()
    quarter = Contribution(0.25, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert await record(pool, report(store, ticket=ticket), report(store, quarter, ticket=ticket, implied=True)) == [True, False]
    assert await record(pool, report(store, quarter, ticket=ticket, implied=True)) == [False]
    assert await record(pool, report(store, quarter, ticket=other, implied=True)) == [True]
    assert await pool.fetchval("SELECT count(*) FROM reports") == 1
    assert await record(pool, report(store, ticket=other)) == [True], "a report is taken still"
    assert (await paths.since(pool, 0))[PathKey("eu", store, "read")].weight == pytest.approx(2.25, rel=1e-3)


async def test_only_those_who_report_are_known_as_such(pool: Any) -> None:
    store = await rows.store(pool)
    await record(pool, report(store, client="10.0.0.1"), report(store, client="10.0.0.2", implied=True))
    names = [voice("p", "u", f"10.0.0.{n}").name for n in (1, 2, 3)]
    assert await reports.reporting(pool, names) == {names[0]}
    await pass_time(pool, reports.KEPT_SECONDS + 1)
    await reports.forget_old(pool)
    assert await reports.reporting(pool, names) == set()


async def test_last_words_fade_and_are_taken_back_by_a_success(pool: Any) -> None:
    bad, good = await rows.store(pool, "bad"), await rows.store(pool, "good")
    await record(
        pool,
        report(bad, client="10.0.0.1", trouble=1.0),
        report(bad, client="10.0.0.2", trouble=0.25),
        report(bad, client="10.1.0.1", trouble=1.0, project="q"),
        report(bad, client="10.2.0.1"),
        report(good, client="10.0.0.1"),
    )
    await pass_time(pool, HALF_LIFE_SECONDS)
    near = {
        Words("10.0.0.0/24", "p", 0.5, 0.0), Words("10.1.0.0/24", "q", 0.5, 0.0), Words("10.2.0.0/24", "p", 0.0, 0.5),
    }  # fmt: skip
    found = await reports.last_words(pool)
    assert set(found) == {(bad, "read")}, "where nobody was failed there is nothing to tell"
    told = {Words(word.network, word.project, round(word.failed, 2), round(word.delivered, 2)) for word in found[bad, "read"]}
    assert told == near
    await record(pool, report(bad, client="10.1.0.1", project="q"))
    (back,) = [word for word in (await reports.last_words(pool))[bad, "read"] if word.project == "q"]
    assert (back.failed, back.delivered) == (0.0, pytest.approx(1.0, abs=0.05))


async def test_a_failure_is_in_force_with_its_report_and_ends(pool: Any) -> None:
    store = await rows.store(pool)
    told = report(store, trouble=1.0, excludes="p\tu\ti\t10.0.0.1")
    assert await record(pool, told, report(store)) == [True, True]
    ((client, of, left),) = await failures.in_force(pool, 10)
    assert (client, of) == ("p\tu\ti\t10.0.0.1", store)
    assert 50 < left <= 60
    assert await failures.of_clients(pool, ["somebody else"]) == []
    await pool.execute("UPDATE failures SET until = now()")
    assert await failures.of_clients(pool, [client]) == []
    await failures.forget_old(pool)
    assert await pool.fetchval("SELECT count(*) FROM failures") == 0


async def test_who_forgets_waits_for_no_report(pool: Any) -> None:
    """Reports lock rows in an order of their own: whoever waited for one while it holds others could be waited for."""
    store = await rows.store(pool)
    await record(pool, *(report(store, client=f"10.0.0.{n}", trouble=1.0, excludes=f"client {n}") for n in (1, 2)))
    await pass_time(pool, reports.KEPT_SECONDS + 1)
    await pool.execute("UPDATE failures SET until = now()")
    async with pool.acquire() as reporting, reporting.transaction():
        await reporting.execute("SELECT FROM voices WHERE voice = $1 FOR UPDATE", voice("p", "u", "10.0.0.1").name)
        await reporting.execute("SELECT FROM failures WHERE client = 'client 1' FOR UPDATE")
        await reports.forget_old(pool)
        await failures.forget_old(pool)
        assert await pool.fetchval("SELECT array_agg(voice) FROM voices") == [voice("p", "u", "10.0.0.1").name]
        assert await pool.fetchval("SELECT array_agg(client) FROM failures") == ["client 1"]


async def test_a_report_on_a_store_that_is_gone_harms_no_other(pool: Any) -> None:
    store = await rows.store(pool)
    assert await record(pool, report(store + 1000), report(store)) == [False, True]
