"""The sources of one download: who is at work, who is left, what the broker has to know.

Rules
- A standby source is activated before it is used. When the broker cannot be reached it is used as it is: its URL is signed.
- A URL about to expire is signed again; so is one that was refused, once.
- When no source is left, a new ticket is asked for, avoiding those that failed; after that, with all of them again.
- A store that is full has not failed: where all are, the download waits for room as patiently as it would have at its beginning.
- While help is wanted and some source was lost, or had no room, a new ticket is asked for now and then: a long download outlives troubles.
- Each source is reported once, at once when it fails. A broker that cannot be reached never stops a transfer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar
from uuid import UUID

from broker.client import plan
from broker.client.answers import Source, Ticket
from broker.client.api import SCHEMES, Broker
from broker.client.fetch import Reader, Window
from broker.client.local import LocalReader
from broker.client.progress import Progress
from broker.client.trouble import ClientError, TransferFailed
from broker.client.wire import StoreTrouble, Why
from broker.errors import BrokerError, Busy

BROKER_SECONDS = 5.0
"""How long a running transfer waits for the broker before it goes on without."""

RENEW_SECONDS = 30.0
"""How often progress is reported, which renews the lease."""

LATE_WORD_SECONDS = 3.0
"""…and how often, at most, while a source takes more than twice as long as its ticket says: others will want to know."""

MARGIN_SECONDS = 5.0
"""A URL that ends sooner is not used any more."""

_PAUSES = (0.5, 2.0, 5.0)
"""Seconds before each new ticket, after every source has failed."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to download, from where, and by how many sources at once: `parallel` None lets the engine decide."""

    image: UUID | None = None
    blob: UUID | None = None
    formats: Sequence[str] = ()
    only: Sequence[str] = ()
    prefer: Sequence[str] = ()
    avoid: Sequence[str] = ()
    site: str | None = None
    parallel: int | None = None
    schemes: Sequence[str] = SCHEMES
    convert: Mapping[str, float] | None = None
    """Formats that will do as well, since they can be converted into one of `formats`, with the bytes a second that this takes."""


@dataclass(frozen=True, slots=True)
class Used:
    """How one store did: `outcome` as in reports, bytes received, seconds spent."""

    store: str
    outcome: str
    bytes: int
    seconds: float
    detail: str = ""


@dataclass(slots=True, eq=False)
class Seat:
    """One source as this download uses it."""

    source: Source
    ticket: UUID
    reader: Reader
    state: str = "standby"
    """standby, active, failed, slow or corrupt."""
    window: Window | None = None
    rate: float = 0.0
    since: float = field(default_factory=time.monotonic)
    counted: int = 0
    heard_at: float = 0.0
    renewed_at: float = field(default_factory=time.monotonic)
    retries: int = 0
    signed_again: bool = False
    detail: str = ""

    @property
    def store(self) -> str:
        return self.source.store


def word_due(lasted: float, expected: float) -> float:
    """Seconds between two words on a source's progress, after it has `lasted` so long where `expected` was said."""
    return min(RENEW_SECONDS, max(LATE_WORD_SECONDS, lasted / 2)) if lasted > 2 * expected else RENEW_SECONDS


