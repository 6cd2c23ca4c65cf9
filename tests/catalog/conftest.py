"""Fixtures of the catalogue's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest_asyncio

from tests.catalog.registry import Registry, running


@pytest_asyncio.fixture
async def registry(pool: asyncpg.Pool[asyncpg.Record]) -> AsyncIterator[Registry]:
    """One broker's service on a fresh catalogue."""
    async with running(pool) as registry:
        yield registry
