"""When somebody who is sent away may come again: Retry-After, and whether it turned out right.

Rules
- It follows from the leases under way and from who waits (`broker.turns`), as the database saw them a moment ago, and from what this
  broker has promised to others: who was told to come back in a while comes before those who ask later.
- A promise ends when its client asks again, or some seconds after its time. What happened is compared with what was told.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
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

MOST_PROMISES = 10_000


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
        self._lines: dict[tuple[int, Direction], tuple[float, Line | None]] = {}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._given)

    def kept(self, context: Context, who: str) -> None:
        """Somebody got what it asked for: if it had been sent away before, compare what was told with what happened."""
        if self._given and (promise := self._given.pop(who, None)) is not None:
            waited = context.clock() - promise.contender.asked_at
            context.metrics.retry_after_ratio.observe(waited / promise.seconds, "returned")

    def withdraw(self, who: str) -> None:
        """Somebody does not go away, but waits."""
        self._given.pop(who, None)

    def has_returned(self, who: str, now: float) -> bool:
        """Whether somebody comes back about when it was told to."""
        promise = self._given.get(who)
        return promise is not None and promise.due_at - EARLY_SECONDS <= now <= promise.due_at + GRACE_SECONDS

    def give(self, who: str, promise: Promise) -> None:
        """Remember what somebody was told; who comes back in time keeps its place, and the first word is what counts."""
        before = self._given.get(who)
        if before is not None and promise.contender.asked_at <= before.due_at + GRACE_SECONDS:
            promise = before._replace(store_id=promise.store_id, due_at=promise.due_at)
        self._given[who] = promise
        self._given.move_to_end(who)
        while len(self._given) > MOST_PROMISES:
            self._given.popitem(last=False)

    def open(self, store_id: int, direction: Direction, who: str, now: float) -> list[Contender]:
        """The others who were told to come back to a store and have not yet."""
        for name, promise in list(self._given.items()):
            if promise.due_at + GRACE_SECONDS <= now:
                del self._given[name]
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
    held = await quotas.held(context.db, party.project)
    leases, total = len(held), sum(lease.bytes for lease in held)
    turn: float | None = None
    for left, freed in sorted((Under(lease.held_seconds, lease.expected_seconds).left(1.0), lease.bytes) for lease in held):
        leases, total, turn = leases - 1, total - freed, left
        if (party.max_leases is None or leases < party.max_leases) and (party.max_bytes is None or total + bytes <= party.max_bytes):
            break
    return admit.retry_seconds([turn], context.policy.admit)
