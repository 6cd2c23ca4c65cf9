"""Uploads a file (or a pipe) by a ticket: parts in parallel, hashed while they are sent, resumed after a kill, committed.

The bytes are read once by the senders and once, from the page cache, by the thread that hashes the whole. The broker looks at
the store when the upload is committed; what it then says of digests is the last word.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar, TypeVarTuple
from uuid import UUID

from broker import errors
from broker.client.answers import Committed, Destination, Part, Pieces, Ticket
from broker.client.api import Broker
from broker.client.journal import PartDone, UploadState, load_upload, upload_journal
from broker.client.material import FileMaterial, PipeMaterial
from broker.client.progress import Progress
from broker.client.send import Body, Hashed, Sender, digest_of
from broker.client.sources import MARGIN_SECONDS, RENEW_SECONDS, Used
from broker.client.trouble import ClientError, LocalTrouble, TransferFailed
from broker.client.wire import StoreTrouble, Why

PARALLEL = 4
"""Parts under way at once."""

STALL_SECONDS = 60.0
"""A store that takes no megabyte for this long is given up."""

PIECE = 16 << 20
"""Length of pieces when the parts do not give one."""

_MOST_PIECES = 65536
_SIGN_AHEAD = 32
_ATTEMPTS = 4
_COMMITS = 3
_TICK_SECONDS = 0.1
_RETRY_SECONDS = 0.3

Value = TypeVar("Value")
Arguments = TypeVarTuple("Arguments")


@dataclass(frozen=True, slots=True)
class Offer:
    """What is uploaded and where it may go. `image` is an id or a new image as the contract writes it; `blob` means one more replica."""

    image: UUID | Mapping[str, Any] | None = None
    blob: UUID | None = None
    format: str | None = None
    purpose: str | None = None
    only: Sequence[str] = ()
    prefer: Sequence[str] = ()
    avoid: Sequence[str] = ()
    site: str | None = None

    def identity(self) -> dict[str, Any]:
        """What makes this upload another one than that of the same file for another purpose."""
        return {
            "image": self.image, "blob": self.blob, "format": self.format, "purpose": self.purpose,
            "only": list(self.only), "site": self.site,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A committed upload. `store` is ``None`` when the bytes were known already and none was sent."""

    image: UUID | None
    format: str | None
    blob: UUID
    size: int
    digests: Mapping[str, str]
    store: str | None
    seconds: float
    resumed: int
    destinations: tuple[Used, ...]


