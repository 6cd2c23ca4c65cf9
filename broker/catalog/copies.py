"""Copies: replicas that somebody asked for and an agent makes. The broker only keeps the list.

Rules
- Of one blob at most one copy to a store is under way (``queued`` or ``running``).
- An agent has a copy until `taken_until`, which its reports move on; then another may take it. The number of the attempt is its
  turn: what an earlier taker still says counts no more.
- After `MAX_ATTEMPTS` agents that fell silent a copy has failed. One that ended is kept for a while, for those who ask how it went.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from broker import errors
from broker.catalog.connect import reachable
from broker.model import Exposure, Purpose

TAKEN_SECONDS = 120.0
"""For so long an agent may be silent."""

MAX_ATTEMPTS = 5
KEPT_SECONDS = 7 * 86400.0

QUEUED, RUNNING, DONE, FAILED = "queued", "running", "done", "failed"


@dataclass(frozen=True, slots=True)
class Copy:
    """One blob to be put to one store. `attempts` is also the present taker's turn; `size` is the blob's."""

    id: UUID
    image_id: UUID
    blob_id: UUID
    store: str
    exposure: Exposure
    purpose: Purpose
    project: str
    subject: str
    state: str
    agent: str | None
    attempts: int
    bytes: int
    size: int | None
    problem: str | None
    created_at: float
    updated_at: float


_SELECT = """
SELECT c.id, c.image_id, c.blob_id, s.name AS store, s.exposure, c.purpose, c.project, c.subject, c.state, c.agent, c.attempts, c.bytes,
       b.size, c.problem, extract(epoch FROM c.created_at)::float8 AS created_at, extract(epoch FROM c.updated_at)::float8 AS updated_at
