"""A broker that was cut off for longer than the change log is kept believes nothing that it knew."""

from __future__ import annotations

from typing import Any

import pytest

from broker.catalog import changes
from broker.service.memory import ANEW_SECONDS
from tests.catalog.registry import ALICE, running


@pytest.mark.parametrize(("away", "anew"), [(ANEW_SECONDS - 60, False), (ANEW_SECONDS + 1, True)])
async def test_what_the_log_forgot_is_learned_all_the_same(pool: Any, away: float, anew: bool) -> None:
    async with running(pool) as registry:
        memory = registry.context.memory
        keys_read = 0

        async def read_keys() -> None:
            nonlocal keys_read
            keys_read += 1

        memory._on_key_change = read_keys
        await registry.add_store("weed")
        blob = await registry.add_blob()
        await registry.add_image(ALICE, {"raw": blob})
        await memory.catch_up()
        known = await memory.blob(blob)
        assert known is not None and not known.replicas and memory.store("weed") is not None

        await pool.execute("UPDATE stores SET cost = 7")
        await pool.execute("UPDATE blobs SET size = 4")
        await changes.forget_old(pool, 0)  # others went on, and dropped what all of them had read
        assert await pool.fetchval("SELECT count(*) FROM changes") == 0
        memory._read_at -= away
        await memory.catch_up()
        store, found = memory.store("weed"), await memory.blob(blob)
        assert store is not None and found is not None
        assert (store.cost == 7, found.size == 4, keys_read) == (anew, anew, int(anew))
        assert memory.is_fresh()
