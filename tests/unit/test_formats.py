"""The choice among formats of one image: by the time until the client can use it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.formats import Considered, Option, acceptable, choose, conversion_seconds, main

GB = 10**9


@pytest.mark.parametrize(
    ("have", "formats", "convert", "expected"),
    [
        ({"raw", "qcow2"}, ["raw"], {}, ["raw"]),
        ({"raw", "qcow2"}, ["raw"], {"qcow2": 1.0}, ["raw", "qcow2"]),
        ({"qcow2"}, ["raw"], {"qcow2": 1.0}, ["qcow2"]),
        ({"vmdk"}, ["raw"], {"qcow2": 1.0}, []),
        ({"a", "b", "c"}, ["c", "a"], {"b": 1.0, "a": 1.0}, ["c", "a", "b"]),
        (set(), ["raw"], {"qcow2": 1.0}, []),
    ],
)
def test_what_a_client_takes(have: set[str], formats: list[str], convert: dict[str, float], expected: list[str]) -> None:
    assert acceptable(have, formats, convert) == expected


@pytest.mark.parametrize(
    ("options", "chosen", "seconds"),
    [
        # 10 GB raw in 100 s, or 2 GB of qcow2 in 20 s and 10 s of converting.
        ([Option("raw", 10 * GB, 100.0), Option("qcow2", 2 * GB, 20.0)], "qcow2", 10.0),
        # The raw one is near: converting costs more than it saves.
        ([Option("raw", 10 * GB, 25.0), Option("qcow2", 2 * GB, 20.0)], "raw", 0.0),
        # A slow converter is not worth it, whatever the network.
        ([Option("raw", 10 * GB, 100.0), Option("vmdk", 2 * GB, 20.0)], "raw", 0.0),
        # Nothing to fetch it from is no choice.
        ([Option("raw", 10 * GB, None), Option("vmdk", 2 * GB, 20.0)], "vmdk", 200.0),
        # Full everywhere: the other one, though slower.
        ([Option("raw", 10 * GB, 1.0, True), Option("qcow2", 2 * GB, 20.0)], "qcow2", 10.0),
        ([Option("raw", 10 * GB, 1.0, True), Option("qcow2", 2 * GB, 20.0, True)], "raw", 0.0),
        # Equals: the client's order.
        ([Option("raw", 10 * GB, 30.0), Option("qcow2", 2 * GB, 20.0)], "raw", 0.0),
        ([Option("qcow2", 2 * GB, 20.0), Option("raw", 10 * GB, 30.0)], "qcow2", 10.0),
    ],
)
def test_the_soonest_to_use_is_chosen(options: list[Option], chosen: str, seconds: float) -> None:
    choice = choose(options, ["raw"], {"qcow2": 0.2 * GB, "vmdk": 0.01 * GB})
    assert choice is not None
    assert (options[choice.chosen].format, choice.considered[0].format, choice.conversion_seconds) == (chosen, chosen, seconds)
    assert len(choice.considered) == sum(option.seconds is not None for option in options)


def test_without_a_place_there_is_no_choice() -> None:
    assert choose([], ["raw"], {}) is None
    assert choose([Option("raw", 1, None), Option("qcow2", 1, None)], ["raw"], {"qcow2": 1.0}) is None
    choice = choose([Option("raw", GB, 5.0)], ["raw"], {"raw": 1.0})  # what is taken as it is is not converted
    assert choice is not None
    assert choice.considered == (Considered("raw", 5.0, 0.0, False),)


seconds = st.none() | st.floats(0.001, 1e6)
some_options = st.lists(st.tuples(st.integers(1, 10**13), seconds, st.booleans()), min_size=1, max_size=8).map(
    lambda rows: [Option(f"f{index}", size, takes, full) for index, (size, takes, full) in enumerate(rows)]
)


@given(some_options, st.lists(st.floats(1.0, 1e10), min_size=8, max_size=8), st.integers(0, 8), st.floats(1.0, 100.0))
def test_no_other_one_is_sooner_and_faster_converting_never_harms(
    options: list[Option], rates: list[float], as_it_is: int, faster: float
) -> None:
    formats = [option.format for option in options[:as_it_is]]
    convert = {f"f{index}": rate for index, rate in enumerate(rates)}
    choice = choose(options, formats, convert)
    possible = [option for option in options if option.seconds is not None]
    if not possible:
        assert choice is None
        return
    assert choice is not None
    chosen = options[choice.chosen]
    free = [option for option in possible if not option.is_full]
    assert not (chosen.is_full and free)
    totals = [(option.seconds or 0) + conversion_seconds(option, formats, convert) for option in free or possible]
    mine = (chosen.seconds or 0) + choice.conversion_seconds
    assert mine == min(totals)
    again = choose(options, formats, {format: rate * faster for format, rate in convert.items()})
    assert again is not None
    assert again.considered[0].seconds + again.conversion_seconds <= mine


def test_the_format_that_stands_for_an_image() -> None:
    assert main("raw", {"qcow2", "raw"}) == "raw"
    assert main("raw", {"vmdk", "qcow2"}) == "qcow2"
    assert main(None, {"vmdk", "qcow2"}) == "qcow2"
    assert main("raw", ()) is None
