"""A place of a ticket: how it is recorded with the ticket, signed, and shown.

The record keeps the numbers of the decision, so that a ticket can be shown again as it was and its estimate compared with
what the transfer reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from broker import errors, rank
from broker.accept import Candidate
from broker.model import Handle, Store
from broker.service import reads
from broker.service.context import Context
from broker.service.reads import Until


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

    def place_at(self, store: Store) -> Place:
        """The same place as it was, at that store."""
        return Place(
            store.name, store.site, store.kind, "", "", self.seconds, self.rate, self.setup_seconds, self.success, self.basis, self.weight
        )

    def place(self, candidate: Candidate, state: str) -> Place:
        """The same place as it may be offered now."""
        return Place(
            candidate.store, candidate.site, candidate.kind, candidate.key, state, self.seconds, self.rate, self.setup_seconds,
            self.success, self.basis, self.weight,
        )  # fmt: skip


def recorded(row: Sequence[Sequence[Any]]) -> list[Recorded]:
    """The places in a ticket's row."""
    return [Recorded(*entry) for entry in row]


def until(context: Context, expires_at: float, now: float) -> Until:
    """How long what reads the places of a ticket that ends at `expires_at` may live, as of the second that `now` lies in."""
    policy = context.policy
    return _until(int(expires_at), int(now), int(policy.url_ttl_seconds), int(policy.share_bucket_seconds))


@lru_cache(maxsize=1024)
def _until(expires_at: int, now: int, url_ttl_seconds: int, share_bucket_seconds: int) -> Until:
    """The tickets of a second mostly live equally long."""
    return reads.until(min(expires_at, now + url_ttl_seconds), now, share_bucket_seconds)


def sign_read(context: Context, store: str, key: str, until: Until, filename: str | None = None) -> str | None:
    """What reads a key of a store, in JSON as `reads.Reads.sign` gives it; ``None`` when the store's credential is missing or has ended."""
    try:
        return context.memory.reads.sign(store, key, until, filename)
    except errors.StoreUnavailable:
        return None


def describe(at: Place | Candidate, told: Place | rank.Estimate, weight: float) -> dict[str, Any]:
    """Where a place is, and the numbers told of it, as JSON."""
    return {
        "store": at.store,
        "site": at.site,
        "kind": at.kind,
        "estimate": {
            "seconds": told.seconds,
            "rate": told.rate,
            "setup_seconds": told.setup_seconds,
            "success": told.success,
            "basis": told.basis,
        },
        "weight": weight,
    }


def show_read(place: Place, rank: int, read: str) -> orjson.Fragment:
    """The place as a source of a ticket, in JSON."""
    described = orjson.dumps(describe(place, place, place.weight)).decode()[1:-1]
    return orjson.Fragment(f'{{"rank":{rank},"state":"{place.state}",{described},{read}}}')


def render(place: Place, rank: int, handle: Handle | None) -> dict[str, Any]:
    """The place as JSON, with its URL where there is one."""
    shown = {"rank": rank, "state": place.state, **describe(place, place, place.weight)}
    return shown if handle is None else shown | reads.show(handle)
