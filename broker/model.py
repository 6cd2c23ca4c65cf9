"""The words of the domain, as frozen values (README, "Words").

Everything that crosses a layer is one of these. They hold no behaviour beyond what follows from their own fields, do
no I/O and read no clock. What is made anew for every request is a NamedTuple, at a fifth of the cost of a frozen dataclass.

Units: sizes in bytes, rates and bandwidths in bytes per second, durations in seconds, instants as POSIX seconds
(``float``, UTC). Digests are lowercase hex, keyed by algorithm name.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

Digests = Mapping[str, str]
"""Algorithm name to lowercase hex digest, for instance ``{"sha256": "9f86d0…"}``."""

DIGEST_HEX_LENGTH: Mapping[str, int] = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}
"""The algorithms that a blob may be declared with and the length of each in hex digits."""

CONTENT_DIGESTS = ("sha512", "sha256", "md5")
"""What counts as a digest of the content, strongest first. SHA-1 is carried for old catalogues but proves nothing."""

MAX_BLOB_SIZE = 1 << 53
"""Largest declared size: 8 PiB, the last integer that JSON readers everywhere keep exact."""

_SITE = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}(?:/[a-z0-9][a-z0-9._-]{0,62}){0,7}\Z")


def is_site(text: str) -> bool:
    """Whether `text` is a site path: one to eight segments of lower-case letters, digits, ``.``, ``_`` and ``-``."""
    return _SITE.match(text) is not None


def new_id(now: float | None = None) -> UUID:
    """A fresh UUID version 7 (RFC 9562 section 5.7): its order is the order of creation, so indexes and partitions grow at one end.

    Its 74 random bits are the operating system's, so that no id can be guessed from another one.
    """
    return UUID(new_ids(1, now)[0])


_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def created_at(id: UUID) -> float:
    """When an id of `new_id` was made, by the clock of the broker that made it."""
    return (id.int >> 80) / 1000


def new_ids(count: int, now: float | None = None) -> list[str]:
    """The same, as text in canonical form, so many at once."""
    milliseconds = f"{int((time.time() if now is None else now) * 1000) & 0xFFFFFFFFFFFF:012x}"
    head = f"{milliseconds[:8]}-{milliseconds[8:]}-7"
    random = os.urandom(10 * count).hex()
    return [
        f"{head}{random[i : i + 3]}-{_VARIANT[random[i + 3]]}{random[i + 4 : i + 7]}-{random[i + 7 : i + 19]}"
        for i in range(0, 20 * count, 20)
    ]


class Role(StrEnum):
    """What a principal may do at most; each role includes those after it, but ``service``: a member that sees private stores."""

    ADMIN = "admin"
    SERVICE = "service"
    MEMBER = "member"
    READER = "reader"


class Operation(StrEnum):
    """What a ticket is for."""

    DOWNLOAD = "download"
    UPLOAD = "upload"


class Exposure(StrEnum):
    """Who may learn that a store exists: everyone, or only principals in the roles ``service`` and ``admin`` (M13)."""

    PUBLIC = "public"
    SERVICE = "service"


class Visibility(StrEnum):
    """Who may read an image: its project, that and its members (``shared``), everyone who asks by id (``community``), or everyone and
    in every list (``public``)."""

    PRIVATE = "private"
    SHARED = "shared"
    COMMUNITY = "community"
    PUBLIC = "public"


class ImageStatus(StrEnum):
    """``queued`` until a blob of it is active; then ``pending`` while it waits for approval. A rejected image is ``deactivated``.
    ``pending`` and ``deactivated`` images give no ticket to others than administrators (M16)."""

    QUEUED = "queued"
    PENDING = "pending"
    ACTIVE = "active"
    DEACTIVATED = "deactivated"


class Vetting(StrEnum):
    """What was decided of an image that needs approval."""

    PENDING = "pending"
    APPROVED = "approved"
    REJECTED = "rejected"


class MemberStatus(StrEnum):
    """What a project said to an image that is shared with it. It may read the image whatever it said; only accepted ones are listed."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


class BlobState(StrEnum):
    """``queued`` until a first replica was verified; ``deleting`` once no image refers to it."""

    QUEUED = "queued"
    ACTIVE = "active"
    DELETING = "deleting"


class Purpose(StrEnum):
    """Whether a replica is one of the blob's own copies, or a cached one that may be evicted (M5, M7)."""

    ORIGIN = "origin"
    CACHE = "cache"


