"""Signing keys at rest: the private half as encrypted PKCS #8 (`broker.sign.token`), with its life.

Instants are POSIX seconds; ``None`` stands for no end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from broker.catalog.connect import reachable

_LOCK = 0x6B6579732D2D2D31  # "keys---1" in ASCII


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key. It signs from `signs_from` until `signs_until`, is published until `kept_until`."""

    id: str
    algorithm: str
    pem: str = field(repr=False)
    signs_from: float
    signs_until: float | None = None
    kept_until: float | None = None


async def lock(connection: Any) -> None:
    """Let one broker at a time decide about keys, until the transaction ends."""
    with reachable():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)


async def load(db: Any) -> list[KeyRow]:
    """Every key that is neither revoked nor past its end, oldest first."""
    with reachable():
        rows = await db.fetch(
            """SELECT id, algorithm, private_pem, extract(epoch FROM signs_from)::float8, extract(epoch FROM signs_until)::float8,
                      extract(epoch FROM kept_until)::float8
               FROM signing_keys WHERE revoked_at IS NULL AND (kept_until IS NULL OR kept_until > now()) ORDER BY signs_from, id"""
        )
    return [KeyRow(*row) for row in rows]


async def insert(db: Any, key: KeyRow) -> None:
    """Keep a key."""
    with reachable():
        await db.execute(
            """INSERT INTO signing_keys (id, algorithm, private_pem, signs_from, signs_until, kept_until)
               VALUES ($1, $2, $3, to_timestamp($4), to_timestamp($5), to_timestamp($6))""",
            key.id, key.algorithm, key.pem, key.signs_from, key.signs_until, key.kept_until,
        )  # fmt: skip
