"""What is kept of blobs stays within its bound, the least recently used go first, and nothing that changed is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from broker import metrics
from broker.catalog.compact import BLOB_BYTES, IMAGE_BYTES, REPLICA_BYTES
from broker.service.hot import Hot
from tests.catalog import rows

ONE = BLOB_BYTES + REPLICA_BYTES + IMAGE_BYTES
"""The estimate of a blob with one replica and one image."""


class Counted(Hot):
    """Tells how many blobs were looked up, and waits before it goes on with an answer if it is told to."""

    looked_up = 0
    gate: asyncio.Event | None = None

    async def _load(self, ids: Any, look_up: Any) -> Any:
        async def slow(wanted: Any) -> Any:
            answer = await look_up(wanted)
            self.looked_up += len(wanted)
            if self.gate is not None:
                await self.gate.wait()
            return answer

        return await super()._load(ids, slow)  # type: ignore[arg-type]


Make = Callable[..., Counted]


@pytest.fixture
async def make(pool: Any) -> AsyncIterator[Make]:
    made: list[Counted] = []

    def one(hot_bytes: int, fresh: bool = True) -> Counted:
        made.append(Counted(pool, metrics.create(), hot_bytes, lambda: fresh))
        return made[-1]

    yield one
    for hot in made:
        await hot.close()


async def test_the_bound_holds_and_the_least_recently_used_goes(pool: Any, make: Make) -> None:
    store = await rows.store(pool)
    first, second, third = [str(await rows.blob(pool, store)) for _ in range(3)]
    hot = make(2 * ONE)
    await hot.blobs([first])
    await hot.blobs([second])
    await hot.blobs([first])  # used again
    await hot.blobs([third])  # one too many
    assert hot.looked_up == 3
    assert hot._held == 2 * ONE
    await hot.blobs([first, third])
    assert hot.looked_up == 3
    await hot.blobs([second])
    assert hot.looked_up == 4


async def test_one_byte_less_keeps_one_blob_less(pool: Any, make: Make) -> None:
    store = await rows.store(pool)
    ids = [str(await rows.blob(pool, store)) for _ in range(2)]
    hot = make(2 * ONE - 1)
    assert all(await hot.blobs(ids))  # both are answered
    assert hot._held == ONE


async def test_without_memory_everything_is_looked_up(pool: Any, make: Make) -> None:
    id = str(await rows.blob(pool, await rows.store(pool)))
    hot = make(0)
    for _ in range(3):
        assert (await hot.blobs([id]))[0] is not None
    assert (hot.looked_up, hot._held) == (3, 0)


async def test_memory_that_is_not_fresh_is_not_believed(pool: Any, make: Make) -> None:
    id = str(await rows.blob(pool, await rows.store(pool)))
    hot = make(10 * ONE, fresh=False)
    await hot.blobs([id])
    await hot.blobs([id])
    assert hot.looked_up == 2


async def test_what_changes_during_a_look_up_is_not_kept(pool: Any, make: Make) -> None:
    id = str(await rows.blob(pool, await rows.store(pool)))
    hot = make(10 * ONE)
    hot.gate = asyncio.Event()
    asked = asyncio.create_task(hot.blobs([id]))
    while not hot.looked_up:
        await asyncio.sleep(0.001)
    hot.forget(id)
    hot.gate.set()
    await asked
    await hot.blobs([id])
    assert hot.looked_up == 2


async def test_a_change_between_the_ends_of_two_look_ups_reaches_the_slower_one(pool: Any, make: Make) -> None:
    """The first one is kept and forgotten again; the second one, which read the same old state, must not come back."""
    id = str(await rows.blob(pool, await rows.store(pool)))
    hot = make(10 * ONE)
    hot.gate = slow = asyncio.Event()
    late = asyncio.create_task(hot.blobs([id]))
    while not hot.looked_up:
        await asyncio.sleep(0.001)
    hot.gate = None
    await hot.blobs([id])
    hot.forget(id)
    slow.set()
    await late
    await hot.blobs([id])
    assert hot.looked_up == 3