async def upload(
    broker: Broker,
    source: Path,
    offer: Offer,
    *,
    digest_first: bool = False,
    parallel: int = PARALLEL,
    progress: Progress | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> Uploaded:
    """Upload the file `source`, going on where an earlier run ended. With `digest_first` it is hashed before anything is asked for: then
    stores bind the digest, and known content is not sent at all.

    Raises `LocalTrouble`, `TransferFailed`, `BrokerUnreachable`, and what the broker says; `errors.Mismatch` when the store
    holds other bytes than were sent.
    """
    material = FileMaterial(source)
    work = _Upload(broker, offer, parallel, progress or Progress(), stall_seconds)
    try:
        return await work.file(material, digest_first)
    finally:
        await work.stop()
        material.close()


async def upload_stream(
    broker: Broker,
    stream: IO[bytes],
    offer: Offer,
    *,
    parallel: int = 2,
    progress: Progress | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> Uploaded:
    """Upload what comes from `stream`, of unknown size, in parts; it cannot be resumed. Raises as `upload` does."""
    work = _Upload(broker, offer, parallel, progress or Progress(), stall_seconds)
    try:
        return await work.pipe(PipeMaterial(stream))
    finally:
        await work.stop()


def piece_length(size: int, part_size: int | None) -> int:
    """The length of pieces: that of the parts when there are some, since they are hashed anyway."""
    if part_size is not None and 65536 <= part_size <= 1 << 32 and -(-size // part_size) <= _MOST_PIECES:
        return part_size
    return max(PIECE, -(-size // _MOST_PIECES + 65535) // 65536 * 65536)


class _Upload:
    def __init__(self, broker: Broker, offer: Offer, parallel: int, progress: Progress, stall_seconds: float) -> None:
        self._broker = broker
        self._offer = offer
        self._parallel = parallel
        self._progress = progress
        self._stall = stall_seconds
        self._pool = ThreadPoolExecutor(max_workers=parallel + 3, thread_name_prefix="send")
        self._senders: list[Sender] = []
        self._used: list[Used] = []
        self._urls: dict[int, Part] = {}
        self._signing = asyncio.Lock()
        self._began = time.monotonic()
        self._resumed = 0
        self._renewed_at = time.monotonic()

    async def stop(self) -> None:
        """End every thread."""
        for sender in self._senders:
            sender.wire.abort()
        self._pool.shutdown(wait=True)
        for sender in self._senders:
            sender.wire.close()

    # --- a file ---

    async def file(self, material: FileMaterial, digest_first: bool) -> Uploaded:
        self._progress.total = material.size
        identity = {**self._offer.identity(), "broker": self._broker.url}
        journal = load_upload(upload_journal(material.path, material.size, material.modified_ns, identity))
        material.begin_digest()
        digests: Mapping[str, str] | None = None
        if digest_first:
            self._progress.stage = "hashing"
            digests = {"sha256": await self._in_thread(material.sha256)}
        ticket, seen = await self._ticket(journal, material.size, digests)
        if ticket.known:
            journal.end()
            self._progress.done = material.size
            return self._result(ticket.image, ticket.format, ticket.blob.id, material.size, digests or {}, None)
        while True:
            place = self._place(ticket)
            if journal.ticket != ticket.id or journal.store != place.store or journal.part_size != (place.part_size or 0):
                self._remember(journal, ticket.id, place)
                seen = {}
            self._urls = {part.number: part for part in place.parts}
            try:
                committed = await self._deliver(material, ticket, place, journal, seen)
            except StoreTrouble as trouble:
                ticket = await self._next(ticket, place, str(trouble))
                continue
            journal.end()
            return self._result(committed.image, committed.format, committed.blob.id, material.size, committed.blob.digests, place.store)

    async def _ticket(self, journal: UploadState, size: int, digests: Mapping[str, str] | None) -> tuple[Ticket, Mapping[int, int]]:
        """The ticket of an earlier run with the parts that have arrived, or a new one."""
        self._progress.stage = "asking"
        if journal.ticket is not None:
            try:
                state = await self._broker.ticket(journal.ticket)
                if state.operation == "upload" and state.state in ("open", "committing", "committed"):
                    ticket = await self._broker.refresh(journal.ticket)
                    seen = next((place.seen for place in state.places if place.store == journal.store), {})
                    self._progress.note(f"going on with an upload that was begun: {len(seen)} parts have arrived")
                    return ticket, seen
            except (errors.NotFound, errors.Gone, errors.Conflict):
                pass
            self._progress.note("the upload that was begun has ended; beginning again")
        return await self._new_ticket(size, digests), {}

    async def _new_ticket(self, size: int | None, digests: Mapping[str, str] | None = None, avoid: Sequence[str] = ()) -> Ticket:
        offer = self._offer
        return await self._broker.upload_ticket(
            image=offer.image, blob=offer.blob, format=offer.format, purpose=offer.purpose, size=size, digests=digests, only=offer.only,
            prefer=offer.prefer, avoid=sorted({*offer.avoid, *avoid})[:32], site=offer.site, count=3,
        )  # fmt: skip

    def _place(self, ticket: Ticket) -> Destination:
        place = next((place for place in ticket.destinations if place.state == "active"), None)
        if place is None:
            raise TransferFailed("the ticket names no place to write to", "try again, or choose a store with --to")
        return place

    def _remember(self, journal: UploadState, ticket: UUID, place: Destination) -> None:
        try:
            journal.begin(ticket, place.store, place.part_size or 0)
        except OSError as error:
            self._progress.note(f"this upload cannot be resumed: {error.strerror}")

    async def _next(self, ticket: Ticket, failed: Destination, why: str) -> Ticket:
        """The ticket with another place active. Raises `TransferFailed` when none can be taken."""
        await self._report(ticket.id, failed.store, "failed", why)
        tried = {used.store for used in self._used}
        for place in ticket.destinations:
            if place.store in tried:
                continue
            try:
                fresh = await self._broker.activate(ticket.id, place.store)
            except (errors.Busy, errors.NoDestination, errors.StoreUnavailable) as error:
                self._progress.note(f"{place.store}: {error}")
                continue
            self._progress.note(f"{failed.store}: {why}; going on with {place.store}")
            active = tuple(other for other in fresh.destinations if other.store == place.store)
            rest = tuple(other for other in fresh.destinations if other.store != place.store)
            return replace(fresh, destinations=active + rest)
        reasons = "; ".join(f"{used.store} {used.detail}" for used in self._used)
        raise TransferFailed(f"no store took the bytes: {reasons}", "run the same command again: it resumes what can be resumed")

    async def _deliver(
        self, material: FileMaterial, ticket: Ticket, place: Destination, journal: UploadState, seen: Mapping[int, int]
    ) -> Committed:
        """Send everything to one place and commit. Raises `StoreTrouble` when the place fails."""
        self._progress.stage = "sending"
        self._senders = []
        began = time.monotonic()
        if place.part_size is None:
            if ticket.state == "open":
                whole = await self._single(ticket, place, material)
            else:
                whole = await self._in_thread(_hash_whole, Body(material.file, 0, material.size), place.kind)
            pieces: Pieces | None = Pieces(piece_length(material.size, None), "sha256", whole.pieces)
            parts: list[dict[str, Any]] = []
            digests = dict(whole.digests)
        else:
            numbers = range(1, -(-material.size // place.part_size) + 1)
            if ticket.state == "open":
                done = await self._known_parts(material, place, journal, seen)
                await self._send_parts(ticket, place, material, journal, done, [number for number in numbers if number not in done])
            else:  # all were there when an earlier run asked for the commit
                done = {number: await self._hashed_part(material, place, number) for number in numbers}
            pieces, parts, digests = self._declared(material.size, place.part_size, done)
        self._progress.stage = "committing"
        digests["sha256"] = await self._in_thread(material.sha256)
        material.require_unchanged()
        for attempt in range(_COMMITS):
            try:
                committed = await self._broker.commit(ticket.id, place.store, material.size, digests, pieces, parts)
                break
            except errors.NotUploaded as error:
                missing = list(error.extra.get("missing", ()))
                if attempt + 1 == _COMMITS or place.part_size is None or not missing:
                    raise StoreTrouble(Why.MISSING, "lost what it had taken") from None
                await self._send_parts(ticket, place, material, journal, done, missing)
        await self._report(ticket.id, place.store, "ok", "", time.monotonic() - began)
        return committed

    def _declared(
        self, size: int, part_size: int, done: Mapping[int, PartDone]
    ) -> tuple[Pieces | None, list[dict[str, Any]], dict[str, str]]:
        parts = [done[number] for number in sorted(done)]
        pieces = None
        if piece_length(size, part_size) == part_size:
            pieces = Pieces(part_size, "sha256", tuple(part.digests["sha256"] for part in parts))
        digests = {"sha256": parts[0].digests["sha256"]} if len(parts) == 1 else {}
        return pieces, [{"number": part.number, "size": part.size, "digests": dict(part.digests)} for part in parts], digests

    # --- one PUT ---

    async def _single(self, ticket: Ticket, place: Destination, material: FileMaterial) -> Hashed:
        sender = self._sender()
        length = piece_length(material.size, None)
        body = Body(material.file, 0, material.size)
        for attempt in range(_ATTEMPTS):
            url, headers = place.url, place.headers
            if url is None:
                raise StoreTrouble(Why.WRONG, "the ticket has no URL for it")
            try:
                return await self._watched(ticket, place, self._in_thread(sender.send, url, headers, body, _algorithms(place.kind), length))
            except StoreTrouble as trouble:
                if attempt and trouble.why is Why.WRONG and ("412" in trouble.text or "409" in trouble.text):
                    # An earlier try was written although its answer was lost; the commit looks at it.
                    return await self._in_thread(_hash_whole, body, place.kind)
                if not _again(trouble, attempt):
                    raise
                await self._pause(trouble, attempt)
                fresh = await self._broker.refresh(ticket.id)
                place = next((other for other in fresh.destinations if other.store == place.store), place)
        raise AssertionError("the last attempt raises")

    # --- parts ---

    async def _known_parts(
        self, material: FileMaterial, place: Destination, journal: UploadState, seen: Mapping[int, int]
    ) -> dict[int, PartDone]:
        """Parts that need not be sent again: the store has them, and what we noted of them is still what the file holds."""
        done: dict[int, PartDone] = {}
        assert place.part_size is not None
        for number, part in journal.parts.items():
            body = material.body(number, place.part_size)
            if body.length <= 0 or seen.get(number) != body.length or part.size != body.length:
                continue
            if await self._in_thread(digest_of, body, _algorithms(place.kind)) == part.digests:
                done[number] = part
                self._resumed += body.length
        self._progress.resumed = self._resumed
        return done

    async def _hashed_part(self, material: FileMaterial, place: Destination, number: int) -> PartDone:
        assert place.part_size is not None
        body = material.body(number, place.part_size)
        return PartDone(number, body.length, await self._in_thread(digest_of, body, _algorithms(place.kind)))

    async def _send_parts(
        self,
        ticket: Ticket,
        place: Destination,
        material: FileMaterial,
        journal: UploadState,
        done: dict[int, PartDone],
        numbers: Sequence[int],
    ) -> None:
        waiting = deque(numbers)

        async def work(sender: Sender) -> None:
            while waiting:
                number = waiting.popleft()
                assert place.part_size is not None
                body = material.body(number, place.part_size)
                part = await self._part(ticket, place, sender, number, body, waiting)
                done[number] = part
                try:
                    journal.add(part)
                except OSError as error:
                    self._progress.note(f"this upload cannot be resumed: {error.strerror}")

        await self._together(ticket, place, [work(self._sender()) for _ in range(min(self._parallel, len(numbers)))])

    async def _part(
        self, ticket: Ticket, place: Destination, sender: Sender, number: int, body: Body, waiting: Sequence[int], size: int | None = None
    ) -> PartDone:
        """Send one part, again if need be; from the second try on its digests are bound. Raises `StoreTrouble`."""
        digests: Mapping[str, str] | None = None
        for attempt in range(_ATTEMPTS):
            url = await self._signed(ticket.id, place.store, number, waiting, digests, size)
            try:
                hashed = await self._in_thread(sender.send, url.url or "", url.headers, body, _algorithms(place.kind))
                return PartDone(number, body.length, hashed.digests)
            except StoreTrouble as trouble:
                if not _again(trouble, attempt):
                    raise
                await self._pause(trouble, attempt)
                digests = await self._in_thread(digest_of, body, _algorithms(place.kind))
        raise AssertionError("the last attempt raises")

    async def _signed(
        self, ticket: UUID, store: str, number: int, waiting: Sequence[int], digests: Mapping[str, str] | None, size: int | None
    ) -> Part:
        """A URL for this part that is good for some seconds yet, with those of the next parts in the same request."""
        async with self._signing:
            part = self._urls.pop(number, None)
            if digests is None and size is None and part is not None and part.url and part.expires_at > time.time() + MARGIN_SECONDS:
                return part
            numbers = [number] if digests or size is not None else [number, *list(waiting)[: _SIGN_AHEAD - 1]]
            signed = await self._broker.parts(ticket, store, numbers, {number: digests} if digests else None, size)
            self._urls |= {part.number: part for part in signed}
            part = self._urls.pop(number, None)
        if part is None or not part.url:
            raise StoreTrouble(Why.WRONG, f"the broker gave no URL for part {number}")
        return part

    async def _together(self, ticket: Ticket, place: Destination, works: Sequence[Any]) -> None:
        """Run all; the first failure ends the others."""
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            await self._watched(ticket, place, asyncio.gather(*tasks))
        finally:
            if any(not task.done() or task.cancelled() or task.exception() for task in tasks):
                for sender in self._senders:
                    sender.wire.abort()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _watched(self, ticket: Ticket, place: Destination, work: Awaitable[Value]) -> Value:
        """Show progress and renew the lease while `work` runs; interrupted, end it and hear how, else asyncio would complain."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                finished, _ = await asyncio.wait([task], timeout=_TICK_SECONDS)
                sent = sum(sender.sent for sender in self._senders)
                self._progress.done = self._resumed + sent
                self._progress.stores = {place.store: sent}
                if finished:
                    return task.result()
                if time.monotonic() - self._renewed_at > RENEW_SECONDS:
                    self._renewed_at = time.monotonic()
                    await self._tell(ticket.id, place.store, "ok", "", time.monotonic() - self._began, final=False)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    # --- a pipe ---

    async def pipe(self, material: PipeMaterial) -> Uploaded:
        ticket = await self._new_ticket(None)
        try:
            return await self._pipe(material, ticket)
        except BaseException:
            await self._abandon(ticket.id)
            raise

    async def _pipe(self, material: PipeMaterial, ticket: Ticket) -> Uploaded:
        place = self._place(ticket)
        if place.part_size is None:
            raise TransferFailed(f"{place.store} takes no upload of unknown size", "save it to a file first, or name another store")
        self._urls = {part.number: part for part in place.parts}
        self._progress.stage = "sending"
        done: dict[int, PartDone] = {}
        reading = asyncio.Lock()
        began = time.monotonic()
        part_size = place.part_size

        async def work(sender: Sender) -> None:
            while True:
                async with reading:
                    spool = await self._in_thread(material.next, part_size)
                    number = len(done) + 1
                    if spool is None:
                        return
                    done[number] = PartDone(number, 0, {})
                with spool:
                    length = os.fstat(spool.fileno()).st_size
                    last = material.size if length < part_size else None
                    done[number] = await self._part(ticket, place, sender, number, Body(spool.fileno(), 0, length), (), last)

        try:
            await self._together(ticket, place, [work(self._sender()) for _ in range(self._parallel)])
        except StoreTrouble as trouble:
            await self._report(ticket.id, place.store, "failed", str(trouble))
            raise TransferFailed(f"{place.store} {trouble}", "a pipe passes once: run the pipeline again") from None
        if not material.size:
            raise LocalTrouble("the input is empty", "an image holds at least one byte")
        self._progress.stage = "committing"
        pieces, parts, digests = self._declared(material.size, part_size, done)
        committed = await self._broker.commit(ticket.id, place.store, material.size, digests | {"sha256": material.sha256()}, pieces, parts)
        await self._report(ticket.id, place.store, "ok", "", time.monotonic() - began)
        return self._result(committed.image, committed.format, committed.blob.id, material.size, committed.blob.digests, place.store)

    async def _abandon(self, ticket: UUID) -> None:
        try:
            await self._broker.release(ticket, patience=2)
        except (errors.BrokerError, ClientError) as error:
            self._progress.note(f"could not give the upload up: {error}")

    # --- the rest ---

    def _sender(self) -> Sender:
        sender = Sender(self._stall)
        self._senders.append(sender)
        return sender

    async def _pause(self, trouble: StoreTrouble, attempt: int) -> None:
        await asyncio.sleep(min(trouble.retry_after, 30.0) or _RETRY_SECONDS * 2**attempt)

    async def _report(self, ticket: UUID, store: str, outcome: str, detail: str, seconds: float | None = None) -> None:
        spent = max((sender.seconds for sender in self._senders), default=0.0) if seconds is None else seconds
        self._used.append(Used(store, outcome, sum(sender.sent for sender in self._senders), spent, detail))
        await self._tell(ticket, store, outcome, detail, spent, final=True)

    async def _tell(self, ticket: UUID, store: str, outcome: str, detail: str, seconds: float, *, final: bool) -> None:
        setup = [sender.setup_seconds for sender in self._senders if sender.setup_seconds is not None]
        sent = sum(sender.sent for sender in self._senders)
        try:
            await self._broker.report(
                ticket, store, outcome, bytes=sent, seconds=seconds, setup_seconds=min(setup, default=None), detail=detail, final=final,
                patience=1,
            )  # fmt: skip
        except (errors.BrokerError, ClientError) as error:
            self._progress.note(f"could not report to the broker: {error}")

    def _result(
        self, image: UUID | None, format: str | None, blob: UUID, size: int, digests: Mapping[str, str], store: str | None
    ) -> Uploaded:
        self._progress.stage = "done"
        return Uploaded(image, format, blob, size, digests, store, time.monotonic() - self._began, self._resumed, tuple(self._used))

    async def _in_thread(self, function: Callable[[*Arguments], Value], *arguments: *Arguments) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def _algorithms(kind: str) -> tuple[str, ...]:
    """Digests of a part: SHA-256 for everyone; MD5 where stores tell no other one of what they hold (S3, Swift)."""
    return ("sha256",) if kind == "http" else ("sha256", "md5")


def _again(trouble: StoreTrouble, attempt: int) -> bool:
    """Whether the same place is tried again."""
    if attempt + 1 >= _ATTEMPTS or trouble.why is Why.STOPPED:
        return False
    if trouble.why in (Why.REFUSED, Why.STALLED):
        return attempt < 1
    return trouble.why in (Why.BUSY, Why.BROKEN)


def _hash_whole(body: Body, kind: str) -> Hashed:
    """The digests of a body that is at the store already."""
    digests = digest_of(body, _algorithms(kind))
    length = piece_length(body.length, None)
    starts = range(0, body.length, length)
    pieces = [digest_of(Body(body.file, start, min(length, body.length - start)), ("sha256",))["sha256"] for start in starts]
    return Hashed(digests, tuple(pieces))
