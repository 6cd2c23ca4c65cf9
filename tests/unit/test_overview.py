"""How a store is said to be, and how numbers of the status page are written and drawn."""

from __future__ import annotations

from typing import Any

import pytest

from broker.model import Abilities, Store
from broker.service.overview import OutcomeShown, Use, open_state, state_of, total
from broker.web.status import render

BOTH = Abilities(reads=True, writes=True)


def store(**fields: Any) -> Store:
    return Store(1, "disk", "http", "eu", "http://disk", **{"abilities": BOTH, **fields})


@pytest.mark.parametrize(
    ("fields", "read", "success", "doubt", "state", "level"),
    [
        ({}, Use(0, None), None, 0.0, "open", "good"),
        ({}, Use(3, 4), 0.9, 0.09, "open", "good"),
        ({}, Use(4, 4), 1.0, 0.0, "full", "warn"),
        ({}, Use(5, 4), 1.0, 0.0, "draining", "warn"),
        ({}, Use(1, 0), 1.0, 0.0, "draining", "warn"),
        ({}, Use(0, 0), 1.0, 0.0, "drained", "off"),
        ({}, Use(0, 4), 0.89, 0.0, "unsteady", "warn"),
        ({}, Use(0, 4), 0.49, 0.0, "failing", "bad"),
        ({}, Use(4, 4), 0.49, 0.0, "failing", "bad"),
        ({}, Use(0, 4), 1.0, 0.1, "doubted", "warn"),
        ({"writable": False}, Use(0, 4), 1.0, 0.0, "read only", "good"),
        ({"abilities": Abilities(reads=True)}, Use(0, 4), 1.0, 0.0, "read only", "good"),
        ({"abilities": Abilities(writes=True)}, Use(0, 4), 1.0, 0.0, "not readable", "warn"),
        ({"abilities": Abilities()}, Use(0, 4), None, 0.0, "not usable", "bad"),
        ({"enabled": False, "abilities": Abilities()}, Use(4, 4), 0.1, 1.0, "disabled", "off"),
    ],
)
def test_how_a_store_is(fields: dict[str, Any], read: Use, success: float | None, doubt: float, state: str, level: str) -> None:
    assert state_of(store(**fields), read, success, doubt) == (state, level)


def test_others_learn_nothing_of_slots_and_abilities() -> None:
    assert open_state(store(abilities=Abilities(), read_slots=0), None, 0.0) == ("open", "good")


def test_uses_add_up_without_those_that_have_no_limit() -> None:
    assert total([Use(2, 4), Use(7, None), None, Use(1, 0)]) == Use(3, 4)
    assert total([Use(7, None)]) == Use(0, None)
    assert [use.share for use in (Use(0, 4), Use(5, 4), Use(3, 0), Use(9, None))] == [0, 1.25, 1, 0]


def test_dots_are_where_the_ratio_is() -> None:
    outcomes = [OutcomeShown("s", "read", "ok", ratio, 0.0) for ratio in (None, 1e9, 1.0, 0.5, 0.1)]
    plot = render.Plot(outcomes)
    assert (plot.within, plot.longer, plot.shorter, plot.failed, plot.median) == (2, 1, 1, 1, 1.0)
    assert plot.paths["bad"] == "M900.0 388h0"  # the newest is rightmost
    assert plot.height(16) == plot.height(1e9) < plot.height(2) < plot.height(1) < plot.height(0.5) < plot.height(0.0)
    assert plot.height(1) - plot.height(2) == pytest.approx(plot.height(0.5) - plot.height(1))


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (0.001, "< 1 %"), (0.01, "1 %"), (0.5, "50 %"), (0.994, "99 %"), (0.9994, "99.9 %"), (1, "100 %")]
)
def test_shares(share: float, text: str) -> None:
    assert render.percent(share) == text


def test_durations_and_instants_have_units_and_zones() -> None:
    assert [render.short_seconds(seconds) for seconds in (0.0004, 0.25, 1, 90, 7300)] == [
        "0 ms",
        "250 ms",
        "1.0 s",
        "1 min 30 s",
        "2 h 1 min",
    ]
    assert render.day_and_time(0) == "1970-01-01 00:00:00 UTC"
    assert [render.basis(text) for text in ("measured", "wider-site:eu", "wider-site:", "prior")] == [
        "measured", "measured from eu", "measured from everywhere", "by distance alone",
    ]  # fmt: skip
