"""How far a store is doubted by everyone, since several clients that have nothing to do with each other were failed by it.

Rules
- What counts is each voice's last word (`broker.voices`) on a store and direction: it failed, or it delivered. It fades by
  half in `HALF_LIFE_SECONDS` and is forgotten after `WINDOW_SECONDS`.
- Voices of one network, or of one project, may be one person. All of a network count once, and each further project adds one.
- Up to `TOLERATED` independent failures nobody is suspicious: a client with a broken network doubts no store for others.
  Each one more halves what is left of the trust.
- Whoever was served meanwhile speaks for the store: the share of failures among all that is told scales the doubt.
- A doubted store is offered still, as one that little is known of: exploration and time bring it back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

HALF_LIFE_SECONDS = 90.0
"""After so long a word counts half."""

WINDOW_SECONDS = 600.0
"""Older words are forgotten."""

TOLERATED = 2.0
"""So many fresh, independent failures raise no suspicion."""

STEP = 0.05
"""Doubts are rounded to this, so that what was made of them need not be made anew all the time."""


class Words(NamedTuple):
    """The last words of the voices of one project in one network: the freshest failure and the freshest success, 0 to 1 each."""

    network: str
    project: str
    failed: float
    delivered: float


def doubt(words: Iterable[Words]) -> float:
    """How far a store is doubted: 0 is not at all, 1 is utterly."""
    told = list(words)
    failed = _independent((word.network, word.project, word.failed) for word in told)
    if failed <= TOLERATED:
        return 0.0
    delivered = _independent((word.network, word.project, word.delivered) for word in told)
    doubted = (1.0 - math.exp2(TOLERATED - failed)) * failed / (failed + delivered)
    return round(round(doubted / STEP) * STEP, 2)


def _independent(words: Iterable[tuple[str, str, float]]) -> float:
    """How many independent voices these are worth: one for each network, and one for each project but the first."""
    networks: dict[str, float] = {}
    projects: dict[str, float] = {}
    for network, project, weight in words:  # thousands, while many are in trouble: no call for each
        if weight > networks.get(network, 0.0):
            networks[network] = weight
        if weight > projects.get(project, 0.0):
            projects[project] = weight
    further = sum(projects.values()) - max(projects.values(), default=0.0)
    return sum(networks.values()) + further
