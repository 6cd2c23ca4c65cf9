"""The site tree: distances and what lies around a site."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.sites import EVERYWHERE, UNRELATED, ancestors, distance

SITES = st.lists(st.sampled_from("abc"), min_size=1, max_size=8).map("/".join)


@pytest.mark.parametrize(
    ("a", "b", "edges"),
    [
        ("eu", "eu", 0),
        ("eu/az1/rack3", "eu/az1/rack3", 0),
        ("eu/az1/rack3", "eu/az2", 3),
        ("eu/az1/rack3/host7", "eu/az1", 2),
        ("eu/az1/rack1/host1", "eu/az1/rack2/host1", 4),
        ("eu/az1", "eu/az11", 2),
        ("eu", "eu/az1", 1),
        ("eu", "us", UNRELATED),
        ("eu/az1", "us/az1", UNRELATED),
        (None, "eu", UNRELATED),
        ("eu", None, UNRELATED),
        (None, None, UNRELATED),
        ("", "", UNRELATED),
    ],
)
def test_distance(a: str | None, b: str | None, edges: int) -> None:
    assert distance(a, b) == edges


@pytest.mark.parametrize(
    ("site", "around"),
    [
        ("eu/az1/rack3", ("eu/az1/rack3", "eu/az1", "eu", EVERYWHERE)),
        ("eu", ("eu", EVERYWHERE)),
        ("", (EVERYWHERE,)),
        (None, (EVERYWHERE,)),
    ],
)
def test_ancestors(site: str | None, around: tuple[str, ...]) -> None:
    assert ancestors(site) == around


@given(SITES, SITES, SITES)
def test_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert distance(a, b) == distance(b, a)
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, b) <= distance(a, c) + distance(c, b)
    assert distance(a, b) <= UNRELATED


@given(SITES)
def test_each_ancestor_is_one_edge_wider(site: str) -> None:
    around = ancestors(site)
    for steps, wider in enumerate(around[:-1]):
        assert distance(site, wider) == steps
