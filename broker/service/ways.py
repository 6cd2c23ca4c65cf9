"""The ways on which clients of one site read from the stores, and the sources of tickets that lie at their ends.

What a way promises, and nearly all of the text in which a ticket tells it, depends on site and store alone. So it is made once and
serves all blobs until the outlook of its site changes; of a source only its seconds and its weight are worked out for each ticket.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import orjson

from broker import accept, rank
from broker.catalog.compact import CompactBlob, PlacedReplica
from broker.model import ReplicaState, Store
from broker.paths import IDLE
from broker.service.context import Context
from broker.service.places import describe

_ELSEWHERE = (accept.Reason.NOT_MOUNTED, accept.Reason.PRIVATE)
"""Why a path or a volume is nothing to a client, whatever else its request says."""


class Way:
    """What reading from one store promises to clients of one site, with that store's load as it was when this was made."""

    __slots__ = (
        "_basis", "_before", "_candidate", "_outlook", "active", "is_handed", "is_open", "prospect", "recorded", "shown", "slots", "store",
        "store_id", "varies",
    )  # fmt: skip

    def __init__(self, store: Store, candidate: accept.Candidate, outlook: rank.Outlook, loads: rank.Loads, policy: rank.Policy) -> None:
        self.store_id = store.id
        self.store = store.name
        self.slots = store.read_slots
        self.varies = store.read_bandwidth is not None or (store.read_slots is not None and outlook.shared_rate != math.inf)
        """Whether what it promises depends on the store's load."""
        self.is_open = accept.is_offered_to_all(candidate)
        """Whether an active replica there is offered to all."""
        self.is_handed = candidate.handed
        self._candidate = candidate
        self._outlook = outlook
        self._basis = _json(outlook.basis)
        told = rank.Estimate(0.0, 0.0, 0.0, 0.0, 0.0, outlook.basis, 0.0)
        before, seconds, _ = _json(describe(candidate, told, 0.0)).partition('"seconds":0.0')
        self._before = before[1:] + seconds.removesuffix("0.0")
        self._take_load(loads, policy)

    def against(self, ask: accept.Request) -> accept.Reason | None:
        """What is against reading an active replica there, for a request that is not choosy."""
        return accept.accept(ask, self._candidate, IDLE, 0.0)

    def at(self, loads: rank.Loads, policy: rank.Policy) -> Way:
        """The same way at another load. Sources of tickets under way keep this one: what is shown is what was recorded."""
        other = object.__new__(Way)
        other.store_id, other.store, other.slots, other.varies, other.is_open, other.is_handed = (
            self.store_id, self.store, self.slots, self.varies, self.is_open, self.is_handed,
        )  # fmt: skip
        other._candidate, other._outlook, other._basis, other._before = self._candidate, self._outlook, self._basis, self._before
        other._take_load(loads, policy)
        return other

    def _take_load(self, loads: rank.Loads, policy: rank.Policy) -> None:
        self.active = loads.get(self.store, IDLE).active
        self.prospect = rank.prospect(self._outlook, self._candidate, loads, policy)
        setup, rate, success = _numbers(self.prospect[:3])
        self.recorded = f",{rate},{setup},{success},{self._basis},"
        """What `Source.record` says between seconds and weight."""
        told = f',"rate":{rate},"setup_seconds":{setup},"success":{success},"basis":{self._basis}}},"weight":'
        self.shown = self._before, told
        """What `Source.show` says before the seconds, and between them and the weight."""


class Source:
    """A ranked replica on its way into a ticket: what admission asks of it, and what is recorded and shown of it.

    `told` are its seconds and its weight in JSON.
    """

    __slots__ = ("_told_seconds", "_told_weight", "key", "replica", "seconds", "slots", "store", "way", "weight")

    def __init__(self, way: Way, key: str, replica: str, seconds: float, weight: float, told: tuple[str, str]) -> None:
        self.way = way
        self.store = way.store
        self.slots = way.slots
        self.key = key
        self.replica = replica
        self.seconds = seconds
        self.weight = weight
        self._told_seconds, self._told_weight = told

    def record(self, active: bool, concurrency: int) -> str:
        """The entry of a ticket's row, in JSON; `places.recorded` reads it back."""
        way, state = self.way, "true" if active else "false"
        return f'[{way.store_id},"{self.replica}",{state},{concurrency},{self._told_seconds}{way.recorded}{self._told_weight}]'

    def show(self, rank: int, state: str, read: str) -> str:
        """The source of a ticket, in JSON; `read` is what `reads.Reads.sign` gave for it."""
        before, between = self.way.shown
        return f'{{"rank":{rank},"state":"{state}",{before}{self._told_seconds}{between}{self._told_weight},{read}}}'


