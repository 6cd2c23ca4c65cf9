"""What a kind of store can do: the Protocols that every module beside this one implements.

One object serves one registered store. Signing is pure CPU and synchronous; everything else talks to the store's
internal endpoint, which is the only address that it ever opens: redirects are refused, answers bounded in time and size.

Every method that talks to the store raises `errors.StoreUnavailable` when the store does not answer, answers 5xx,
redirects, or answers something that is not its protocol; the text never holds a credential or a signed URL.

How bytes become a sealed object (invariant 14)::

    single     sign_put(staging) → client PUTs → stat(staging) → seal(staging, final, …) → final key
    multipart  begin(staging) → sign_part(…) → client PUTs parts → parts(…) → finish(…) → final key
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from broker.model import Digests, Handle, Observation, PartSeen


@dataclass(frozen=True, slots=True)
class Limits:
    """What a store takes, in bytes and numbers. A PUT may hold `max_put`, parts `min_part` to `max_part` (the last may be shorter)."""

    max_put: int
    min_part: int
    max_part: int
    max_parts: int
    max_object: int


@dataclass(frozen=True, slots=True)
class Write:
    """One PUT of a whole object to be signed. What is ``None`` or empty is not bound."""

    key: str
    expires_at: float
    size: int | None = None
    digests: Digests = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Kept with the object where the store can: lower-case names without a prefix, ASCII values."""


@dataclass(frozen=True, slots=True)
class PartWrite:
    """One PUT of one part to be signed; `number` begins at 1, `offset` and `length` are in bytes of the whole object."""

    number: int
    offset: int
    length: int
    expires_at: float
    digests: Digests = field(default_factory=dict)


class Store(Protocol):
    """Every kind of store: read, write, look, seal, delete, and multipart uploads."""

    kind: ClassVar[str]
    schemes: ClassVar[tuple[str, ...]]
    """What a client must be able to open, for instance ``("https", "http")``."""
    limits: Limits

    def sign_get(self, key: str, expires_at: float, now: float, filename: str | None = None) -> Handle:
        """A handle that reads `key` until `expires_at` (bounded by the store's longest validity and the credential's end).

        With a `filename` the store tells it to who reads (RFC 6266, ``attachment``), where its URLs can say so; else it is left out.
        """
        ...

    def sign_put(self, write: Write, now: float) -> Handle:
        """A handle that writes one object, binding whatever this store was seen to enforce (its `Abilities`)."""
        ...

    async def stat(self, key: str) -> Observation | None:
        """What the store says of `key`, by HEAD; ``None`` when it is not there. `digests` holds only what this store computes itself."""
        ...

    async def seal(self, staging: str, final: str, metadata: Mapping[str, str]) -> str:
        """Put the staged object where no signed write URL reaches it; its key: `final`, or `staging` when the store refuses overwriting.

        At `final` it has just `metadata`; at `staging` it keeps those that it was written with.
        """
        ...

    async def delete(self, key: str) -> bool:
        """Delete the object (with the segments of a Swift SLO). ``False`` when there was none."""
        ...

    async def begin(self, key: str, size: int | None, part_size: int, metadata: Mapping[str, str]) -> str:
        """Open a multipart upload to `key` and return its id (at most 200 ASCII characters, unguessable)."""
        ...

    def sign_part(self, key: str, upload: str, part: PartWrite, now: float) -> Handle:
        """A handle that writes one part, binding length and digests where this store enforces them."""
        ...

    async def parts(self, key: str, upload: str) -> Sequence[PartSeen]:
        """The parts that have arrived, by number."""
        ...

    async def finish(self, key: str, upload: str, parts: Sequence[PartSeen], metadata: Mapping[str, str]) -> str:
        """Make one sealed object of exactly these `parts` and return its key. Calling it again after success returns the same key."""
        ...

    async def abort(self, key: str, upload: str) -> None:
        """Give up a multipart upload and free its parts. Nothing happens when it is gone already."""
        ...

    async def clock_skew(self) -> float:
        """The store's clock minus ours in seconds, from the Date header of one cheap request."""
        ...


@runtime_checkable
class SignsAlike(Protocol):
    """A store whose URLs for reading hold nothing of their own: same key, same end, same file name, same URL, so that one can be kept
    for many."""

    @property
    def reads_by(self) -> int:
        """Which of its secrets `Store.sign_get` signs with now; a URL is worth no more once that has changed."""
        ...


@runtime_checkable
class Lists(Protocol):
    """A store that tells what it holds and what was kept with it, so that a lost catalogue can be made again."""

    def objects(self) -> AsyncIterator[str]:
        """The key of every object below the store's prefix, page by page. Raises `errors.StoreUnavailable` on the way."""
        ...

    async def recorded(self, key: str) -> Observation | None:
        """As `Store.stat`, with all metadata, also those that the store keeps where a HEAD does not tell them."""
        ...


@runtime_checkable
class FindsMultipart(Protocol):
    """A store where `Store.begin` leaves something behind, so that an upload whose id got lost has to be found again."""

    async def multiparts(self, key: str) -> Sequence[str]:
        """The ids of the multipart uploads open at `key`, a thousand at most."""
        ...
