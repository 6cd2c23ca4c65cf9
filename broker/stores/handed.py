"""Places that the broker never opens: it hands out a name, and a client that is there opens it (README, "Shared mounts and volumes").

Rules
- The broker can neither look nor write nor delete there. What lies there is observed by agents (invariant 4), which are
  believed as principals of the roles ``service`` and ``admin`` are; nothing is ever uploaded there by a ticket.
- A handle of this kind grants nothing by itself: it is a name. Who may open it is the mount's or the cluster's own affair, so
  it is told only where a token or a network proves that the client is at the store's site (`broker.accept`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NoReturn

from broker.errors import StoreUnavailable
from broker.model import MAX_BLOB_SIZE, NO_HEADERS, Handle, Observation, PartSeen, Store
from broker.stores.base import Limits, PartWrite, Write
from broker.stores.settings import check_names


class HandedStore:
    """What the kinds of such places have in common; each adds `_name`. Raises `Invalid` when a setting is unknown."""

    kind: ClassVar[str]
    schemes: ClassVar[tuple[str, ...]]
    limits = Limits(max_put=MAX_BLOB_SIZE, min_part=1, max_part=MAX_BLOB_SIZE, max_parts=1, max_object=MAX_BLOB_SIZE)
    reads_by: ClassVar[int] = 0
    """Nothing is signed, so one handle serves all (`base.SignsAlike`)."""

    def __init__(self, store: Store) -> None:
        check_names(store, set())
        self._store = store.name

    def check_key(self, key: str) -> None:
        """Raises `Invalid` when no object of this kind can have that key."""
        raise NotImplementedError

    def _url(self, key: str) -> str:
        raise NotImplementedError

    def sign_get(self, key: str, expires_at: float, now: float, filename: str | None = None) -> Handle:
        """The name of what lies there. `expires_at` says how long the broker stands by it; the place itself knows of no end."""
        return Handle("GET", self._url(key), NO_HEADERS, expires_at)

    def _unseen(self) -> NoReturn:
        raise StoreUnavailable(f"the broker cannot look into store {self._store}: only agents can")

    def sign_put(self, write: Write, now: float) -> Handle:
        self._unseen()

    def sign_part(self, key: str, upload: str, part: PartWrite, now: float) -> Handle:
        self._unseen()

    async def stat(self, key: str) -> Observation | None:
        self._unseen()

    async def seal(self, staging: str, final: str, metadata: Mapping[str, str]) -> str:
        self._unseen()

    async def delete(self, key: str) -> bool:
        self._unseen()

    async def begin(self, key: str, size: int | None, part_size: int, metadata: Mapping[str, str]) -> str:
        self._unseen()

    async def parts(self, key: str, upload: str) -> Sequence[PartSeen]:
        self._unseen()

    async def finish(self, key: str, upload: str, parts: Sequence[PartSeen], metadata: Mapping[str, str]) -> str:
        self._unseen()

    async def abort(self, key: str, upload: str) -> None:
        self._unseen()

    async def clock_skew(self) -> float:
        self._unseen()
