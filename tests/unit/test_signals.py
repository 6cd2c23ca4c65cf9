"""What is no report weighs little, and what cannot be true is found."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import rank
from broker.model import Outcome
from broker.paths import Contribution
from broker.plausible import CLOCK_SECONDS, LEAST_BYTES, REPETITIONS, implausible
from broker.signals import OUTCOMES, WEIGHTS, Signal, trouble, weakened

MIB = 1 << 20


@pytest.mark.parametrize(
    ("signal", "outcome", "weight"),
    [
        (Signal.REPEATED, Outcome.FAILED, 0.25),
        (Signal.EXPIRED, Outcome.FAILED, 0.25),
        (Signal.COMMITTED, Outcome.OK, 0.5),
        (Signal.PROGRESS, Outcome.OK, 0.5),
    ],
)
def test_signals(signal: Signal, outcome: Outcome, weight: float) -> None:
    assert (OUTCOMES[signal], WEIGHTS[signal]) == (outcome, weight)


def test_no_silent_failure_is_believed_alone() -> None:
    failing = [WEIGHTS[signal] for signal in Signal if OUTCOMES[signal] is Outcome.FAILED]
    assert max(failing) < rank.Policy().min_evidence


@pytest.mark.parametrize(
    ("outcome", "weight", "expected"),
    [
        (Outcome.FAILED, 1.0, 1.0),
        (Outcome.FAILED, 0.25, 0.25),
        (Outcome.OK, 1.0, 0.0),
        (Outcome.SLOW, 1.0, 0.0),
        (Outcome.CORRUPT, 1.0, 0.0),
    ],
)
def test_trouble(outcome: Outcome, weight: float, expected: float) -> None:
    assert trouble(outcome, weight) == expected


def test_weakened() -> None:
    assert weakened(Contribution(1, 1, 100, 2, 1, 0.5), 0.25) == (0.25, 0.25, 25, 0.5, 0.25, 0.125)


@pytest.mark.parametrize(
    ("bytes", "seconds", "setup", "size", "age", "field"),
    [
        (100, 2.0, 0.1, 100, 5.0, None),
        (0, 0.0, None, 100, 0.0, None),
        (100, None, None, 100, 0.0, None),  # how long it took was not told
        (100, 0.0, None, 100, 5.0, "seconds"),
        (1, 0.0, None, None, 5.0, "seconds"),
        (100, 5.0 + CLOCK_SECONDS, None, 100, 5.0, None),
        (100, 5.001 + CLOCK_SECONDS, None, 100, 5.0, "seconds"),  # it began before its ticket
        (100, CLOCK_SECONDS, None, 100, -3600.0, None),  # the ticket is from the future: another broker's clock
        (100, CLOCK_SECONDS + 0.001, None, 100, -3600.0, "seconds"),
        (LEAST_BYTES, 1.0, None, 100, 5.0, None),
        (LEAST_BYTES + 1, 1.0, None, 100, 5.0, "bytes"),
        (REPETITIONS * MIB, 1.0, None, MIB, 5.0, None),
        (REPETITIONS * MIB + 1, 1.0, None, MIB, 5.0, "bytes"),
        (10**15 + MIB, 1.0, None, MIB, 5.0, "bytes"),
        (10**15, 1.0, None, None, 5.0, None),  # of an upload whose size nobody knows
        (100, 1.0, 1.0, 100, 5.0, None),
        (100, 1.0, 1.001, 100, 5.0, "setup_seconds"),
        (100, None, 3.0, 100, 5.0, None),
    ],
)
def test_implausible(bytes: int, seconds: float | None, setup: float | None, size: int | None, age: float, field: str | None) -> None:
    found = implausible(bytes, seconds, setup, size, age)
    assert (None if found is None else found.field) == field


@given(st.integers(0, 10**15), st.floats(1e-6, 1e9), st.integers(0, 10**15), st.floats(0, 1e9))
def test_what_a_client_measured_is_never_refused(bytes: int, seconds: float, size: int, age: float) -> None:
    assert implausible(min(bytes, size), min(seconds, age), None, size, age) is None or min(seconds, age) == 0


@given(st.integers(0, 10**16), st.floats(0, 1e12), st.integers(0, 10**15))
def test_whatever_is_refused_says_what_was_expected(bytes: int, seconds: float, size: int) -> None:
    found = implausible(bytes, seconds, None, size, 60.0)
    assert found is None or (found.field in ("bytes", "seconds") and math.isfinite(seconds) and found.expected)
