"""Real PostgreSQL servers, and a fresh migrated database for every test that asks.

`database` (a URL) and `pool` are on the embedded PostgreSQL 18; `any_postgres` (a URL) runs the test there and on Debian's
15. `empty_postgres` is the same without a schema. Each test process has servers of its own, begun when first used.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import asyncpg
import pytest

from broker import embedded
from broker.catalog import connect, migrations
from tests.parts.process import PartMissing

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
_TEMPLATE = "migrated"
_MEMORY, _PLENTY, _PREFIX = Path("/dev/shm"), 4 << 30, "broker-tests-postgres-"
_T = TypeVar("_T")


class Postgres:
    """A server that an event loop in a thread of its own keeps alive."""

    def __init__(self, binaries: Path | None) -> None:
        self._binaries = binaries
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        # pytest's own temporary directories let nobody else pass, and PostgreSQL may have to run as somebody else.
        self._place = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_fast_place()))
        self._place.chmod(0o711)

    def __enter__(self) -> Postgres:
        self._thread.start()
        self._begin()
        self._run(self._prepare())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._place)

    def create(self, template: str = _TEMPLATE) -> str:
        """A new database like `template`; its URL."""
        name = f"test{next(self._numbers)}"
        # Hundreds of tests ask for one: files are copied whole, which costs less than writing every page to the log.
        self._run(self._execute(f"create database {name} template {template} strategy file_copy"))
        return self._server.url(name)

    def drop(self, url: str) -> None:
        """Remove the database of `url`, whoever is connected to it."""
        self._run(self._execute(f"drop database {url.partition('?')[0].rpartition('/')[2]} with (force)"))

    @property
    def pid(self) -> int:
        """The server's process; when it is killed, another one takes its place."""
        pid = self._server.pid
        assert pid is not None
        return pid

    def stop(self) -> None:
        """Be gone, until `start_again`."""
        self._run(self._server.stop())

    def start_again(self) -> None:
        """The same server on the same data, at the same URLs."""
        self._begin()

    def end_connections(self, url: str) -> None:
        """End every connection to the database of `url`, as a restart of the server would."""
        name = url.partition("?")[0].rpartition("/")[2]
        self._run(self._execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))

    def _begin(self) -> None:
        # What a test writes need not outlive the machine, only a server that is killed: nothing is forced to disk.
        with patch.dict(embedded._SETTINGS, fsync="off", full_page_writes="off"):
            self._server = self._run(embedded.start(self._place / "data", binaries=self._binaries))

    async def _prepare(self) -> None:
        await self._execute(f"create database {_TEMPLATE}")
        connection = await connect.connect_one(self._server.url(_TEMPLATE))
        try:
            await migrations.migrate(connection)
        finally:
            await connection.close()

    async def _execute(self, sql: str) -> None:
        connection = await asyncpg.connect(self._server.dsn)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)


def _fast_place() -> Path | None:
    """Memory, where there is plenty: a database is some 450 files, and making those on a disk can take longer than the test itself.
    ``None``: where temporary files are. What killed test processes left there is removed."""
    if not _MEMORY.is_dir() or min(shutil.disk_usage(_MEMORY).free, _available()) < _PLENTY:
        return None
    for left in _MEMORY.glob(f"{_PREFIX}*"):
        if not Path("/proc", left.name.removeprefix(_PREFIX).partition("-")[0]).exists():
            shutil.rmtree(left, ignore_errors=True)
    return _MEMORY


def _available() -> int:
    """Bytes of memory that can be had without swapping."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The embedded PostgreSQL 18."""
    with Postgres(None) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_15() -> Iterator[Postgres]:
    """Debian's PostgreSQL 15."""
    if not (DEBIAN_15 / "postgres").exists():
        raise PartMissing("PostgreSQL 15 is not installed; install it with: apt-get install postgresql-15")
    with Postgres(DEBIAN_15) as server:
        yield server


@pytest.fixture
def database(postgres: Postgres) -> Iterator[str]:
    """The URL of a fresh database with the whole schema, on PostgreSQL 18."""
    url = postgres.create()
    yield url
    postgres.drop(url)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    """A pool on `database`, as the broker makes it."""
    pool = await connect.connect(database, min_size=1, max_size=10)
    yield pool
    pool.terminate()


@pytest.fixture(params=["postgres", "postgres_15"])
def any_postgres(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `database`, once on PostgreSQL 18 and once on 15."""
    server: Postgres = request.getfixturevalue(request.param)
    url = server.create()
    yield url
    server.drop(url)


@pytest.fixture(params=["postgres", "postgres_15"])
def empty_postgres(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `any_postgres`, without a schema."""
    server: Postgres = request.getfixturevalue(request.param)
    url = server.create("template1")
    yield url
    server.drop(url)
