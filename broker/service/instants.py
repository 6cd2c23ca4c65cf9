"""Instants as answers show them."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache


def instant(at: float) -> str:
    """RFC 3339 in UTC, in whole seconds rounded down: nothing ends later than it says."""
    return _instant(int(at))


@lru_cache(maxsize=4096)
def _instant(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
