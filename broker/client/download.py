"""Downloads a blob by a ticket: from the best source, from several at once when that helps, from the next one when one fails.

The event loop decides, threads move the bytes (`fetch`), another thread hashes what has become contiguous (`verify`). What is
decided is in `plan`, which sources there are in `sources`, what survives a kill in `journal`, the file itself in `target`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, TypeVarTuple
from uuid import UUID

from broker.client import plan
from broker.client.answers import Blob, Ticket
from broker.client.api import Broker
from broker.client.fetch import Window
from broker.client.journal import DownloadState, Origin, compacted
from broker.client.plan import Running, Span, Spans
from broker.client.progress import Progress
from broker.client.sources import Seat, Sources, Used, Wanted
from broker.client.target import Target
from broker.client.trouble import ClientError, TransferFailed, VerificationFailed
from broker.client.verify import GrowingDigest, bad_pieces, chosen
from broker.client.wire import StoreTrouble, Why
from broker.errors import BrokerError

STALL_SECONDS = 15.0
"""A source that sends nothing for this long is given up."""

MOST_SOURCES = 4
"""Sources at once when the engine decides."""

_TICK_SECONDS = 0.1
_SAVE_SECONDS = 1.0
_SAVE_BYTES = 64 << 20
_SETTLE_SECONDS = 1.0
_STILL_SECONDS = 1.5
_REPAIRS = 5

Value = TypeVar("Value")
Arguments = TypeVarTuple("Arguments")


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A verified file. `verified_by` names the digest algorithm, or ``size`` where no digest is known."""

    path: Path
    blob: Blob
    image: UUID | None
    format: str | None
    size: int
    seconds: float
    resumed: int
    verified_by: str
    sources: tuple[Used, ...]
    converted_from: str | None = None
    """The format that was fetched and verified, where the file is another one (`broker.client.convert`)."""
    converting_seconds: float = 0.0


