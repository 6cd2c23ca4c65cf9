"""What the status page tells each principal: the same as the API would, in one view.

Rules
- Administrators see everything. Everyone else sees the stores that exist for him (M13) without slots and space, as the API shows
  them, his own tickets and transfers, and the paths to those stores. What is left out leaves no gap: ranks and shares are told
  among what is shown.
- Stores and averages are what this broker decides by, from memory; the rest is one reading of the catalogue for each principal
  (one for all administrators), a second old at most, so that many browsers cost what one does.
- While the database is away the last reading stands, with its time; without one, what memory has.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import groupby

from broker import errors, permit
from broker.catalog import status as readings
from broker.catalog.path_pages import PathRow
from broker.catalog.status import Bounds, OutcomeSeen, Reading, Scope, TicketSeen, WaitSeen
from broker.model import Direction, Operation, Outcome, Principal, Role, Store
from broker.paths import IDLE, decay
from broker.service import places
from broker.service.context import Context
from broker.service.overview import (
    COMPARED_SIZE,
    Asked,
    DecisionShown,
    OutcomeShown,
    Overview,
    PathShown,
    PlaceShown,
    SiteShown,
    StoreShown,
    TransferShown,
    Use,
    WaitShown,
    open_state,
    state_of,
)
from broker.service.places import Recorded
from broker.sites import EVERYWHERE

STORES = 500
TRANSFERS = 40
DECISIONS = 20
OUTCOMES = 200
PATHS = 12
WAITS = 40
"""So many of each are shown at most."""

READING_SECONDS = 1.0
"""So long a reading is shown again, and a database that did not answer is not asked again."""

PATIENCE_SECONDS = 10.0
"""A reading that takes longer counts as a database that is away."""

READINGS = 64
"""Principals whose last readings are kept."""


class Overviews:
    """Makes overviews; keeps the readings behind them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._kept: OrderedDict[Scope, tuple[float, Reading]] = OrderedDict()
        self._away_at = float("-inf")
        self._turn = asyncio.Lock()

    async def of(self, principal: Principal) -> Overview:
        """What this principal may see now."""
        reading, away = await self._read(scope_of(principal))
        return overview(self._context, principal, reading, away=away)

    async def _read(self, scope: Scope) -> tuple[Reading | None, bool]:
        """The last reading, a new one when it is old; and whether the database is away."""
        if (fresh := self._fresh(scope)) is not None:
            return fresh, False
        async with self._turn:  # those who come meanwhile share what the first one reads
            if (fresh := self._fresh(scope)) is not None:
                return fresh, False
            if self._now() - self._away_at >= READING_SECONDS:
                try:
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        reading = await readings.read(self._context.db, scope, _BOUNDS)
                    self._keep(scope, reading)
                    return reading, False
                except (errors.Unavailable, TimeoutError):
                    self._away_at = self._now()
        kept = self._kept.get(scope)
        return (None if kept is None else kept[1]), True

    def _fresh(self, scope: Scope) -> Reading | None:
        kept = self._kept.get(scope)
        return kept[1] if kept is not None and self._now() - kept[0] < READING_SECONDS else None

    def _keep(self, scope: Scope, reading: Reading) -> None:
        self._kept[scope] = (self._now(), reading)
        self._kept.move_to_end(scope)
        if len(self._kept) > READINGS:
            self._kept.popitem(last=False)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


_BOUNDS = Bounds(TRANSFERS, DECISIONS, OUTCOMES, PATHS, WAITS, COMPARED_SIZE)


def scope_of(principal: Principal) -> Scope:
    """What of the catalogue this principal may read."""
    if principal.role is Role.ADMIN:
        return Scope(everything=True, private=True, project="", subject="")
    return Scope(everything=False, private=principal.sees_private_stores, project=principal.project, subject=principal.subject)


def overview(context: Context, principal: Principal, reading: Reading | None, *, away: bool) -> Overview:
    """The page of this principal."""
    visible = {store.id: store for store in context.memory.stores().values() if permit.may_see_store(principal, store)}
    everything = principal.role is Role.ADMIN
    shown = sorted(visible.values(), key=lambda store: (store.site, store.name))
    leased = reading.leased if reading is not None else {}
    sites = tuple(
        SiteShown(path, tuple(_store(context, store, leased if everything and not away else None, everything) for store in stores))
        for path, stores in groupby(shown[:STORES], key=lambda store: store.site)
    )
    if reading is None:
        return Overview(everything, None, away, sites, len(shown) - len(shown[:STORES]), (), 0, (), 0, (), (), 0, ())
    decisions = [_decision(principal, ticket, visible) for ticket in reading.decisions]
    transfers = [_transfer(principal, ticket, visible) for ticket in reading.transfers]
    names = {store.name for store in visible.values()}
    return Overview(
        everything=everything,
        at=reading.at,
        away=away,
        sites=sites,
        more_stores=len(shown) - len(shown[:STORES]),
        transfers=tuple(transfer for transfer in transfers if transfer is not None),
        more_transfers=reading.transfer_count - len(transfers),
        waits=tuple(_wait(wait, visible, reading.at) for wait in reading.waits),
        more_waits=reading.wait_count - len(reading.waits),
        decisions=tuple(decision for decision in decisions if decision is not None),
        paths=tuple(_path(context, row, reading.at) for row in reading.paths if row.store in names),
        more_paths=reading.path_count - len(reading.paths),
        outcomes=tuple(_outcome(row, visible[row.store_id].name) for row in reading.outcomes if row.store_id in visible),
    )


