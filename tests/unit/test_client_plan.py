"""Who fetches which bytes: tables of decisions, and what holds for all of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.client.plan import (
    CHUNK,
    LEAST,
    LEAST_CHUNK,
    Running,
    Span,
    Spans,
    Take,
    chunk_for,
    covered,
    missing,
    prefix,
    share,
    take,
    too_slow,
    union,
    wants_another,
    without,
)

MEBIBYTE = 1 << 20
FAST, SLOW = 100 * MEBIBYTE, 1 * MEBIBYTE


def spans(most: int = 60) -> st.SearchStrategy[list[Span]]:
    pair = st.tuples(st.integers(0, most), st.integers(0, most)).map(lambda pair: Span(min(pair), max(pair)))
    return st.lists(pair, max_size=8)


def _bytes(group: list[Span] | Spans) -> set[int]:
    return {byte for start, end in group for byte in range(start, end)}


@given(spans(), spans())
def test_union_and_without_are_those_of_sets(left: list[Span], right: list[Span]) -> None:
    joined = union(left, right)
    assert _bytes(joined) == _bytes(left) | _bytes(right)
    assert all(before.end < after.start for before, after in itertools.pairwise(joined))
    assert _bytes(without(union(left), right)) == _bytes(left) - _bytes(right)


@given(spans(), st.integers(0, 60))
def test_missing_and_done_make_the_whole(done: list[Span], size: int) -> None:
    known = union(Span(start, min(end, size)) for start, end in done)
    left = missing(known, size)
    assert covered(known) + covered(left) == size
    assert prefix(known) == (left[0].start if left else size)


@pytest.mark.parametrize(
    ("free", "running", "rate", "alone", "expected"),
    [
        # alone, a source takes everything in one request, after what is there already
        ((Span(0, 900 * MEBIBYTE),), [], 0, True, Take(Span(0, 900 * MEBIBYTE))),
        ((Span(5, 10), Span(20, 30)), [], 0, True, Take(Span(5, 10))),
        # with others, a chunk from the front
        ((Span(7, 900 * MEBIBYTE),), [Running(0, 7, FAST)], FAST, False, Take(Span(7, 7 + CHUNK))),
        ((Span(7, 8),), [Running(0, 7, FAST)], FAST, False, Take(Span(7, 8))),
        # nothing left, nobody at work
        ((), [], FAST, False, None),
        # what ends soon is left alone
        ((), [Running(0, 10 * MEBIBYTE, FAST)], FAST, False, None),
        ((), [Running(10, 10, FAST)], FAST, False, None),
        # of what lasts, a share by rate
        ((), [Running(0, 30 * MEBIBYTE, SLOW)], SLOW, False, Take(Span(15 * MEBIBYTE, 30 * MEBIBYTE), 0)),
        ((), [Running(0, 30 * MEBIBYTE, SLOW)], 2 * SLOW, False, Take(Span(10 * MEBIBYTE, 30 * MEBIBYTE), 0)),
        ((), [Running(0, 30 * MEBIBYTE, SLOW)], 0, False, Take(Span(15 * MEBIBYTE, 30 * MEBIBYTE), 0)),
        # the one that would end last gives
        ((), [Running(0, MEBIBYTE, SLOW), Running(MEBIBYTE, 9 * MEBIBYTE, SLOW)], SLOW, False, Take(Span(5 * MEBIBYTE, 9 * MEBIBYTE), 1)),
        # one that stands still gives everything
        ((), [Running(3, 9, 0)], FAST, False, Take(Span(3, 9), 0)),
        # a small rest changes hands whole, and only when that is faster
        ((), [Running(0, LEAST, 100_000)], FAST, False, Take(Span(0, LEAST), 0)),
        ((), [Running(0, LEAST, 100_000)], 50_000, False, None),
    ],
)
def test_what_a_source_takes(free: Spans, running: list[Running], rate: float, alone: bool, expected: Take | None) -> None:
    assert take(free, running, rate, alone=alone) == expected


@given(
    st.lists(st.tuples(st.integers(1, 1 << 30), st.integers(0, 1 << 28), st.floats(0, 1e9)), min_size=1, max_size=5),
    st.floats(0, 1e9),
)
def test_what_is_taken_over_belongs_to_the_one_that_gives(sizes: list[tuple[int, int, float]], rate: float) -> None:
    running, start = [], 0
    for length, left, pace in sizes:
        end = start + length
        running.append(Running(max(start, end - left), end, pace))
        start = end
    taken = take((), running, rate, alone=False)
    if taken is not None:
        assert taken.cut is not None
        giver = running[taken.cut]
        assert giver.position <= taken.span.start < taken.span.end == giver.end


@pytest.mark.parametrize(
    ("size", "sources", "expected"),
    [(1 << 40, 2, CHUNK), (10, 2, LEAST_CHUNK), (64 * MEBIBYTE, 2, 8 * MEBIBYTE), (64 * MEBIBYTE, 0, 16 * MEBIBYTE)],
)
def test_chunks_give_each_source_a_few_turns(size: int, sources: int, expected: int) -> None:
    assert chunk_for(size, sources) == expected


def test_a_newcomer_gets_what_is_far_ahead() -> None:
    assert share(Running(10, 10 + 2 * CHUNK, FAST)) is None
    assert share(Running(10, 11 + 2 * CHUNK, FAST)) == 10 + CHUNK


@pytest.mark.parametrize(
    ("left", "size", "rate", "active", "most", "expected"),
    [
        (900 * MEBIBYTE, 900 * MEBIBYTE, 10 * MEBIBYTE, 1, 4, True),
        (900 * MEBIBYTE, 900 * MEBIBYTE, 0, 1, 4, True),
        (900 * MEBIBYTE, 900 * MEBIBYTE, 10 * MEBIBYTE, 4, 4, False),
        (20 * MEBIBYTE, 900 * MEBIBYTE, 10 * MEBIBYTE, 1, 4, False),
        (9 * MEBIBYTE, 9 * MEBIBYTE, 1, 1, 4, False),
        (LEAST, 900 * MEBIBYTE, 1, 1, 4, False),
    ],
)
def test_when_another_source_helps(left: int, size: int, rate: float, active: int, most: int, expected: bool) -> None:
    assert wants_another(left, size, rate, active, most) is expected


@pytest.mark.parametrize(
    ("rates", "ages", "expected"),
    [
        ({"a": 1.0}, {"a": 100.0}, []),
        ({"a": 100.0, "b": 10.0}, {"a": 9.0, "b": 9.0}, ["b"]),
        ({"a": 100.0, "b": 10.0}, {"a": 9.0, "b": 1.0}, []),
        ({"a": 100.0, "b": 50.0}, {"a": 9.0, "b": 9.0}, []),
        ({"a": 0.0, "b": 0.0}, {"a": 9.0, "b": 9.0}, []),
    ],
)
def test_who_is_given_up(rates: dict[str, float], ages: dict[str, float], expected: list[str]) -> None:
    assert too_slow(rates, ages) == expected
