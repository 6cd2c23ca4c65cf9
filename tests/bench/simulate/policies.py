"""The policies that are compared: each puts the stores that have a blob in an order for one machine.

`Ours` is the broker's own code (``broker.rank``, ``broker.admit``, ``broker.paths``) with its defaults. The others are written from what
their projects document. All see the stores' loads through the same (stale) view; none sees what nobody tells a broker: foreign traffic,
links, caps of single connections.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median

from broker import accept, admit, paths, rank, signals, voices
from broker.model import Abilities, Operation, Outcome
from broker.paths import Load, PathAverage
from broker.sites import ancestors, distance
from tests.bench.simulate.scene import Node, Scene, Store

KM_A_MILE = 1.609


@dataclass(slots=True)
class View:
    """What one broker believes at the moment: transfers under way by store, and the averages. `taken_at` is when it was read."""

    active: dict[str, int] = field(default_factory=dict)
    averages: dict[tuple[str, str], PathAverage] = field(default_factory=dict)
    polled: dict[str, int] = field(default_factory=dict)
    """Loads as of the last poll of 15 s (Pelican)."""
    taken_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A ranked store, and what the ticket says of it: expected rate, for clients that can use it."""

    store: str
    rate: float
    seconds: float


class Policy(ABC):
    """`order` is asked once for each ticket. `leases`: whether stores' slots hold transfers back."""

    name: str
    leases = False
    learns = False

    def __init__(self, scene: Scene, rng: Random) -> None:
        self.scene, self.rng = scene, rng
        self.stores = {store.name: store for store in scene.stores}

    @abstractmethod
    def order(self, node: Node, have: Sequence[str], view: View, now: float, avoid: Mapping[str, float]) -> list[Choice]:
        """The stores of `have` in the order to try them; `avoid` says until when a failure keeps a store from this machine."""

    def told(self, outcome: Outcome, store: str, node: Node, view: View, now: float) -> None:
        """One transfer has ended: nothing to most policies."""
        return


class Ours(Policy):
    """The broker as it is."""

    name, leases, learns = "ours", True, True

    def __init__(self, scene: Scene, rng: Random, policy: rank.Policy | None = None) -> None:
        super().__init__(scene, rng)
        self.policy = policy or rank.Policy()
        self.candidates = {store.name: _candidate(store) for store in scene.stores}

    def order(self, node: Node, have: Sequence[str], view: View, now: float, avoid: Mapping[str, float]) -> list[Choice]:
        request = accept.Request(Operation.DOWNLOAD, node.site, self.scene.size, failed_until=avoid)
        outlooks = rank.Outlooks(node.site, view.averages, self.policy, now)
        loads = {name: Load(active=active) for name, active in view.active.items()}
        ranking = rank.rank(request, [self.candidates[name] for name in have], outlooks, loads, self.policy, now, self.rng)
        return [Choice(source.candidate.store, source.estimate.rate, source.estimate.seconds) for source in ranking.sources]


def _candidate(store: Store) -> accept.Candidate:
    return accept.Candidate(store.name, store.site, "http", Abilities(reads=True, ranges=True), slots=store.slots, bandwidth=store.declared)


class Drawn(Policy):
    """Base of those that know no rates."""

    def ranked(self, names: Sequence[str]) -> list[Choice]:
        return [Choice(name, 0.0, 0.0) for name in names]


class Uniform(Drawn):
    """A random order."""

    name = "random"

    def order(self, node: Node, have: Sequence[str], view: View, now: float, avoid: Mapping[str, float]) -> list[Choice]:
        return self.ranked(self.rng.sample(list(have), len(have)))


class Nearest(Drawn):
    """By distance in the tree of sites, equals at random (Rucio's default, most mirrors' redirectors)."""

    name = "nearest"

    def order(self, node: Node, have: Sequence[str], view: View, now: float, avoid: Mapping[str, float]) -> list[Choice]:
        return self.ranked(sorted(have, key=lambda name: (distance(node.site, self.stores[name].site), self.rng.random())))


class LeastLeases(Drawn):
    """The store with the fewest transfers under way, equals at random."""

    name = "least-leases"

    def order(self, node: Node, have: Sequence[str], view: View, now: float, avoid: Mapping[str, float]) -> list[Choice]:
        return self.ranked(sorted(have, key=lambda name: (view.active.get(name, 0), self.rng.random())))


class RoundRobin(Drawn):
    """Each in its turn."""

    name = "round-robin"
    _turn = 0

    def order(self, node: Node, have: Sequence[str], view: View, now: float, avoid: Mapping[str, float]) -> list[Choice]:
        self._turn += 1
        start = self._turn % len(have)
        return self.ranked([*have[start:], *have[:start]])


