"""Which source fetches which bytes: pure decisions about ranges.

Rules
- Bytes are taken from the front, so that the file can be hashed while it grows.
- One source alone takes all that is left in one request. With several, each takes a chunk at a time: fast ones come back sooner.
- When nothing is left to take, an idle source takes over the tail of the range that would end last, in proportion to both
  rates, but only when that gains time; from a source that stands still it takes everything. A byte belongs to one source at
  a time, so a late writer can never overwrite what was fetched by another.
- A source far slower than the fastest is given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

CHUNK = 32 << 20
"""Bytes that a source takes at a time, at most, when several work on one blob."""

LEAST_CHUNK = 4 << 20
"""…and at least: each chunk costs a request."""

LEAST = 1 << 20
"""A range smaller than this is not divided."""

WORTH_SECONDS = 1.0
"""An idle source steps in when a range would last longer than this."""

SEVERAL_FROM = 16 << 20
"""Blobs smaller than this come from one source."""

MORE_SECONDS = 3.0
"""While the rest lasts longer than this, another source may help."""

AGAIN_SECONDS = 15.0
"""While help is wanted and some source was given up or had no room, a new ticket is asked for so often."""

SLOW_FACTOR = 8
"""A source this many times slower than the fastest is given up…"""

SLOW_SECONDS = 5.0
"""…after it had this long to show what it can do."""


class Span(NamedTuple):
    """Bytes from `start` up to, not including, `end`."""

    start: int
    end: int


Spans = tuple[Span, ...]
"""Ascending, without overlap or touching ends."""


def union(*groups: Iterable[Span]) -> Spans:
    """All bytes that lie in any span."""
    merged: list[Span] = []
    for span in sorted(span for group in groups for span in group if span.start < span.end):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return tuple(merged)


def without(spans: Spans, removed: Iterable[Span]) -> Spans:
    """The bytes of `spans` that lie in none of `removed`."""
    left: list[Span] = list(spans)
    for cut in removed:
        pieces = []
        for span in left:
            pieces += [Span(span.start, min(span.end, cut.start)), Span(max(span.start, cut.end), span.end)]
        left = [span for span in pieces if span.start < span.end]
    return union(left)


def missing(done: Spans, size: int) -> Spans:
    """What of `size` bytes is not in `done`."""
    return without((Span(0, size),) if size else (), done)


def covered(spans: Spans) -> int:
    """Bytes in all spans."""
    return sum(end - start for start, end in spans)


def prefix(spans: Spans) -> int:
    """How many bytes from the very first are there without a gap."""
    return spans[0].end if spans and spans[0].start == 0 else 0


@dataclass(frozen=True, slots=True)
class Running:
    """A range being fetched: the next byte, its end, and the source's rate in bytes per second (0 while unknown or still)."""

    position: int
    end: int
    rate: float


class Take(NamedTuple):
    """Fetch these bytes. `cut` is the index of the running range that gives them up; ``None`` when nobody had them."""

    span: Span
    cut: int | None = None


def chunk_for(size: int, sources: int) -> int:
    """How many bytes of a blob a source takes at a time: a few turns for each of them."""
    return min(CHUNK, max(LEAST_CHUNK, size // (4 * max(1, sources))))


def take(free: Spans, running: Sequence[Running], rate: float, *, alone: bool, chunk: int = CHUNK) -> Take | None:
    """What a source with `rate` (0 when unknown) fetches next; ``None`` when it is not needed now.

    `free` is what nobody has or fetches; `alone` says that no other source is at work.
    """
    if free:
        first = free[0]
        return Take(first if alone else Span(first.start, min(first.end, first.start + chunk)))
    if not running:
        return None
    last = max(range(len(running)), key=lambda index: _seconds(running[index]))
    slowest = running[last]
    left = slowest.end - slowest.position
    seconds = _seconds(slowest)
    if left <= 0 or seconds <= WORTH_SECONDS:
        return None
    if slowest.rate <= 0:
        return Take(Span(slowest.position, slowest.end), last)
    mine = rate if rate > 0 else slowest.rate
    if left <= LEAST:
        return Take(Span(slowest.position, slowest.end), last) if left / mine + WORTH_SECONDS < seconds else None
    share = max(1, int(left * mine / (mine + slowest.rate)))
    return Take(Span(slowest.end - share, slowest.end), last)


def _seconds(running: Running) -> float:
    left = running.end - running.position
    if left <= 0:
        return 0.0
    return left / running.rate if running.rate > 0 else float("inf")


def share(running: Running, *, chunk: int = CHUNK) -> int | None:
    """Where to end a range that one source took alone when another joins; ``None`` when it may keep all of it."""
    return running.position + chunk if running.end - running.position > 2 * chunk else None


def wants_another(left: int, size: int, rate: float, active: int, most: int) -> bool:
    """Whether a further source is worth its slot: a large blob, time left, and the limit `most` not reached."""
    return active < most and size >= SEVERAL_FROM and left > LEAST and (rate <= 0 or left / rate > MORE_SECONDS)


def too_slow(rates: Mapping[str, float], ages: Mapping[str, float]) -> list[str]:
    """The sources to give up: those at work long enough whose rate is far below the fastest one's."""
    if len(rates) < 2:
        return []
    fastest = max(rates.values())
    return [name for name, rate in rates.items() if ages[name] >= SLOW_SECONDS and rate * SLOW_FACTOR < fastest]
