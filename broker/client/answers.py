"""The broker's answers as frozen values, read from the JSON of the contract (schemas/openapi.json).

Unknown fields are ignored, so that an older client reads a newer broker. Instants are POSIX seconds. URLs and headers
that carry signatures are left out of every repr (invariant 13). `document` is the JSON object as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self
from uuid import UUID

from broker.model import Digests

Document = Mapping[str, Any]


def instant(text: str | None) -> float:
    """An RFC 3339 instant as POSIX seconds; 0 when there is none."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def _uuid(text: str | None) -> UUID | None:
    return UUID(text) if text else None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the broker expects of a place: seconds in all, bytes per second, seconds until the first byte, chance of success, and why."""

    seconds: float
    rate: float
    setup_seconds: float
    success: float
    basis: str

    @classmethod
    def read(cls, document: Document) -> Self:
        seconds, rate, setup, success = (float(document[name]) for name in ("seconds", "rate", "setup_seconds", "success"))
        return cls(seconds, rate, setup, success, document["basis"])


@dataclass(frozen=True, slots=True)
class Source:
    """A ranked place to read from. `active` ones hold their lease, `standby` ones are activated when used."""

    rank: int
    store: str
    site: str
    kind: str
    state: str
    weight: float
    estimate: Estimate
    expires_at: float
    url: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            document["rank"], document["store"], document["site"], document["kind"], document["state"], float(document["weight"]),
            Estimate.read(document["estimate"]), instant(document["expires_at"]), document.get("url"), document.get("headers", {}),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a large upload: `number` begins at 1, `offset` and `length` are in bytes of the whole."""

    number: int
    offset: int
    length: int
    expires_at: float = 0.0
    url: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            document["number"], document["offset"], document["length"],
            instant(document.get("expires_at")), document.get("url"), document.get("headers", {}),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Destination:
    """A ranked place to write to, in one PUT (`url`) or in parts of `part_size`."""

    rank: int
    store: str
    site: str
    kind: str
    state: str
    weight: float
    estimate: Estimate
    expires_at: float
    url: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    part_size: int | None = None
    part_count: int | None = None
    parts: tuple[Part, ...] = ()

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            document["rank"], document["store"], document["site"], document["kind"], document["state"], float(document["weight"]),
            Estimate.read(document["estimate"]), instant(document["expires_at"]), document.get("url"), document.get("headers", {}),
            document.get("part_size"), document.get("part_count"), tuple(map(Part.read, document.get("parts", ()))),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Excluded:
    """A store that has the blob (or could take it) and is not offered, with the reason."""

    store: str
    reason: str

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(document["store"], document["reason"])


@dataclass(frozen=True, slots=True)
class Pieces:
    """Digests of consecutive pieces of `length` bytes."""

    length: int
    algorithm: str
    digests: tuple[str, ...]

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(document["length"], document["algorithm"], tuple(document["digests"]))

    def document(self) -> dict[str, Any]:
        return {"length": self.length, "algorithm": self.algorithm, "digests": list(self.digests)}


