"""A place of a ticket: how it is recorded with the ticket, signed, and shown.

The record keeps the numbers of the decision, so that a ticket can be shown again as it was and its estimate compared with
what the transfer reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from broker import errors, rank
from broker.accept import Candidate
from broker.model import Handle
from broker.service import reads
from broker.service.context import Context
from broker.service.reads import Read, Until


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


def recorded(row: Sequence[Sequence[Any]]) -> list[Recorded]:
    """The places in a ticket's row."""
    return [Recorded(*entry) for entry in row]


_SHOWN = b'{"rank":%d,"state":"%b",%b,%b}'
"""A source of a ticket: the last two are members of `describe` and of `reads.show`."""


class Source:
    """A ranked replica on its way into a ticket: what admission asks of it, and what is recorded and shown of it.

    The texts are made when first needed, and kept: the same replica goes into many tickets.
    """

    __slots__ = ("_recorded", "_shown", "candidate", "estimate", "seconds", "slots", "store", "weight")

    def __init__(self, source: rank.Source) -> None:
        self.candidate, self.estimate, self.weight = source
        self.store = self.candidate.store
        self.slots = self.candidate.slots
        self.seconds = self.estimate.seconds
        self._shown: bytes | None = None
        self._recorded: tuple[str, str] | None = None

    def record(self, active: bool, concurrency: int) -> str:
        """The entry of a ticket's row, in JSON; `recorded` reads it back."""
        if self._recorded is None:
            at, told = self.candidate, self.estimate
            numbers = (told.seconds, told.rate, told.setup_seconds, told.success, told.basis, self.weight)
            self._recorded = orjson.dumps((at.store_id, at.replica))[:-1].decode(), orjson.dumps(numbers)[1:].decode()
        before, after = self._recorded
        return f"{before},true,{concurrency},{after}" if active else f"{before},false,{concurrency},{after}"

    def show(self, rank: int, state: bytes, read: Read) -> bytes:
        """The source of a ticket, in JSON."""
        if self._shown is None:
            self._shown = orjson.dumps(describe(self.candidate, self.estimate, self.weight))[1:-1]
        return _SHOWN % (rank, state, self._shown, read.shown)


def until(context: Context, expires_at: float, now: float) -> Until:
    """How long what reads the places of a ticket that ends at `expires_at` may live."""
    policy = context.policy
    return reads.until(min(expires_at, now + policy.url_ttl_seconds), now, int(policy.share_bucket_seconds))


def sign_read(context: Context, store: str, key: str, until: Until) -> Read | None:
    """What reads a key of a store; ``None`` when the store's credential is missing or has ended."""
    try:
        read = context.memory.reads.sign(store, key, until)
    except errors.StoreUnavailable:
        return None
    return read if read.expires_at > until.now else None


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


def show_read(place: Place, rank: int, read: Read) -> orjson.Fragment:
    """The place as a source of a ticket, in JSON."""
    described = orjson.dumps(describe(place, place, place.weight))[1:-1]
    return orjson.Fragment(_SHOWN % (rank, place.state.encode(), described, read.shown))


def render(place: Place, rank: int, handle: Handle | None) -> dict[str, Any]:
    """The place as JSON, with its URL where there is one."""
    shown = {"rank": rank, "state": place.state, **describe(place, place, place.weight)}
    return shown if handle is None else shown | reads.show(handle)
