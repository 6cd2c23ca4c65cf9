"""Stores over the API: registered by administrators, probed before they count.

Rules
- A store that cannot be reached, or that refuses what it was registered for, is not registered: nothing is created.
- What changes where or with what a store is opened (endpoints, settings, credential) is probed before it is kept.
- Others than administrators see what they need to read a ticket; private stores exist for them only in the role ``service`` (M13).
- No transaction is open while a store is asked.
- Where the broker cannot open a store at all (mounts and volumes), nothing is uploaded: such a store is registered as read-only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from broker import errors, permit
from broker.catalog import sites, stores
from broker.catalog.stores import StoreRecord
from broker.model import Client, Exposure, Role, SlotRange, Store
from broker.service.context import Context
from broker.service.idempotency import Claim
from broker.service.instants import instant
from broker.service.listing import Versioned, limit_of, render_page
from broker.service.sites import reload, require_admin
from broker.stores.probe import Probed
from broker.stores.reach import AddressRefused
from broker.stores.registry import is_handed
from broker.stores.settings import same_place

_OPENED_WITH = ("endpoint", "internal_endpoint", "internal", "settings", "credential")


async def list_stores(context: Context, client: Client, query: Mapping[str, Any]) -> dict[str, Any]:
    """A page of stores, by name; at a site or below it, of a kind."""
    limit = limit_of(query)
    found = await stores.page(
        context.db,
        private=client.principal.sees_private_stores,
        limit=limit + 1,
        after=query.get("marker", ""),
        site=query.get("site"),
        kind=query.get("kind"),
    )
    return render_page("stores", found, limit, lambda record: _render(client, record), lambda record: record.store.name)


async def create_store(context: Context, client: Client, request: Mapping[str, Any], claim: Claim) -> Versioned:
    """Register a store.

    Raises `Forbidden`, `Invalid` (its site, kind, a setting or its credential), `Conflict` (its name is taken, or it refuses
    writing) and `StoreUnavailable`; nothing is created then.
    """
    require_admin(client)
    blank = Store(id=0, name=request["name"], kind=request["kind"], site=request["site"], endpoint=request["endpoint"])
    wanted = _with(replace(blank, writable=not is_handed(blank.kind)), request)
    known = await stores.get(context.db, wanted.name)
    if known is not None:
        return _again(client, known, wanted, claim)
    await _require_site(context, wanted.site)
    await _require_own_place(context, wanted)
    probed = await _probe(context, wanted)
    try:
        record = await stores.insert(context.db, replace(wanted, abilities=probed.abilities), _steps(probed))
    except errors.Conflict:
        known = await stores.get(context.db, wanted.name)
        if known is None:
            raise
        return _again(client, known, wanted, claim)
    await reload(context)
    return Versioned(_render(client, record), record.store.version)


async def get_store(context: Context, client: Client, name: str) -> Versioned:
    """One store. Raises `NotFound`, also for a private one that this principal may not know."""
    record = await stores.get(context.db, name)
    if record is None or not permit.may_see_store(client.principal, record.store):
        raise errors.NotFound("No such store.")
    return Versioned(_render(client, record), record.store.version)


async def change_store(context: Context, client: Client, name: str, version: int | None, request: Mapping[str, Any]) -> Versioned:
    """Change a store; fewer slots drain first. Settings that are not named stay.

    Raises `Forbidden`, `NotFound`, `PreconditionFailed`, and what `create_store` raises; nothing is changed then.
    """
    require_admin(client)
    before = (await _at_version(context, name, version)).store
    after = _with(before, {**request, "settings": {**before.settings, **request.get("settings", {})}})
    if after.site != before.site:
        await _require_site(context, after.site)
    opened_differently = any(getattr(after, field) != getattr(before, field) for field in _OPENED_WITH)
    steps = None
    if opened_differently:
        await _require_own_place(context, after)
    if opened_differently or (after.writable and not before.writable):
        probed = await _probe(context, after)
        after, steps = replace(after, abilities=probed.abilities), _steps(probed)
    record = await stores.update(context.db, after, before.version, probe=steps)
    await reload(context)
    return Versioned(_render(client, record), record.store.version)


async def delete_store(context: Context, client: Client, name: str, version: int | None) -> None:
    """Forget a store. Raises `Forbidden`, `Conflict` while it is in use, `NotFound` and `PreconditionFailed`."""
    require_admin(client)
    record = await _at_version(context, name, version)
    await stores.delete(context.db, record.store.id, record.store.version)
    await reload(context)


async def probe_store(context: Context, client: Client, name: str) -> Versioned:
    """Look again at what a store enforces. Raises `Forbidden`, `NotFound`, `StoreUnavailable`, `Invalid` (its credential), and
    `Conflict` when the store was changed meanwhile."""
    require_admin(client)
    store = (await _at_version(context, name, None)).store
    probed = await context.probe(store)
    try:
        record = await stores.record_probe(context.db, replace(store, abilities=probed.abilities), _steps(probed))
    except errors.PreconditionFailed:
        raise errors.Conflict("The store was changed while it was looked at; probe it again.", retry_after=1.0) from None
    await reload(context)
    return Versioned(_render(client, record), record.store.version)


def _with(store: Store, request: Mapping[str, Any]) -> Store:
    """The store with the fields of a request; what a new store must have is there already."""
    fields = {name: value for name, value in request.items() if name not in ("name", "kind")}
    if "exposure" in fields:
        fields["exposure"] = Exposure(fields["exposure"])
    if "cost" in fields:
        fields["cost"] = float(fields["cost"])
    for way in ("read", "write"):
        if fields.get(f"{way}_adaptive") is not None:
            fields[f"{way}_adaptive"] = _range(fields[f"{way}_adaptive"], f"{way}_adaptive")
    changed = replace(store, **fields)
    return replace(
        changed,
        read_slots=_within(changed.read_slots, changed.read_adaptive),
        write_slots=_within(changed.write_slots, changed.write_adaptive),
    )


def _range(given: Mapping[str, int], field: str) -> SlotRange:
    bounds = SlotRange(given["min"], given["max"])
    if bounds.min > bounds.max:
        raise errors.Invalid("min is more than max.", field=field, expected="min and max, in that order")
    return bounds


def _within(slots: int | None, bounds: SlotRange | None) -> int | None:
    """Slots as they may be where the broker adapts them: it begins at what is given, else at the least."""
    if bounds is None:
        return slots
    return bounds.min if slots is None else min(max(slots, bounds.min), bounds.max)


def _again(client: Client, known: StoreRecord, wanted: Store, claim: Claim) -> Versioned:
    """The store that a repeated request made. Raises `Conflict` when the name belongs to another one."""
    store = known.store
    same = replace(
        wanted, id=store.id, reserved=store.reserved, abilities=store.abilities, probed_at=store.probed_at, version=store.version
    )
    if not claim.repeated or same != store:
        raise errors.Conflict(f"A store {store.name} exists already.", field="name", expected="a name that no store has")
    return Versioned(_render(client, known), store.version)


async def _at_version(context: Context, name: str, version: int | None) -> StoreRecord:
    """The store, if it is at that version. Raises `NotFound` and `PreconditionFailed`."""
    record = await stores.get(context.db, name)
    if record is None:
        raise errors.NotFound("No such store.")
    if version is not None and record.store.version != version:
        raise errors.PreconditionFailed("The store has changed since it was read.")
    return record


async def _require_site(context: Context, path: str) -> None:
    if await sites.get(context.db, path) is None:
        raise errors.Invalid(f"There is no site {path}.", field="site", expected="the path of an existing site")


async def _require_own_place(context: Context, store: Store) -> None:
    """Slots, space and deletions are counted by store: one place under two names would be counted twice, and emptied by either."""
    for other in await stores.load(context.db):
        if other.name != store.name and same_place(other, store):
            raise errors.Conflict(
                f"The store {other.name} is this place already: the same address, bucket or container, and prefix.",
                field="endpoint",
                expected="a place that no store has; another bucket, container or prefix is one",
            )


async def _probe(context: Context, store: Store) -> Probed:
    """What the store enforces. Raises `Conflict` when it refuses to be written although it is registered for that, and `Invalid` when
    its address is none that the broker opens for it."""
    try:
        probed = await context.probe(store)
    except AddressRefused as error:
        raise error.as_invalid() from None
    if store.writable and not probed.abilities.writes:
        seen = next((step.detail for step in probed.steps if step.name == "writing"), "it refused")
        raise errors.Conflict(
            f"The store could not be written ({seen[:300]}). Check the credential and the settings, or register it with writable false.",
            field="writable",
            expected="false, or a store that can be written",
        )
    return probed


def _steps(probed: Probed) -> Sequence[Mapping[str, str]]:
    """The steps of a probe as they are kept and shown."""
    results = {True: "yes", False: "no", None: "not tried"}
    return [{"name": step.name[:100], "result": results[step.result], "detail": step.detail[:1000]} for step in probed.steps]


def _render(client: Client, record: StoreRecord) -> dict[str, Any]:
    store = record.store
    shown: dict[str, Any] = {
        "name": store.name,
        "kind": store.kind,
        "site": store.site,
        "endpoint": store.endpoint,
        "exposure": store.exposure.value,
        "enabled": store.enabled,
        "writable": store.writable,
        "cost": store.cost,
    }
    if client.principal.role is not Role.ADMIN:
        return shown
    return shown | {
        "internal_endpoint": store.internal_endpoint,
        "internal": store.internal,
        "settings": dict(store.settings),
        "credential": store.credential,
        "read_slots": store.read_slots,
        "write_slots": store.write_slots,
        "read_adaptive": None if store.read_adaptive is None else store.read_adaptive._asdict(),
        "write_adaptive": None if store.write_adaptive is None else store.write_adaptive._asdict(),
        "read_bandwidth": store.read_bandwidth,
        "write_bandwidth": store.write_bandwidth,
        "capacity": store.capacity,
        "reserved": store.reserved,
        "leased_read": record.leased_read,
        "leased_write": record.leased_write,
        "abilities": asdict(store.abilities),
        "probe": [dict(step) for step in record.probe],
        "probed_at": None if store.probed_at is None else instant(store.probed_at),
    }
