"""Who may do what: the one place where roles, visibility and exposure meet (README, "Who may do what").

Pure functions over a principal and a thing. What a principal may not see answers exactly like what does not exist, so
callers raise `NotFound` for a ``False`` of the ``may_see_*`` and `Forbidden` only for what is visible.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from broker.model import BlobState, Exposure, Image, ImageStatus, Principal, Replica, Role, Store, Visibility


class Owned(Protocol):
    """As much of an image as decides who may see it; `members` are the projects that it is shared with."""

    @property
    def project(self) -> str: ...
    @property
    def visibility(self) -> Visibility: ...
    @property
    def members(self) -> Collection[str]: ...
    @property
    def is_withheld(self) -> bool: ...


class Exposed(Protocol):
    """A store, or whatever tells of the store that it is about."""

    @property
    def exposure(self) -> Exposure: ...


FOR_ALL = (Visibility.COMMUNITY, Visibility.PUBLIC)
"""What every principal may see by its id."""

WITHHELD = (ImageStatus.DEACTIVATED, ImageStatus.PENDING)
"""Of such images only administrators get bytes (M16)."""


@dataclass(frozen=True, slots=True)
class ImageAccess:
    """As much of an image as decides who may read its blobs."""

    id: UUID
    project: str
    visibility: Visibility
    status: ImageStatus
    format: str
    members: tuple[str, ...]
    is_withheld: bool


def may_see_store(principal: Principal, store: Exposed) -> bool:
    """Private stores exist only for the roles ``admin`` and ``service`` (M13)."""
    return store.exposure is Exposure.PUBLIC or principal.sees_private_stores


def may_see_image(principal: Principal, image: Owned) -> bool:
    """Its project, its members, administrators and services see an image; everyone sees a public or community one (by id), unless it
    waits for approval or was refused it: what nobody vetted is shown to nobody (M16)."""
    if image.project == principal.project or principal.sees_private_stores:
        return True
    if image.visibility is Visibility.SHARED:
        return principal.project in image.members
    return image.visibility is not Visibility.PRIVATE and not image.is_withheld


def lists_image(principal: Principal, image: Owned) -> bool:
    """As `may_see_image`, but community images are listed only for their project, and services see in lists what members see."""
    if image.project == principal.project or principal.role is Role.ADMIN:
        return True
    if image.visibility is Visibility.SHARED:
        return principal.project in image.members
    return image.visibility is Visibility.PUBLIC and not image.is_withheld


def may_read_image(principal: Principal, image: Image | ImageAccess) -> bool:
    """Whether a ticket for its bytes may be given: visible, and neither deactivated nor unapproved unless an administrator asks (M16).

    Nor to its own project, and not to a service: what nova-compute gets a ticket for is booted.
    """
    if image.status in WITHHELD and principal.role is not Role.ADMIN:
        return False
    return may_see_image(principal, image)


def may_read_blob(principal: Principal, images: Iterable[ImageAccess]) -> bool:
    """A blob is readable through any image that is; one that no image refers to, only by administrators."""
    return principal.role is Role.ADMIN or any(may_read_image(principal, image) for image in images)


def may_name_blob(principal: Principal, images: Collection[ImageAccess], state: BlobState | None) -> bool:
    """Whether a principal may make an image of a blob that `images` have. Whoever has an image of a queued one may upload its bytes, so
    that one is for the project alone that has it already."""
    if state is BlobState.QUEUED and principal.role is not Role.ADMIN and any(image.project != principal.project for image in images):
        return False
    return state in (BlobState.QUEUED, BlobState.ACTIVE) and may_read_blob(principal, images)


def anyone_may_read(images: Iterable[tuple[str, str]]) -> bool:
    """Whether `may_read_blob` holds for every principal; of each image visibility and status."""
    return any(visibility in FOR_ALL and status not in WITHHELD for visibility, status in images)


def may_change_image(principal: Principal, project: str) -> bool:
    """Members and services change what their project owns; administrators everything."""
    return principal.role is Role.ADMIN or (principal.may_write and project == principal.project)


def may_publish(principal: Principal, vetted: Collection[Visibility]) -> bool:
    """Administrators make an image public; where public images are `vetted` everyone who writes may, since it then waits for one (M16)."""
    return principal.role is Role.ADMIN or (principal.may_write and Visibility.PUBLIC in vetted)


def may_answer_for(principal: Principal, member: str) -> bool:
    """Whether a principal may accept or refuse for the project `member` that an image is shared with it."""
    return principal.role is Role.ADMIN or (principal.may_write and principal.project == member)


def may_write_blob(principal: Principal, images: Iterable[ImageAccess]) -> bool:
    """Whether a principal may add a replica: a writer of a project with an image of it, a service that may read it, an administrator."""
    if principal.role is Role.ADMIN:
        return True
    images = tuple(images)
    if principal.role is Role.SERVICE and may_read_blob(principal, images):
        return True
    return principal.may_write and any(image.project == principal.project for image in images)


def may_write_store(principal: Principal, store: Store) -> bool:
    """Whether uploads and registrations by this principal may go to `store`."""
    return principal.may_write and store.enabled and store.writable and may_see_store(principal, store)


def may_change_replica(principal: Principal, replica: Replica) -> bool:
    """Whoever's project registered a replica may change or forget it, and administrators."""
    return principal.role is Role.ADMIN or (principal.may_write and replica.project == principal.project)
