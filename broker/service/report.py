"""How a transfer went: what a client's report changes.

A report counts once for each place of a ticket. It moves the averages of the client's site and of every wider one, those
less and less (`broker.voices`), but only where token or network prove the site; it ends the lease, or renews it when it tells of
progress. A failure keeps the store from this client for a while, by every broker before the report is answered. A client's word
alone makes no replica corrupt: the broker looks for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

from broker import admit, errors, signals
from broker.catalog import leases
from broker.catalog.reports import ReportRow
from broker.catalog.tickets import TicketRecord
from broker.model import Client, Direction, Operation, Outcome, Store, client_name, created_at
from broker.paths import Report, contribution
from broker.plausible import implausible
from broker.service import places, replicas, tickets
from broker.service.context import Context
from broker.service.places import Recorded
from broker.signals import Signal
from broker.sites import EVERYWHERE, ancestors
from broker.voices import voice


async def report_transfer(context: Context, client: Client, id: UUID, request: Mapping[str, Any]) -> None:
    """Take a report on one place. The same report again changes nothing. Raises `NotFound`, `Invalid`."""
    record = await tickets.find(context, client, id)
    store = context.memory.store(request["store"])
    place = next((p for p in places.recorded(record.places) if store is not None and p.store_id == store.id), None)
    if store is None or place is None:
        raise errors.Invalid("The ticket names no such store.", field="store", expected="a store of the ticket's places")
    _check(context, record, request)
    if not request.get("final", True):
        policy = context.policy.admit
        left = min(_seconds_left(record, place, request), policy.max_total_seconds)
        await leases.renew(context.db, id, store.id, admit.lease_seconds(max(place.seconds, left), policy), policy.max_total_seconds, left)
        if request.get("bytes"):
            so_far = told(request)._replace(outcome=signals.OUTCOMES[Signal.PROGRESS], signal=Signal.PROGRESS)
            context.metrics.signals.inc(Signal.PROGRESS)
            await context.reports([row_of(context, record, store, place, so_far, client)])
        return
    outcome = Outcome(request["outcome"])
    context.repeats.settled(client_name(record.project, record.subject, record.instance, record.address), record.blob_id)
    row = row_of(context, record, store, place, told(request), client)
    (noted,) = await context.reports([row])
    if not noted.counted:
        return
    if noted.xact is not None and row.excludes is not None:
        now = context.clock()
        context.memory.note_failure(row.excludes, store.name, now + row.excluded_seconds, now)
        await context.memory.spread.wait(noted.xact)
    await leases.release(context.db, [(id, store.id)])
    _count(context, store, row, place)
    if outcome is Outcome.CORRUPT and place.replica is not None:
        await replicas.look_again(context, UUID(place.replica))


def _check(context: Context, record: TicketRecord, request: Mapping[str, Any]) -> None:
    """Raise `Invalid` for what cannot be true."""
    wrong = implausible(
        request.get("bytes", 0), request.get("seconds"), request.get("setup_seconds"), record.size, context.clock() - created_at(record.id)
    )
    if wrong is not None:
        raise errors.Invalid("The report cannot be true.", field=wrong.field, expected=wrong.expected)


class Told(NamedTuple):
    """What was said of a transfer, or is taken for said."""

    outcome: Outcome
    bytes: int
    seconds: float
    setup_seconds: float | None = None
    detail: str | None = None
    signal: signals.Signal | None = None
    """``None`` for a report."""


def told(request: Mapping[str, Any]) -> Told:
    """What a report says."""
    return Told(
        Outcome(request["outcome"]), request.get("bytes", 0), float(request.get("seconds", 0)), request.get("setup_seconds"),
        request.get("detail"),
    )  # fmt: skip


def row_of(context: Context, record: TicketRecord, store: Store, place: Recorded, told: Told, client: Client | None = None) -> ReportRow:
    """What is recorded for a word on `place`, said by `client` (who asked for the ticket, when nobody said it)."""
    reading = record.operation is Operation.DOWNLOAD
    direction, bandwidth = (Direction.READ, store.read_bandwidth) if reading else (Direction.WRITE, store.write_bandwidth)
    weight = 1.0 if told.signal is None else signals.WEIGHTS[told.signal]
    report = Report(told.outcome, told.bytes, told.seconds, place.concurrency, bandwidth, told.setup_seconds)
    added = signals.weakened(contribution(report, context.policy.paths), weight)
    failed = told.signal is None and told.outcome in (Outcome.FAILED, Outcome.CORRUPT)
    return ReportRow(
        ticket_id=record.id,
        store_id=store.id,
        direction=direction.value,
        outcome=told.outcome.value,
        bytes=told.bytes,
        seconds=told.seconds,
        detail=told.detail,
        implied=told.signal is not None,
        voice=voice(record.project, record.subject, record.address if client is None else client.address),
        weight=weight,
        trouble=signals.trouble(told.outcome, weight),
        excludes=client.name if client is not None and failed else None,
        excluded_seconds=context.policy.rank.failure_seconds,
        site=record.site or EVERYWHERE,
        contributions=dict.fromkeys(ancestors(record.site), added),
    )


def _seconds_left(record: TicketRecord, place: Recorded, request: Mapping[str, Any]) -> float:
    """How long a transfer that tells of its progress should go on: at the rate so far, if it moves its share of the blob."""
    bytes_, seconds = int(request.get("bytes", 0)), float(request.get("seconds", 0))
    if record.size is None or not bytes_ or not seconds:
        return place.seconds
    share = record.size / max(1, sum(other.active for other in places.recorded(record.places)))
    return max(0.0, share - bytes_) * seconds / bytes_


def _count(context: Context, store: Store, row: ReportRow, place: Recorded) -> None:
    """Reports by outcome, and how good the estimate was."""
    metrics, direction = context.metrics, row.direction
    metrics.reports.inc(store.name, row.outcome)
    if row.outcome == Outcome.OK and row.seconds > 0:
        metrics.reported_bytes.inc(store.name, direction, by=row.bytes)
        metrics.reported_seconds.observe(row.seconds, direction)
        metrics.estimated_seconds.observe(place.seconds, direction)
        metrics.estimate_ratio.observe(row.seconds / max(place.seconds, 1e-6), direction)
