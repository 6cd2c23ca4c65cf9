"""The search for the number of transfers at which a store moves the most, on stores made of formulas."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import adapt
from broker.adapt import Search
from broker.model import SlotRange

Curve = Callable[[int], float]


def flat(knee: int) -> Curve:
    """More at once than `knee` move no more."""
    return lambda n: 1e6 * min(n, knee)


def falling(knee: int) -> Curve:
    """More at once than `knee` are in each other's way."""
    return lambda n: 1e6 * (n if n <= knee else knee / (1 + 0.03 * (n - knee)))


def searched(search: Search, bounds: SlotRange, curve: Curve, windows: int, noise: float = 0.0, seed: int = 0) -> tuple[Search, list[int]]:
    """The search after so many windows, and the levels it had."""
    draw, levels = random.Random(seed), []
    for _ in range(windows):
        levels.append(search.level)
        search = adapt.step(search, bounds, curve(search.level) * draw.uniform(1 - noise, 1 + noise))
    return search, levels


def share(curve: Curve, levels: list[int], best: int) -> float:
    """How much of the best throughput those levels moved."""
    return statistics.mean(map(curve, levels)) / curve(best)


@pytest.mark.parametrize(
    ("bounds", "levels"),
    [
        (SlotRange(1, 1), [1]),
        (SlotRange(1, 2), [1, 2]),
        (SlotRange(1, 20), [1, 2, 3, 4, 5, 7, 9, 12, 16, 20]),
        (SlotRange(10, 30), [10, 13, 17, 23, 30]),
    ],
)
def test_ladder(bounds: SlotRange, levels: list[int]) -> None:
    assert adapt.ladder(bounds) == levels


HOME = Search(4, 4, {3: (30.0, 9), 4: (40.0, 9), 5: (50.0, 9)}, settling=False)


@pytest.mark.parametrize(
    ("before", "rate", "home", "level"),
    [
        (HOME, 40.0, 4, 5),  # looks up
        (Search(4, 4, HOME.seen, up_next=False, settling=False), 40.0, 4, 3),  # looks down
        (Search(4, 4, HOME.seen, rest=2, settling=False), 40.0, 4, 4),  # rests
        (Search(4, 5, HOME.seen, settling=False), 50.0, 5, 7),  # better: moves, and looks further
        (Search(4, 5, {4: (40.0, 9)}, settling=False), 42.0, 4, 4),  # not better enough: goes home
        (Search(4, 3, {4: (40.0, 9)}, settling=False), 39.0, 3, 2),  # as good with fewer: moves
        (Search(4, 3, {4: (40.0, 9)}, settling=False), 30.0, 4, 4),  # worse: goes home
        (Search(4, 5, HOME.seen, settling=False), 10.0, 4, 4),  # the store has changed: home is to be looked at anew
        (Search(4, 5, HOME.seen), 0.0, 4, 5),  # the first window after a change tells nothing
        (Search(4, 5, HOME.seen, settling=False), None, 4, 4),  # too few transfers: goes home
        (Search(4, 4, HOME.seen, settling=False), None, 4, 4),
        (Search(6, 6, settling=False), 60.0, 5, 5),  # no level of these bounds: the nearest
    ],
)
def test_step(before: Search, rate: float | None, home: int, level: int) -> None:
    after = adapt.step(before, SlotRange(1, 20), rate)
    assert (after.home, after.level) == (home, level)


@pytest.mark.parametrize("shape", [flat, falling])
@pytest.mark.parametrize("knee", [1, 3, 8, 20, 50])
def test_finds_the_knee(shape: Callable[[int], Curve], knee: int) -> None:
    curve, bounds = shape(knee), SlotRange(1, 64)
    search, _ = searched(adapt.read(None, None, bounds), bounds, curve, 200)
    assert knee * 0.8 <= search.home <= max(knee * 1.34, knee + 1)
    assert share(curve, searched(search, bounds, curve, 100)[1], knee) > 0.9


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([flat, falling]), st.integers(1, 60), st.integers(0, 2**32), st.integers(1, 64))
def test_finds_it_through_noise(shape: Callable[[int], Curve], knee: int, seed: int, begin: int) -> None:
    """Each window 20 % too much or too little."""
    curve, bounds = shape(knee), SlotRange(1, 64)
    search, _ = searched(adapt.read(None, begin, bounds), bounds, curve, 300, 0.2, seed)
    _, levels = searched(search, bounds, curve, 300, 0.2, seed + 1)
    assert share(curve, levels, knee) > 0.8
    assert statistics.median(levels) <= max(2 * knee, knee + 2), "more at once than helps"


@pytest.mark.parametrize(("before", "after"), [(8, 32), (32, 8), (4, 5), (20, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_follows_a_knee_that_moves(before: int, after: int, seed: int) -> None:
    bounds = SlotRange(1, 64)
    search, _ = searched(adapt.read(None, None, bounds), bounds, flat(before), 200, 0.2, seed)
    search, _ = searched(search, bounds, flat(after), 200, 0.2, seed)
    _, levels = searched(search, bounds, flat(after), 200, 0.2, seed)
    assert share(flat(after), levels, after) > 0.85
    assert statistics.median(levels) <= 2 * after


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1000), st.integers(0, 1000), st.lists(st.none() | st.floats(0, 1e12), max_size=60), st.none() | st.integers(0, 5000))
def test_stays_within_bounds(least: int, more: int, rates: list[float | None], begin: int | None) -> None:
    """Whatever is reported; and what is kept between windows is read back as it was."""
    bounds = SlotRange(least, least + more)
    search = adapt.read(None, begin, bounds)
    for rate in rates:
        search = adapt.step(search, bounds, rate)
        assert least <= search.level <= least + more
        assert least <= search.home <= least + more
        assert adapt.read(orjson.loads(orjson.dumps(search.document())), search.level, bounds) == search


def test_an_administrator_sets_other_slots() -> None:
    search, _ = searched(adapt.read(None, None, SlotRange(1, 64)), SlotRange(1, 64), flat(30), 100)
    again = adapt.read(search.document(), 3, SlotRange(1, 64))
    assert (again.home, again.level) == (3, 3)
    narrower = adapt.step(search, SlotRange(2, 8), 1.0)
    assert 2 <= narrower.level <= 8
