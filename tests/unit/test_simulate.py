"""The simulator's own parts: shares, the lower bound, and that a run moves every byte."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from tests.bench.simulate import bound
from tests.bench.simulate.network import Network
from tests.bench.simulate.policies import POLICIES
from tests.bench.simulate.report import WORKLOADS, by_project, jain
from tests.bench.simulate.run import Run
from tests.bench.simulate.scene import Change, Group, Node, Scene, Store, Want, load

UNLIMITED = float("inf")


def scene(
    *, stores: tuple[Store, ...], nodes: int = 2, rate: float = 100e9, size: int = 1000 * 10**9, links: dict[str, float] | None = None,
    changes: tuple[Change, ...] = (), at: tuple[float, ...] = (),
) -> Scene:  # fmt: skip
    group = Group("eu/b", nodes, rate)
    wants = [Want(at[n] if at else 0.0, n, 0) for n in range(nodes)]
    machines = [Node(group.site, rate, "p", (0.0, 0.0), False) for _ in range(nodes)]
    return Scene("test", stores, links or {}, machines, [group], size, [tuple(s.name for s in stores)], wants, changes)


NEAR, FAR = Store("near", "eu/b", 60e9), Store("far", "us/c", 60e9)


@pytest.mark.parametrize(
    ("stores", "nodes", "rate", "links", "flows", "caps", "expected"),
    [
        ((NEAR,), 2, 100e9, {}, [(0, 0), (0, 1)], None, [30, 30]),  # the store is shared
        ((NEAR,), 2, 20e9, {}, [(0, 0), (0, 1)], None, [20, 20]),  # the machines are slower
        ((NEAR, FAR), 2, 50e9, {}, [(0, 0), (1, 0), (0, 1)], None, [25, 25, 35]),  # one machine on two stores, the rest to the other
        ((FAR,), 2, 100e9, {"us": 10e9}, [(0, 0), (0, 1)], None, [5, 5]),  # the link out of us
        ((NEAR,), 2, 100e9, {"us": 10e9}, [(0, 0), (0, 1)], None, [30, 30]),  # a link that is not on the way
        ((NEAR,), 3, 100e9, {}, [(0, 0), (0, 1), (0, 2)], [5e9, UNLIMITED, UNLIMITED], [5, 27.5, 27.5]),  # a capped connection
    ],
)
def test_shares_are_max_min_fair(stores, nodes, rate, links, flows, caps, expected) -> None:  # type: ignore[no-untyped-def]
    network = Network(scene(stores=stores, nodes=nodes, rate=rate, links=links))
    limits = np.array(caps if caps is not None else [UNLIMITED] * len(flows))
    assert network.shares([network.path(store, node) for store, node in flows], limits) == pytest.approx(
        [share * 1e9 for share in expected]
    )


def test_no_flow_can_gain_without_a_poorer_one_losing() -> None:
    drawn = load(WORKLOADS / "boot_storm.toml", 1)
    network, rng = Network(drawn), Random(7)
    paths = [network.path(rng.randrange(4), rng.randrange(200)) for _ in range(100)]
    rates = network.shares(paths, np.full(100, 40e6))
    load_of = np.zeros(len(network.capacity))
    for path, rate in zip(paths, rates, strict=True):
        for resource in set(path):
            load_of[resource] += rate
    assert (load_of[:-1] <= network.capacity[:-1] * (1 + 1e-6)).all()
    for path, rate in zip(paths, rates, strict=True):
        saturated = [r for r in set(path) if load_of[r] >= network.capacity[r] * (1 - 1e-6)]
        at_its_cap = rate >= 40e6 * (1 - 1e-6)
        richest = [max(x for p, x in zip(paths, rates, strict=True) if r in p) <= rate * (1 + 1e-6) for r in saturated]
        assert at_its_cap or any(richest)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (scene(stores=(NEAR, FAR)), 2000 / 120),
        (scene(stores=(NEAR, FAR), rate=10e9), 100.0),  # a machine cannot be faster than its interface
        (scene(stores=(NEAR, FAR), links={"us": 40e9}), 20.0),
        (scene(stores=(NEAR,), changes=(Change(10.0, "near", 0.0), Change(50.0, "near", 1.0))), 2000 / 60 + 40),
        (scene(stores=(NEAR,), at=(0.0, 90.0)), 90 + 1000 / 60),
    ],
)
def test_lower_bound(given: Scene, expected: float) -> None:
    assert bound.makespan(given) == pytest.approx(expected, abs=2 * bound.PRECISION)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("workload", ["boot_storm", "dying_storm"])
def test_every_download_ends_not_sooner_than_the_bound(policy: str, workload: str) -> None:
    drawn = load(WORKLOADS / f"{workload}.toml", 3)
    result = Run(drawn, POLICIES[policy](drawn, Random(3)), 3).result()
    assert len(result.seconds) == len(drawn.wants)
    assert sum(result.served.values()) == pytest.approx(len(drawn.wants) * drawn.size, rel=1e-3)
    assert max(result.ends) >= bound.makespan(drawn) - 2 * bound.PRECISION
    if policy == "ours":
        assert result.over_slots == 0


@pytest.mark.parametrize("path", sorted(WORKLOADS.glob("*.toml")), ids=lambda path: path.stem)
def test_workloads_can_be_read(path: Path) -> None:
    drawn = load(path, 0)
    assert drawn.wants
    assert drawn.about
    assert {change.store for change in drawn.changes} <= {store.name for store in drawn.stores}


def test_jain() -> None:
    assert jain([1, 1, 1]) == 1
    assert jain([1, 0, 0]) == pytest.approx(1 / 3)


def test_shares_of_projects_count_while_all_want_something() -> None:
    drawn = load(WORKLOADS / "two_tenants.toml", 0)
    result = Run(drawn, POLICIES["random"](drawn, Random(1)), 1).result()
    assert sum(by_project(result)) <= len(drawn.wants)
    assert min(by_project(result)) > 0
