"""What is done again and again, by whichever broker comes first: end what nobody finishes, remove what nobody needs.

Rules
- Every step is safe to run on many brokers at once and to die in: rows that another broker holds are skipped, rows claimed by
  one that died come up again.
- An upload past its end is abandoned: its space is given back, what it wrote is scheduled for deletion, the queued image that
  was made for it is forgotten.
- A deletion is tried until the store says that the bytes are gone, ever more seldom (`backoff`).
"""

from __future__ import annotations

import asyncio

import structlog

from broker import errors
from broker.catalog import blobs, copies, deletions, leases, upload_ends
from broker.catalog.deletions import EVERY_MULTIPART, Deletion
from broker.catalog.transaction import transaction
from broker.service.context import Context
from broker.service.upload import forget
from broker.stores.base import FindsMultipart

KEPT_SECONDS = 7 * 86400.0
"""So long can an upload that has ended be looked at, and its commit be repeated."""

_BATCH = 100
_AT_ONCE = 8

log = structlog.get_logger()


async def reap(context: Context) -> dict[str, int]:
    """One round of everything. Returns how much was done of each. Raises `Unavailable`."""
    done = {"leases": await leases.sweep(context.db), "abandoned": await abandon_expired(context)}
    done["deleted"] = await delete_due(context)
    async with transaction(context.db) as connection:
        done["forgotten"] = await upload_ends.forget_ended(connection, KEPT_SECONDS, _BATCH)
    done["blobs"] = await blobs.forget_deleted(context.db)
    await copies.expire(context.db)
    return done


async def abandon_expired(context: Context) -> int:
    """Abandon uploads that are past their end. Returns how many."""
    total = 0
    while True:
        async with transaction(context.db) as connection:
            expired = await upload_ends.expired(connection, _BATCH)
            for upload in expired:
                await upload_ends.abandoned(connection, upload)
        for upload in expired:
            forget(context, upload)
        if expired:
            await leases.release(context.db, [(upload.id, None) for upload in expired])
        total += len(expired)
        if len(expired) < _BATCH:
            return total


async def delete_due(context: Context) -> int:
    """Try every deletion that is due once. Returns how many succeeded."""
    total = 0
    while True:
        found = await deletions.due(context.db, _BATCH)
        slots = asyncio.Semaphore(_AT_ONCE)
        total += sum(await asyncio.gather(*(_delete(context, deletion, slots) for deletion in found)))
        if len(found) < _BATCH:
            return total


def backoff(attempts: int) -> float:
    """Seconds until a deletion that failed so many times is tried again: 10 s, doubling, at most an hour."""
    return min(3600.0, 10.0 * 2.0 ** min(max(0, attempts - 1), 20))


async def _delete(context: Context, deletion: Deletion, slots: asyncio.Semaphore) -> int:
    """Remove one object or multipart upload. 1 when it is gone."""
    store = context.memory.store_by_id(deletion.store_id)
    async with slots:
        try:
            if store is None:
                raise errors.StoreUnavailable("the store is not registered")
            driver = context.memory.driver(store.name)
            if deletion.multipart_id is None:
                await driver.delete(deletion.key)
            elif deletion.multipart_id != EVERY_MULTIPART:
                await driver.abort(deletion.key, deletion.multipart_id)
            elif isinstance(driver, FindsMultipart):
                for upload in await driver.multiparts(deletion.key):
                    await driver.abort(deletion.key, upload)
        except errors.BrokerError as error:
            # Known to hold no secret, as every BrokerError's text.
            log.warning("deletion failed", store=deletion.store_id, attempts=deletion.attempts, problem=str(error))
            await deletions.retry_later(context.db, deletion, backoff(deletion.attempts), str(error))
            return 0
    await deletions.done(context.db, deletion)
    return 1
