"""Signing keys at rest: the private half as encrypted PKCS #8 (`broker.sign.token`), with its life (`broker.sign.rotation`).

Instants are POSIX seconds by the database's clock; infinity stands for no end, in the database ``NULL`` or ``infinity``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from broker.catalog.connect import reachable
from broker.sign.rotation import Life

_LOCK = 0x6B6579732D2D2D31  # "keys---1" in ASCII


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key: its life, and its private half."""

    life: Life
    pem: str = field(repr=False)


async def lock(connection: Any) -> None:
    """Let one broker at a time decide about keys, until the transaction ends."""
    with reachable():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)


async def clock(db: Any) -> float:
    """The time by the database's clock."""
    with reachable():
        now: float = await db.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        return now


async def load(db: Any, *, dead: bool = False) -> list[KeyRow]:
    """Every key that is neither revoked nor past its end, oldest first; with `dead` these too."""
    with reachable():
        rows = await db.fetch(
            """SELECT private_pem, id, algorithm,
                      extract(epoch FROM created_at)::float8, extract(epoch FROM signs_from)::float8,
                      coalesce(extract(epoch FROM signs_until)::float8, 'infinity'),
                      coalesce(extract(epoch FROM kept_until)::float8, 'infinity'),
                      coalesce(extract(epoch FROM tokens_until)::float8, '-infinity'),
                      coalesce(extract(epoch FROM revoked_at)::float8, 'infinity')
               FROM signing_keys WHERE $1 OR (revoked_at IS NULL AND (kept_until IS NULL OR kept_until > now()))
               ORDER BY created_at, id""",
            dead,
        )
    return [KeyRow(Life(*life), pem) for pem, *life in rows]


async def insert(db: Any, key: KeyRow) -> None:
    """Keep a key."""
    life = key.life
    with reachable():
        await db.execute(
            """INSERT INTO signing_keys (id, algorithm, private_pem, created_at, signs_from, signs_until, kept_until)
               VALUES ($1, $2, $3, to_timestamp($4), to_timestamp($5), to_timestamp($6), to_timestamp($7))""",
            life.id, life.algorithm, key.pem, life.created_at, life.signs_from, _end(life.signs_until), _end(life.kept_until),
        )  # fmt: skip


async def update(db: Any, life: Life) -> None:
    """Write how a key's life goes on."""
    with reachable():
        await db.execute(
            """UPDATE signing_keys SET signs_from = to_timestamp($2), signs_until = to_timestamp($3), kept_until = to_timestamp($4),
                      revoked_at = to_timestamp($5) WHERE id = $1""",
            life.id, life.signs_from, _end(life.signs_until), _end(life.kept_until), _end(life.revoked_at),
        )  # fmt: skip


async def keep_until(db: Any, id: str, until: float) -> None:
    """Keep a key until `until` at least: it signs a token that lives so long. Nothing is written when that is known."""
    with reachable():
        await db.execute(
            """UPDATE signing_keys SET tokens_until = to_timestamp($2)
               WHERE id = $1 AND (tokens_until IS NULL OR tokens_until < to_timestamp($2))""",
            id, until,
        )  # fmt: skip
        await db.execute("UPDATE signing_keys SET kept_until = to_timestamp($2) WHERE id = $1 AND kept_until < to_timestamp($2)", id, until)


async def replace_pem(db: Any, id: str, pem: str) -> None:
    """Keep a key's private half as `pem` from now on."""
    with reachable():
        await db.execute("UPDATE signing_keys SET private_pem = $2 WHERE id = $1", id, pem)


async def forget_dead(db: Any, seconds: float = 30 * 86400.0) -> None:
    """Drop keys that ended, or were revoked, `seconds` ago."""
    with reachable():
        await db.execute("DELETE FROM signing_keys WHERE least(revoked_at, kept_until) < now() - make_interval(secs => $1)", seconds)


def _end(instant: float) -> float | None:
    return None if math.isinf(instant) else instant
