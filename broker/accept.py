"""Which candidates can be offered to a client at all, and the reason against each of the others.

Rules
- A reason for every exclusion (invariant 10). The first one that applies is told, those about the store before those
  about the request.
- Only active replicas are offered, an unsealed one to its own project alone (invariants 2 and 14).
- A private store (M13) comes first: whoever must not see it learns no other reason.
- Nothing is assumed of a store that was not probed: it has no abilities, so it is not offered.
- Uploads go only to stores that enforce their URLs (invariant 8); where they do not, whoever holds any URL could write anything.
- What is no URL of the network (a path, a volume) opens only where it is mounted: it is offered to clients that a token or a network
  proves to be at the store's site, or below it, and that say by name that they can open it. A hint proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple, Protocol
from uuid import UUID

from broker.model import WEAK_UPLOADS, Abilities, Exposure, Operation, ReplicaState, Store
from broker.paths import IDLE, Load
from broker.sites import ancestors


class Reason(StrEnum):
    """Why a candidate is not offered. The values are part of the HTTP contract."""

    PRIVATE = "private"
    """Only counted; the principal must not learn of it."""
    DISABLED = "disabled"
    PENDING = "pending"
    UNSEALED = "unsealed"
    CORRUPT = "corrupt"
    MISSING = "missing"
    DELETING = "deleting"
    AVOIDED = "avoided"
    NOT_MOUNTED = "not-mounted"
    """Nothing proves that the client is where this path or volume is."""
    SCHEME = "scheme"
    """The client cannot open what this store gives."""
    RECENTLY_FAILED = "recently-failed"
    """This client reported a failure there a moment ago."""
    NOT_READABLE = "not-readable"
    """The probe did not see the store serve a signed read."""
    NOT_WRITABLE = "not-writable"
    """Closed for writing, or the probe did not see it take a signed write."""
    UNENFORCED = "unenforced"
    """The probe saw it take altered or expired URLs, and its operator does not allow uploads nevertheless."""
    UNVERIFIABLE = "unverifiable"
    """It computes no digest by which an upload could be verified."""
    TOO_LARGE = "too-large"
    NO_CAPACITY = "no-capacity"
    UNSIGNABLE = "unsignable"
    """The broker has no credential for it, or one that has ended."""
    FULL = "full"
    """It gives no slot at all (drained), or had none left when leases were asked for."""


_REPLICA_REASON: Mapping[ReplicaState, Reason] = {
    ReplicaState.PENDING: Reason.PENDING,
    ReplicaState.UNSEALED: Reason.UNSEALED,
    ReplicaState.CORRUPT: Reason.CORRUPT,
    ReplicaState.MISSING: Reason.MISSING,
    ReplicaState.DELETING: Reason.DELETING,
}


NETWORK_SCHEMES = frozenset(("https", "http"))
"""What every client is taken to open, wherever it is."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place that could be offered: built once for a replica, or for a store as destination, and reused over requests.

    Slots, bandwidth and abilities are those of the direction that the ticket needs.
    """

    store: str
    site: str
    scheme: str
    """What a client must be able to open: ``https``, ``http``, ``file``, ``rbd``."""
    abilities: Abilities
    kind: str = ""
    exposure: Exposure = Exposure.PUBLIC
    enabled: bool = True
    cost: float = 0.0
    slots: int | None = None
    bandwidth: int | None = None
    store_id: int = 0
    handed: bool = False
    """Whether what it gives is no URL of the network: a path or a volume, which the broker itself cannot open."""
    replica: str | None = None
    """The id of the replica to read; ``None`` for a destination."""
    key: str = ""
    """The key of that replica at its store."""
    state: ReplicaState = ReplicaState.ACTIVE
    project: str = ""
    """Whose replica it is: an unsealed one is offered to its own project alone."""
    writable: bool = True
    trusted: bool = True
    """Whether the store enforces its URLs, or its operator allows uploads although it does not."""
    capacity: int | None = None
    max_size: int | None = None
    """Largest object that the store takes, in bytes."""
    observes: frozenset[str] = frozenset()
    """Digest algorithms that the store computes itself, of the whole or of parts."""


class Placed(Protocol):
    """As much of a replica as a candidate needs."""

    @property
    def id(self) -> UUID | str: ...

    @property
    def key(self) -> str: ...

    @property
    def state(self) -> ReplicaState: ...

    @property
    def project(self) -> str: ...


class Request(NamedTuple):
    """What a client asked for, as far as the order depends on it."""

    operation: Operation
    site: str | None = None
    """Where the client is, or says that it is."""
    size: int | None = None
    project: str = ""
    sees_private: bool = False
    prefer: frozenset[str] = frozenset()
    """Names of stores to lift."""
    avoid: frozenset[str] = frozenset()
    """Names of stores to leave out."""
    schemes: frozenset[str] = frozenset()
    """What the client can open; empty means anything."""
    digests: frozenset[str] = frozenset()
    """Algorithms of the digests that an upload declares."""
    needs_digest: bool = True
    """Whether policy asks for a content digest to accept an upload (invariant 4)."""
    failed_until: Mapping[str, float] = MappingProxyType({})
    """Stores that failed this client, with the instant until which that excludes them."""
    proven_site: str | None = None
    """Where its token or its network proves it to be."""

    @property
    def is_choosy(self) -> bool:
        """Whether something about the request itself can be against a candidate."""
        return bool(self.avoid or self.schemes or self.failed_until)


def source(replica: Placed, store: Store, scheme: str) -> Candidate:
    """The candidate that a replica is for reading."""
    return Candidate(
        store=store.name,
        site=store.site,
        scheme=scheme,
        abilities=store.abilities,
        kind=store.kind,
        exposure=store.exposure,
        enabled=store.enabled,
        cost=store.cost,
        slots=store.read_slots,
        bandwidth=store.read_bandwidth,
        store_id=store.id,
        replica=str(replica.id),
        handed=scheme not in NETWORK_SCHEMES,
        key=replica.key,
        state=replica.state,
        project=replica.project,
    )


def destination(store: Store, scheme: str, max_size: int | None) -> Candidate:
    """The candidate that a store is for writing; `max_size` is the largest object that its kind takes."""
    abilities = store.abilities
    return Candidate(
        store=store.name,
        site=store.site,
        scheme=scheme,
        abilities=abilities,
        kind=store.kind,
        exposure=store.exposure,
        enabled=store.enabled,
        cost=store.cost,
        slots=store.write_slots,
        bandwidth=store.write_bandwidth,
        store_id=store.id,
        writable=store.writable,
        trusted=abilities.enforces or store.settings.get(WEAK_UPLOADS) == "allowed",
        capacity=store.capacity,
        max_size=max_size,
        observes=frozenset(abilities.observes) | frozenset(abilities.observes_parts if abilities.multipart else ()),
    )


def accept(request: Request, candidate: Candidate, load: Load, now: float) -> Reason | None:
    """``None`` when the candidate can be offered, else the first reason against it."""
    if candidate.exposure is not Exposure.PUBLIC and not request.sees_private:
        return Reason.PRIVATE
    if not candidate.enabled:
        return Reason.DISABLED
    upload = request.operation is Operation.UPLOAD
    reason = _accept_write(request, candidate, load) if upload else _accept_read(request, candidate)
    if reason is not None:
        return reason
    store = candidate.store
    if store in request.avoid:
        return Reason.AVOIDED
    if candidate.handed and candidate.site not in ancestors(request.proven_site):
        return Reason.NOT_MOUNTED
    if (request.schemes or candidate.handed) and candidate.scheme not in request.schemes:
        return Reason.SCHEME
    if request.failed_until and now < request.failed_until.get(store, -math.inf):
        return Reason.RECENTLY_FAILED
    if candidate.slots == 0:
        return Reason.FULL
    return None


_PLAIN_READ = Request(Operation.DOWNLOAD)


def is_offered_to_all(candidate: Candidate) -> bool:
    """Whether nothing is against reading the candidate, whoever asks, as long as the request is not choosy."""
    return accept(_PLAIN_READ, candidate, IDLE, 0.0) is None


def _accept_read(request: Request, candidate: Candidate) -> Reason | None:
    """What can be against reading a replica."""
    if candidate.state is not ReplicaState.ACTIVE:
        own_unsealed = candidate.state is ReplicaState.UNSEALED and candidate.project and candidate.project == request.project
        if not own_unsealed:
            return _REPLICA_REASON[candidate.state]
    return None if candidate.abilities.reads or candidate.handed else Reason.NOT_READABLE


def _accept_write(request: Request, candidate: Candidate, load: Load) -> Reason | None:
    """What can be against writing to a store."""
    if not candidate.writable or not candidate.abilities.writes:
        return Reason.NOT_WRITABLE
    if not candidate.trusted:
        return Reason.UNENFORCED
    if request.needs_digest and not candidate.observes:
        return Reason.UNVERIFIABLE
    size = request.size or 0
    if candidate.max_size is not None and size > candidate.max_size:
        return Reason.TOO_LARGE
    if candidate.capacity is not None and candidate.capacity - load.reserved < max(1, size):
        return Reason.NO_CAPACITY
    return None