class Sources:
    """Keeps the ticket of one download. Used from the event loop only."""

    def __init__(self, broker: Broker, ticket: Ticket, wanted: Wanted, size: int, stall_seconds: float, progress: Progress) -> None:
        self.ticket = ticket
        self.seats: list[Seat] = []
        self.used: list[Used] = []
        self._broker = broker
        self._wanted = replace(wanted, image=None, formats=(), convert=None, blob=ticket.blob.id)
        self._size = size
        self._stall = stall_seconds
        self._progress = progress
        self._rounds = 0
        self._asked_at = time.monotonic()
        self._refused = False
        self._told: list[asyncio.Task[None]] = []
        self._adopt(ticket)

    def _adopt(self, ticket: Ticket) -> None:
        self.ticket = ticket
        for source in ticket.sources:
            if source.url is not None and not any(seat.store == source.store and seat.state == "corrupt" for seat in self.seats):
                state = "active" if source.state == "active" else "standby"
                reader = LocalReader if source.url.startswith("file:") else Reader
                seat = Seat(source, ticket.id, reader(self._size, self._stall), state)
                seat.state = "leased" if state == "active" else state
                self.seats.append(seat)

    def working(self) -> list[Seat]:
        return [seat for seat in self.seats if seat.state == "active"]

    def left(self) -> int:
        """How many sources have not been tried."""
        return sum(seat.state in ("leased", "standby") for seat in self.seats)

    async def next(self, *, leased_only: bool = False) -> Seat | None:
        """A further source to work with, leased if the broker can be reached; ``None`` when none is left."""
        for state in ("leased",) if leased_only else ("leased", "standby"):
            for seat in [seat for seat in self.seats if seat.state == state]:
                if state == "leased" or await self._activate(seat):
                    seat.state = "active"
                    seat.since = seat.renewed_at = time.monotonic()
                    return seat
        return None

    async def _activate(self, seat: Seat) -> bool:
        try:
            fresh = await self._ask(self._broker.activate(seat.ticket, seat.store, patience=0))
        except Busy:
            self._refused = True
            return False
        except BrokerError as error:
            if error.status < 500:
                seat.state = "failed"
                seat.detail = str(error)
                return False
            fresh = None
        except ClientError:
            fresh = None
        if fresh is not None:
            self._sign_again(fresh)
        return seat.source.expires_at > time.time()

    def _sign_again(self, ticket: Ticket) -> None:
        fresh = {source.store: source for source in ticket.sources if source.url is not None}
        for seat in self.seats:
            if seat.ticket == ticket.id and seat.store in fresh:
                seat.source = fresh[seat.store]

    async def handle(self, seat: Seat) -> tuple[str, Mapping[str, str]]:
        """A URL of this source that is good for some seconds yet. Raises `StoreTrouble` when there is none."""
        if seat.source.expires_at < time.time() + MARGIN_SECONDS:
            await self.refresh(seat)
        if seat.source.url is None or seat.source.expires_at <= time.time():
            raise StoreTrouble(Why.REFUSED, "its URL has expired and the broker gave no new one")
        return seat.source.url, seat.source.headers

    async def refresh(self, seat: Seat) -> bool:
        """Have the ticket signed again; whether that worked."""
        before = seat.source.url
        try:
            self._sign_again(await self._ask(self._broker.refresh(seat.ticket, patience=0)))
        except (BrokerError, ClientError):
            return False
        return seat.source.url != before

    async def renew(self) -> bool:
        """A new ticket after every source has failed; whether there is anything to try. Raises `TransferFailed` after some."""
        if self._rounds >= len(_PAUSES):
            raise TransferFailed(self.why(), "run the same command again: it resumes")
        await asyncio.sleep(_PAUSES[self._rounds])
        self._rounds += 1
        corrupt = [seat.store for seat in self.seats if seat.state == "corrupt"]
        failed = [seat.store for seat in self.seats if seat.state in ("failed", "slow")] if self._rounds == 1 else []
        avoid = sorted({*corrupt, *failed, *self._wanted.avoid})
        if await self._new_ticket(avoid, patience=self._broker.patience):
            self._progress.note("every source has failed; got a new ticket")
        return self.left() > 0

    def may_ask_again(self) -> bool:
        """Whether a new ticket is worth asking for while others work: some source was lost, and the last ticket is old enough."""
        is_lost = self._refused or any(seat.state in ("failed", "slow") for seat in self.seats)
        return is_lost and time.monotonic() - self._asked_at >= plan.AGAIN_SECONDS

    async def ask_again(self) -> bool:
        """Look for help beside the sources at work: what failed may be well again, what was full may have room. Whether there is any."""
        busy = [seat.store for seat in self.seats if seat.state in ("active", "corrupt")]
        return await self._new_ticket(sorted({*busy, *self._wanted.avoid})) and self.left() > 0

    async def _new_ticket(self, avoid: Sequence[str], *, patience: float = 0.0) -> bool:
        """Whether there is a new ticket; `patience` is for how many seconds to stand in line where stores are full."""
        wanted = self._wanted
        self._asked_at, self._refused = time.monotonic(), False
        asking = self._broker.download_ticket(
            blob=wanted.blob, only=wanted.only, prefer=wanted.prefer, avoid=avoid[:32], site=wanted.site, parallel=1, count=4,
            schemes=wanted.schemes, wait=None if patience else BROKER_SECONDS / 2,
        )  # fmt: skip
        try:
            ticket = await self._ask(asking, patience + BROKER_SECONDS)
        except (BrokerError, ClientError) as error:
            self._refused = True
            self._progress.note(f"no new ticket: {error}")
            return False
        self._adopt(ticket)
        return True

    def why(self) -> str:
        """Why nothing is left, store by store."""
        reasons = {seat.store: seat.detail or seat.state for seat in self.seats}
        return "no source delivered: " + ("; ".join(f"{store} {reason}" for store, reason in reasons.items()) or "the ticket named none")

    def progressed(self) -> None:
        """Bytes came: whatever failed before, new tickets may be asked for again."""
        self._rounds = 0

    def give_up(self, seat: Seat, outcome: str, detail: str) -> None:
        """This source is out, and the broker is told at once."""
        seat.state, seat.detail = outcome, detail
        seat.reader.wire.abort()
        self._progress.note(f"{seat.store}: {detail}; going on with another source" if self.left() else f"{seat.store}: {detail}")
        self.report(seat, outcome, detail)

    def report(self, seat: Seat, outcome: str, detail: str = "") -> None:
        """The final word about a source, told while the transfer goes on."""
        reader = seat.reader
        self.used.append(Used(seat.store, outcome, reader.received, reader.seconds, detail))
        self._tell(seat, outcome, detail, final=True)

    def keep(self, seat: Seat) -> None:
        """Renew the lease of a source at work, when it is time."""
        now = time.monotonic()
        if now - seat.renewed_at >= word_due(now - seat.since, seat.source.estimate.seconds):
            seat.renewed_at = now
            self._tell(seat, "ok", "", final=False)

    def _tell(self, seat: Seat, outcome: str, detail: str, *, final: bool) -> None:
        reader = seat.reader
        report = self._broker.report(
            seat.ticket, seat.store, outcome, bytes=reader.received, seconds=reader.seconds,
            setup_seconds=reader.setup_seconds, detail=detail, final=final, patience=1,
        )  # fmt: skip
        self._told.append(asyncio.create_task(self._quietly(report, "could not report to the broker")))

    async def settle(self, *, abandoned: bool = False) -> None:
        """Wait until the broker has been told everything. Gives back leases that were never used; all of them when `abandoned`."""
        states = ("leased", "active") if abandoned else ("leased",)
        for ticket in {seat.ticket for seat in self.seats if seat.state in states}:
            self._told.append(asyncio.create_task(self._quietly(self._broker.release(ticket, patience=0), "could not release a lease")))
        await asyncio.gather(*self._told)
        self._told.clear()

    async def _quietly(self, request: Awaitable[None], trouble: str) -> None:
        try:
            await self._ask(request)
        except (BrokerError, ClientError) as error:
            self._progress.note(f"{trouble}: {error}")

    async def _ask(self, request: Awaitable[Value], seconds: float | None = None) -> Value:
        try:
            async with asyncio.timeout(BROKER_SECONDS if seconds is None else seconds):
                return await request
        except TimeoutError:
            raise TransferFailed("the broker does not answer") from None