def plain_sources(context: Context, blob: CompactBlob, ask: accept.Request, outlooks: rank.Outlooks) -> list[Source] | None:
    """The blob's replicas in the order to try them, for a request that is not choosy; ``None`` when something may be against one of
    them: nearly always nothing is, and then there is nothing to ask of each. What is mounted elsewhere is passed over."""
    if not blob.all_active:
        return None
    rows, known, loads = blob.replica_rows, outlooks.ways.get, context.memory.read_loads
    ways: list[Way] = []
    prospects: list[rank.Prospect] = []
    passed: dict[str, accept.Reason] = {}
    for row in rows:
        found = known(row[0])
        if found is None or (found.varies and found.active != loads.get(found.store, IDLE).active):
            found = way(context, outlooks, row[0])
        if found is None:
            return None
        if not found.is_open:
            reason = found.against(ask) if found.is_handed else None
            if reason not in _ELSEWHERE:
                return None
            passed[row[2]] = reason
            continue
        ways.append(found)
        prospects.append(found.prospect)
    if not ways:
        return None if passed else []
    if passed:
        rows = tuple(row for row in rows if row[2] not in passed)
        for reason in passed.values():
            context.metrics.exclusion(reason)
    policy = context.policy.rank
    seconds, shares = rank.size_up(prospects, blob.size, policy)
    told = _numbers([*seconds, *shares])
    count = len(rows)
    return [
        Source(ways[i], rows[i][1], rows[i][2], seconds[i], shares[i], (told[i], told[count + i])) for i in rank.draw(shares, context.rng)
    ]


def way(context: Context, outlooks: rank.Outlooks, store_id: int) -> Way | None:
    """The way to a store at its present load; ``None`` when no such store is known."""
    memory, policy = context.memory, context.policy.rank
    found: Way | None = outlooks.ways.get(store_id)
    if found is None:
        store = memory.store_by_id(store_id)
        if store is None:
            return None
        candidate = _candidate(PlacedReplica(store_id, "", "", ReplicaState.ACTIVE, ""), store)
        found = outlooks.ways[store_id] = Way(store, candidate, outlooks.of(candidate), memory.read_loads, policy)
    elif found.varies and found.active != memory.read_loads.get(found.store, IDLE).active:
        found = outlooks.ways[store_id] = found.at(memory.read_loads, policy)
    return found


def candidates(context: Context, blob: CompactBlob) -> Iterable[accept.Candidate]:
    """The blob's replicas as `accept` and `rank` see them, those at stores that are known."""
    for replica in blob.replicas:
        store = context.memory.store_by_id(replica.store_id)
        if store is not None:
            yield _candidate(replica, store)


def ranked_sources(context: Context, ranking: rank.Ranking, outlooks: rank.Outlooks) -> list[Source]:
    """The sources of a ranking by these outlooks, in its order."""
    return [
        Source(found, candidate.key, candidate.replica or "", estimate.seconds, weight, _pair(estimate.seconds, weight))
        for candidate, estimate, weight in ranking.sources
        if (found := way(context, outlooks, candidate.store_id)) is not None
    ]


def _candidate(replica: PlacedReplica, store: Store) -> accept.Candidate:
    return accept.source(replica, store, store.endpoint.partition(":")[0])


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _pair(seconds: float, weight: float) -> tuple[str, str]:
    told_seconds, told_weight = _numbers((seconds, weight))
    return told_seconds, told_weight


def _numbers(values: Sequence[float]) -> list[str]:
    """Each in JSON: `repr` takes four times as long for the shortest text of a float, and a ticket has a dozen of them."""
    return orjson.dumps(values)[1:-1].decode().split(",")
