"""Make a lost catalogue again from what lies at the stores, or add to a restored one what it does not know.

Read downwards: `survey` lists every store and looks at each object that the catalogue does not have; `broker.recover` decides;
`carry_out` writes, one transaction a blob. Nothing is changed at a store, and each step may be done again.

Rules
- An object counts by its record alone, which only a broker can have written (`broker.sign.record`). Objects without one are somebody
  else's, or were registered: nothing of them is known.
- Objects that are about to be deleted are left alone, and those that an upload under way writes, unless the catalogue was restored and
  no broker runs: then such an upload may have been committed since, and to abandon it would delete what was accepted.
- A replica of the catalogue that its store does not list is looked at; what is not there is ``missing``.
- Images come back private, whatever they were, unless recorded visibility is wanted: it may have been taken back since.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from broker import errors
from broker.catalog import blobs, recovery
from broker.catalog.transaction import transaction
from broker.model import BlobState, ReplicaState, Store, Visibility
from broker.recover import Conflict, Found, Plan, Recovered, plan
from broker.sign.record import Sealer, carries
from broker.stores import base
from broker.verify import VerifyPolicy

LOOKS_AT_ONCE = 16
_PAGE = 500


@dataclass(slots=True)
class Tally:
    """What was seen at one store. `problem` says why it could not be read to the end; then nothing there is missing."""

    store: str
    listed: int = 0
    known: int = 0
    busy: int = 0
    foreign: int = 0
    forged: int = 0
    recovered: int = 0
    corrupt: int = 0
    missing: int = 0
    problem: str | None = None


@dataclass(slots=True)
class Survey:
    """Everything that was found, and the replicas of the catalogue that are not there any more."""

    found: list[Found] = field(default_factory=list)
    missing: list[recovery.Known] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)


class Wanted(NamedTuple):
    """How images come back."""

    recorded_visibility: bool = False
    deactivated: bool = False
    vetted: frozenset[Visibility] = frozenset()
    """Visibilities that need approval: whether there was one is lost with the catalogue, so their images wait for it."""


@dataclass(slots=True)
class Done:
    """What was made (or would be), and what was left out."""

    images: int = 0
    blobs: int = 0
    replicas: int = 0
    conflicts: list[Conflict] = field(default_factory=list)


Tell = Callable[[Tally], None]


async def survey(
    db: Any, stores: Sequence[Store], open_store: Callable[[Store], base.Store], sealer: Sealer, tell: Tell, *, restored: bool = False
) -> Survey:
    """Look at every object of `stores` that the catalogue behind `db` does not have; `tell` hears how far it is. Raises `Unavailable`.

    A store that cannot be read is noted, and the others are looked at.
    """
    result = Survey()
    for store in stores:
        tally = result.tallies[store.name] = Tally(store.name)
        try:
            driver = open_store(store)
            if not isinstance(driver, base.Lists):
                raise errors.StoreUnavailable(f"stores of kind {store.kind} list nothing")
            busy = await recovery.busy(db, store.id, uploads=not restored)
            await _survey_store(db, store, driver, sealer, busy, result, tally, tell)
        except (errors.StoreUnavailable, errors.Invalid) as error:
            tally.problem = error.detail or error.title
            tell(tally)
    return result


async def _survey_store(
    db: Any, store: Store, driver: Any, sealer: Sealer, busy: set[str], result: Survey, tally: Tally, tell: Tell
) -> None:
    unseen = await recovery.known(db, store.id)
    async for page in _pages(driver.objects()):
        tally.listed += len(page)
        tally.known += sum(key in unseen for key in page)
        tally.busy += sum(key in busy for key in page)
        fresh = [key for key in page if key not in unseen and key not in busy]
        for key in page:
            unseen.pop(key, None)
        for found in await _all(fresh, lambda key: _look(store, driver, sealer, tally, key)):
            if found is not None:
                result.found.append(found)
        tell(tally)
    lost = [known for known in unseen.values() if known.state is ReplicaState.ACTIVE]
    gone = await _all(lost, lambda known: _gone(driver, known))
    result.missing += [known for known in gone if known is not None]
    tally.missing = sum(known is not None for known in gone)
    tell(tally)


async def _look(store: Store, driver: Any, sealer: Sealer, tally: Tally, key: str) -> Found | None:
    """The object at `key`, if it has a record of ours that is about it."""
    observed = await driver.recorded(key)
    if observed is None or not carries(observed.metadata):
        tally.foreign += 1
        return None
    record = sealer.open(observed.metadata, key)
    if record is None:
        tally.forged += 1
        return None
    return Found(store.name, key, record, observed)


async def _gone(driver: Any, known: recovery.Known) -> recovery.Known | None:
    return known if await driver.stat(known.key) is None else None


async def _pages(keys: AsyncIterator[str]) -> AsyncIterator[list[str]]:
    page: list[str] = []
    async for key in keys:
        page.append(key)
        if len(page) == _PAGE:
            yield page
            page = []
    if page:
        yield page


async def _all(items: Sequence[Any], work: Callable[[Any], Any]) -> list[Any]:
    """The work on every item, so many at once; the first failure ends it."""
    results: list[Any] = [None] * len(items)
    waiting = iter(enumerate(items))

    async def take() -> None:
        for number, item in waiting:
            results[number] = await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in islice(range(LOOKS_AT_ONCE), len(items)):
                group.create_task(take())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return results


async def decide(db: Any, found: Survey, policy: VerifyPolicy) -> Plan:
    """What follows from a survey. Raises `Unavailable`."""
    known = await blobs.summaries(db, {each.record.blob for each in found.found})
    return plan(found.found, known, policy)


async def carry_out(db: Any, planned: Plan, seen: Survey, stores: Sequence[Store], wanted: Wanted, *, apply: bool) -> Done:
    """Write what was planned; without `apply` only count it. What the catalogue turns out to have against it is left out, and told.

    Raises `Unavailable`; what was written until then stays, and calling this again goes on.
    """
    ids = {store.name: store.id for store in stores}
    done = Done(conflicts=list(planned.conflicts))
    for each in planned.blobs:
        try:
            made = await _write(db, each, ids, wanted) if apply else _count(each)
        except (errors.Conflict, errors.Gone) as refusal:
            places = tuple(f"{copy.found.store}/{copy.found.key}" for copy in each.copies)
            done.conflicts.append(Conflict("blob", each.blob.id, (refusal.detail or refusal.title).rstrip("."), places))
            continue
        done.images += made.images
        done.blobs += made.blobs
        done.replicas += made.replicas
        for copy in each.copies:
            tally = seen.tallies[copy.found.store]
            tally.recovered += copy.state is ReplicaState.ACTIVE
            tally.corrupt += copy.state is ReplicaState.CORRUPT
    if apply:
        await recovery.mark_missing(db, seen.missing)
    return done


def _count(each: Recovered) -> recovery.Made:
    return recovery.Made(len(each.images), 1 if each.images else 0, len(each.copies))


async def _write(db: Any, each: Recovered, ids: dict[str, int], wanted: Wanted) -> recovery.Made:
    async with transaction(db) as connection:
        states = await blobs.lock(connection, [each.blob.id])
        if states.get(each.blob.id) is BlobState.DELETING:
            raise errors.Gone("it is being deleted")
        return await recovery.restore(
            connection, each, ids, recorded_visibility=wanted.recorded_visibility, deactivated=wanted.deactivated, vetted=wanted.vetted
        )