class ReplicaState(StrEnum):
    """Only ``active`` replicas are ever named by a ticket (invariant 2). ``unsealed`` ones are for their uploader alone (invariant 14)."""

    PENDING = "pending"
    ACTIVE = "active"
    UNSEALED = "unsealed"
    CORRUPT = "corrupt"
    MISSING = "missing"
    DELETING = "deleting"


class UploadState(StrEnum):
    """``open`` → ``committing`` → ``committed``; or ``failed`` (what arrived was refused) or ``abandoned`` (reaped)."""

    OPEN = "open"
    COMMITTING = "committing"
    COMMITTED = "committed"
    FAILED = "failed"
    ABANDONED = "abandoned"


class Outcome(StrEnum):
    """How a transfer went, as its client tells it."""

    OK = "ok"
    FAILED = "failed"
    SLOW = "slow"
    CORRUPT = "corrupt"


class Direction(StrEnum):
    """Slots and bandwidth are declared apart for reading from and writing to a store."""

    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. `site` is set only when the token proves it; `expires_at` is when the token ends."""

    subject: str
    project: str
    role: Role
    expires_at: float
    site: str | None = None

    @property
    def sees_private_stores(self) -> bool:
        return self.role in (Role.ADMIN, Role.SERVICE)

    @property
    def may_write(self) -> bool:
        return self.role is not Role.READER


class Client(NamedTuple):
    """A principal on one machine: a hundred nodes under one service account are a hundred clients."""

    principal: Principal
    instance: str
    address: str
    site: str | None
    """Where the client is, as its token proves, else its network; ``None`` when neither does. A hint is no part of it."""

    @property
    def name(self) -> str:
        """Names this client in reports and exclusions. Its parts hold no tabs, so that no two clients are called the same."""
        return client_name(self.principal.project, self.principal.subject, self.instance, self.address)


def client_name(project: str, subject: str, instance: str, address: str) -> str:
    """How the client of that principal, instance and address is named."""
    return f"{project}\t{subject}\t{instance}\t{address}"


@dataclass(frozen=True, slots=True)
class Pieces:
    """Digests of consecutive pieces of `length` bytes each, the last one shorter. They let a client repair one piece alone."""

    length: int
    algorithm: str
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Blob:
    """Immutable bytes. `size` is ``None`` only while the first upload has not been committed."""

    id: UUID
    size: int | None
    digests: Digests
    state: BlobState
    pieces: Pieces | None = None


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a store really enforces, as the probe saw it (``broker.stores.probe``). Nothing is assumed: an unprobed store has none.

    binds_* say that a signed value is enforced on a write: a body that differs is refused and leaves nothing behind.
    """

    reads: bool = False
    ranges: bool = False
    writes: bool = False
    deletes: bool = False
    refuses_tampering: bool = False
    refuses_expired: bool = False
    binds_length: bool = False
    binds_md5: bool = False
    binds_sha256: bool = False
    refuses_overwrite: bool = False
    """A signed ``If-None-Match: *`` (or the store by itself) refuses a second PUT of one key."""
    observes: tuple[str, ...] = ()
    """Digest algorithms of a whole object that the store computes itself and tells in answer to a HEAD, strongest first."""
    multipart: bool = False
    observes_parts: tuple[str, ...] = ()
    """Digest algorithms of single parts that the store computes itself and tells when parts are listed."""
    seals_parts: bool = False
    """A part URL replayed after completion leaves the finished object unchanged."""
    takes_unsized: bool = False
    """A PUT whose length is not known when it begins (``Transfer-Encoding: chunked``) is taken."""
    copies: bool = False
    """Server-side copy works, so that a staged object can be sealed under another key."""
    clock_skew_seconds: float = 0.0
    """The store's clock minus ours, from its Date header, in whole seconds."""

    @property
    def enforces(self) -> bool:
        """Whether a URL allows just what it says, until its end (invariant 8)."""
        return self.refuses_tampering and self.refuses_expired

    @property
    def binds(self) -> tuple[str, ...]:
        """Digests that are proven by a URL which binds them: no object lies where it writes but one of that digest. From a store that
        tells a digest that is asked for instead: when it is silent once, something is wrong."""
        return ("sha256",) if self.binds_sha256 and self.enforces and "sha256" not in self.observes else ()

    @property
    def seals_single(self) -> bool:
        """Whether a single PUT can be sealed (invariant 14)."""
        return self.refuses_overwrite or self.copies


