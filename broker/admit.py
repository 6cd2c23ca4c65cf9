"""Which sources of a ranked list a transfer gets leases on, for how long, and what a client is told when none has a slot.

Whose turn it is where several ask for one slot is `broker.turns`' affair.

The database is the arbiter: it locks store rows in order and checks slots against unexpired leases (invariant 3). What
is decided here is what to ask it for, and what to make of its answer::

    wants = next_wants(offers, loads, parallel, granted=(), refused=())
    while wants:  # each round asks only for what was never asked for, so it ends after at most one round per store
        granted, refused = …ask the database for leases on wants…
        wants = next_wants(offers, loads, parallel, granted, refused)
    admission = settle(offers, granted, count)

Rules
- Leases go to the best-ranked stores that have a slot; a full store is passed over for another replica.
- Who can wait rather waits for a good store than to take one that is far slower (`worth_a_slot`).
- Stores believed full are asked only when nothing else was granted: loads are slightly stale, a wrong "full" must not refuse.
- A ticket holds at most one lease per store. A store without slots (``None``) is never full.
- A lease lasts as long as its transfer is expected to take, times a margin, within bounds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from broker.paths import IDLE, Load


@dataclass(frozen=True, slots=True)
class Policy:
    """How long grants last, in seconds, and what a project gets that administrators have not set otherwise."""

    margin: float = 3.0
    """A lease lasts this many times the estimate."""
    min_lease_seconds: float = 60.0
    """No lease is shorter."""
    max_lease_seconds: float = 6 * 3600.0
    """No lease is longer without being renewed."""
    max_total_seconds: float = 24 * 3600.0
    """Renewals end so long after the grant."""
    min_ticket_seconds: float = 300.0
    """No ticket is shorter: a standby source may be needed late."""
    max_ticket_seconds: float = 12 * 3600.0
    """No ticket is longer."""
    min_retry_seconds: float = 1.0
    """Nobody is told to come back sooner."""
    max_retry_seconds: float = 120.0
    """Nobody is told to come back later: transfers often end early."""
    adapt_seconds: float = 10.0
    """So long slots stay as they are before those that adapt are judged by what was reported (`broker.adapt`)."""
    retry_seconds: float = 10.0
    """What is told when no expected end is known."""
    patience: float = 3.0
    """Who can wait does not take a slot where the transfer would last this many times as long as from the best store."""
    service_weight: float = 4.0
    """Requests of the roles service and admin weigh so many times those of members, where slots are short."""
    project_max_leases: int = 0
    """Leases that a project may hold at once; 0: no limit."""
    project_max_bytes: int = 0
    """Bytes that its leases may be for together; 0: no limit."""
    most_waiting: int = 256
    """Requests of one project that may wait at one broker at the same time."""
    project_tickets_per_hour: int = 1_000_000
    """Tickets that a project may ask for at once at one broker, and again in each hour; 0: no limit."""


class Offered(Protocol):
    """One source or destination of a ranking, as far as admission is concerned."""

    @property
    def store(self) -> str: ...

    @property
    def slots(self) -> int | None: ...

    @property
    def seconds(self) -> float:
        """The estimate of the transfer."""
        ...


AnOffer = TypeVar("AnOffer", bound=Offered)


class Offer(NamedTuple):
    """The same, and nothing else."""

    store: str
    slots: int | None
    seconds: float


class Admitted(NamedTuple):
    """Indexes into the offers, both in rank order: leased now, and to be activated when needed."""

    active: tuple[int, ...]
    standby: tuple[int, ...]


def has_slot(slots: int | None, load: Load) -> bool:
    """Whether one more transfer fits."""
    return slots is None or load.active < slots


def next_wants(
    offers: Sequence[Offered], loads: Mapping[str, Load], parallel: int, granted: Collection[str], refused: Collection[str]
) -> tuple[str, ...]:
    """Stores to ask leases of next, best first; empty when there is nothing left to ask for."""
    missing = parallel - len(granted)
    if missing <= 0:
        return ()
    free: list[str] = []
    full: list[str] = []
    for offer in offers:
        store = offer.store
        if store in granted or store in refused or store in free or store in full:
            continue
        if not has_slot(offer.slots, loads.get(store, IDLE)):
            full.append(store)
            continue
        free.append(store)
        if len(free) == missing:
            break
    if free:
        return tuple(free)
    return () if granted else tuple(full[:missing])


def worth_a_slot(offers: Sequence[AnOffer], policy: Policy) -> list[AnOffer]:
    """What somebody who can wait takes, in the same order: the first offer, and those that take not much longer than the best one.

    The best may be full: waiting for it costs less than a transfer that takes so much longer, and holds a slot as long.
    """
    if not offers:
        return []
    most = policy.patience * min(offer.seconds for offer in offers)
    return [offers[0], *(offer for offer in offers[1:] if offer.seconds <= most)]


def settle(offers: Sequence[Offered], granted: Collection[str], count: int) -> Admitted | None:
    """The admission after the database has spoken: at most `count` sources, those with a lease among them. ``None``: all are full."""
    active: list[int] = []
    others: list[int] = []
    left = set(granted)
    for index, offer in enumerate(offers):
        if offer.store in left:
            left.remove(offer.store)  # of two offers of one store, the first
            active.append(index)
        elif index < count:
            others.append(index)
        elif not left:
            break
    return Admitted(tuple(active), tuple(others[: max(0, count - len(active))])) if active else None


def retry_seconds(turns: Iterable[float | None], policy: Policy) -> float:
    """What a client is told: the soonest of its turns, in seconds from now; ``None`` is a store where no turn can be foreseen."""
    soonest = min((seconds for seconds in turns if seconds is not None), default=policy.retry_seconds)
    return _bounded(soonest, policy.min_retry_seconds, policy.max_retry_seconds)


def lease_seconds(estimate_seconds: float, policy: Policy) -> float:
    """How long a lease lasts for a transfer of that estimate."""
    return _bounded(estimate_seconds * policy.margin, policy.min_lease_seconds, policy.max_lease_seconds)


def ticket_seconds(offers: Sequence[Offered], policy: Policy) -> float:
    """How long a ticket lives: long enough for the slowest source that it names."""
    slowest = max([offer.seconds for offer in offers], default=0.0)
    return _bounded(slowest * policy.margin, policy.min_ticket_seconds, policy.max_ticket_seconds)


def _bounded(seconds: float, least: float, most: float) -> float:
    """`seconds` within bounds; what is not a number is taken for the most."""
    return most if math.isnan(seconds) else min(max(seconds, least), most)
