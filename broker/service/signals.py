"""What clients tell without a report is counted (`broker.signals` says as what), some time later and beside all requests."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from broker import signals
from broker.catalog import reports
from broker.catalog import signals as records
from broker.catalog.reports import ReportRow
from broker.catalog.tickets import TicketRecord
from broker.model import Store
from broker.service import places
from broker.service.context import Context
from broker.service.places import Recorded
from broker.service.report import Told, row_of
from broker.signals import Signal
from broker.voices import voice

REPORT_SECONDS = 60.0
"""So long after a commit a report may come yet; then the time until the commit is taken for one."""


async def take_repeats(context: Context) -> int:
    """Requests that came again: the store that came first may have failed the client. Returns how many count."""
    found = {UUID(asked.ticket): asked.store for asked in context.repeats.take()}
    if not found:
        return 0
    rows = []
    for record in await records.unsettled(context.db, list(found)):
        store = context.memory.store(found[record.id])
        place = None if store is None else _place(record, store.id)
        if store is not None and place is not None:
            rows.append(row_of(context, record, store, place, _silence(Signal.REPEATED)))
    return await _record(context, Signal.REPEATED, rows)


async def look_back(context: Context) -> dict[str, int]:
    """Tickets that ended and uploads that were committed without a report. Returns how many of each count. Raises `Unavailable`."""
    return {"expired": await _expired(context), "committed": await _committed(context)}


async def _expired(context: Context) -> int:
    """Tickets of clients that otherwise report: something may have gone wrong at the places that were leased."""
    span = await records.claim(context.db, "expired")
    ended = [] if span is None else await records.expired(context.db, span)
    names = {record.id: voice(record.project, record.subject, record.address).name for record in ended}
    known = await reports.reporting(context.db, list(set(names.values()))) if names else set()
    rows = []
    for record in ended:
        if names[record.id] in known:
            for store, place in _active(context, record):
                rows.append(row_of(context, record, store, place, _silence(Signal.EXPIRED)))
    return await _record(context, Signal.EXPIRED, rows)


async def _committed(context: Context) -> int:
    """Uploads whose client never said how long it took: it took no longer than from the ticket to the commit."""
    span = await records.claim(context.db, "committed", REPORT_SECONDS)
    rows = []
    for sent in [] if span is None else await records.committed(context.db, span):
        store = context.memory.store_by_id(sent.store_id)
        place = _place(sent.ticket, sent.store_id)
        if store is not None and place is not None:
            told = Told(signals.OUTCOMES[Signal.COMMITTED], sent.size, sent.seconds, signal=Signal.COMMITTED)
            rows.append(row_of(context, sent.ticket, store, place, told))
    return await _record(context, Signal.COMMITTED, rows)


def _silence(signal: Signal) -> Told:
    return Told(signals.OUTCOMES[signal], 0, 0.0, signal=signal)


def _place(record: TicketRecord, store_id: int) -> Recorded | None:
    return next((place for place in places.recorded(record.places) if place.store_id == store_id), None)


def _active(context: Context, record: TicketRecord) -> Iterable[tuple[Store, Recorded]]:
    for place in places.recorded(record.places):
        store = context.memory.store_by_id(place.store_id)
        if store is not None and place.active:
            yield store, place


async def _record(context: Context, signal: Signal, rows: list[ReportRow]) -> int:
    """Record them, unless a report has come meanwhile."""
    if not rows:
        return 0
    counted = sum(noted.counted for noted in await context.reports(rows))
    context.metrics.signals.inc(signal, by=counted)
    return counted
