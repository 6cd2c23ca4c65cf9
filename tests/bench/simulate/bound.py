"""The least time in which all of a scene's wants could be met by anyone: a maximum flow over the capacity that is really there.

Second by second, as a linear program: bytes from a store to a group of machines are limited by what the store serves in that
second, by the links on the way and the machines' interfaces; nothing is delivered before it was asked for. Machines of one
group and blobs with the same replicas are taken together, which can only lower the bound. It knows the future, so no policy
can reach it always.
"""

from __future__ import annotations

from collections import defaultdict
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from broker.sites import ancestors
from tests.bench.simulate.scene import Scene

_GIGA = 1e9
"""The solver's numbers are gigabytes: it dislikes large ones."""

Commodity = tuple[int, tuple[str, ...]]


PRECISION = 1 / 16
"""Of a second."""


def makespan(scene: Scene) -> float:
    """Seconds from the start until the last byte, at the least."""
    last = max(want.at + scene.size / scene.nodes[want.node].rate for want in scene.wants)
    if _suffices(scene, last):
        return last
    low, high = last, 2 * last + 64
    while not _suffices(scene, high):
        low, high = high, high * 2
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if _suffices(scene, middle) else (middle, high)
    return low


def _suffices(scene: Scene, seconds: float) -> bool:
    wanted = len(scene.wants) * scene.size / _GIGA
    whole = ceil(seconds)
    return _delivered(scene, whole, 1.0 - (whole - seconds)) >= wanted * (1 - 1e-6)


def _delivered(scene: Scene, seconds: int, last: float) -> float:
    """The most that can be delivered (in 1e9 bytes) when only the share `last` of the last second counts."""
    arrived = _arrivals(scene, seconds)
    commodities = list(arrived)
    served = _served(scene, seconds, last)
    width = np.ones(seconds)
    width[-1] = last
    routes = [(c, s) for c, (_, have) in enumerate(commodities) for s, store in enumerate(scene.stores) if store.name in have]
    rows: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.int64]] = []
    limits: list[NDArray[np.float64]] = []
    used = 0
    second = np.arange(seconds)

    def limit(routes_used: list[int], most: NDArray[np.float64]) -> None:
        """The sum over these routes is at most `most`, in every second."""
        nonlocal used
        for route in routes_used:
            rows.append(used + second)
            columns.append(route * seconds + second)
        limits.append(most)
        used += seconds

    for number in range(len(scene.stores)):
        limit([r for r, (_, s) in enumerate(routes) if s == number], served[number])
    for site, capacity in scene.links.items():
        for leaving in (True, False):
            crossing = [r for r, (c, s) in enumerate(routes) if _uses(scene, site, s, commodities[c][0], leaving=leaving)]
            if crossing:
                limit(crossing, capacity / _GIGA * width)
    for number, group in enumerate(scene.groups):
        limit([r for r, (c, _) in enumerate(routes) if commodities[c][0] == number], group.count * group.rate / _GIGA * width)
    size = len(routes) * seconds
    waiting = len(commodities) * seconds  # what was asked for and not delivered yet: never negative
    upper = coo_array((np.ones(sum(map(len, rows))), (np.concatenate(rows), np.concatenate(columns))), shape=(used, size + waiting))
    balance, asked = _balance(routes, list(arrived.values()), seconds)
    value = np.concatenate([-np.ones(size), np.zeros(waiting)])
    answer = linprog(value, A_ub=upper, b_ub=np.concatenate(limits), A_eq=balance, b_eq=asked, bounds=(0, None), method="highs-ipm")
    if answer.status != 0:
        raise ArithmeticError(f"the solver says: {answer.message}")
    return float(-answer.fun)


def _arrivals(scene: Scene, seconds: int) -> dict[Commodity, NDArray[np.float64]]:
    """What is asked for in each second, by group and replicas."""
    asked: dict[Commodity, NDArray[np.float64]] = defaultdict(lambda: np.zeros(seconds))
    for want in scene.wants:
        if want.at < seconds:
            asked[scene.node_group(want.node), scene.replicas[want.blob]][int(want.at)] += scene.size / _GIGA
    return dict(asked)


def _served(scene: Scene, seconds: int, last: float) -> list[NDArray[np.float64]]:
    """What each store serves in each second."""
    found = []
    for store in scene.stores:
        share = np.ones(seconds)
        for change in scene.changes:
            if change.store == store.name:
                share[ceil(change.at) :] = change.share
                if change.at % 1 and change.at < seconds:  # the better half of a second counts as whole: it is a lower bound
                    share[int(change.at)] = max(share[int(change.at)], change.share)
        share[-1] *= last
        found.append(store.rate / _GIGA * share)
    return found


def _uses(scene: Scene, link: str, store: int, group: int, *, leaving: bool) -> bool:
    inside = (link in ancestors(scene.stores[store].site), link in ancestors(scene.groups[group].site))
    return inside == ((True, False) if leaving else (False, True))


def _balance(routes: list[tuple[int, int]], arrivals: list[NDArray[np.float64]], seconds: int) -> tuple[coo_array, NDArray[np.float64]]:
    """For each commodity and second: delivered + still waiting - waiting before = asked for."""
    second = np.arange(seconds)
    rows, columns, values = [], [], []
    for route, (commodity, _) in enumerate(routes):
        rows.append(commodity * seconds + second)
        columns.append(route * seconds + second)
        values.append(np.ones(seconds))
    for commodity in range(len(arrivals)):
        at = len(routes) * seconds + commodity * seconds + second
        rows += [commodity * seconds + second, commodity * seconds + second[1:]]
        columns += [at, at[:-1]]
        values += [np.ones(seconds), -np.ones(seconds - 1)]
    shape = (len(arrivals) * seconds, (len(routes) + len(arrivals)) * seconds)
    matrix = coo_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=shape)
    return matrix, np.concatenate(arrivals)
