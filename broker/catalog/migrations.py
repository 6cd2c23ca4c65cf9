"""The schema's steps, forward only: `schemas/sql/NNNN_name.sql`, numbered from 1 without a gap.

Rules: a step that was applied is never edited (its SHA-256 is kept); each runs in one transaction of its own, under a
lock that lets one broker migrate at a time. A broker serves a schema that has all steps it knows, and no other but those;
or exactly one more, if that step begins with the line ``-- compatible-with: previous`` (invariant 12: such a step leaves
everything that the code before it does working).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import TypeAlias

import asyncpg

_LOCK = 0x7472616E73666572  # "transfer" in ASCII
_FILE = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql\Z")
_COMPATIBLE = re.compile(r"--\s*compatible-with:\s*previous\s*$", re.MULTILINE)

_Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"  # only the stubs make it generic


class SchemaError(Exception):
    """This broker and the database's schema do not fit together; the text names the step and what to do."""


@dataclass(frozen=True, slots=True)
class Step:
    """One migration. `sql` is empty for steps that only the database knows."""

    version: int
    name: str
    checksum: str
    compatible: bool
    """Whether code that knows all steps but this one works with it."""
    sql: str = ""

    def __str__(self) -> str:
        return f"{self.version:04}_{self.name}"


@dataclass(frozen=True, slots=True)
class Status:
    """The database against this broker's steps: not yet `applied`, `unknown` here, or `changed` since they were applied."""

    applied: tuple[Step, ...]
    pending: tuple[Step, ...]
    unknown: tuple[Step, ...]
    changed: tuple[Step, ...]

    @property
    def serves(self) -> bool:
        """Whether this broker may serve this schema."""
        ahead = not self.unknown or (len(self.unknown) == 1 and self.unknown[0].compatible)
        return ahead and not self.pending and not self.changed


def steps(directory: Traversable | None = None) -> tuple[Step, ...]:
    """The steps in `directory` (by default those of this broker), in order. Raises `SchemaError` for gaps in the numbers."""
    found = []
    for file in (directory or resources.files("broker.schemas") / "sql").iterdir():
        if match := _FILE.match(file.name):
            sql = file.read_text(encoding="utf-8")
            header = sql.partition("\n\n")[0]
            found.append(
                Step(int(match[1]), match[2], hashlib.sha256(sql.encode()).hexdigest(), _COMPATIBLE.search(header) is not None, sql)
            )
    found.sort(key=lambda step: step.version)
    for expected, step in enumerate(found, 1):
        if step.version != expected:
            raise SchemaError(f"the migrations are not numbered one by one: {step} comes where {expected:04} should; reinstall the broker")
    return tuple(found)


async def check(connection: _Connection, directory: Traversable | None = None) -> Status:
    """Compare the database with this broker's steps. Changes nothing."""
    known = {step.version: step for step in steps(directory)}
    applied = await _applied(connection)
    there = {step.version for step in applied}
    return Status(
        applied=applied,
        pending=tuple(step for version, step in known.items() if version not in there),
        unknown=tuple(step for step in applied if step.version not in known),
        changed=tuple(step for step in applied if step.version in known and known[step.version].checksum != step.checksum),
    )


async def require(connection: _Connection, directory: Traversable | None = None) -> Status:
    """Refuse, with `SchemaError`, a schema that this broker must not serve."""
    status = await check(connection, directory)
    if not status.serves:
        raise SchemaError(_complaint(status))
    return status


async def migrate(connection: _Connection, directory: Traversable | None = None) -> tuple[Step, ...]:
    """Apply what is pending and return it; another broker that migrates is waited for. Needs a connection of its own.

    Raises `SchemaError`, before anything is changed, when the schema is newer than this broker or was edited; a failing
    step raises its `asyncpg.PostgresError` and leaves those before it applied.
    """
    await connection.execute("set statement_timeout = 0; set lock_timeout = 0")
    await connection.execute("select pg_advisory_lock($1)", _LOCK)
    try:
        await connection.execute(
            "create table if not exists schema_migrations (version integer primary key, name text not null, checksum text not null,"
            " compatible_with_previous boolean not null, applied_at timestamptz not null default now())"
        )
        status = await check(connection, directory)
        if status.changed or (status.unknown and not status.serves):
            raise SchemaError(_complaint(status))
        for step in status.pending:
            async with connection.transaction():
                # Whoever waits for a table lock makes everybody behind it wait: rather fail, to be run again.
                await connection.execute("set local lock_timeout = '10s'")
                await connection.execute(step.sql)
                await connection.execute(
                    "insert into schema_migrations (version, name, checksum, compatible_with_previous) values ($1, $2, $3, $4)",
                    step.version,
                    step.name,
                    step.checksum,
                    step.compatible,
                )
        return status.pending
    finally:
        if not connection.is_closed():
            await connection.execute("select pg_advisory_unlock($1)", _LOCK)
            await connection.execute("reset statement_timeout; reset lock_timeout")


async def _applied(connection: _Connection) -> tuple[Step, ...]:
    if await connection.fetchval("select to_regclass('schema_migrations')") is None:
        return ()
    rows = await connection.fetch("select version, name, checksum, compatible_with_previous from schema_migrations order by version")
    return tuple(Step(row["version"], row["name"], row["checksum"], row["compatible_with_previous"]) for row in rows)


def _complaint(status: Status) -> str:
    if status.changed:
        return f"step {status.changed[0]} was edited after it had been applied; install the broker version that applied it"
    if status.unknown:
        return f"the schema has step {status.unknown[-1]}, which this broker does not know; install a newer broker"
    return f"the schema lacks step {status.pending[0]}; run: broker migrate"
