"""Averages of what transfers reported: they converge, decay, and count contention once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.model import Outcome
from broker.paths import PathAverage, Policy, Report, alone_rate, contribution, decay, observe

POLICY = Policy()
GB = 10**9

OUTCOMES = st.sampled_from(list(Outcome))
REPORTS = st.builds(
    Report,
    outcome=OUTCOMES,
    bytes=st.integers(-(10**20), 10**20),
    seconds=st.floats(),
    concurrency=st.integers(-5, 10**9),
    bandwidth=st.none() | st.integers(0, 10**12),
    setup_seconds=st.none() | st.floats(),
)


def observed(*reports: Report, at: float = 0.0, every: float = 0.0) -> PathAverage:
    average = None
    for number, report in enumerate(reports):
        average = observe(average, report, at + number * every, POLICY)
    assert average is not None
    return average


@pytest.mark.parametrize(("weight", "elapsed", "left"), [(8.0, 0, 8.0), (8.0, 600, 4.0), (8.0, 1800, 1.0), (8.0, -60, 8.0), (0.0, 60, 0.0)])
def test_decay(weight: float, elapsed: float, left: float) -> None:
    assert decay(weight, elapsed, 600) == pytest.approx(left)


def test_one_report_is_the_average() -> None:
    average = observed(Report(Outcome.OK, GB, 10.5, setup_seconds=0.5), at=7.0)
    assert average.rate == pytest.approx(GB / 10)
    assert average.setup_seconds == 0.5
    assert average.success == 1.0
    assert (average.weight, average.updated_at) == (1.0, 7.0)


def test_rate_is_bytes_over_busy_seconds() -> None:
    """1 GB in 1 s and 1 GB in 9 s are 2 GB in 10 s, not the mean of both rates."""
    average = observed(Report(Outcome.OK, GB, 1), Report(Outcome.OK, GB, 9))
    assert average.rate == pytest.approx(2 * GB / 10)


def test_nothing_told_is_none() -> None:
    empty = PathAverage(0, 0, 0, 0, 0, 0, 0)
    assert (empty.rate, empty.setup_seconds, empty.success) == (None, None, None)


@pytest.mark.parametrize(
    ("report", "rate", "success"),
    [
        (Report(Outcome.OK, 10**6, 1), None, 1.0),
        (Report(Outcome.OK, 1 << 20, 1), 1 << 20, 1.0),
        (Report(Outcome.SLOW, GB, 100), GB / 100, 1.0),
        (Report(Outcome.FAILED, 0, 3), None, 0.0),
        (Report(Outcome.FAILED, GB, 10), GB / 10, 0.0),
        (Report(Outcome.CORRUPT, GB, 1), None, 0.0),
        (Report(Outcome.OK, GB, 0), None, 1.0),
        (Report(Outcome.OK, GB, -1), None, 1.0),
        (Report(Outcome.OK, GB, math.nan), None, 1.0),
        (Report(Outcome.OK, GB, math.inf), None, 1.0),
        (Report(Outcome.OK, -GB, 1), None, 1.0),
        (Report(Outcome.OK, 10**15 + 1, 1), None, 1.0),
        (Report(Outcome.OK, 10**15, 1), POLICY.max_rate, 1.0),
        (Report(Outcome.OK, GB, 1e-9), POLICY.max_rate, 1.0),
        (Report(Outcome.OK, GB, 1e12), GB / POLICY.max_seconds, 1.0),
    ],
)
def test_what_a_report_tells(report: Report, rate: float | None, success: float) -> None:
    average = observed(report)
    assert average.rate == (None if rate is None else pytest.approx(rate))
    assert average.success == success


@pytest.mark.parametrize("setup", [-1.0, 11.0, math.nan, math.inf])
def test_impossible_setup_is_not_believed(setup: float) -> None:
    average = observed(Report(Outcome.OK, GB, 10, setup_seconds=setup))
    assert average.setup_seconds is None
    assert average.rate == pytest.approx(GB / 10)


@pytest.mark.parametrize(
    ("rate", "concurrency", "bandwidth", "alone"),
    [
        (50.0, 1, 100, 50.0),
        (50.0, 0, 100, 50.0),
        (50.0, 4, None, 50.0),
        (50.0, 4, 0, 50.0),
        (25.0, 4, 100, 100.0),  # its whole share: held back by the others
        (10.0, 10, 100, 100.0),
        (0.001, 10, 100, pytest.approx(0.001, rel=0.01)),  # next to nothing of its share: held back by its own path
        (60.0, 4, 100, 100.0),  # more than its share
        (150.0, 4, 100, 150.0),  # more than was declared: the declaration is wrong, the transfer is not
    ],
)
def test_alone_rate(rate: float, concurrency: int, bandwidth: int | None, alone: float) -> None:
    assert alone_rate(rate, concurrency, bandwidth) == alone


@given(st.integers(1, 1000), st.floats(1e3, 1e10))
def test_equal_contenders_tell_the_whole_bandwidth(contenders: int, bandwidth: float) -> None:
    """n transfers that each get B/n say that the path gives B: contention is not counted twice."""
    whole = int(bandwidth)
    seconds = POLICY.min_rate_bytes * contenders / whole
    if not POLICY.min_seconds <= seconds <= POLICY.max_seconds:
        return
    report = Report(Outcome.OK, POLICY.min_rate_bytes, seconds, concurrency=contenders, bandwidth=whole)
    assert observed(*[report] * min(contenders, 20)).rate == pytest.approx(whole, rel=1e-6)


@given(st.floats(1.0, 1e9), st.floats(1.0, 1e9), st.integers(1, 100), st.integers(1, 10**9))
def test_alone_rate_bounds(low: float, high: float, concurrency: int, bandwidth: int) -> None:
    low, high = sorted((low, high))
    slower, faster = alone_rate(low, concurrency, bandwidth), alone_rate(high, concurrency, bandwidth)
    assert slower <= faster * (1 + 1e-9)
    assert low <= slower <= max(bandwidth, low) * (1 + 1e-9)


@given(st.floats(1e6, 1e9), st.floats(1e6, 1e9))
def test_converges_to_what_is_told_lately(before: float, after: float) -> None:
    old = [Report(Outcome.OK, GB, GB / before)] * 20
    new = [Report(Outcome.OK, GB, GB / after)] * 20
    average = observed(*old, *new, every=1200.0)
    assert average.rate == pytest.approx(after, rel=0.01)


def test_old_failures_fade() -> None:
    reports = [Report(Outcome.FAILED, 0, 1)] * 5 + [Report(Outcome.OK, GB, 10)] * 5
    fresh, faded = observed(*reports), observed(*reports, every=600.0)
    assert fresh.success == 0.5
    assert faded.success is not None
    assert faded.success > 0.96


def test_weight_is_bounded_by_the_half_life() -> None:
    assert observed(*[Report(Outcome.OK, GB, 10)] * 200, every=600.0).weight == pytest.approx(2.0)


def test_a_clock_that_steps_back_adds_nothing() -> None:
    first = observe(None, Report(Outcome.OK, GB, 10), 1000.0, POLICY)
    second = observe(first, Report(Outcome.OK, GB, 10), 400.0, POLICY)
    assert (second.weight, second.updated_at) == (2.0, 1000.0)


@given(st.lists(st.tuples(REPORTS, st.floats(0, 5000)), min_size=1, max_size=10))
def test_no_report_breaks_an_average(reports: list[tuple[Report, float]]) -> None:
    average, now = None, 0.0
    for report, elapsed in reports:
        now += elapsed
        average = observe(average, report, now, POLICY)
    assert average is not None
    assert average.rate is None or 0 < average.rate <= POLICY.max_rate * (1 + 1e-9)
    assert average.success is not None
    assert 0 <= average.success <= 1
    assert average.setup_seconds is None or 0 <= average.setup_seconds <= POLICY.max_seconds


@given(st.lists(st.tuples(REPORTS, st.floats(0, 5000)), min_size=1, max_size=10))
def test_sums_may_be_kept_column_by_column(reports: list[tuple[Report, float]]) -> None:
    """What the catalogue's SQL does, column = column · 2^(−dt/half-life) + contribution, is the same average."""
    average, now, columns = None, 0.0, [0.0] * 6
    for report, elapsed in reports:
        now += elapsed
        average = observe(average, report, now, POLICY)
        kept = 2.0 ** (-elapsed / POLICY.half_life_seconds)
        columns = [column * kept + added for column, added in zip(columns, contribution(report, POLICY), strict=True)]
    assert average is not None
    sums = [average.weight, average.good, average.bytes, average.busy_seconds, average.setup_weight, average.setup]
    assert sums == pytest.approx(columns, rel=1e-6, abs=1e-6)
