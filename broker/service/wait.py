"""Waiting for a slot: a request whose stores are full stays with its broker until its turn comes, its time is over, or its client is gone.

Rules
- Who waits is told to the catalogue (`broker.catalog.waits`), so that all brokers see it and the database decides whose turn it is.
- One loop looks after all that wait here, and only while somebody does: every `TICK_SECONDS`, sooner when a lease is given back, it tells
  that this broker lives, who has come and who has gone, and asks whose turn it is. Only those ask for leases again.
- Each asks again as if for the first time, so that nothing is granted that could not be granted now; and all do once every
  `LOOK_AGAIN_SECONDS`, since the blob may have come to lie elsewhere.
- A turn is a hint: the grant decides. Without the catalogue everybody waits on, and is told at the end that it is away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import structlog

from broker import errors
from broker.catalog import contention, waits
from broker.catalog.waits import Wait
from broker.model import Client, Direction
from broker.service.parties import party_of

if TYPE_CHECKING:
    from broker.service.context import Context

TICK_SECONDS = 0.25
"""How often it is asked whose turn it is. Far below `contention.DEAD_SECONDS`."""

LOOK_AGAIN_SECONDS = 5.0

RETURN_SECONDS = 5.0
"""Who comes back when it was told to waits for so long by itself: between those who wait, no slot would ever be free for it."""

_BREATH_SECONDS = 0.005
"""Between two looks at least, however many leases are given back."""

Attempt = Callable[[frozenset[int]], Awaitable[dict[str, Any]]]
"""Asks for the ticket; the stores that should have a slot for it are named where they are known."""

_log = structlog.get_logger(__name__)


class Waiter:
    """One request that waits. `is_gone` tells whether its client has left."""

    __slots__ = ("entry", "is_gone", "stores", "turn")

    def __init__(self, entry: Wait, is_gone: Callable[[], bool]) -> None:
        self.entry = entry
        self.is_gone = is_gone
        self.stores: frozenset[int] = frozenset()
        self.turn = asyncio.Event()

    async def next_turn(self, seconds: float) -> frozenset[int]:
        """The stores that should have a slot for it now; none when the time is over first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self.turn.wait()
        stores, self.stores = self.stores, frozenset()
        self.turn.clear()
        return stores


