"""Members of shared images over the API.

Rules (OpenStack, "Image API v2", "Sharing")
- The image's project adds and removes members; each member says for itself whether it accepts, and the image's project may not say it
  for it. Administrators do both.
- A member may read the image whatever it said; what it accepted is in its lists.
- The image's project, administrators and services see all members, a member itself alone.
- Only an image of visibility ``shared`` has members that count. Else all of this is refused; the members of an image that is no longer
  shared are kept, and count again when it is.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from broker import errors, permit
from broker.catalog import members
from broker.catalog.members import Member
from broker.catalog.transaction import transaction
from broker.model import Client, Image, MemberStatus, Visibility
from broker.service import visible
from broker.service.context import Context
from broker.service.instants import instant

MAX_MEMBERS = 128
"""How many members an image may have (Glance: image_member_quota)."""


async def list_members(context: Context, client: Client, id: UUID) -> dict[str, Any]:
    """The members that this principal may see. Raises `NotFound`, `Forbidden`."""
    image = await _shared(context, client, id)
    return {"members": [_render(member) for member in await members.of_image(context.db, id) if _may_see(client, image, member.project)]}


async def get_member(context: Context, client: Client, id: UUID, project: str) -> dict[str, Any]:
    """One member. Raises `NotFound`, `Forbidden`."""
    image = await _shared(context, client, id)
    found = await members.get(context.db, id, project) if _may_see(client, image, project) else None
    return _render(_require(found))


async def add_member(context: Context, client: Client, id: UUID, project: str) -> dict[str, Any]:
    """Share an image with a project. Raises `NotFound`, `Forbidden`, `Conflict` (it is a member already), `TooLarge`."""
    image = await _shared(context, client, id)
    if not permit.may_change_image(client.principal, image.project):
        raise errors.Forbidden("Only the image's project shares it.")
    if project == image.project:
        raise errors.Conflict("The image belongs to this project.", field="member", expected="another project")
    async with transaction(context.db) as connection:
        member = await members.add(connection, id, project, MAX_MEMBERS)
    context.memory.forget_image(id, image.blobs.values())
    return _render(member)


async def answer_member(context: Context, client: Client, id: UUID, project: str, status: MemberStatus) -> dict[str, Any]:
    """Say for a member whether it takes the image into its lists. Raises `NotFound`, `Forbidden`."""
    image = await _shared(context, client, id)
    if not _may_see(client, image, project):
        raise errors.NotFound("No such member.")
    if not permit.may_answer_for(client.principal, project):
        raise errors.Forbidden("Only a member itself accepts or rejects.", field="status")
    member = _require(await members.answer(context.db, id, project, status))
    context.memory.forget_image(id, image.blobs.values())
    return _render(member)


async def remove_member(context: Context, client: Client, id: UUID, project: str) -> None:
    """Share an image with a project no more. Raises `NotFound`, `Forbidden`."""
    image = await _shared(context, client, id)
    if not permit.may_change_image(client.principal, image.project):
        raise errors.Forbidden("Only the image's project ends the sharing.")
    if not await members.remove(context.db, id, project):
        raise errors.NotFound("No such member.")
    context.memory.forget_image(id, image.blobs.values())


async def _shared(context: Context, client: Client, id: UUID) -> Image:
    image = await visible.image(context, client, id)
    if image.visibility is not Visibility.SHARED:
        raise errors.Forbidden("Only shared images have members.", field="visibility", expected="shared")
    return image


def _may_see(client: Client, image: Image, project: str) -> bool:
    principal = client.principal
    return principal.project in (image.project, project) or principal.sees_private_stores


def _require(member: Member | None) -> Member:
    if member is None:
        raise errors.NotFound("No such member.")
    return member


def _render(member: Member) -> dict[str, Any]:
    return {
        "member": member.project,
        "status": member.status.value,
        "created_at": instant(member.created_at),
        "updated_at": instant(member.updated_at),
    }
