"""Images and stores as far as a principal may see them (`broker.permit`): what it may not see answers as what is not there."""

from __future__ import annotations

from uuid import UUID

from broker import errors, permit
from broker.catalog import images
from broker.model import Client, Image, Store
from broker.service.context import Context


async def image(context: Context, client: Client, id: UUID) -> Image:
    """The image as the catalogue has it now. Raises `NotFound`."""
    found = await images.get(context.db, id)
    if found is None or not permit.may_see_image(client.principal, found):
        raise errors.NotFound("No such image.")
    return found


def store(context: Context, client: Client, name: str) -> Store | None:
    """The store of that name, from memory."""
    found = context.memory.store(name)
    return found if found is not None and permit.may_see_store(client.principal, found) else None


def stores(context: Context, client: Client) -> list[Store]:
    """All stores, by name, from memory."""
    found = (each for each in context.memory.stores().values() if permit.may_see_store(client.principal, each))
    return sorted(found, key=lambda each: each.name)
