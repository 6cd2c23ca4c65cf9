"""One run: discrete events around the policies, in a fluid network.

The clients are the same for every policy, and of one of two kinds (`Clients`).

Both: a dead store is noticed after a second, the next one on the list goes on with what is left, and the machine does not want that
store again for a minute; when the list is at its end a new one is asked for. Where every store is full (a policy with slots), a
client waits until one of them has room, and comes when it is its project's turn (`broker.turns`).
``single``: one source at a time, whatever its rate, until it fails: curl, git-lfs, nova.
``several``: what broker.client does, by the numbers of `broker.client.plan`: when what is left lasts longer than three seconds, a
further source helps (up to four); one that is eight times slower than the fastest after five seconds is given up; while some source
was given up or had no room, and help is still wanted, a new list is asked for every 15 s.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from random import Random

import numpy as np

from broker import paths, signals, turns
from broker.client.plan import AGAIN_SECONDS, MORE_SECONDS, SLOW_FACTOR, SLOW_SECONDS
from broker.client.sources import word_due
from broker.model import Outcome
from tests.bench.simulate.network import Network
from tests.bench.simulate.policies import Choice, Memory, Policy, View, parallel_wants
from tests.bench.simulate.scene import Scene, Want

NOTICE_SECONDS = 1.0
TICK_SECONDS = 1.0
POLL_SECONDS = 15.0
MOST_SOURCES = 4
EXCLUDED_SECONDS = 60.0


class Clients(StrEnum):
    """How the machines download; see the rules above."""

    SINGLE = "single"
    SEVERAL = "several"


@dataclass(slots=True, eq=False)
class Flow:
    """One source at work for one download."""

    store: str
    path: list[int]
    cap: float
    began: float
    concurrency: int
    expected: float
    """Seconds, by the estimate in the ticket."""
    told_at: float
    got: float = 0.0
    rate: float = 0.0
    dead_since: float | None = None


@dataclass(slots=True, eq=False)
class Download:
    """One download; `left` bytes."""

    want: Want
    left: float
    broker: int
    choices: deque[Choice] = field(default_factory=deque)
    flows: list[Flow] = field(default_factory=list)
    avoid: dict[str, float] = field(default_factory=dict)
    asked_at: float = 0.0
    lost: bool = False
    """Whether a source was given up, or had no room."""


@dataclass(slots=True)
class Result:
    """What came of it. `seconds` by want; bytes by store; bytes that left their region."""

    scene: Scene
    policy: str
    seconds: list[float]
    ends: list[float]
    served: dict[str, float]
    crossing: float
    refused: int
    over_slots: int
    timeline: list[tuple[float, dict[str, float]]]
    ended: list[tuple[Want, float]]


class Run:
    """`result` runs the scene to its end."""

    def __init__(
        self, scene: Scene, policy: Policy, seed: int, clients: Clients = Clients.SINGLE, *, most_seconds: float = 36_000.0
    ) -> None:
        self.scene, self.policy = scene, policy
        self.rng = Random(seed)
        self.network = Network(scene)
        self.index = {store.name: number for number, store in enumerate(scene.stores)}
        self.stores = {store.name: store for store in scene.stores}
        self.clients = clients
        self.now = 0.0
        self.most_seconds = most_seconds
        self.active = dict.fromkeys(self.stores, 0)
        self.memory = Memory()
        self.views = [View() for _ in range(scene.brokers)]
        self.running: set[Download] = set()
        self.waiting: deque[Download] = deque()
        self.events: list[tuple[float, int, str, object]] = []
        self._order = count()
        self._result = Result(scene, policy.name, [], [], dict.fromkeys(self.stores, 0.0), 0.0, 0, 0, [], [])

    def result(self) -> Result:
        """Run until every download has ended, or `most_seconds` are over."""
        for want in self.scene.wants:
            self._at(want.at, "want", want)
        for change in self.scene.changes:
            self._at(change.at, "change", change)
        self._at(0.0, "poll", None)
        self._at(TICK_SECONDS, "tick", None)
        to_come = len(self.scene.wants)
        while (to_come or self.running or self.waiting) and self.now < self.most_seconds:
            self._rates()
            done = min([self.now + d.left / rate for d in self.running if (rate := sum(f.rate for f in d.flows)) > 0], default=float("inf"))
            at = min(done, self.events[0][0])
            self._advance(at)
            for download in [d for d in self.running if d.left <= 1e-6 * self.scene.size]:
                self._finish(download)
            while self.events and self.events[0][0] <= self.now:
                _, _, kind, what = heapq.heappop(self.events)
                to_come -= kind == "want"
                getattr(self, f"_on_{kind}")(what)
            self._serve_waiting()
        for download in [*self.running, *self.waiting]:  # never ended: counts as long as the run
            self._note_end(download, self.most_seconds)
        return self._result

    # -- time

    def _at(self, when: float, kind: str, what: object) -> None:
        heapq.heappush(self.events, (when, next(self._order), kind, what))

    def _flows(self) -> Iterator[Flow]:
        for download in self.running:
            yield from download.flows

    def _rates(self) -> None:
        flows = list(self._flows())
        shares = self.network.shares([flow.path for flow in flows], np.array([flow.cap for flow in flows]))
        for flow, rate in zip(flows, shares, strict=True):
            flow.rate = float(rate)

    def _advance(self, at: float) -> None:
        passed = at - self.now
        for download in self.running:
            for flow in download.flows:
                moved = flow.rate * passed
                flow.got += moved
                download.left -= moved
                self._result.served[flow.store] += moved
                if self.network.crosses(self.index[flow.store], download.want.node):
                    self._result.crossing += moved
        self.now = at

    # -- events

    def _on_want(self, want: Want) -> None:
        self._ask(Download(want, float(self.scene.size), self.rng.randrange(self.scene.brokers)))

    def _on_change(self, change: object) -> None:
        number = self.index[change.store]  # type: ignore[attr-defined]
        self.network.capacity[number] = self.network.nominal[number] * change.share  # type: ignore[attr-defined]
        if self.network.capacity[number] == 0:
            self._at(self.now + NOTICE_SECONDS, "dead", change.store)  # type: ignore[attr-defined]

    def _on_dead(self, store: object) -> None:
        for download in list(self.running):
            for flow in [flow for flow in download.flows if flow.store == store]:
                self._fail(download, flow)

    def _on_retry(self, download: object) -> None:
        self._ask(download)  # type: ignore[arg-type]

    def _on_poll(self, _: object) -> None:
        for view in self.views:
            view.polled = dict(self.active)
        self._at(self.now + POLL_SECONDS, "poll", None)

    def _on_tick(self, _: object) -> None:
        self._result.timeline.append((self.now, {name: sum(f.rate for f in self._flows() if f.store == name) for name in self.stores}))
        for download in list(self.running):
            if self.policy.learns:
                self._tell_progress(download)
            if self.clients is Clients.SEVERAL:
                self._watch(download)
        self._at(self.now + TICK_SECONDS, "tick", None)

    # -- what a client does

    def _watch(self, download: Download) -> None:
        """Give up a hopeless source, let another one help."""
        rates = {flow.store: flow.rate for flow in download.flows}
        fastest = max(rates.values(), default=0.0)
        for flow in list(download.flows):
            if len(download.flows) > 1 and self.now - flow.began >= SLOW_SECONDS and flow.rate * SLOW_FACTOR < fastest:
                self._drop(download, flow, Outcome.SLOW)
        rate = sum(flow.rate for flow in download.flows)
        lasting = min([self.now - flow.began for flow in download.flows], default=0.0) >= TICK_SECONDS
        if not lasting or len(download.flows) >= MOST_SOURCES or (rate > 0 and download.left / rate <= MORE_SECONDS):
            return
        if not self._start_next(download) and download.lost and self.now - download.asked_at >= AGAIN_SECONDS:
            download.choices = deque(choice for choice in self._listed(download) if choice.store not in rates)
            self._start_next(download)

    def _tell_progress(self, download: Download) -> None:
        """How far each source has come, as often as broker.client tells it."""
        for flow in download.flows:
            lasted = self.now - flow.began
            if self.now - flow.told_at >= word_due(lasted, flow.expected) and not self.scene.nodes[download.want.node].lies:
                flow.told_at = self.now
                store = self.stores[flow.store]
                report = paths.Report(Outcome.OK, int(flow.got), lasted, flow.concurrency, store.declared)
                weight = signals.WEIGHTS[signals.Signal.PROGRESS]
                self.memory.learn(download.want.node, self.scene.nodes[download.want.node], store, report, self.now, weight)

    def _fail(self, download: Download, flow: Flow) -> None:
        self._drop(download, flow, Outcome.FAILED)
        download.avoid[flow.store] = self.now + EXCLUDED_SECONDS
        if not download.flows and not self._start_next(download):
            self.running.discard(download)
            self._at(self.now + 0.5, "retry", download)

    def _drop(self, download: Download, flow: Flow, outcome: Outcome) -> None:
        download.flows.remove(flow)
        download.lost |= outcome is not Outcome.OK
        self.active[flow.store] -= 1
        self._report(download, flow, outcome)

    def _finish(self, download: Download) -> None:
        for flow in list(download.flows):
            self._drop(download, flow, Outcome.OK)
        self.running.discard(download)
        self._note_end(download, self.now)

    def _note_end(self, download: Download, at: float) -> None:
        self._result.seconds.append(at - download.want.at)
        self._result.ends.append(at)
        self._result.ended.append((download.want, at))

    def _report(self, download: Download, flow: Flow, outcome: Outcome) -> None:
        node, store = self.scene.nodes[download.want.node], self.stores[flow.store]
        view = self._view(download.broker)
        self.policy.told(outcome, flow.store, node, view, self.now)
        if not self.policy.learns:
            return
        report = paths.Report(outcome, int(flow.got), self.now - flow.began, flow.concurrency, store.declared)
        if node.lies:
            report = paths.Report(Outcome.FAILED, 0, 0.0)
        self.memory.learn(download.want.node, node, store, report, self.now)

    # -- what a broker does

    def _view(self, number: int) -> View:
        """What that broker believes now: read anew when it is older than the scene's staleness."""
        view = self.views[number]
        if self.now - view.taken_at >= self.scene.stale_seconds or (self.scene.brokers == 1 and self.scene.stale_seconds == 0):
            view.active, view.averages, view.taken_at = dict(self.active), dict(self.memory.averages), self.now
        return view

    def _ask(self, download: Download) -> None:
        """A ticket, and its first source; wait when every store is full."""
        download.choices = deque(self._listed(download))
        if not download.choices:
            self._at(self.now + 1.0, "retry", download)
        elif not self._start_next(download):
            self._result.refused += 1
            if download not in self.waiting:
                self.waiting.append(download)

    def _listed(self, download: Download) -> list[Choice]:
        """What the policy answers."""
        download.asked_at = self.now
        view, have = self._view(download.broker), self.scene.replicas[download.want.blob]
        avoid = {store: until for store, until in download.avoid.items() if until > self.now}
        ranked = self.policy.order(self.scene.nodes[download.want.node], have, view, self.now, avoid)
        return [choice for choice in ranked if choice.store not in avoid]

    def _serve_waiting(self) -> None:
        """Whose turn it is asks again, by the broker's own rule of fairness at each store that has room."""
        for name in self.stores:
            if not self.waiting or not self._has_slot(name):
                continue
            held = Counter(self._party(download) for download in self.running for flow in download.flows if flow.store == name)
            here = {str(id(download)): download for download in self.waiting if name in self.scene.replicas[download.want.blob]}
            for turn in turns.order((self._contender(download) for download in here.values()), held):
                if not self._has_slot(name):
                    break
                self.waiting.remove(here[turn.id])
                self._ask(here[turn.id])

    def _party(self, download: Download) -> turns.Party:
        return self.scene.nodes[download.want.node].project, 1.0

    def _contender(self, download: Download) -> turns.Contender:
        return turns.Contender(str(id(download)), *self._party(download), 1.0, download.want.at)

    def _has_slot(self, store: str) -> bool:
        slots = self.stores[store].slots
        return not self.policy.leases or slots is None or self.active[store] < slots

    def _start_next(self, download: Download) -> bool:
        """The next source of the list that gets a lease."""
        view = self._view(download.broker)
        if self.policy.leases:
            refused: set[str] = set()
            chosen = None
            while chosen is None and (wanted := parallel_wants(download.choices, self.stores, view, refused)):
                if self._has_slot(wanted[0]):  # what the database says
                    chosen = wanted[0]
                else:
                    refused.add(wanted[0])
                    download.lost = True
        else:
            chosen = download.choices[0].store if download.choices else None
        if chosen is None:
            return False
        expected = next(choice.seconds for choice in download.choices if choice.store == chosen)
        download.choices = deque(choice for choice in download.choices if choice.store != chosen)
        self.active[chosen] += 1
        view.active[chosen] = view.active.get(chosen, 0) + 1  # a broker knows what it has just granted
        store, number = self.stores[chosen], self.index[chosen]
        if store.slots is not None and self.active[chosen] > store.slots:
            self._result.over_slots += 1
        path = self.network.path(number, download.want.node)
        flow = Flow(chosen, path, store.per_connection, self.now, view.active[chosen], expected, self.now)
        download.flows.append(flow)
        self.running.add(download)
        if self.network.capacity[number] == 0:
            self._at(self.now + NOTICE_SECONDS, "dead", chosen)
        return True
