"""What clients tell without a report: which of it counts, and how little.

Rules
- A signal is weak evidence. None is believed alone where it says that a store failed (`rank.Policy.min_evidence`), and
  none excludes a store for anybody.
- An explicit report on the same place always comes first; then the signal counts nothing.
- The time from an upload ticket to its commit holds whatever else the client did meanwhile: as a rate it is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from broker.model import Outcome
from broker.paths import Contribution


class Signal(StrEnum):
    """What was seen instead of a report. The values are part of a metric."""

    REPEATED = "repeated"
    """The client asked for the same blob again, while its ticket was open and unreported: the first source may have failed it."""
    EXPIRED = "expired"
    """A client that otherwise reports let a ticket end without a word."""
    COMMITTED = "committed"
    """An upload was committed without a report."""
    PROGRESS = "progress"
    """A transfer under way told how far it has come: a store that turns slow is known before the first slow transfer has ended."""


WEIGHTS: Mapping[Signal, float] = MappingProxyType(
    {Signal.REPEATED: 0.25, Signal.EXPIRED: 0.25, Signal.COMMITTED: 0.5, Signal.PROGRESS: 0.5}
)
"""What a signal weighs, beside 1 for a report."""

OUTCOMES: Mapping[Signal, Outcome] = MappingProxyType(
    {Signal.REPEATED: Outcome.FAILED, Signal.EXPIRED: Outcome.FAILED, Signal.COMMITTED: Outcome.OK, Signal.PROGRESS: Outcome.OK}
)
"""What a signal says of the transfer."""


def trouble(outcome: Outcome, weight: float = 1.0) -> float:
    """How bad a word on a store that is, 0 to 1: what suspicion counts. A ``corrupt`` object is not the store's failure to serve."""
    return weight if outcome is Outcome.FAILED else 0.0


def weakened(told: Contribution, weight: float) -> Contribution:
    """What a report would add to the averages, weighing less."""
    return Contribution(*(value * weight for value in told))
