"""Many callers, one round trip: what is asked for while a statement is under way goes into the next one.

There is no timer. A caller that comes when nothing is under way waits only for the end of the event loop's present turn,
so that all requests read in that turn share the statement; under load the batches grow by themselves. The statement runs
on a connection kept for it, since taking one from a pool and giving it back costs more than most queries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import asyncpg

from broker import errors
from broker.catalog.connect import is_transient, reachable
from broker.metrics import Metrics

Item = TypeVar("Item")
Result = TypeVar("Result")

Work = Callable[[Any, Sequence[Item]], Awaitable[Sequence[Result]]]
"""Runs one batch on a connection: a result for each item, in order."""


class Coalescer(Generic[Item, Result]):
    """Runs `work` for batches of up to `most` items, one batch at a time, on a connection of its own from `pool`.

    `metrics` learn under `name` how long batches take, how many items share one, and how many callers wait.
    """

    def __init__(
        self, pool: asyncpg.Pool[asyncpg.Record], work: Work[Item, Result], name: str, metrics: Metrics, *, most: int = 1000
    ) -> None:
        self._pool = pool
        self._work = work
        self._name = name
        self._metrics = metrics
        self._most = most
        self._waiting: list[tuple[Sequence[Item], asyncio.Future[Sequence[Result]]]] = []
        self._runner: asyncio.Task[None] | None = None
        self._connection: Any = None
        metrics.queued.follow(lambda: len(self._waiting), name)

    async def __call__(self, items: Sequence[Item]) -> Sequence[Result]:
        """The results of `items`, which stay together in one batch. Raises `errors.Unavailable`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[Result]] = loop.create_future()
        self._waiting.append((items, future))
        if self._runner is None:
            self._runner = loop.create_task(self._run())
        return await future

    async def close(self) -> None:
        """Finish what is under way and give the connection back."""
        while self._runner is not None:
            await asyncio.wait([self._runner])
        await self._give_back()

    async def _run(self) -> None:
        try:
            await asyncio.sleep(0)
            while self._waiting:
                await self._run_batch(self._take())
        finally:
            self._runner = None
            if self._waiting:  # a caller came between the last look and here
                self._runner = asyncio.get_running_loop().create_task(self._run())

    def _take(self) -> list[tuple[Sequence[Item], asyncio.Future[Sequence[Result]]]]:
        """The oldest callers, as many as fit into one batch; always at least one."""
        size = taken = 0
        for items, _ in self._waiting:
            size += len(items)
            if taken and size > self._most:
                break
            taken += 1
        batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return batch

    async def _run_batch(self, batch: list[tuple[Sequence[Item], asyncio.Future[Sequence[Result]]]]) -> None:
        flat = batch[0][0] if len(batch) == 1 else [item for items, _ in batch for item in items]
        self._metrics.coalesced.observe(len(flat), self._name)
        try:
            with reachable(), self._metrics.database_seconds.time(self._name):
                results = await self._work(await self._connected(), flat)
        except Exception as error:
            if is_transient(error) or isinstance(error, errors.Unavailable):
                await self._give_back()
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        begin = 0
        for items, future in batch:
            if not future.done():  # the caller may have been cancelled
                future.set_result(results[begin : begin + len(items)])
            begin += len(items)

    async def _connected(self) -> Any:
        if self._connection is not None and self._connection.is_closed():
            await self._give_back()
        if self._connection is None:
            self._connection = await self._pool.acquire(timeout=5)
        return self._connection

    async def _give_back(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await self._pool.release(connection)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection.terminate()