class WaitingRoom:
    """Everybody who waits at one broker."""

    def __init__(self) -> None:
        self._desk = uuid4()
        self._waiters: dict[str, list[Waiter]] = {}
        self._come: list[Wait] = []
        self._gone: list[str] = []
        self._by_project: Counter[str] = Counter()
        self._loop: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self.is_closing = False

    async def close(self) -> None:
        """Send everybody away."""
        self.is_closing = True
        for waiter in self._everybody():
            waiter.turn.set()
        if (loop := self._loop) is not None:
            await asyncio.wait([loop], timeout=TICK_SECONDS * 4)
            loop.cancel()

    def has_place(self, project: str, most: int) -> bool:
        """Whether one more of that project may wait here."""
        return not self.is_closing and self._by_project[project] < most

    def enter(self, context: Context, waiter: Waiter) -> None:
        """Wait from now on."""
        self._waiters.setdefault(waiter.entry.id, []).append(waiter)
        self._by_project[waiter.entry.party.project] += 1
        self._come.append(waiter.entry)
        self._wake.set()
        if self._loop is None:
            self._loop = asyncio.get_running_loop().create_task(self._tend(context))

    def change(self, waiter: Waiter, store_ids: Sequence[int]) -> None:
        """Wait for other stores, where that is so; the place in the line stays."""
        if store_ids != waiter.entry.store_ids and store_ids:
            waiter.entry = waiter.entry._replace(store_ids=store_ids)
            self._come.append(waiter.entry)

    def leave(self, waiter: Waiter) -> None:
        """Wait no more."""
        id, project = waiter.entry.id, waiter.entry.party.project
        same = self._waiters[id]
        same.remove(waiter)
        if not same:
            del self._waiters[id]
            self._gone.append(id)
            self._wake.set()
        self._by_project[project] -= 1
        if not self._by_project[project]:
            del self._by_project[project]

    def _everybody(self) -> list[Waiter]:
        return [waiter for same in self._waiters.values() for waiter in same]

    # -- the loop

    async def _tend(self, context: Context) -> None:
        try:
            while self._waiters or self._gone:
                try:
                    async with context.db.acquire(timeout=5) as connection:
                        await connection.add_listener("slots", self._on_release)
                        try:
                            while self._waiters or self._gone:
                                await self._look(context, connection)
                                await self._pause()
                        finally:
                            if not connection.is_closed():
                                await connection.remove_listener("slots", self._on_release)
                except (errors.Unavailable, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                    if not self._waiters:
                        return  # what is left will not be seen, and is swept away
                    _log.warning("nobody's turn can be told", error=type(error).__name__)
                    await asyncio.sleep(TICK_SECONDS)
        finally:
            self._loop = None
            context.metrics.waiting.replace({})
            if self._waiters and not self.is_closing:
                self._loop = asyncio.get_running_loop().create_task(self._tend(context))

    async def _look(self, context: Context, connection: Any) -> None:
        """Tell what has changed, and wake those whose turn it is."""
        for waiter in self._everybody():
            if waiter.is_gone():
                waiter.turn.set()
        come, gone = self._come, self._gone
        self._come, self._gone = [], []
        come = [entry for entry in come if entry.id in self._waiters]
        gone = [id for id in gone if id not in self._waiters]
        try:
            with context.metrics.database_seconds.time("wait"):
                await waits.tend(connection, self._desk, come, gone)
                due = await contention.due(connection, self._desk)
        except BaseException:
            self._come, self._gone = come + self._come, gone + self._gone
            raise
        for id, stores in due.items():
            for waiter in self._waiters.get(id, ()):
                waiter.stores = frozenset(stores)
                waiter.turn.set()
        standing: Counter[tuple[str, ...]] = Counter()
        for waiter in self._everybody():
            for store_id in waiter.entry.store_ids:
                store = context.memory.store_by_id(store_id)
                if store is not None:
                    standing[store.name, waiter.entry.direction.value] += 1
        context.metrics.waiting.replace(dict(standing))

    async def _pause(self) -> None:
        await asyncio.sleep(_BREATH_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_SECONDS):
                await self._wake.wait()
        self._wake.clear()

    def _on_release(self, *_: Any) -> None:
        self._wake.set()


async def patiently(
    context: Context, client: Client, id: str, direction: Direction, seconds: float | None, attempt: Attempt, is_gone: Callable[[], bool]
) -> dict[str, Any]:
    """What `attempt` gives, waiting up to `seconds` while it is refused for want of slots or quota; ``None`` leaves it to the broker
    whether to wait. Raises what it raises."""
    clock = asyncio.get_running_loop().time
    called = clock()
    try:
        return await attempt(frozenset())
    except (errors.Busy, errors.QuotaExceeded) as error:
        refusal: errors.Busy | errors.QuotaExceeded = error
    stays = seconds is not None
    if seconds is None:
        seconds = RETURN_SECONDS if isinstance(refusal, errors.Busy) and refusal.returned else 0.0
    if not seconds:
        raise refusal
    end = called + seconds
    room, party = context.waiting, party_of(context, client.principal)
    if not refusal.stores or not room.has_place(party.project, context.policy.admit.most_waiting):
        raise refusal
    began, told, outcome = clock(), refusal.retry_after, "in-vain"
    waiter = Waiter(Wait(id, party, direction, sorted(refusal.stores), refusal.bytes), is_gone)
    room.enter(context, waiter)
    try:
        while True:
            if stays and isinstance(refusal, errors.Busy):
                context.promises.withdraw(refusal.who)
            due = await waiter.next_turn(min(end - clock(), LOOK_AGAIN_SECONDS))
            if is_gone():
                outcome = "gone"
                raise refusal
            try:
                ticket = await attempt(due)
            except (errors.Busy, errors.QuotaExceeded) as error:
                refusal = error
                if clock() >= end or room.is_closing:
                    raise
                room.change(waiter, sorted(refusal.stores))
                continue
            outcome = "granted"
            if told and stays:
                context.metrics.retry_after_ratio.observe((clock() - began) / told, "waited")
            return ticket
    finally:
        room.leave(waiter)
        context.metrics.wait_seconds.observe(clock() - began, direction.value, outcome)
