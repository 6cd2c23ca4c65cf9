"""Who may see, list and read an image: one table, every row for every way to ask."""

from __future__ import annotations

from uuid import UUID

import pytest

from broker.model import Image, ImageStatus, Principal, Role, Vetting, Visibility
from broker.permit import (
    ImageAccess,
    anyone_may_read,
    lists_image,
    may_answer_for,
    may_publish,
    may_read_blob,
    may_read_image,
    may_see_image,
)

OWNER = Principal("a", "owner", Role.MEMBER, 0)
FRIEND = Principal("b", "friend", Role.READER, 0)
OTHER = Principal("c", "other", Role.MEMBER, 0)
SERVICE = Principal("d", "nova", Role.SERVICE, 0)
ADMIN = Principal("e", "ops", Role.ADMIN, 0)
EVERYONE = {"owner": OWNER, "friend": FRIEND, "other": OTHER, "service": SERVICE, "admin": ADMIN}

ALL = "owner friend other service admin"
ACTIVE, DEACTIVATED, PENDING = ImageStatus.ACTIVE, ImageStatus.DEACTIVATED, ImageStatus.PENDING

TABLE = [
    # visibility, status, vetting: who sees it, who lists it, who reads it
    (Visibility.PRIVATE, ACTIVE, None, "owner service admin", "owner admin", "owner service admin"),
    (Visibility.SHARED, ACTIVE, None, "owner friend service admin", "owner friend admin", "owner friend service admin"),
    (Visibility.COMMUNITY, ACTIVE, None, ALL, "owner admin", ALL),
    (Visibility.PUBLIC, ACTIVE, None, ALL, ALL, ALL),
    (Visibility.PUBLIC, ACTIVE, Vetting.APPROVED, ALL, ALL, ALL),
    (Visibility.PRIVATE, DEACTIVATED, None, "owner service admin", "owner admin", "admin"),
    (Visibility.SHARED, DEACTIVATED, None, "owner friend service admin", "owner friend admin", "admin"),
    (Visibility.COMMUNITY, DEACTIVATED, None, ALL, "owner admin", "admin"),
    (Visibility.PUBLIC, DEACTIVATED, None, ALL, ALL, "admin"),
    (Visibility.PRIVATE, PENDING, Vetting.PENDING, "owner service admin", "owner admin", "admin"),
    (Visibility.SHARED, PENDING, Vetting.PENDING, "owner friend service admin", "owner friend admin", "admin"),
    (Visibility.COMMUNITY, PENDING, Vetting.PENDING, "owner service admin", "owner admin", "admin"),
    (Visibility.PUBLIC, PENDING, Vetting.PENDING, "owner service admin", "owner admin", "admin"),
    (Visibility.PUBLIC, DEACTIVATED, Vetting.REJECTED, "owner service admin", "owner admin", "admin"),
    (Visibility.PUBLIC, ImageStatus.QUEUED, Vetting.PENDING, "owner service admin", "owner admin", "owner service admin"),
]


@pytest.mark.parametrize(("visibility", "status", "vetting", "see", "list_", "read"), TABLE)
def test_images(visibility: Visibility, status: ImageStatus, vetting: Vetting | None, see: str, list_: str, read: str) -> None:
    members = ("friend",) if visibility is Visibility.SHARED else ()
    image = Image(UUID(int=1), "n", "owner", visibility, status, {}, {}, vetting=vetting, members=members)
    for allowed, rule in ((see, may_see_image), (list_, lists_image), (read, may_read_image)):
        assert {name for name, principal in EVERYONE.items() if rule(principal, image)} == set(allowed.split()), rule.__name__  # type: ignore[operator]
    if status is ImageStatus.QUEUED:
        return  # no bytes
    access = ImageAccess(image.id, "owner", visibility, status, "raw", members, image.is_withheld)
    assert {name for name, principal in EVERYONE.items() if lists_image(principal, access)} == set(list_.split())
    assert {name for name, principal in EVERYONE.items() if may_read_blob(principal, [access])} == set(read.split())
    assert anyone_may_read([(visibility.value, status.value)]) is (set(read.split()) == set(EVERYONE))


def test_a_blob_is_read_through_any_image_that_allows_it() -> None:
    withheld = ImageAccess(UUID(int=1), "owner", Visibility.PUBLIC, PENDING, "raw", (), True)
    own = ImageAccess(UUID(int=2), "owner", Visibility.PRIVATE, ACTIVE, "raw", (), False)
    assert {name for name, principal in EVERYONE.items() if may_read_blob(principal, [withheld, own])} == {"owner", "service", "admin"}
    assert {name for name, principal in EVERYONE.items() if may_read_blob(principal, [])} == {"admin"}


def test_publishing_and_answering() -> None:
    assert [name for name, principal in EVERYONE.items() if may_publish(principal, ())] == ["admin"]
    assert [name for name, principal in EVERYONE.items() if may_publish(principal, {Visibility.PUBLIC})] == [
        "owner", "other", "service", "admin",
    ]  # fmt: skip
    assert [name for name, principal in EVERYONE.items() if may_answer_for(principal, "other")] == ["other", "admin"]
    assert [name for name, principal in EVERYONE.items() if may_answer_for(principal, "friend")] == ["admin"]