WEAK_UPLOADS = "weak_uploads"
"""A setting of every kind of store: ``allowed`` when its operator takes uploads although the store does not enforce its URLs."""

TOKENS = "tokens"
"""A setting of every kind of store: ``trusted`` when clients may be redirected there that send their bearer tokens on."""

CACHE = "cache"
"""A setting of every kind of store: ``yes`` for one that gets a copy of every image that is queued for caching."""


class SlotRange(NamedTuple):
    """Between these the broker itself looks for the number of slots at which a store moves the most (`broker.adapt`)."""

    min: int
    max: int


@dataclass(frozen=True, slots=True)
class Store:
    """A registered endpoint that verifies signatures.

    `endpoint` is the name that clients use and signatures are made for, `internal_endpoint` the one that the broker
    itself uses (the same by default). `internal` lets the broker open addresses inside its own network for it. `settings`
    depend on the kind (README, "Connect a store"). `credential` names an entry of the broker's credentials; the secret itself is
    never in the catalogue.
    """

    id: int
    name: str
    kind: str
    site: str
    endpoint: str
    internal_endpoint: str | None = None
    internal: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    credential: str | None = None
    exposure: Exposure = Exposure.PUBLIC
    enabled: bool = True
    writable: bool = True
    cost: float = 0.0
    read_slots: int | None = None
    write_slots: int | None = None
    read_adaptive: SlotRange | None = None
    """Given: `read_slots` is what was found so far."""
    write_adaptive: SlotRange | None = None
    read_bandwidth: int | None = None
    write_bandwidth: int | None = None
    capacity: int | None = None
    reserved: int = 0
    """Bytes of active replicas and of open uploads' reservations together."""
    abilities: Abilities = Abilities()
    probed_at: float | None = None
    version: int = 1


@dataclass(frozen=True, slots=True)
class Replica:
    """A blob at a location, (store, key). `deletable` says that whoever registered it delegated the right to delete it (M10)."""

    id: UUID
    blob_id: UUID
    store: str
    key: str
    purpose: Purpose
    state: ReplicaState
    deletable: bool
    project: str
    observed_by: str | None = None
    observed_strength: str | None = None
    observed_at: float | None = None
    version: int = 1


@dataclass(frozen=True, slots=True)
class Image:
    """What people name. `blobs` maps a disk format to the blob that holds it (M19).

    `name` may be empty. `subject` made it. `disk_format` and `container_format` were declared, before there were bytes. `min_disk` is in
    GiB, `min_ram` in MiB. A `protected` image cannot be deleted, a `hidden` one is listed only when asked for. `vetting` is ``None`` for
    an image that needs no approval. `members` are the projects that it is shared with, whatever they said to it; none unless it is
    ``shared``.
    """

    id: UUID
    name: str
    project: str
    visibility: Visibility
    status: ImageStatus
    properties: Mapping[str, str]
    blobs: Mapping[str, UUID]
    created_at: float = 0.0
    updated_at: float = 0.0
    version: int = 1
    subject: str = ""
    tags: tuple[str, ...] = ()
    protected: bool = False
    hidden: bool = False
    min_disk: int = 0
    min_ram: int = 0
    disk_format: str | None = None
    container_format: str | None = None
    vetting: Vetting | None = None
    members: tuple[str, ...] = ()

    @property
    def is_withheld(self) -> bool:
        """Whether it waits for approval or was refused it."""
        return self.vetting in (Vetting.PENDING, Vetting.REJECTED)


@dataclass(frozen=True, slots=True)
class PartSeen:
    """One part as the store tells it. Numbers begin at 1."""

    number: int
    size: int
    digests: Digests = field(default_factory=dict)
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of an object at the store, and by whom (``broker`` or ``agent``).

    `digests` holds only what the store computed itself from the bytes it keeps; what it merely repeats is left out.
    `parts` is set when the object is made of parts whose digests the store told one by one.
    """

    size: int
    at: float
    by: str
    digests: Digests = field(default_factory=dict)
    parts: tuple[PartSeen, ...] = ()
    etag: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


NO_HEADERS: Mapping[str, str] = {}
"""Of a handle that needs none; shared, never to be changed."""


class Handle(NamedTuple):
    """What a client opens: one method on one key of one store until `expires_at` (invariant 8). `url` may be a path or a volume."""

    method: str
    url: str
    headers: Mapping[str, str]
    expires_at: float
