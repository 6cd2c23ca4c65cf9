"""Whose turn it is at a store that has fewer slots than are asked for, and when somebody's turn will come.

Weighted max-min fairness among projects, per store and direction: the next free slot goes to the project that would then hold
the least for its weight. `order` is what the grant does in SQL (`broker.catalog.contention`); a test holds the two together.

Rules
- A party is a project at one priority: requests of a service weigh more, and take nothing from the members of their project.
- Of a party, who asked first comes first. Its n-th request counts as if the ones before it had been granted.
- Nobody starves: whoever holds nothing comes before everyone who would hold more for its weight.
- The time until a turn follows from when the leases under way are expected to end, and from who comes before; those take slots
  for as long as leases lasted lately.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Party = tuple[str, float]
"""Project and priority."""

OVERDUE = 0.25
"""A transfer that takes longer than expected is expected to take this part of its time more."""

MOST_AHEAD = 10_000
"""More in front than this make no difference: the bounds of policy hold long before."""


class Contender(NamedTuple):
    """Somebody who asks for a slot. `weight` is the project's times the priority; instants in POSIX seconds."""

    id: str
    project: str
    priority: float
    weight: float
    asked_at: float

    @property
    def party(self) -> Party:
        return self.project, self.priority


def order(contenders: Iterable[Contender], held: Mapping[Party, int]) -> list[Contender]:
    """The contenders in the order of their turns; `held` are the leases that each party has on the store."""
    asked: dict[Party, int] = {}
    ranked: list[tuple[float, float, str, Contender]] = []
    for contender in sorted(contenders, key=lambda contender: (contender.asked_at, contender.id)):
        party = contender.party
        asked[party] = asked.get(party, 0) + 1
        would_hold = (held.get(party, 0) + asked[party]) / contender.weight
        ranked.append((would_hold, contender.asked_at, contender.id, contender))
    ranked.sort(key=lambda entry: entry[:3])
    return [contender for _, _, _, contender in ranked]


class Under(NamedTuple):
    """A transfer under way: how long it has held its lease, and how long it was expected to. In seconds."""

    held_seconds: float
    expected_seconds: float

    def left(self, pace: float) -> float:
        """Seconds until it is expected to end, where transfers last `pace` times as long as expected."""
        expected = self.expected_seconds * pace
        return max(expected - self.held_seconds, OVERDUE * max(expected, self.held_seconds))


class Line(NamedTuple):
    """A store with slots in one direction, as it was seen: what is under way, and who waits."""

    slots: int
    under_way: Sequence[Under] = ()
    contenders: Sequence[Contender] = ()
    held: Mapping[Party, int] = {}
    pace: float = 1.0
    """How long leases lasted lately, as a multiple of what was expected."""
    mean_seconds: float | None = None
    """How long leases lasted lately; ``None`` when none has ended yet."""


def ahead(line: Line, newcomer: Contender) -> int:
    """How many of those who wait have their turn before somebody who asks now."""
    others = [contender for contender in line.contenders if contender.id != newcomer.id]
    return order([*others, newcomer], line.held).index(newcomer)


def seconds_until(line: Line, before: int, own_seconds: float) -> float | None:
    """Seconds until a slot is expected for somebody with so many before; ``None`` when there is no slot to wait for.

    `own_seconds` is taken for what those before will last, as long as nothing is known of that.
    """
    if line.slots <= 0:
        return None
    ends = sorted(under.left(line.pace) for under in line.under_way)
    ends = ends[max(0, len(ends) - line.slots) :]  # slots were lowered: so many end without making room
    ends = [0.0] * (line.slots - len(ends)) + ends
    each = own_seconds if line.mean_seconds is None else line.mean_seconds
    for _ in range(min(before, MOST_AHEAD)):
        heapq.heapreplace(ends, ends[0] + each)
    return ends[0]
