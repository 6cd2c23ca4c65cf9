"""Several statements that happen together or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from broker.catalog.connect import reachable


@asynccontextmanager
async def transaction(db: Any) -> AsyncIterator[Any]:
    """A connection of the pool `db` in a transaction; a `db` that is a connection is used itself (in a transaction, with a savepoint).

    Nothing but catalogue functions belongs into the block: no store is asked while locks are held. Raises `errors.Unavailable`.
    """
    with reachable():
        if isinstance(db, asyncpg.Pool):
            async with db.acquire() as connection, connection.transaction():
                yield connection
        else:
            async with db.transaction():
                yield db
