"""Idempotency keys: a POST that is sent again creates nothing twice.

A key belongs to its owner (a principal) and stands for one request, by fingerprint. It is kept for a day; a retry later
than that is a new request.
"""

from __future__ import annotations

import hmac
from typing import Any
from uuid import UUID

from broker import errors
from broker.catalog.connect import reachable

KEPT_SECONDS = 86400.0


async def claim(db: Any, owner: str, key: str, fingerprint: bytes, fresh: UUID) -> UUID:
    """The id of the resource that this key stands for: `fresh` for the first request, for each retry what the first one got.

    That id tells nothing of whether the resource was made: the first request may have failed, or be under way. Raises
    `IdempotencyMismatch` when the key was used for another request.
    """
    with reachable():
        inserted = await db.fetchval(
            """INSERT INTO idempotency AS i (owner, key, fingerprint, resource) VALUES ($1, $2, $3, $4)
               ON CONFLICT (owner, key) DO UPDATE SET fingerprint = $3, resource = $4, created_at = now()
                   WHERE i.created_at < now() - make_interval(secs => $5)
               RETURNING resource""",
            owner, key, fingerprint, fresh, KEPT_SECONDS,
        )  # fmt: skip
        if inserted is not None:
            return fresh
        row = await db.fetchrow("SELECT fingerprint, resource FROM idempotency WHERE owner = $1 AND key = $2", owner, key)
    if row is None:  # forgotten between the two statements
        raise errors.Unavailable("The Idempotency-Key expired just now. Send the request again.", retry_after=1.0)
    if not hmac.compare_digest(bytes(row["fingerprint"]), fingerprint):
        raise errors.IdempotencyMismatch()
    return UUID(int=row["resource"].int)


async def forget_old(db: Any, seconds: float = KEPT_SECONDS) -> None:
    """Drop keys older than `seconds`."""
    with reachable():
        await db.execute("DELETE FROM idempotency WHERE created_at < now() - make_interval(secs => $1)", seconds)
