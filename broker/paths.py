"""What is known of the way from a site to a store: moving averages of what transfers reported, and how busy it is now.

Rules
- An average is kept as *sums*, each decayed by half every `Policy.half_life_seconds`. Ratios of sums are the averages:
  they do not change by decay alone, only their weight does. A catalogue applies the very same update in SQL, per column::

      column = column * power(2.0, -greatest(0, new_at - updated_at) / half_life_seconds) + contribution

- The rate is harmonic: bytes over busy seconds. One slow gigabyte counts as much as the time it took, and a thousand
  tiny transfers cannot pretend to be a fast path.
- Contention counts once. Where a store declares its bandwidth, an estimate divides that by the transfers under way;
  so what a transfer reports is first corrected for those that were under way when it was granted (`alone_rate`).
  Where no bandwidth is declared the estimate knows no contention, and neither does the average.
- Clients may report anything: values outside of the bounds in `Policy` are clamped, impossible ones prove nothing.
- A report belongs to its site and to every wider one (`broker.sites.ancestors`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from broker.model import Outcome


@dataclass(frozen=True, slots=True)
class Policy:
    """How reports turn into averages."""

    half_life_seconds: float = 600.0
    """After so long without news an average has half its weight."""
    min_rate_bytes: int = 1 << 20
    """Transfers of fewer bytes tell about success and setup, not about the rate."""
    max_bytes: int = 10**15
    """More bytes than this were not moved by one transfer: such a report tells nothing of the rate."""
    min_seconds: float = 0.001
    """Shorter durations are taken for this."""
    max_seconds: float = 7 * 86400.0
    """Longer durations are taken for this."""
    max_rate: float = 50e9
    """Faster than this, in bytes per second, is taken for this (400 Gbit/s)."""
    max_concurrency: int = 10_000
    """More transfers at once than this are taken for this many."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a client told of one transfer, with what the broker knew when it granted it."""

    outcome: Outcome
    bytes: int
    seconds: float
    concurrency: int = 1
    """Transfers on that store and direction when this one was granted, itself included."""
    bandwidth: int | None = None
    """What the store declared for that direction, in bytes per second."""
    setup_seconds: float | None = None
    """Until the first byte, where the client measured it; part of `seconds`."""


LEAST_SETUP_SECONDS = 1e-9
"""Less is taken for none: a share of it could be too small for a number of the database's."""


class Contribution(NamedTuple):
    """What one report adds to each sum of a path. The names are those of `PathAverage`."""

    weight: float
    good: float
    bytes: float
    busy_seconds: float
    setup_weight: float
    setup: float


@dataclass(frozen=True, slots=True)
class PathAverage:
    """Decayed sums over the reports of one (site, store, direction), as of `updated_at`."""

    weight: float
    """Σ w: how much evidence there is; a report just made weighs 1."""
    good: float
    """Σ w over the transfers that delivered."""
    bytes: float
    """Σ w · bytes, corrected for concurrency."""
    busy_seconds: float
    """Σ w · seconds of the transfers behind `bytes`."""
    setup_weight: float
    """Σ w over the reports that told their setup."""
    setup: float
    """Σ w · setup seconds."""
    updated_at: float

    @property
    def rate(self) -> float | None:
        """Bytes per second that the path gives to a transfer alone on its store; ``None`` when nothing told."""
        return self.bytes / self.busy_seconds if self.busy_seconds > 0 else None

    @property
    def setup_seconds(self) -> float | None:
        """Seconds until the first byte; ``None`` when nothing told."""
        return self.setup / self.setup_weight if self.setup_weight > 0 else None

    @property
    def success(self) -> float | None:
        """Share of transfers that delivered, 0 to 1; ``None`` when nothing told."""
        return self.good / self.weight if self.weight > 0 else None


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a store is in one direction, as far as the broker knows now."""

    active: int = 0
    """Unexpired leases."""
    reserved: int = 0
    """Bytes that replicas and open uploads take together; matters for writing."""


IDLE = Load()
"""What is assumed of a store without any load known."""


def decay(weight: float, elapsed_seconds: float, half_life_seconds: float) -> float:
    """What is left of `weight` after a time. Clocks that step back take nothing away and add nothing."""
    return weight * math.exp2(-elapsed_seconds / half_life_seconds) if elapsed_seconds > 0 else weight


def alone_rate(rate: float, concurrency: int, bandwidth: int | None) -> float:
    """What a transfer at `rate` would have reached without the others that shared the store with it.

    One that got its whole share of the bandwidth was held back by the others, so alone it would have had theirs too; one
    that got far less was held back by its own path, so alone it would be no faster. In between the correction grows
    smoothly. Never more than the bandwidth, unless the transfer itself was faster than that.
    """
    if concurrency <= 1 or not bandwidth:
        return rate
    used_share = min(1.0, rate * concurrency / bandwidth)
    return max(rate, min(float(bandwidth), rate * math.pow(concurrency, used_share)))


def contribution(report: Report, policy: Policy) -> Contribution:
    """What one report adds to the sums of its path."""
    good = 1.0 if report.outcome in (Outcome.OK, Outcome.SLOW) else 0.0
    seconds = _bounded_seconds(report.seconds, policy)
    setup, setup_weight = 0.0, 0.0
    if report.setup_seconds is not None and 0 <= report.setup_seconds <= seconds:
        setup, setup_weight = (report.setup_seconds if report.setup_seconds >= LEAST_SETUP_SECONDS else 0.0), 1.0
    if report.outcome is Outcome.CORRUPT or seconds == 0.0 or not policy.min_rate_bytes <= report.bytes <= policy.max_bytes:
        return Contribution(1.0, good, 0.0, 0.0, setup_weight, setup)
    busy = max(policy.min_seconds, seconds - setup)
    concurrency = min(report.concurrency, policy.max_concurrency)
    rate = min(policy.max_rate, alone_rate(min(policy.max_rate, report.bytes / busy), concurrency, report.bandwidth))
    return Contribution(1.0, good, rate * busy, busy, setup_weight, setup)


def observe(average: PathAverage | None, report: Report, now: float, policy: Policy) -> PathAverage:
    """The average of a path after one more report."""
    added = contribution(report, policy)
    if average is None:
        return PathAverage(*added, updated_at=now)
    kept = decay(1.0, now - average.updated_at, policy.half_life_seconds)
    return PathAverage(
        weight=average.weight * kept + added.weight,
        good=average.good * kept + added.good,
        bytes=average.bytes * kept + added.bytes,
        busy_seconds=average.busy_seconds * kept + added.busy_seconds,
        setup_weight=average.setup_weight * kept + added.setup_weight,
        setup=average.setup * kept + added.setup,
        updated_at=max(now, average.updated_at),
    )


def _bounded_seconds(seconds: float, policy: Policy) -> float:
    """`seconds` within the policy's bounds; 0 when they cannot be a duration at all."""
    if not math.isfinite(seconds) or seconds <= 0:
        return 0.0
    return min(max(seconds, policy.min_seconds), policy.max_seconds)
