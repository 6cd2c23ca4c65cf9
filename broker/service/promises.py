"""When somebody who is sent away may come again: Retry-After, and whether it turned out right.

Rules
- It follows from the leases under way and from who waits (`broker.turns`), as the database saw them a moment ago, and from what this
  broker has promised to others: who was told to come back in a while comes before those who ask later.
- A promise ends when its client asks again, or some seconds after its time. What happened is compared with what was told.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from broker import admit, turns
from broker.catalog import contention, quotas
from broker.catalog.leases import Party
from broker.model import Direction
from broker.turns import Contender, Line, Under

if TYPE_CHECKING:
    from broker.service.context import Context

SEEN_SECONDS = 0.1
"""What the database told of a store is used for so long."""

GRACE_SECONDS = 2.0
"""So long after its time a promise counts yet."""

EARLY_SECONDS = 0.5
"""Who comes so much too early is in time."""

MOST_PROMISES = 2000
MOST_OF_PROJECT = 200
"""Older ones are forgotten. Each is looked at whenever somebody is sent away, and a client may call itself what it likes to get more."""

PROJECTS = 16
"""So many projects' leases are kept as they were seen."""


class Promise(NamedTuple):
    """What somebody was told first, and when; the last time it was told something, it was to come back at `due_at` to `store_id`."""

    store_id: int
    direction: Direction
    contender: Contender
    seconds: float
    due_at: float


class Promises:
    """What one broker has promised, and the lines at its stores as they were last seen."""

    def __init__(self) -> None:
        self._given: OrderedDict[str, Promise] = OrderedDict()
        self._of_project: Counter[str] = Counter()
        self._lines: dict[tuple[int, Direction], tuple[float, Line | None]] = {}
        self._freed: OrderedDict[str, tuple[float, Sequence[tuple[float, int]]]] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._given)

    def kept(self, context: Context, who: str) -> None:
        """Somebody got what it asked for: if it had been sent away before, compare what was told with what happened."""
        if self._given and (promise := self._drop(who)) is not None:
            waited = context.clock() - promise.contender.asked_at
            context.metrics.retry_after_ratio.observe(waited / promise.seconds, "returned")

    def withdraw(self, who: str) -> None:
        """Somebody does not go away, but waits."""
        self._drop(who)

    def has_returned(self, who: str, now: float) -> bool:
        """Whether somebody comes back about when it was told to."""
        promise = self._given.get(who)
        return promise is not None and promise.due_at - EARLY_SECONDS <= now <= promise.due_at + GRACE_SECONDS

    def give(self, who: str, promise: Promise) -> None:
        """Remember what somebody was told; who comes back in time keeps its place, and the first word is what counts."""
        before = self._drop(who)
        if before is not None and promise.contender.asked_at <= before.due_at + GRACE_SECONDS:
            promise = before._replace(store_id=promise.store_id, due_at=promise.due_at)
        project = promise.contender.project
        if self._of_project[project] >= MOST_OF_PROJECT:
            self._drop(next(name for name, other in self._given.items() if other.contender.project == project))
        elif len(self._given) >= MOST_PROMISES:
            self._drop(next(iter(self._given)))
        self._given[who] = promise
        self._of_project[project] += 1

    def _drop(self, who: str) -> Promise | None:
        promise = self._given.pop(who, None)
        if promise is not None:
            project = promise.contender.project
            self._of_project[project] -= 1
            if not self._of_project[project]:
                del self._of_project[project]
        return promise

    def open(self, store_id: int, direction: Direction, who: str, now: float) -> list[Contender]:
        """The others who were told to come back to a store and have not yet."""
        for name, promise in list(self._given.items()):
            if promise.due_at + GRACE_SECONDS <= now:
                self._drop(name)
        return [
            promise.contender
            for name, promise in self._given.items()
            if name != who and promise.store_id == store_id and promise.direction is direction
        ]

    async def lines(self, context: Context, store_ids: Mapping[int, float], direction: Direction) -> dict[int, Line]:
        """The lines at these stores. Raises `errors.Unavailable`."""
        now = context.clock()
        old = [id for id in store_ids if not now - SEEN_SECONDS < self._lines.get((id, direction), (-math.inf, None))[0] <= now]
        if old:
            found = await contention.lines(context.db, old, direction)
            for id in old:
                self._lines[id, direction] = now, found.get(id)
        return {id: line for id in store_ids if (line := self._lines[id, direction][1]) is not None}

    async def freed(self, context: Context, project: str) -> Sequence[tuple[float, int]]:
        """In how many seconds each of the project's counted leases should end, and what it holds. Raises `errors.Unavailable`."""
        now = context.clock()
        at, found = self._freed.get(project, (-math.inf, ()))
        if not now - SEEN_SECONDS < at <= now:
            held = await quotas.held(context.db, project)
            found = sorted((Under(lease.held_seconds, lease.expected_seconds).left(1.0), lease.bytes) for lease in held)
            self._freed[project] = now, found
            self._freed.move_to_end(project)
            if len(self._freed) > PROJECTS:
                self._freed.popitem(last=False)
        return found


async def until_turn(context: Context, who: str, party: Party, store_ids: Mapping[int, float], direction: Direction) -> float:
    """Seconds until one of these stores should have a slot for `who`; the mapping tells how long its own transfer takes at each.

    It is a promise, which counts for those who ask later. Raises `errors.Unavailable`.
    """
    promises, policy, now = context.promises, context.policy.admit, context.clock()
    soonest: tuple[float, int] | None = None
    newcomer = Contender(who, party.project, party.priority, party.weight, math.inf)
    for store_id, line in (await promises.lines(context, store_ids, direction)).items():
        whole = line._replace(contenders=[*line.contenders, *promises.open(store_id, direction, who, now)])
        seconds = turns.seconds_until(whole, turns.ahead(whole, newcomer), store_ids[store_id])
        if seconds is not None and (soonest is None or seconds < soonest[0]):
            soonest = seconds, store_id
    told = admit.retry_seconds([soonest[0] if soonest else None], policy)
    if soonest is not None:
        promises.give(who, Promise(soonest[1], direction, newcomer._replace(asked_at=now), told, now + told))
    return told


async def until_within_limit(context: Context, party: Party, bytes: int) -> float:
    """Seconds until the project should hold so little that one more lease on `bytes` is within its limits.

    Raises `errors.Unavailable`.
    """
    freed_then = await context.promises.freed(context, party.project)
    leases, total = len(freed_then), sum(held for _, held in freed_then)
    turn: float | None = None
    for left, freed in freed_then:
        leases, total, turn = leases - 1, total - freed, left
        if (party.max_leases is None or leases < party.max_leases) and (party.max_bytes is None or total + bytes <= party.max_bytes):
            break
    return admit.retry_seconds([turn], context.policy.admit)