FROM copies c JOIN stores s ON s.id = c.store_id JOIN blobs b ON b.id = c.blob_id
"""


def _copy(row: Any) -> Copy:
    return Copy(**{**dict(row), "exposure": Exposure(row["exposure"]), "purpose": Purpose(row["purpose"])})


async def get(db: Any, id: UUID) -> Copy | None:
    """One copy."""
    with reachable():
        row = await db.fetchrow(_SELECT + "WHERE c.id = $1", id)
    return None if row is None else _copy(row)


async def page(
    db: Any,
    *,
    project: str | None,
    private: bool,
    limit: int,
    after: UUID | None = None,
    image: UUID | None = None,
    state: str | None = None,
    purpose: Purpose | None = None,
) -> list[Copy]:
    """Up to `limit` copies by id, those after `after`: of images of `project` or asked for by it, or all when ``None``.

    Those to stores of exposure ``service`` only with `private`.
    """
    with reachable():
        rows = await db.fetch(
            _SELECT
            + """WHERE ($1::text IS NULL OR c.project = $1 OR EXISTS (SELECT FROM images i WHERE i.id = c.image_id AND i.project = $1))
                 AND ($2 OR s.exposure = 'public') AND ($3::uuid IS NULL OR c.id > $3) AND ($4::uuid IS NULL OR c.image_id = $4)
                 AND ($5::text IS NULL OR c.state = $5) AND ($6::text IS NULL OR c.purpose = $6) ORDER BY c.id LIMIT $7""",
            project, private, after, image, state, purpose and purpose.value, limit,
        )  # fmt: skip
    return [_copy(row) for row in rows]


async def of_images(db: Any, images: Sequence[UUID]) -> list[Copy]:
    """Every copy of these images that is kept, by id."""
    with reachable():
        return [_copy(row) for row in await db.fetch(_SELECT + "WHERE c.image_id = ANY ($1::uuid[]) ORDER BY c.id", list(images))]


async def insert(db: Any, id: UUID, *, image: UUID, blob: UUID, store_id: int, purpose: Purpose, project: str, subject: str) -> Copy:
    """Ask for a copy; the one that is under way already, if there is. Raises `NotFound` when image, blob or store is gone."""
    try:
        with reachable():
            await db.execute(
                """INSERT INTO copies (id, image_id, blob_id, store_id, purpose, project, subject) VALUES ($1, $2, $3, $4, $5, $6, $7)
                   ON CONFLICT (blob_id, store_id) WHERE state IN ('queued', 'running') DO NOTHING""",
                id, image, blob, store_id, purpose.value, project, subject,
            )  # fmt: skip
            row = await db.fetchrow(
                _SELECT + "WHERE c.blob_id = $1 AND c.store_id = $2 AND c.state IN ('queued', 'running')", blob, store_id
            )
    except asyncpg.ForeignKeyViolationError:
        raise errors.NotFound("The image or the store is gone.") from None
    if row is None:
        raise errors.Conflict("The copy has just ended. Send the request again.", retry_after=1.0)
    return _copy(row)


async def take(db: Any, agent: str, stores: Sequence[str]) -> Copy | None:
    """The copy that waits the longest, to one of `stores` (any when empty), for this agent now. Agents that ask at once get different
    ones. Those whose blob is at the store already are done, without an agent."""
    with reachable():
        await db.execute(
            """UPDATE copies c SET state = 'done', updated_at = now() WHERE state = 'queued' AND EXISTS (
                   SELECT FROM replicas r WHERE r.blob_id = c.blob_id AND r.store_id = c.store_id AND r.state = 'active')"""
        )
        id = await db.fetchval(
            """UPDATE copies SET state = 'running', agent = $1, attempts = attempts + 1, bytes = 0, updated_at = now(),
                      taken_until = clock_timestamp() + make_interval(secs => $3)
               WHERE id = (SELECT c.id FROM copies c JOIN stores s ON s.id = c.store_id
                           WHERE (c.state = 'queued' OR c.state = 'running' AND c.taken_until < clock_timestamp())
                             AND c.attempts < $4 AND s.enabled AND s.writable AND (cardinality($2::text[]) = 0 OR s.name = ANY ($2))
                           ORDER BY c.id LIMIT 1 FOR UPDATE OF c SKIP LOCKED)
               RETURNING id""",
            agent, list(stores), TAKEN_SECONDS, MAX_ATTEMPTS,
        )  # fmt: skip
    return None if id is None else await get(db, id)


async def report(db: Any, id: UUID, turn: int, *, state: str, bytes: int, problem: str | None = None) -> bool:
    """What its taker says. ``False`` when it is somebody else's, or has ended."""
    with reachable():
        return bool(
            await db.fetchval(
                """UPDATE copies SET state = $3, bytes = $4, problem = $5, updated_at = now(),
                          taken_until = CASE WHEN $3 = 'running' THEN clock_timestamp() + make_interval(secs => $6) END
                   WHERE id = $1 AND attempts = $2 AND state = 'running' RETURNING true""",
                id, turn, state, bytes, problem, TAKEN_SECONDS,
            )
        )  # fmt: skip


async def hand_over(db: Any, copy: Copy, agent: str) -> None:
    """Let the replica that the project `agent` has just registered be of the project that asked for the copy."""
    with reachable():
        await db.execute(
            """UPDATE replicas r SET project = $1, subject = $2, version = r.version + 1 FROM stores s
               WHERE s.id = r.store_id AND s.name = $3 AND r.blob_id = $4 AND r.state = 'active' AND r.project = $5 AND $5 <> $1""",
            copy.project, copy.subject, copy.store, copy.blob_id, agent,
        )  # fmt: skip


async def forget(db: Any, ids: Sequence[UUID]) -> int:
    """Drop these copies, under way or not. Returns how many there were."""
    with reachable():
        return len(await db.fetch("DELETE FROM copies WHERE id = ANY ($1::uuid[]) RETURNING id", list(ids)))


async def expire(db: Any) -> None:
    """Let those fail that too many agents left, and forget those that ended long ago."""
    with reachable():
        await db.execute(
            """UPDATE copies SET state = 'failed', updated_at = now(), problem = 'the agents that took it fell silent'
               WHERE state = 'running' AND taken_until < clock_timestamp() AND attempts >= $1""",
            MAX_ATTEMPTS,
        )
        await db.execute(
            "DELETE FROM copies WHERE state IN ('done', 'failed') AND updated_at < now() - make_interval(secs => $1)", KEPT_SECONDS
        )
