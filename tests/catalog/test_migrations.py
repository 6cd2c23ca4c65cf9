"""Migrations: one at a time, never edited, never guessed at; and what a broker says of a schema that is not its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from broker.catalog import connect, migrations


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """A directory with two migrations."""
    (tmp_path / "0001_first.sql").write_text("-- The first.\n\ncreate table one (id integer);\ncreate table uno (id integer);\n")
    (tmp_path / "0002_second.sql").write_text("-- The second.\n\ncreate table two (id integer);\n")
    (tmp_path / "notes.txt").write_text("not a migration")
    return tmp_path


async def _connection(url: str) -> asyncpg.Connection[asyncpg.Record]:
    return await connect.connect_one(url)


async def _tables(connection: asyncpg.Connection[asyncpg.Record]) -> set[str]:
    return {row[0] for row in await connection.fetch("select tablename from pg_tables where schemaname = 'public'")}


async def test_pending_steps_are_applied_once_and_in_order(empty_postgres: str, steps: Path) -> None:
    connection = await _connection(empty_postgres)
    before = await migrations.check(connection, steps)
    assert [str(step) for step in before.pending] == ["0001_first", "0002_second"]
    assert await _tables(connection) == set(), "check changes nothing"
    assert [str(step) for step in await migrations.migrate(connection, steps)] == ["0001_first", "0002_second"]
    assert await migrations.migrate(connection, steps) == ()
    assert await _tables(connection) == {"one", "uno", "two", "schema_migrations"}
    assert (await migrations.require(connection, steps)).serves
    await connection.close()


async def test_two_brokers_migrate_at_the_same_time(empty_postgres: str, steps: Path) -> None:
    (steps / "0003_slow.sql").write_text("select pg_sleep(0.2);\ncreate table three (id integer);\n")
    connections = [await _connection(empty_postgres) for _ in range(4)]
    results = await asyncio.gather(*(migrations.migrate(connection, steps) for connection in connections))
    assert sorted(len(result) for result in results) == [0, 0, 0, 3], "one did it all, the others waited and found it done"
    for connection in connections:
        assert await connection.fetchval("select count(*) from pg_locks where locktype = 'advisory'") == 0
        await connection.close()


async def test_a_missing_step_is_named(empty_postgres: str, steps: Path) -> None:
    connection = await _connection(empty_postgres)
    with pytest.raises(migrations.SchemaError, match="lacks step 0001_first; run: broker migrate"):
        await migrations.require(connection, steps)
    await migrations.migrate(connection, steps)
    (steps / "0003_third.sql").write_text("select 1;\n")
    with pytest.raises(migrations.SchemaError, match="lacks step 0003_third"):
        await migrations.require(connection, steps)
    await connection.close()


async def test_an_edited_step_is_refused(empty_postgres: str, steps: Path) -> None:
    connection = await _connection(empty_postgres)
    await migrations.migrate(connection, steps)
    (steps / "0001_first.sql").write_text("create table other (id integer);\n")
    (steps / "0003_third.sql").write_text("create table three (id integer);\n")
    for refuse in (migrations.require, migrations.migrate):
        with pytest.raises(migrations.SchemaError, match="0001_first was edited"):
            await refuse(connection, steps)
    assert "three" not in await _tables(connection)
    await connection.close()


@pytest.mark.parametrize(
    ("later", "served"),
    [
        (["-- compatible-with: previous\n\nselect 1;\n"], True),
        (["-- About it.\n-- compatible-with: previous\n\nselect 1;\n"], True),
        (["select 1;\n"], False),
        (["-- A header.\n\n-- compatible-with: previous\nselect 1;\n"], False),
        (["-- compatible-with: previous\n\nselect 1;\n"] * 2, False),
    ],
)
async def test_only_one_compatible_step_ahead_is_served(empty_postgres: str, steps: Path, later: list[str], served: bool) -> None:
    files = [steps / f"{number:04}_later.sql" for number in range(3, 3 + len(later))]
    for file, text in zip(files, later, strict=True):
        file.write_text(text)
    connection = await _connection(empty_postgres)
    await migrations.migrate(connection, steps)
    for file in files:
        file.unlink()  # now this is the code of before
    if served:
        assert [step.name for step in (await migrations.require(connection, steps)).unknown] == ["later"]
        assert await migrations.migrate(connection, steps) == ()
    else:
        for refuse in (migrations.require, migrations.migrate):
            with pytest.raises(migrations.SchemaError, match=f"has step {len(later) + 2:04}_later, which this broker does not know"):
                await refuse(connection, steps)
    await connection.close()


async def test_a_failing_step_leaves_nothing_of_itself_and_gives_the_lock_back(empty_postgres: str, steps: Path) -> None:
    (steps / "0003_broken.sql").write_text("create table three (id integer);\nselect 1 / 0;\n")
    connection = await _connection(empty_postgres)
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrations.migrate(connection, steps)
    assert {"one", "two"} < await _tables(connection)
    assert "three" not in await _tables(connection)
    (steps / "0003_broken.sql").write_text("create table three (id integer);\n")
    other = await _connection(empty_postgres)
    assert [str(step) for step in await migrations.migrate(other, steps)] == ["0003_broken"]
    await connection.close()
    await other.close()


def test_a_gap_in_the_numbers_is_refused(steps: Path) -> None:
    (steps / "0004_fourth.sql").write_text("select 1;\n")
    with pytest.raises(migrations.SchemaError, match="0004_fourth comes where 0003 should"):
        migrations.steps(steps)


async def test_the_real_schema_is_complete_on_every_supported_server(any_postgres: str) -> None:
    connection = await _connection(any_postgres)
    status = await migrations.require(connection)
    assert status.applied
    assert not status.unknown
    await connection.close()
