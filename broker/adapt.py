"""How many transfers at once make the most of a store: searched for by trying, and followed when it changes.

`step` takes what one window told, the total throughput that clients reported, and says how many slots the next window gets. The
levels that are tried are a ladder of steps of about a third between the bounds that an administrator set.

Rules
- The search is at home on one level and looks at its neighbours in turn: the one above must be better by `GAIN`, the one below
  need only not be worse by `LOSS`: of levels that move the same the lowest is best, since more at once only makes each slower.
- What was seen at a level is a moving average, so that noise evens out; it is refreshed whenever the level is looked at, so that a
  change is followed. The longer nothing has moved, the rarer it looks around.
- The first window after a change is not judged: the store fills or drains. Neither is one without enough transfers to fill the slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from broker.model import SlotRange

GAIN = 0.06
LOSS = 0.06
ALPHA = 0.25
"""Weight of the newest window in a level's average, once there are enough of them."""

CHANGE = 0.4
"""A window that differs so much from its level's average tells that the store has changed: nothing that was seen before counts."""

MOST_REST = 6
"""Windows at home between two looks at a neighbour, at most."""

FULL_SHARE = 0.75
"""A window tells of a level if so much of its slots was leased."""


@dataclass(frozen=True, slots=True)
class Search:
    """Where a search stands. Rates are in bytes per second."""

    home: int
    level: int
    """The slots that the present window has."""
    seen: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    """Average rate, and windows behind it, by level."""
    rest: int = 0
    calm: int = 0
    """Looks since the search last moved."""
    up_next: bool = True
    settling: bool = True

    def document(self) -> dict[str, Any]:
        """As JSON; `read` takes it back."""
        seen = {str(level): list(told) for level, told in self.seen.items()}
        return {
            "home": self.home, "level": self.level, "seen": seen, "rest": self.rest, "calm": self.calm, "up_next": self.up_next,
            "settling": self.settling,
        }  # fmt: skip


def read(document: Mapping[str, Any] | None, slots: int | None, bounds: SlotRange) -> Search:
    """A search as it was kept; a new one, begun at `slots`, when there is none or an administrator has set other slots."""
    if document is None or document["level"] != slots:
        begin = nearest(bounds, slots if slots is not None else bounds.min)
        return Search(begin, begin)
    seen = {int(level): (float(rate), int(windows)) for level, (rate, windows) in document["seen"].items()}
    return Search(
        document["home"], document["level"], seen, document["rest"], document["calm"], document["up_next"], document["settling"]
    )  # fmt: skip


def ladder(bounds: SlotRange) -> list[int]:
    """The levels that are tried, from the least to the most."""
    levels = [bounds.min]
    while levels[-1] < bounds.max:
        levels.append(min(bounds.max, max(levels[-1] + 1, round(levels[-1] * 4 / 3))))
    return levels


def nearest(bounds: SlotRange, slots: int) -> int:
    """The level next to `slots`."""
    return min(ladder(bounds), key=lambda level: abs(level - slots))


def step(search: Search, bounds: SlotRange, rate: float | None) -> Search:
    """The search after a window that moved `rate`; ``None`` when it had too few transfers to tell."""
    levels = ladder(bounds)
    if search.home not in levels or search.level not in levels:  # the bounds were changed
        home = nearest(bounds, search.home)
        return Search(home, home, {level: told for level, told in search.seen.items() if level in levels})
    if rate is None:
        return _at(replace(search, rest=0), search.home)
    if search.settling:
        return replace(search, settling=False)
    known = search.seen.get(search.level)
    if known is not None and abs(rate - known[0]) > CHANGE * known[0]:
        search = replace(search, seen={}, calm=0, rest=0)
    search = replace(search, seen={**search.seen, search.level: _mixed(search.seen.get(search.level), rate)})
    if search.home not in search.seen:
        return _at(search, search.home)
    if search.level != search.home:
        return _judge(search, levels)
    if search.rest > 0:
        return replace(search, rest=search.rest - 1)
    at = levels.index(search.home)
    up = (search.up_next and at + 1 < len(levels)) or at == 0
    neighbour = levels[min(at + 1, len(levels) - 1) if up else at - 1]
    return _at(replace(search, up_next=not up), neighbour)


def _judge(search: Search, levels: list[int]) -> Search:
    """A neighbour was looked at: move there, and look further the same way, or go home."""
    found, before = search.seen[search.level][0], search.seen[search.home][0]
    up = search.level > search.home
    if not (found > before * (1 + GAIN) if up else found >= before * (1 - LOSS)):
        calm = search.calm + 1
        return _at(replace(search, calm=calm, rest=min(calm // 2, MOST_REST)), search.home)
    at = levels.index(search.level) + (1 if up else -1)
    further = levels[at] if 0 <= at < len(levels) else search.level
    return _at(replace(search, home=search.level, calm=0, rest=0), further)


def _at(search: Search, level: int) -> Search:
    return search if level == search.level else replace(search, level=level, settling=True)


def _mixed(before: tuple[float, int] | None, rate: float) -> tuple[float, int]:
    average, windows = before or (0.0, 0)
    alpha = max(ALPHA, 1 / (windows + 1))
    return average + alpha * (rate - average), windows + 1
