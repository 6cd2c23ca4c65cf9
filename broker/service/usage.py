"""What a project's images come to, told to itself."""

from __future__ import annotations

from broker.catalog import usage as catalog
from broker.catalog.usage import Usage
from broker.model import Client
from broker.service.context import Context


async def usage(context: Context, client: Client) -> Usage:
    """Of the principal's own project."""
    return await catalog.of_project(context.db, client.principal.project)