class Pelican(Drawn):
    """The Pelican director's adaptive sort, from its documentation: of the nearest six, a draw by distance, load and status."""

    name = "pelican"

    def __init__(self, scene: Scene, rng: Random) -> None:
        super().__init__(scene, rng)
        self._status: dict[str, tuple[float, float]] = {}

    def order(self, node: Node, have: Sequence[str], view: View, now: float, avoid: Mapping[str, float]) -> list[Choice]:
        miles = {name: math.dist(node.at, self.stores[name].at) / KM_A_MILE for name in have}
        nearest = sorted(have, key=miles.__getitem__)[:6]
        loads = [view.polled.get(name) for name in nearest]
        known = [load for load in loads if load is not None]
        usual = median(known) if known else 0
        weights = []
        for name, load in zip(nearest, loads, strict=True):
            busy = usual if load is None else load
            load_factor = 1.0 if busy <= 100 else 0.5 ** ((busy - 100) / 200)
            weights.append(max(2 ** (-miles[name] / 200) * load_factor * self._status.get(name, (1.0, 0.0))[0] * 2, 1e-12))
        drawn = rank.draw(weights, self.rng)
        return self.ranked([nearest[index] for index in drawn] + [name for name in have if name not in nearest])

    def told(self, outcome: Outcome, store: str, node: Node, view: View, now: float) -> None:
        value, at = self._status.get(store, (1.0, now))
        kept = math.exp(-(now - at) / 300)
        self._status[store] = value * kept + (1 - kept) * (1.0 if outcome is Outcome.OK else 0.01), now


class Mirrorbits(Drawn):
    """mirrorbits' scores by distance (one country, no AS numbers), a weighted draw of at most five."""

    name = "mirrorbits"

    def order(self, node: Node, have: Sequence[str], view: View, now: float, avoid: Mapping[str, float]) -> list[Choice]:
        far = {name: math.dist(node.at, self.stores[name].at) for name in have}
        base, closest = max(far.values()), min(far.values())
        scores = {name: base - d + 1 + (base - d if d <= closest * 1.5 else 0) for name, d in far.items()}
        best = sorted(have, key=scores.__getitem__, reverse=True)[:5]
        drawn = rank.draw([scores[name] for name in best], self.rng)
        return self.ranked([best[index] for index in drawn] + [name for name in have if name not in best])


POLICIES: Mapping[str, type[Policy]] = {p.name: p for p in (Ours, Uniform, Nearest, LeastLeases, RoundRobin, Pelican, Mirrorbits)}


class Memory:
    """What the brokers' catalogue holds of reports: averages by (site, store), and how much each machine has said (`broker.voices`)."""

    def __init__(self) -> None:
        self.averages: dict[tuple[str, str], PathAverage] = {}
        self._said: dict[tuple[int, str], tuple[float, float]] = {}
        self._policy = paths.Policy()

    def learn(self, number: int, node: Node, store: Store, report: paths.Report, now: float, weight: float = 1.0) -> None:
        """What one word of machine `number` adds: in full at its own site, less and less at wider ones."""
        before, at = self._said.get((number, store.name), (0.0, now))
        before = paths.decay(before, now - at, self._policy.half_life_seconds)
        self._said[number, store.name] = before + weight, now
        heard = voices.share(before, weight)
        for site in ancestors(node.site):
            self._add(site, store.name, report, now, weight if site == node.site else weight * heard)

    def _add(self, site: str, store: str, report: paths.Report, now: float, weight: float) -> None:
        known = self.averages.get((site, store))
        added = signals.weakened(paths.contribution(report, self._policy), weight)
        kept = 0.0 if known is None else paths.decay(1.0, now - known.updated_at, self._policy.half_life_seconds)
        sums = [0.0] * 6 if known is None else [getattr(known, name) * kept for name in added._fields]
        self.averages[site, store] = PathAverage(*(a + b for a, b in zip(sums, added, strict=True)), updated_at=now)


def parallel_wants(choices: Sequence[Choice], stores: Mapping[str, Store], view: View, refused: set[str]) -> tuple[str, ...]:
    """Which store to ask a lease of next, by the broker's own rule."""
    offers = [admit.Offer(choice.store, stores[choice.store].slots, choice.seconds) for choice in choices]
    loads = {name: Load(active=active) for name, active in view.active.items()}
    return admit.next_wants(admit.worth_a_slot(offers, admit.Policy()), loads, 1, (), refused)
