"""Token buckets: how many of something somebody may have at once, and how many more with time.

What is kept is bounded: the least recently counted go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

MAX_KEPT = 10_000
"""Keys that are kept in mind."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many at once, and so many more with each second."""

    burst: float
    per_second: float


class Buckets:
    """A token bucket for each key. A key that is not kept has a full one."""

    def __init__(self, rate: Rate, clock: Callable[[], float], size: int = MAX_KEPT) -> None:
        self._rate = rate
        self._clock = clock
        self._size = size
        self._kept: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, key: Hashable, count: int = 1) -> float:
        """Take `count` out of the bucket, or one that is as full as it gets: 0.0, or the seconds until they are there; then none is."""
        now = self._clock()
        level, at = self._kept.get(key, (self._rate.burst, now))
        level = min(self._rate.burst, level + (now - at) * self._rate.per_second)
        needed = min(float(count), self._rate.burst)
        if level < needed:
            return (needed - level) / self._rate.per_second
        self._keep(key, level - needed, now)
        return 0.0

    def give_back(self, key: Hashable) -> None:
        """One that was taken is not needed. A bucket that is full again is forgotten."""
        found = self._kept.get(key)
        if found is not None:
            if found[0] + 1 >= self._rate.burst:
                del self._kept[key]
            else:
                self._kept[key] = found[0] + 1, found[1]

    def _keep(self, key: Hashable, level: float, now: float) -> None:
        self._kept[key] = level, now
        self._kept.move_to_end(key)
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)
