"""Quotas over the API: what projects may hold. Administrators alone see and write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from broker import errors
from broker.catalog import quotas
from broker.catalog.quotas import Quota
from broker.model import Client
from broker.service.context import Context
from broker.service.listing import limit_of, render_page
from broker.service.sites import reload, require_admin


async def list_quotas(context: Context, client: Client, query: Mapping[str, Any]) -> dict[str, Any]:
    """A page of projects that have quotas of their own. Raises `Forbidden`."""
    require_admin(client)
    limit = limit_of(query)
    found = await quotas.page(context.db, limit=limit + 1, after=unquote(query.get("marker", "")))
    return render_page("quotas", found, limit, _render, lambda quota: quote(quota.project, safe=""))


async def get_quota(context: Context, client: Client, project: str) -> dict[str, Any]:
    """A project's quota. Raises `Forbidden`, `NotFound` (the configuration alone holds for it)."""
    require_admin(client)
    found = await quotas.get(context.db, project)
    if found is None:
        raise errors.NotFound("The project has no quota of its own: the configuration's (policy.admission) holds for it.")
    return _render(found)


async def set_quota(context: Context, client: Client, project: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Set a project's quota as a whole; what is not given is as the configuration says. Raises `Forbidden`."""
    require_admin(client)
    await quotas.put(context.db, Quota(project, request.get("max_leases"), request.get("max_bytes"), request.get("weight")))
    await reload(context)
    return await get_quota(context, client, project)


async def delete_quota(context: Context, client: Client, project: str) -> None:
    """Let the configuration alone hold for a project. Raises `Forbidden`, `NotFound`."""
    require_admin(client)
    if not await quotas.delete(context.db, project):
        raise errors.NotFound("The project has no quota of its own: the configuration's (policy.admission) holds for it.")
    await reload(context)


def _render(quota: Quota) -> dict[str, Any]:
    limits = {"max_leases": quota.max_leases, "max_bytes": quota.max_bytes, "weight": quota.weight}
    given = {name: value for name, value in limits.items() if value is not None}
    return {"project": quota.project, **given, "leases": quota.leases, "bytes": quota.bytes}
