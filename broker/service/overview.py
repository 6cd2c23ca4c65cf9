"""The status page in values: what it shows of stores, transfers, waiters, decisions, paths and outcomes, and how a store is said to be.

Instants are POSIX seconds; `broker.service.status` makes these from what it has read, for one principal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from broker.model import Store

COMPARED_SIZE = 1 << 30
"""Paths are compared by a transfer of so many bytes."""

FAILING, UNSTEADY = 0.5, 0.9
"""Stores with a smaller share of transfers that delivered are told to be failing, or unsteady."""

DOUBTED = 0.1
"""From this doubt on (`broker.suspicion`) a store is told to be doubted."""


@dataclass(frozen=True, slots=True)
class Use:
    """How much of a limited thing is taken; `limit` is ``None`` where there is no limit, or none is known."""

    taken: int
    limit: int | None

    @property
    def share(self) -> float:
        """The share that is taken: over 1 while a lowered limit drains, 1 for a limit of 0, 0 without a limit."""
        return 0.0 if self.limit is None else self.taken / self.limit if self.limit else 1.0


@dataclass(frozen=True, slots=True)
class StoreShown:
    """A store. `level` says how `state` is to be taken: ``good``, ``warn``, ``bad`` or ``off``; the uses are administrators'."""

    name: str
    kind: str
    state: str
    level: str
    private: bool
    read: Use | None
    write: Use | None
    space: Use | None
    rate: float | None
    """What a transfer from it gets, in bytes per second, over all sites; ``None`` when nothing recent told."""
    success: float | None


@dataclass(frozen=True, slots=True)
class SiteShown:
    path: str
    stores: tuple[StoreShown, ...]

    @property
    def read(self) -> Use:
        """Read slots of its stores that have a limit."""
        return total(store.read for store in self.stores)

    @property
    def write(self) -> Use:
        """The same for writing."""
        return total(store.write for store in self.stores)

    @property
    def troubled(self) -> int:
        """How many of its stores want to be looked at."""
        return sum(store.level in ("warn", "bad") for store in self.stores)


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asked for a ticket, when, and for what."""

    id: str
    operation: str
    image: str | None
    size: int | None
    project: str
    subject: str
    machine: str
    site: str | None
    at: float


@dataclass(frozen=True, slots=True)
class TransferShown:
    """A transfer under way. `estimate` is what its first store was expected to take, in seconds; `expected_at` and `lease_ends_at` are
    those of its last lease."""

    asked: Asked
    stores: tuple[str, ...]
    estimate: float | None
    expected_at: float | None
    lease_ends_at: float | None


@dataclass(frozen=True, slots=True)
class WaitShown:
    """A request that waits for a slot. `priority` is how much its role counts beside a member's."""

    project: str
    direction: str
    stores: tuple[str, ...]
    size: int
    priority: float
    seconds: float


@dataclass(frozen=True, slots=True)
class PlaceShown:
    """One place of a ticket, with the numbers of the decision. `share` is its share of first draws, `outcome` what was reported."""

    store: str
    state: str
    seconds: float
    rate: float
    setup_seconds: float
    success: float
    basis: str
    share: float
    outcome: str | None


@dataclass(frozen=True, slots=True)
class DecisionShown:
    """A ticket, and what was decided for it, best place first. `state` is the ticket's or the upload's; `excluded` are stores with the
    reason against each."""

    asked: Asked
    state: str
    places: tuple[PlaceShown, ...]
    excluded: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PathShown:
    """What was observed between a site and a store. `seconds` is what `COMPARED_SIZE` bytes take; ``None`` when nothing arrived.
    `believed` says whether ranking still goes by it."""

    site: str
    store: str
    direction: str
    seconds: float | None
    rate: float | None
    setup_seconds: float | None
    success: float
    age_seconds: float
    believed: bool


@dataclass(frozen=True, slots=True)
class OutcomeShown:
    """A reported transfer. `ratio` is what it took over what was estimated; ``None`` when it did not deliver."""

    store: str
    direction: str
    outcome: str
    ratio: float | None
    at: float


@dataclass(frozen=True, slots=True)
class Overview:
    """The page. `at` is when the catalogue was read, ``None`` when it never was; `away` that it cannot be read now."""

    everything: bool
    at: float | None
    away: bool
    sites: tuple[SiteShown, ...]
    more_stores: int
    transfers: tuple[TransferShown, ...]
    more_transfers: int
    waits: tuple[WaitShown, ...]
    more_waits: int
    decisions: tuple[DecisionShown, ...]
    paths: tuple[PathShown, ...]
    more_paths: int
    outcomes: tuple[OutcomeShown, ...]

    @property
    def store_count(self) -> int:
        return self.more_stores + sum(len(site.stores) for site in self.sites)

    @property
    def read(self) -> Use:
        """Read slots of all stores shown."""
        return total(site.read for site in self.sites)

    @property
    def write(self) -> Use:
        return total(site.write for site in self.sites)

    @property
    def troubled(self) -> int:
        return sum(site.troubled for site in self.sites)

    @property
    def failed(self) -> int:
        """How many of the outcomes shown are failures."""
        return sum(outcome.ratio is None for outcome in self.outcomes)


def total(uses: Iterable[Use | None]) -> Use:
    """The uses together, without those that have no limit."""
    limited = [use for use in uses if use is not None and use.limit is not None]
    return Use(sum(use.taken for use in limited), sum(use.limit or 0 for use in limited) if limited else None)


def state_of(store: Store, read: Use | None, success: float | None, doubt: float) -> tuple[str, str]:
    """How a store is in a few words, and how that is to be taken; what matters most is told."""
    if store.enabled and not (store.abilities.reads or store.abilities.writes):
        return "not usable", "bad"
    state, level = open_state(store, success, doubt)
    if level in ("off", "bad"):
        return state, level
    if not store.abilities.reads:
        return "not readable", "warn"
    if read is not None and read.limit is not None and read.taken > read.limit:
        return "draining", "warn"
    if read is not None and read.limit == 0:
        return "drained", "off"
    if read is not None and read.limit is not None and read.taken >= read.limit:
        return "full", "warn"
    if level == "good" and not store.abilities.writes:
        return "read only", "good"
    return state, level


def open_state(store: Store, success: float | None, doubt: float) -> tuple[str, str]:
    """The same from what everybody may know of a store."""
    if not store.enabled:
        return "disabled", "off"
    if success is not None and success < FAILING:
        return "failing", "bad"
    if doubt >= DOUBTED:
        return "doubted", "warn"
    if success is not None and success < UNSTEADY:
        return "unsteady", "warn"
    return ("open", "good") if store.writable else ("read only", "good")
