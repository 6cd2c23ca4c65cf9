"""What every verb of the service works with. Built once by `broker.app` and handed down; nothing here is global."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import asyncpg

from broker import admit, paths, rank, verify, vet
from broker.catalog import leases, reports
from broker.catalog.coalesce import Coalescer
from broker.metrics import Metrics
from broker.model import Store
from broker.service.pace import Pace
from broker.service.promises import Promises
from broker.service.repeats import Repeats
from broker.service.unrecorded import Unrecorded
from broker.service.wait import WaitingRoom
from broker.stores.probe import LIFE_SECONDS as LONGEST_OWN_SECONDS
from broker.stores.probe import Probed

if TYPE_CHECKING:
    from broker.service.keys import Keyring
    from broker.service.memory import Memory

Grants = Coalescer[leases.GrantRequest, tuple[leases.Grant, dict[tuple[int, str], int]]]
"""Grants leases and writes tickets, those of many requests in one statement."""

Reports = Coalescer[reports.ReportRow, reports.Noted]
"""Records reports, and what follows from them."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What an operator may tune; the defaults are meant to stay. Sizes in bytes, durations in seconds."""

    rank: rank.Policy = field(default_factory=rank.Policy)
    paths: paths.Policy = field(default_factory=paths.Policy)
    admit: admit.Policy = field(default_factory=admit.Policy)
    verify: verify.VerifyPolicy = field(default_factory=verify.VerifyPolicy)
    vetting: vet.Policy = field(default_factory=vet.Policy)
    url_ttl_seconds: float = 3600.0
    """No URL for reading, or for a single PUT, lives longer; a ticket can be refreshed."""
    share_bucket_seconds: float = 0.0
    """0: every transfer token is signed afresh. Else those for reading are shared by all who ask for the same replica in
    the same stretch of this length, in whole seconds; they name no principal."""
    upload_ttl_seconds: float = 86400.0
    """An upload without any activity for so long is abandoned."""
    part_url_ttl_seconds: float = 900.0
    """No URL for a part lives longer; more are signed on request."""
    first_parts: int = 32
    """Part URLs in the answer to an upload ticket."""
    single_put_limit: int = 64 << 20
    """Larger uploads, and those of unknown size, go in parts where the store can."""
    min_part_size: int = 16 << 20
    """Parts begin at this size and grow with the object."""

    @property
    def longest_url_seconds(self) -> float:
        """No signed URL or transfer token lives longer."""
        return max(self.url_ttl_seconds, self.part_url_ttl_seconds, LONGEST_OWN_SECONDS)


@dataclass(frozen=True, slots=True)
class Context:
    """The broker's parts. `clock` gives POSIX seconds; `rng` draws the order of sources, nothing secret."""

    db: asyncpg.Pool[asyncpg.Record]
    grants: Grants
    reports: Reports
    memory: Memory
    keys: Keyring
    policy: Policy
    metrics: Metrics
    clock: Callable[[], float]
    rng: Random
    probe: Callable[[Store], Awaitable[Probed]]
    """Opens a store, registered or not, and tries what it enforces (`broker.stores.probe`). Raises `Invalid` and `StoreUnavailable`."""
    repeats: Repeats = field(default_factory=Repeats)
    waiting: WaitingRoom = field(default_factory=WaitingRoom)
    promises: Promises = field(default_factory=Promises)
    grace_seconds: float = 30.0
    """For so long after the change log was last read stale tickets are given (`broker.service.stale`)."""
    unrecorded: Unrecorded = field(default_factory=Unrecorded)
    """Those that were."""
    pace: Pace = field(default_factory=Pace)
    issuers: tuple[str, ...] = ("",)
    """Whose bearer tokens are accepted; this broker's own URL first."""
