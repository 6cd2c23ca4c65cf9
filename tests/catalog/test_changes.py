"""The change log: every write that a ticket could show is told, in time and at least once."""

from __future__ import annotations

import asyncio
from typing import Any

from broker.catalog import changes
from tests.catalog import rows


async def told(pool: Any, last: changes.Position) -> tuple[set[tuple[str, str]], changes.Position]:
    found, position, _ = await changes.since(pool, last)
    return {tuple(change) for change in found}, position


async def test_every_write_to_a_blob_is_told(pool: Any) -> None:
    store = await rows.store(pool)
    blob = await rows.blob(pool, store)
    image = await pool.fetchval("SELECT image_id FROM image_blobs WHERE blob_id = $1", blob)
    for write, expected in (
        ("UPDATE replicas SET state = 'corrupt'", ("blob", str(blob))),
        ("UPDATE blobs SET state = 'deleting'", ("blob", str(blob))),
        ("UPDATE images SET visibility = 'private'", ("image", str(image))),
        ("DELETE FROM image_blobs", ("blob", str(blob))),
        ("DELETE FROM replicas", ("blob", str(blob))),
        ("UPDATE stores SET enabled = false", ("store", "s1")),
        ("UPDATE slots SET slots = 9 WHERE direction = 'read'", ("slots", str(store))),
        ("UPDATE sites SET networks = '{10.0.0.0/8}'", ("site", "eu/az1")),
    ):
        begin = await changes.position(pool)
        await pool.execute(write)
        found, _ = await told(pool, begin)
        assert expected in found, write


async def test_visibility_of_an_image_concerns_its_blobs(pool: Any) -> None:
    """Who may read a blob is kept with the blob, so a change of the image must reach it too."""
    blob = await rows.blob(pool, await rows.store(pool))
    begin = await changes.position(pool)
    await pool.execute("UPDATE images SET visibility = 'private'")
    found, _ = await told(pool, begin)
    assert ("blob", str(blob)) in found


async def test_leases_write_no_changes(pool: Any) -> None:
    await rows.store(pool, read=1)
    begin = await changes.position(pool)
    await pool.execute("UPDATE slots SET leased = leased + 1")
    assert (await told(pool, begin))[0] == set()


async def test_a_position_never_passes_a_running_transaction(pool: Any) -> None:
    store = await rows.store(pool)
    slow_blob, fast_blob = await rows.blob(pool, store), await rows.blob(pool, store)
    begin = await changes.position(pool)
    async with pool.acquire() as slow:
        transaction = slow.transaction()
        await transaction.start()
        await slow.execute("UPDATE blobs SET state = 'deleting' WHERE id = $1", slow_blob)
        await pool.execute("UPDATE blobs SET state = 'deleting' WHERE id = $1", fast_blob)
        found, position = await told(pool, begin)
        assert found == {("blob", str(fast_blob))}  # told at once, though an older transaction still runs
        await transaction.commit()
    found, position = await told(pool, position)
    assert ("blob", str(slow_blob)) in found  # committed later with a smaller id, and not lost
    assert (await told(pool, position))[0] == set()


async def test_pages_go_on_where_they_ended(pool: Any) -> None:
    store = await rows.store(pool)
    begin = await changes.position(pool)
    blobs = [await rows.blob(pool, store) for _ in range(5)]
    seen: set[tuple[str, str]] = set()
    position = begin
    async with asyncio.timeout(60):  # a transaction elsewhere on the server may hold the first page back for a while
        while not {("blob", str(blob)) for blob in blobs} <= seen:
            found, position, _ = await changes.since(pool, position, 3)
            seen |= {tuple(change) for change in found}


async def test_old_entries_are_dropped(pool: Any) -> None:
    await rows.blob(pool, await rows.store(pool))
    await pool.execute("UPDATE changes SET at = now() - interval '2 hours'")
    await changes.forget_old(pool, 3600)
    assert await pool.fetchval("SELECT count(*) FROM changes") == 0