async def download(
    broker: Broker,
    wanted: Wanted,
    path: Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> Downloaded:
    """Download what is `wanted` to `path`, going on where an earlier run ended.

    Raises `LocalTrouble`, `TransferFailed` or `VerificationFailed` (nothing is under the target's name then), `BrokerUnreachable`, and
    what the broker says (`broker.errors`).
    """
    progress = progress or Progress()
    target = Target(path, replace=replace)
    try:
        try:
            parallel = wanted.parallel or 1
            ticket = await broker.download_ticket(
                image=wanted.image, blob=wanted.blob, formats=wanted.formats, convert=wanted.convert, only=wanted.only,
                prefer=wanted.prefer, avoid=wanted.avoid, site=wanted.site, parallel=parallel,
                count=max(3, parallel + 1), schemes=wanted.schemes,
            )  # fmt: skip
        except BaseException:
            target.discard_empty()
            raise
        return await _Download(broker, wanted, ticket, target, progress, stall_seconds).run()
    finally:
        target.close()


class _Download:
    def __init__(self, broker: Broker, wanted: Wanted, ticket: Ticket, target: Target, progress: Progress, stall_seconds: float) -> None:
        if ticket.blob.size is None:
            raise TransferFailed("the ticket names a blob without a size")
        self._broker = broker
        self._ticket = ticket
        self._target = target
        self._progress = progress
        self._size = ticket.blob.size
        self._algorithm = chosen(ticket.blob.digests)
        self._sources = Sources(broker, ticket, wanted, self._size, stall_seconds, progress)
        self._most = wanted.parallel or MOST_SOURCES
        self._origins: list[Origin] = []
        self._done: Spans = ()
        self._digest: GrowingDigest | None = None
        self._tasks: dict[Seat, asyncio.Task[None]] = {}
        self._joining: asyncio.Task[None] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._saved_at = time.monotonic()
        self._saved_bytes = 0
        self._ticked_at = time.monotonic()
        self._changed = asyncio.Event()
        self._pool = ThreadPoolExecutor(max_workers=24, thread_name_prefix="fetch")
        self._resumed = 0
        self._alone = False

    # --- the whole ---

    async def run(self) -> Downloaded:
        began = time.monotonic()
        self._resume()
        try:
            for _ in range(_REPAIRS):
                self._progress.stage = "fetching"
                await self._fetch_all()
                self._progress.stage = "verifying"
                if await self._verified():
                    break
            else:
                raise VerificationFailed("the bytes stay wrong after several repairs", "tell the operator: replicas of this blob differ")
            await self._in_thread(self._target.finish, self._size)
        except BaseException:
            await self._stop()
            self._keep()
            await self._sources.settle(abandoned=True)
            raise
        await self._stop()
        await self._reports()
        self._progress.stage = "done"
        return Downloaded(
            self._target.path, self._ticket.blob, self._ticket.image, self._ticket.format, self._size,
            time.monotonic() - began, self._resumed, self._algorithm or "size", tuple(self._sources.used),
        )  # fmt: skip

    def _resume(self) -> None:
        state = self._target.resume(str(self._ticket.blob.id), self._size)
        self._target.require_room(self._size, state)
        if state is not None:
            self._origins, self._done = list(state.origins), state.done
        self._resumed = self._progress.resumed = self._progress.done = plan.covered(self._done)
        self._progress.total = self._size

    def _keep(self) -> None:
        """The last word to the journal before giving up."""
        if self._origins and self._target.temporary.exists():
            try:
                self._target.save(self._state())
            except ClientError as error:
                self._progress.note(str(error))
        elif self._target.temporary.exists():
            self._target.discard()

    async def _stop(self) -> None:
        """End every thread; nothing writes to the file afterwards."""
        for seat in self._sources.seats:
            seat.reader.wire.abort()
        others = [task for task in (*self._tasks.values(), self._joining, self._saving) if task is not None]
        for task in others:
            if task is not self._saving:
                task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._digest is not None:
            self._digest.close()
        self._pool.shutdown(wait=True)
        for seat in self._sources.seats:
            seat.reader.wire.close()

    async def _reports(self) -> None:
        seats = self._sources.working()
        best = max((seat.reader.received for seat in seats), default=0)
        for seat in seats:
            slow = seat.detail == "slow" and seat.reader.received < best
            if slow or seat.reader.received:
                self._sources.report(seat, "slow" if slow else "ok")
        await self._sources.settle()

    # --- fetching ---

    async def _fetch_all(self) -> None:
        if self._algorithm and self._digest is None:
            self._digest = GrowingDigest(self._target.file, self._algorithm, self._size)
        while plan.missing(self._done, self._size):
            await self._staff()
            if self._tasks:
                await asyncio.wait(self._tasks.values(), timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(_TICK_SECONDS)
            await self._tick()
        for seat in list(self._tasks):
            # Nobody waits for a source whose bytes another one has delivered.
            if seat.window is not None:
                seat.detail = "slow"
                seat.reader.wire.abort()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    async def _staff(self) -> None:
        """Somebody must be at work: leased sources first, then standby ones, then a new ticket."""
        for seat, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[seat]
                if error := task.exception():
                    raise error
        if self._joining is not None and self._joining.done():
            joined, self._joining = self._joining, None
            joined.result()
        several = self._size >= plan.SEVERAL_FROM and not self._alone
        while several and len(self._tasks) < self._most and (leased := await self._sources.next(leased_only=True)):
            self._start(leased)
        while not self._tasks and self._joining is None:
            found = self._idle_again() or await self._sources.next()
            if found is not None:
                self._start(found)
            else:
                await self._sources.renew()

    def _idle_again(self) -> Seat | None:
        """A source that had nothing left to do and is wanted again, for a repair."""
        return next((seat for seat in self._sources.working() if seat not in self._tasks and not seat.reader.wire.stopped), None)

    def _start(self, seat: Seat) -> None:
        chunk = plan.chunk_for(self._size, len(self._tasks) + 1)
        for other in self._sources.working():
            if other is not seat and other.window is not None and (at := plan.share(self._running(other), chunk=chunk)) is not None:
                other.window.cut(at)
        self._tasks[seat] = asyncio.create_task(self._work(seat))

    async def _join(self) -> None:
        seat = await self._sources.next()
        if seat is not None:
            self._progress.note(f"{seat.store}: helps")
            self._start(seat)

    async def _join_anew(self) -> None:
        if await self._sources.ask_again():
            await self._join()

    async def _work(self, seat: Seat) -> None:
        """One source at work until nothing is left for it, or it fails."""
        while seat.state == "active" and plan.missing(self._done, self._size):
            window = self._take(seat)
            if window is None:
                self._changed.clear()
                try:
                    async with asyncio.timeout(0.2):
                        await self._changed.wait()
                except TimeoutError:
                    pass
                continue
            seat.window = window
            failure: StoreTrouble | None = None
            try:
                url, headers = await self._sources.handle(seat)
                await self._in_thread(seat.reader.fetch, url, headers, window, self._target.file)
            except StoreTrouble as trouble:
                failure = trouble
            finally:
                self._put_back(seat, window)
            if failure is not None and not await self._again(seat, failure, window):
                return

    def _take(self, seat: Seat) -> Window | None:
        if seat.reader.ignores_ranges and any(not other.reader.ignores_ranges for other in self._tasks if other is not seat):
            return None  # it would send everything from the first byte for each range: a reserve, no more
        others = [other for other in self._sources.working() if other.window is not None and other is not seat]
        windows = [other.window for other in others if other.window is not None]
        free = plan.without(plan.missing(self._done, self._size), [Span(window.start, window.end) for window in windows])
        chunk = plan.chunk_for(self._size, len(self._tasks))
        running = [self._running(other) for other in others]
        taken = plan.take(free, running, seat.rate, alone=len(self._tasks) <= 1, chunk=chunk)
        if taken is None:
            return None
        if taken.cut is None:
            return Window(*taken.span)
        giver, given = others[taken.cut], windows[taken.cut]
        start = given.cut(taken.span.start)
        if taken.span.start == running[taken.cut].position:
            # All that was left is taken, so its thread is not waited for; what it has written counts.
            self._put_back(giver, given)
            self._sources.give_up(giver, "slow", "stood still while another source could help")
        return Window(start, taken.span.end) if start < taken.span.end else None

    def _put_back(self, seat: Seat, window: Window) -> None:
        if seat.window is not window:
            return  # another source has taken over meanwhile, and this was done
        seat.window = None
        end = window.cut(window.position)
        if end > window.start:
            self._sources.progressed()
            self._origins.append(Origin(window.start, end, seat.store))
            self._done = plan.union(self._done, [Span(window.start, end)])
        self._changed.set()

    async def _again(self, seat: Seat, trouble: StoreTrouble, window: Window) -> bool:
        """Whether a source that failed gets another chance. If not, it is out."""
        if trouble.why is Why.STOPPED or seat.state != "active":
            return False
        if trouble.why is Why.REFUSED and not seat.signed_again:
            seat.signed_again = True
            if await self._sources.refresh(seat):
                return True
        others = self._sources.left() + len(self._sources.working()) - 1
        if trouble.why is Why.BUSY and seat.retries < 3 and (not others or 0 < trouble.retry_after <= 1):
            seat.retries += 1
            await asyncio.sleep(min(trouble.retry_after or 1.0, 10.0))
            return True
        if trouble.why is Why.BROKEN and seat.retries < 2 and window.position > window.start:
            seat.retries += 1
            return True
        self._sources.give_up(seat, "failed", str(trouble))
        return False

    def _running(self, seat: Seat) -> Running:
        assert seat.window is not None
        rate = seat.rate
        if rate == 0 and time.monotonic() - seat.window.began < _SETTLE_SECONDS:
            rate = seat.source.estimate.rate  # it has only just been asked
        return Running(seat.window.position, seat.window.end, rate)

    # --- looking after it ---

    async def _tick(self) -> None:
        now = time.monotonic()
        working = self._sources.working()
        reached = plan.union(self._done, [Span(seat.window.start, seat.window.position) for seat in working if seat.window is not None])
        held = plan.covered(reached)
        if self._digest is not None:
            self._digest.advance(plan.prefix(reached))
        self._progress.done = held
        self._progress.stores = {seat.store: seat.reader.received for seat in self._sources.seats if seat.reader.received}
        self._measure(working, now)
        if self._saving is None or self._saving.done():
            if self._saving is not None:
                saved, self._saving = self._saving, None
                saved.result()
            if held - self._saved_bytes >= _SAVE_BYTES or (now - self._saved_at >= _SAVE_SECONDS and held != self._saved_bytes):
                self._saved_at, self._saved_bytes = now, held
                self._saving = asyncio.create_task(self._in_thread(self._target.save, self._state()))
        self._balance(working, held, now)
        for seat in working:
            self._sources.keep(seat)

    def _measure(self, working: list[Seat], now: float) -> None:
        elapsed = now - self._ticked_at
        if elapsed < _TICK_SECONDS / 2:
            return
        self._ticked_at = now
        for seat in working:
            recent = (seat.reader.received - seat.counted) / elapsed
            seat.counted = seat.reader.received
            if seat.window is None:
                continue  # what it can do is not known better by its being idle
            if recent > 0:
                seat.heard_at = now
            fresh = min(1.0, elapsed)
            seat.rate = recent if seat.rate == 0 else seat.rate * (1 - fresh) + recent * fresh
            if now - max(seat.heard_at, seat.window.began) >= _STILL_SECONDS:
                seat.rate = 0.0

    def _balance(self, working: list[Seat], held: int, now: float) -> None:
        """More sources while they help, fewer when one is far slower than the rest."""
        busy = [seat for seat in working if seat.window is not None]
        for store in plan.too_slow({seat.store: seat.rate for seat in busy}, {seat.store: now - seat.since for seat in busy}):
            for seat in busy:
                if seat.store == store:
                    self._sources.give_up(seat, "slow", "far slower than the others")
        rate = sum(seat.rate for seat in busy)
        settled = all(now - seat.since >= _SETTLE_SECONDS for seat in working)
        wanted = plan.wants_another(self._size - held, self._size, rate, len(working), self._most)
        if wanted and settled and self._joining is None and not self._alone:
            if self._sources.left():
                self._joining = asyncio.create_task(self._join())
            elif self._sources.may_ask_again():
                self._joining = asyncio.create_task(self._join_anew())

    def _state(self) -> DownloadState:
        windows = [(seat.store, seat.window) for seat in self._sources.working() if seat.window is not None]
        running = [Origin(window.start, window.position, store) for store, window in windows if window.position > window.start]
        return DownloadState(str(self._ticket.blob.id), self._size, self._ticket.blob.digests, compacted([*self._origins, *running]))

    # --- verifying ---

    async def _verified(self) -> bool:
        """Whether the whole digest is right. If not, what is wrong has been thrown away, and whoever sent it is out."""
        if self._algorithm is None or self._digest is None:
            return True
        try:
            observed = await self._in_thread(self._digest.finish)
        finally:
            self._digest = None
        if observed == self._ticket.blob.digests[self._algorithm]:
            return True
        self._progress.note(f"the {self._algorithm} differs; looking for the bytes that are wrong")
        blob = self._ticket.blob
        try:
            blob = await self._broker.blob(blob.id, patience=2)
        except (BrokerError, ClientError):
            self._progress.note("the broker tells no digests of pieces")
        self._blame(await self._in_thread(self._bad, blob))
        return False

    def _bad(self, blob: Blob) -> list[Span]:
        whole = [Span(0, self._size)]
        return (bad_pieces(self._target.file, self._size, blob.pieces) or whole) if blob.pieces is not None else whole

    def _blame(self, bad: list[Span]) -> None:
        """Throw bad pieces away. A store that sent one of them alone is corrupt; where several mixed, go on one at a time."""
        guilty: set[str] = set()
        for span in bad:
            senders = {origin.store for origin in self._origins if origin.start < span.end and span.start < origin.end}
            if len(senders) == 1:
                guilty |= senders
        self._alone = not guilty
        kept: list[Origin] = []
        for origin in self._origins:
            rest = plan.without((Span(origin.start, origin.end),), bad)
            kept += [Origin(span.start, span.end, origin.store) for span in rest]
        self._origins = kept
        self._done = plan.union(Span(origin.start, origin.end) for origin in kept)
        for store in guilty:
            seat = next((seat for seat in self._sources.seats if seat.store == store and seat.state == "active"), None)
            if seat is not None:
                self._sources.give_up(seat, "corrupt", "sent bytes that differ from the digest")
        if not self._sources.left() and not self._sources.working():
            self._target.discard()
            raise VerificationFailed(
                f"every source sent bytes that differ from the blob's {self._algorithm}", "nothing was kept; the broker has been told"
            )

    async def _in_thread(self, function: Callable[[*Arguments], Value], *arguments: *Arguments) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