@dataclass(frozen=True, slots=True)
class Blob:
    """Immutable bytes. `size` is ``None`` until the first upload is committed; `pieces` come with GET of the blob only."""

    id: UUID
    size: int | None
    digests: Digests
    state: str
    pieces: Pieces | None
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document) -> Self:
        pieces = document.get("pieces")
        return cls(
            UUID(document["id"]), document.get("size"), document.get("digests", {}), document.get("state", ""),
            Pieces.read(pieces) if pieces else None, document,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ticket:
    """The answer to one request: ranked places, best first."""

    id: UUID
    operation: str
    state: str
    blob: Blob
    image: UUID | None
    format: str | None
    expires_at: float
    sources: tuple[Source, ...]
    destinations: tuple[Destination, ...]
    excluded: tuple[Excluded, ...]
    stale: bool
    known: bool
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            UUID(document["id"]), document["operation"], document["state"], Blob.read(document["blob"]),
            _uuid(document.get("image")), document.get("format"), instant(document["expires_at"]),
            tuple(map(Source.read, document.get("sources", ()))), tuple(map(Destination.read, document.get("destinations", ()))),
            tuple(map(Excluded.read, document.get("excluded", ()))), document.get("stale", False), document.get("known", False), document,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlaceState:
    """One place of a ticket as it stands; `seen` maps the numbers of parts that arrived to their sizes."""

    store: str
    state: str
    part_size: int | None
    seen: Mapping[int, int]

    @classmethod
    def read(cls, document: Document) -> Self:
        seen = {part["number"]: part["size"] for part in document.get("seen", ())}
        return cls(document["store"], document["state"], document.get("part_size"), seen)


@dataclass(frozen=True, slots=True)
class TicketState:
    """A ticket as it stands. `problem` says why a failed one failed."""

    id: UUID
    operation: str
    state: str
    blob: Blob
    image: UUID | None
    format: str | None
    expires_at: float
    places: tuple[PlaceState, ...]
    problem: str
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            UUID(document["id"]), document["operation"], document["state"], Blob.read(document["blob"]),
            _uuid(document.get("image")), document.get("format"), instant(document["expires_at"]),
            tuple(map(PlaceState.read, document.get("places", ()))), document.get("problem", ""), document,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weighed:
    """One place that would be offered, with the numbers of the decision; `active` are the leases on it, `doubt` is everyone's, 0 to 1."""

    store: str
    site: str
    estimate: Estimate
    weight: float
    evidence: float
    doubt: float
    active: int
    slots: int | None

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            document["store"], document["site"], Estimate.read(document["estimate"]), document["weight"], document["evidence"],
            document["doubt"], document["active"], document["slots"],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a download ticket would name for clients at `site`, likeliest first, and why others are out."""

    blob: Blob
    site: str | None
    candidates: tuple[Weighed, ...]
    excluded: tuple[Excluded, ...]
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            Blob.read(document["blob"]), document["site"], tuple(map(Weighed.read, document["candidates"])),
            tuple(map(Excluded.read, document["excluded"])), document,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Replica:
    """A blob at a store."""

    id: UUID
    blob: UUID
    store: str
    site: str
    key: str | None
    purpose: str
    state: str
    deletable: bool
    etag: str | None
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document, etag: str | None = None) -> Self:
        return cls(
            UUID(document["id"]), UUID(document["blob"]), document["store"], document["site"], document.get("key"),
            document["purpose"], document["state"], document["deletable"], etag, document,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that was asked for. `turn` names the taking that this agent's reports belong to."""

    id: UUID
    image: UUID
    blob: UUID
    store: str
    purpose: str
    state: str
    turn: int
    bytes: int
    size: int | None
    problem: str
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            UUID(document["id"]), UUID(document["image"]), UUID(document["blob"]), document["store"], document["purpose"],
            document["state"], document["turn"], document["bytes"], document.get("size"), document.get("problem", ""), document,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Committed:
    """An upload that was accepted: its replica is active."""

    ticket: UUID
    image: UUID | None
    format: str | None
    blob: Blob
    replica: Replica
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            UUID(document["id"]), _uuid(document.get("image")), document.get("format"),
            Blob.read(document["blob"]), Replica.read(document["replica"]), document,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """What people name; `blobs` maps a disk format to its blob."""

    id: UUID
    name: str
    project: str
    visibility: str
    status: str
    blobs: Mapping[str, Blob]
    etag: str | None
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document, etag: str | None = None) -> Self:
        blobs = {name: Blob.read(blob) for name, blob in document["blobs"].items()}
        return cls(
            UUID(document["id"]), document["name"], document["project"], document["visibility"], document["status"], blobs, etag, document
        )


@dataclass(frozen=True, slots=True)
class Store:
    """A registered store, as far as this principal may see it (`document` holds the rest)."""

    name: str
    kind: str
    site: str
    endpoint: str
    exposure: str
    enabled: bool
    writable: bool
    etag: str | None
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document, etag: str | None = None) -> Self:
        return cls(
            document["name"], document["kind"], document["site"], document["endpoint"], document["exposure"],
            document["enabled"], document["writable"], etag, document,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the network."""

    path: str
    description: str
    networks: tuple[str, ...]
    etag: str | None
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document, etag: str | None = None) -> Self:
        return cls(document["path"], document["description"], tuple(document["networks"]), etag, document)


@dataclass(frozen=True, slots=True)
class Quota:
    """What a project may hold, ``None`` where the broker's configuration says it, and what it holds."""

    project: str
    max_leases: int | None
    max_bytes: int | None
    weight: float | None
    leases: int
    bytes: int
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document, _: str | None = None) -> Self:
        limits = document.get("max_leases"), document.get("max_bytes"), document.get("weight")
        return cls(document["project"], *limits, document["leases"], document["bytes"], document)


@dataclass(frozen=True, slots=True)
class Path:
    """What transfers between a site and a store reported, as moving averages. `site` is ``None`` for all clients together."""

    site: str | None
    store: str
    direction: str
    rate: float | None
    setup_seconds: float | None
    success: float
    weight: float
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            document["site"], document["store"], document["direction"], document["rate"], document["setup_seconds"],
            document["success"], document["weight"], document,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that tokens are signed with. Instants are as the broker writes them, ``None`` where there is none."""

    id: str
    algorithm: str
    state: str
    signs_from: str | None
    signs_until: str | None
    kept_until: str | None
    document: Document = field(repr=False)

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(
            document["id"], document["algorithm"], document["state"], document["signs_from"], document["signs_until"],
            document["kept_until"], document,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Service:
    """The broker's version and what it understands."""

    version: str
    features: tuple[str, ...]

    @classmethod
    def read(cls, document: Document) -> Self:
        return cls(document["version"], tuple(document["features"]))
