"""A place of a ticket: how it is recorded with the ticket, signed, and shown.

The record keeps the numbers of the decision, so that a ticket can be shown again as it was and its estimate compared with
what the transfer reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from broker import errors
from broker.accept import Candidate
from broker.model import Handle
from broker.rank import Estimate
from broker.service.context import Context


class Place(NamedTuple):
    """One source or destination of a ticket."""

    store: str
    site: str
    kind: str
    key: str
    state: str
    """``active`` or ``standby``."""
    seconds: float
    rate: float
    setup_seconds: float
    success: float
    basis: str
    weight: float


class Recorded(NamedTuple):
    """A place as it stands in the ticket's row; `active` without a lease only where the store has no slots."""

    store_id: int
    replica: str | None
    active: bool
    concurrency: int
    """Leases on the store when this one was granted, itself included."""
    seconds: float
    rate: float
    setup_seconds: float
    success: float
    basis: str
    weight: float

    def place(self, candidate: Candidate, state: str) -> Place:
        """The same place as it may be offered now."""
        return Place(
            candidate.store, candidate.site, candidate.kind, candidate.key, state, self.seconds, self.rate, self.setup_seconds,
            self.success, self.basis, self.weight,
        )  # fmt: skip


def to_record(candidate: Candidate, estimate: Estimate, weight: float, active: bool, concurrency: int) -> list[Any]:
    """A ranked candidate as it goes into the ticket's row; `recorded` reads it back."""
    replica = None if candidate.replica is None else str(candidate.replica)
    return [
        candidate.store_id, replica, active, concurrency, estimate.seconds, estimate.rate, estimate.setup_seconds, estimate.success,
        estimate.basis, weight,
    ]  # fmt: skip


def recorded(row: Sequence[Sequence[Any]]) -> list[Recorded]:
    """The places in a ticket's row."""
    return [Recorded(*entry) for entry in row]


def sign_read(context: Context, place: Place | Candidate, expires_at: float, now: float) -> Handle | None:
    """A handle that reads the place, at most until `expires_at`; ``None`` when the store's credential is missing or has ended."""
    policy = context.policy
    ends_at = now + policy.url_ttl_seconds
    if ends_at > expires_at:
        ends_at = expires_at
    try:
        if policy.share_bucket_seconds and place.kind == "http":
            return context.memory.shared_handle(place.store, place.key, ends_at, now, policy.share_bucket_seconds)
        handle = context.memory.driver(place.store).sign_get(place.key, ends_at, now)
    except errors.StoreUnavailable:
        return None
    return handle if handle.expires_at > now else None


def render(place: Place, rank: int, handle: Handle | None) -> dict[str, Any]:
    """The place as JSON, with its URL where there is one."""
    return show(place, place, place.weight, place.state, rank, handle)


def show(at: Place | Candidate, told: Place | Estimate, weight: float, state: str, rank: int, handle: Handle | None) -> dict[str, Any]:
    """The place `at` with the numbers `told` of it, as JSON; with its URL where there is one."""
    shown = {
        "rank": rank,
        "store": at.store,
        "site": at.site,
        "kind": at.kind,
        "state": state,
        "estimate": {
            "seconds": told.seconds,
            "rate": told.rate,
            "setup_seconds": told.setup_seconds,
            "success": told.success,
            "basis": told.basis,
        },
        "weight": weight,
    }
    if handle is not None:
        shown["method"], shown["url"], shown["headers"], ends_at = handle
        shown["expires_at"] = instant(ends_at)
    return shown


def instant(at: float) -> str:
    """RFC 3339 in UTC, in whole seconds rounded down: nothing ends later than it says."""
    return _instant(int(at))


@lru_cache(maxsize=4096)
def _instant(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
