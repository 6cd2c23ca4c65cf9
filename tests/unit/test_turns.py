"""Whose turn it is: shares by weight among projects, first come first within one, nobody starved; and when a turn will come."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.turns import Contender, Line, Under, ahead, order, seconds_until


def asks(text: str, weights: dict[str, float] | None = None) -> list[Contender]:
    """Requests in the order in which they came: each letter is one of that project, a capital one of its service."""
    found = []
    for at, letter in enumerate(text):
        priority = 4.0 if letter.isupper() else 1.0
        weight = (weights or {}).get(letter.lower(), 1.0) * priority
        found.append(Contender(f"{at:03}", letter.lower(), priority, weight, float(at)))
    return found


def turns(text: str, held: dict[str, int] | None = None, weights: dict[str, float] | None = None) -> str:
    """The same letters in the order of their turns."""
    holds = {(name.lower(), 4.0 if name.isupper() else 1.0): count for name, count in (held or {}).items()}
    return "".join(c.project.upper() if c.priority > 1 else c.project for c in order(asks(text, weights), holds))


@pytest.mark.parametrize(
    ("text", "held", "weights", "expected"),
    [
        ("", {}, {}, ""),
        ("aaa", {}, {}, "aaa"),
        ("aaab", {}, {}, "abaa"),
        ("aaaabbc", {}, {}, "abcabaa"),
        ("ab", {"a": 1}, {}, "ba"),
        ("aab", {"b": 1}, {}, "aab"),
        ("aaab", {"b": 3}, {}, "aaab"),
        ("aaab", {"b": 5}, {}, "aaab"),
        ("bbbaaaaaa", {}, {"a": 2.0}, "abaabaaba"),
        ("aaAAAAA", {}, {}, "AAAaAAa"),  # four of the service for one of the members, in one project
        ("abcdE", {"E": 3}, {}, "abcdE"),  # at (3 + 1) / 4 the service is even with them, and came last
        ("abcdE", {"E": 2}, {}, "Eabcd"),
    ],
)
def test_order(text: str, held: dict[str, int], weights: dict[str, float], expected: str) -> None:
    assert turns(text, held, weights) == expected


CONTENDERS = st.lists(
    st.builds(
        lambda id, project, priority, weight, at: Contender(f"{id:04}", project, priority, weight * priority, float(at)),
        st.integers(0, 9999), st.sampled_from("abcd"), st.sampled_from((1.0, 4.0)), st.sampled_from((0.5, 1.0, 3.0)), st.integers(0, 9),
    ),
    unique_by=lambda contender: contender.id,
)  # fmt: skip
HELD = st.dictionaries(st.tuples(st.sampled_from("abcd"), st.sampled_from((1.0, 4.0))), st.integers(0, 5))


@given(CONTENDERS, HELD)
def test_everybody_has_a_turn_and_a_party_keeps_its_order(contenders: list[Contender], held: dict[tuple[str, float], int]) -> None:
    placed = order(contenders, held)
    assert sorted(placed) == sorted(contenders)
    assert order(reversed(contenders), held) == placed


@given(st.integers(1, 40), st.lists(st.integers(1, 60), min_size=2, max_size=5))
def test_equal_projects_get_equal_shares_as_far_as_they_want_them(slots: int, wanted: list[int]) -> None:
    """Max-min: nobody who wants more has two less than somebody else."""
    asked = [Contender(f"{p}-{n:03}", str(p), 1.0, 1.0, float(n)) for p, count in enumerate(wanted) for n in range(count)]
    got = Counter(int(contender.project) for contender in order(asked, {})[:slots])
    for project, count in enumerate(wanted):
        if got[project] < count:
            assert max(got.values()) <= got[project] + 1


@pytest.mark.parametrize(
    ("line", "before", "seconds"),
    [
        pytest.param(Line(2, [Under(1, 8), Under(1, 10)]), 0, 7, id="the first that ends"),
        pytest.param(Line(2, [Under(1, 8), Under(1, 10)]), 1, 9, id="the second, with one before"),
        pytest.param(Line(2, [Under(1, 8), Under(1, 10)]), 2, 10, id="one after the first has gone on: 7 + 3"),
        pytest.param(Line(2, [Under(1, 8)]), 0, 0, id="a slot is free"),
        pytest.param(Line(1, [Under(1, 8), Under(1, 10)]), 0, 9, id="lowered: the first one that ends makes no room"),
        pytest.param(Line(0, [Under(1, 8)]), 0, None, id="drained"),
        pytest.param(Line(1, [Under(0, 8)], pace=2.0), 0, 16, id="transfers last twice as long as expected"),
        pytest.param(Line(1, [Under(20, 8)]), 0, 5, id="overdue: a quarter of its time more"),
        pytest.param(Line(1, [Under(0, 8)], mean_seconds=5.0), 2, 18, id="those before last as long as others did"),
        pytest.param(Line(1, []), 3, 9, id="nothing under way, three before"),
    ],
)
def test_seconds_until(line: Line, before: int, seconds: float | None) -> None:
    assert seconds_until(line, before, 3.0) == seconds


def test_a_newcomer_of_a_project_that_holds_less_comes_before_those_who_wait() -> None:
    line = Line(4, contenders=asks("aaaab"), held={("a", 1.0): 2, ("b", 1.0): 1})
    ask = Contender("new", "c", 1.0, 1.0, math.inf)
    assert ahead(line, ask) == 0
    assert ahead(line, ask._replace(project="b")) == 2  # b's own, which came before, and a's first, at 3 as well
    assert ahead(line, ask._replace(project="a")) == 5
    assert ahead(line, line.contenders[4]) == 0  # who waits already is not counted twice
