"""Sites over the API. Everyone sees them, their networks only administrators and services; administrators write them."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from broker import errors
from broker.catalog import sites
from broker.catalog.sites import Network, Site
from broker.model import Client, Role
from broker.service.context import Context
from broker.service.idempotency import Claim
from broker.service.listing import Versioned, limit_of, render_page


async def list_sites(context: Context, client: Client, query: Mapping[str, Any]) -> dict[str, Any]:
    """A page of sites, by path."""
    limit = limit_of(query)
    found = await sites.page(context.db, limit=limit + 1, after=query.get("marker", ""))
    return render_page("sites", found, limit, lambda site: _render(client, site), lambda site: site.path)


async def create_site(context: Context, client: Client, request: Mapping[str, Any], claim: Claim) -> Versioned:
    """Add a site. Raises `Forbidden`, `Invalid` (a network that is none) and `Conflict`."""
    require_admin(client)
    path = request["path"]
    networks = _networks(request.get("networks", ()))
    try:
        site = await sites.insert(context.db, path, request.get("description", ""), networks)
    except errors.Conflict:
        known = await sites.get(context.db, path)
        if not claim.repeated or known is None or (known.description, known.networks) != (request.get("description", ""), networks):
            raise
        site = known
    await reload(context)
    return Versioned(_render(client, site), site.version)


async def get_site(context: Context, client: Client, path: str) -> Versioned:
    """One site. Raises `NotFound`."""
    site = await sites.get(context.db, path)
    if site is None:
        raise errors.NotFound("No such site.")
    return Versioned(_render(client, site), site.version)


async def change_site(context: Context, client: Client, path: str, version: int | None, request: Mapping[str, Any]) -> Versioned:
    """Change a site. Raises `Forbidden`, `Invalid`, `NotFound` and `PreconditionFailed`."""
    require_admin(client)
    networks = _networks(request["networks"]) if "networks" in request else None
    site = await sites.update(context.db, path, version, description=request.get("description"), networks=networks)
    await reload(context)
    return Versioned(_render(client, site), site.version)


async def delete_site(context: Context, client: Client, path: str, version: int | None) -> None:
    """Forget a site. Raises `Forbidden`, `Conflict` while stores are there, `NotFound` and `PreconditionFailed`."""
    require_admin(client)
    await sites.delete(context.db, path, version)
    await reload(context)


async def reload(context: Context) -> None:
    """Let this broker know its own write at once. If the catalogue is gone by now the change log will tell: the write stands."""
    with suppress(errors.Unavailable):
        await context.memory.reload_stores()


def require_admin(client: Client) -> None:
    """Raises `Forbidden` for everyone but administrators."""
    if client.principal.role is not Role.ADMIN:
        raise errors.Forbidden("Only administrators may do this.")


def _networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Networks in canonical form: no bit set behind the prefix, none twice."""
    found = []
    for i, text in enumerate(texts):
        try:
            found.append(ipaddress.ip_network(text))
        except ValueError:
            raise errors.Invalid(
                "This is no network in CIDR form.",
                field=f"networks.{i}",
                expected="an IPv4 or IPv6 network such as 10.1.0.0/16, all bits behind the prefix 0",
            ) from None
    if len(set(found)) != len(found):
        raise errors.Invalid("A network is named twice.", field="networks", expected="different networks")
    return tuple(found)


def _render(client: Client, site: Site) -> dict[str, Any]:
    shown = [str(network) for network in site.networks] if client.principal.sees_private_stores else []
    return {"path": site.path, "description": site.description, "networks": shown}
