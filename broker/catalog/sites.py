"""Sites: places in the network, with the networks that clients there come from.

Rules
- A site needs no parent: ``eu/az1`` may exist without ``eu``. Topology follows from the paths alone (`broker.sites`).
- Networks of different sites may overlap; the longest prefix decides.
- A site stays while a store is at it or below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import asyncpg

from broker import errors
from broker.catalog.connect import reachable
from broker.catalog.transaction import transaction

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Site:
    """A place and its networks."""

    path: str
    description: str = ""
    networks: tuple[Network, ...] = ()
    version: int = 1


_SELECT = "SELECT path, description, networks, version FROM sites "


def _site(row: Any) -> Site:
    return Site(row["path"], row["description"], tuple(row["networks"]), row["version"])


async def load(db: Any) -> list[Site]:
    """Every site."""
    with reachable():
        return [_site(row) for row in await db.fetch(_SELECT + "ORDER BY path")]


async def get(db: Any, path: str) -> Site | None:
    """The site with this path."""
    with reachable():
        row = await db.fetchrow(_SELECT + "WHERE path = $1", path)
    return None if row is None else _site(row)


async def page(db: Any, *, limit: int, after: str = "") -> list[Site]:
    """Up to `limit` sites by path, those after `after`."""
    with reachable():
        rows = await db.fetch(_SELECT + "WHERE path > $1 ORDER BY path LIMIT $2", after, limit)
    return [_site(row) for row in rows]


async def insert(db: Any, path: str, description: str, networks: Sequence[Network]) -> Site:
    """Add a site. Raises `Conflict` when the path is taken."""
    with reachable():
        row = await db.fetchrow(
            """INSERT INTO sites (path, description, networks) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING
               RETURNING path, description, networks, version""",
            path, description, list(networks),
        )  # fmt: skip
    if row is None:
        raise errors.Conflict(f"A site {path} exists already.", field="path", expected="a path that no site has")
    return _site(row)


async def update(
    db: Any, path: str, version: int | None, *, description: str | None = None, networks: Sequence[Network] | None = None
) -> Site:
    """Change what is not ``None``. Raises `PreconditionFailed` when the site is no longer at `version`, and `NotFound`."""
    with reachable():
        row = await db.fetchrow(
            """UPDATE sites SET description = coalesce($3, description), networks = coalesce($4, networks), version = version + 1
               WHERE path = $1 AND ($2::int IS NULL OR version = $2) RETURNING path, description, networks, version""",
            path, version, description, None if networks is None else list(networks),
        )  # fmt: skip
    if row is None:
        raise await _why_not(db, path)
    return _site(row)


async def delete(db: Any, path: str, version: int | None) -> None:
    """Forget a site. Raises `Conflict` while a store is there or below, `PreconditionFailed`, `NotFound`."""
    try:
        async with transaction(db) as connection:
            used = await connection.fetchval("SELECT count(*) FROM stores WHERE site = $1 OR starts_with(site, $1 || '/')", path)
            if used:
                raise errors.Conflict(f"{used} stores are at this site or below it. Remove them first.")
            gone = await connection.fetchval(
                "DELETE FROM sites WHERE path = $1 AND ($2::int IS NULL OR version = $2) RETURNING path", path, version
            )
            if gone is None:
                raise await _why_not(connection, path)
    except asyncpg.ForeignKeyViolationError:  # a store came in between
        raise errors.Conflict("A store is at this site.") from None


async def _why_not(db: Any, path: str) -> errors.BrokerError:
    """Why no row matched a path and a version."""
    if await get(db, path) is not None:
        return errors.PreconditionFailed("The site has changed since it was read.")
    return errors.NotFound("No such site.")