def _store(context: Context, store: Store, leased: Mapping[tuple[int, str], int] | None, everything: bool) -> StoreShown:
    memory = context.memory
    average = memory.averages(Direction.READ).get((EVERYWHERE, store.name))
    policy, now = context.policy.rank, context.clock()
    if average is not None and decay(average.weight, now - average.updated_at, policy.half_life_seconds) < policy.min_evidence:
        average = None
    success = None if average is None else average.success
    read = write = space = None
    if everything:
        loads = memory.read_loads.get(store.name, IDLE), memory.write_loads.get(store.name, IDLE)
        used = [
            load.active if leased is None else leased.get((store.id, direction), 0)
            for load, direction in zip(loads, Direction, strict=True)
        ]
        read, write = Use(used[0], store.read_slots), Use(used[1], store.write_slots)
        space = Use(loads[1].reserved, store.capacity)
    doubt = memory.doubts(Direction.READ).get(store.name, 0.0)
    state, level = state_of(store, read, success, doubt) if everything else open_state(store, success, doubt)
    return StoreShown(
        store.name, store.kind, state, level, store.exposure.value != "public", read, write, space,
        None if average is None else average.rate, success,
    )  # fmt: skip


def _asked(principal: Principal, ticket: TicketSeen) -> Asked:
    image = ticket.image
    name = image.name if image is not None and permit.may_see_image(principal, image) else None
    machine = f"{ticket.instance} at {ticket.address}" if ticket.instance else ticket.address
    return Asked(
        str(ticket.id), ticket.operation.value, name, ticket.size, ticket.project, ticket.subject, machine, ticket.site, ticket.asked_at
    )


def _transfer(principal: Principal, ticket: TicketSeen, visible: Mapping[int, Store]) -> TransferShown | None:
    """``None`` for a transfer that uses no store that is shown."""
    held = {lease.store_id: lease for lease in ticket.leases}
    used = [place for place in places.recorded(ticket.places) if place.store_id in visible and _is_used(place, ticket, visible, held)]
    if not used:
        return None
    leases = [lease for lease in ticket.leases if lease.store_id in visible]
    return TransferShown(
        _asked(principal, ticket),
        tuple(visible[place.store_id].name for place in used),
        used[0].seconds,
        max((lease.expected_at for lease in leases), default=None),
        max((lease.expires_at for lease in leases), default=None),
    )


def _wait(wait: WaitSeen, visible: Mapping[int, Store], now: float) -> WaitShown:
    names = tuple(sorted(visible[id].name for id in wait.store_ids if id in visible))
    return WaitShown(wait.project, wait.direction, names, wait.bytes, wait.priority, max(0.0, now - wait.asked_at))


def _is_used(place: Recorded, ticket: TicketSeen, visible: Mapping[int, Store], held: Mapping[int, object]) -> bool:
    """Whether the client may be transferring there: with a lease, or where none is needed; not any more once it has reported."""
    if place.store_id in held:
        return True
    store = visible[place.store_id]
    slots = store.read_slots if ticket.operation is Operation.DOWNLOAD else store.write_slots
    return place.active and slots is None and place.store_id not in ticket.reported


def _decision(principal: Principal, ticket: TicketSeen, visible: Mapping[int, Store]) -> DecisionShown | None:
    """``None`` for a ticket of which no place is shown."""
    recorded = places.recorded(ticket.places)
    known = [place for place in recorded if place.store_id in visible]
    if recorded and not known:
        return None
    whole = 1.0 if len(known) == len(recorded) else sum(place.weight for place in known) or 1.0
    state = ticket.upload or ("expired" if ticket.state == "open" and ticket.expired else ticket.state)
    names = {store.name for store in visible.values()}
    told = ticket.why.get("excluded", ()) if ticket.why is not None else ()
    return DecisionShown(
        _asked(principal, ticket),
        state,
        tuple(_place(place, ticket, visible[place.store_id], whole) for place in known),
        tuple((entry["store"], entry["reason"]) for entry in told if entry["store"] in names),
    )


def _place(place: Recorded, ticket: TicketSeen, store: Store, whole: float) -> PlaceShown:
    return PlaceShown(
        store.name, "active" if place.active else "standby", place.seconds, place.rate, place.setup_seconds, place.success, place.basis,
        place.weight / whole, ticket.reported.get(place.store_id),
    )  # fmt: skip


def _path(context: Context, row: PathRow, now: float) -> PathShown:
    average, policy = row.average, context.policy.rank
    rate, setup = average.rate or None, average.setup_seconds
    return PathShown(
        row.site,
        row.store,
        row.direction,
        None if rate is None else (setup or 0.0) + COMPARED_SIZE / rate,
        rate,
        setup,
        min(1.0, average.success or 0.0),
        max(0.0, now - average.updated_at),
        decay(average.weight, now - average.updated_at, policy.half_life_seconds) >= policy.min_evidence,
    )


def _outcome(row: OutcomeSeen, store: str) -> OutcomeShown:
    estimate = _estimate(places.recorded(row.places), row.store_id)
    delivered = row.outcome in (Outcome.OK, Outcome.SLOW) and row.seconds > 0 and estimate is not None
    direction = Direction.READ if row.operation is Operation.DOWNLOAD else Direction.WRITE
    ratio = row.seconds / max(estimate or 0.0, 1e-6) if delivered else None
    return OutcomeShown(store, direction.value, row.outcome, ratio, row.at)


def _estimate(recorded: Sequence[Recorded], store_id: int) -> float | None:
    return next((place.seconds for place in recorded if place.store_id == store_id), None)
