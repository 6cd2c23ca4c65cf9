"""How many tickets a project may ask for at one broker: what bounds the rows, and the work, that one project makes.

Rules
- A project has `admit.Policy.project_tickets_per_hour` at once, and gets as many again in each hour, evenly. A batch counts by its
  tickets, and is refused as a whole; what was asked for counts, not what was granted.
- It is counted by each process alone: nothing is asked of the database for it.
"""

from __future__ import annotations

import time

from broker import errors
from broker.admit import Policy
from broker.buckets import Buckets, Rate


class Pace:
    """The tickets that each project has left."""

    def __init__(self, policy: Policy | None = None) -> None:
        self._policy = policy or Policy()
        per_hour = self._policy.project_tickets_per_hour
        self._left = Buckets(Rate(per_hour, per_hour / 3600), time.monotonic)

    def count(self, project: str, tickets: int) -> None:
        """Count tickets that `project` asks for. Raises `QuotaExceeded`; then none is counted."""
        policy = self._policy
        if not policy.project_tickets_per_hour:
            return
        seconds = self._left.take(project, tickets)
        if seconds:
            raise errors.QuotaExceeded(
                f"The project has asked for too many tickets: {policy.project_tickets_per_hour} an hour at each broker.",
                retry_after=min(max(seconds, policy.min_retry_seconds), policy.max_retry_seconds),
            )
