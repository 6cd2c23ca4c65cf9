"""How a transfer went: what a client's report changes.

A report counts once for each place of a ticket. It moves the averages of the client's site and of every wider one, but
only where token or network prove the site; it ends the lease, or renews it when it tells of progress; a failure keeps the
store from this client for a while. A client's word alone makes no replica corrupt: the broker looks for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from broker import admit, errors
from broker.catalog import leases
from broker.catalog.paths import PathKey, ReportRow
from broker.catalog.tickets import TicketRecord
from broker.model import Client, Direction, Operation, Outcome, Store
from broker.paths import Report, contribution
from broker.service import places, replicas, tickets
from broker.service.context import Context
from broker.service.places import Recorded
from broker.sites import ancestors


async def report_transfer(context: Context, client: Client, id: UUID, request: Mapping[str, Any]) -> None:
    """Take a report on one place. The same report again changes nothing. Raises `NotFound`, `Invalid`."""
    record = await tickets.find(context, client, id)
    store = context.memory.store(request["store"])
    place = next((p for p in places.recorded(record.places) if store is not None and p.store_id == store.id), None)
    if store is None or place is None:
        raise errors.Invalid("The ticket names no such store.", field="store", expected="a store of the ticket's places")
    if not request.get("final", True):
        policy = context.policy.admit
        await leases.renew(context.db, id, store.id, admit.lease_seconds(place.seconds, policy), policy.max_total_seconds)
        return
    outcome = Outcome(request["outcome"])
    row = _row(context, record, store, place, outcome, request)
    (first,) = await context.reports([row])
    if not first:
        return
    if outcome in (Outcome.FAILED, Outcome.CORRUPT):
        context.memory.note_failure(client.name, store.name, context.clock() + context.policy.rank.failure_seconds)
    await leases.release(context.db, [(id, store.id)])
    _count(context, store, row, place)
    if outcome is Outcome.CORRUPT and place.replica is not None:
        await replicas.look_again(context, UUID(place.replica))


def _row(context: Context, record: TicketRecord, store: Store, place: Recorded, outcome: Outcome, request: Mapping[str, Any]) -> ReportRow:
    direction = Direction.READ if record.operation is Operation.DOWNLOAD else Direction.WRITE
    bandwidth = store.read_bandwidth if direction is Direction.READ else store.write_bandwidth
    bytes_, seconds = request.get("bytes", 0), float(request.get("seconds", 0))
    added = contribution(Report(outcome, bytes_, seconds, place.concurrency, bandwidth, request.get("setup_seconds")), context.policy.paths)
    keys = {PathKey(site, store.id, direction.value): added for site in ancestors(record.site)}
    return ReportRow(record.id, store.id, outcome.value, bytes_, seconds, request.get("detail"), keys)


def _count(context: Context, store: Store, row: ReportRow, place: Recorded) -> None:
    """Reports by outcome, and how good the estimate was."""
    metrics, direction = context.metrics, next(iter(row.contributions)).direction
    metrics.reports.inc(store.name, row.outcome)
    if row.outcome == Outcome.OK and row.seconds > 0:
        metrics.reported_bytes.inc(store.name, direction, by=row.bytes)
        metrics.reported_seconds.observe(row.seconds, direction)
        metrics.estimated_seconds.observe(place.seconds, direction)
        metrics.estimate_ratio.observe(row.seconds / max(place.seconds, 1e-6), direction)
