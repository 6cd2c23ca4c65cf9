"""Which images need approval, when again, and what approval asks for: tables, and what holds for every change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.model import Image, ImageStatus, Role, Vetting, Visibility
from broker.vet import BOOT_PROPERTIES, SIGNATURE_PROPERTIES, Policy, Verdict, obstacle, of_changed, of_extended, of_new

RAW, QCOW2 = UUID(int=1), UUID(int=2)
PUBLIC = Policy(frozenset({Visibility.PUBLIC}))
SIGNED = Policy(frozenset({Visibility.PUBLIC}), signatures=True)
SIGNATURE = dict.fromkeys(SIGNATURE_PROPERTIES, "x")


def image(vetting: Vetting | None = None, visibility: Visibility = Visibility.PUBLIC, **fields: Any) -> Image:
    made = Image(UUID(int=9), "n", "p", visibility, ImageStatus.ACTIVE, {}, {"raw": RAW}, vetting=vetting)
    return replace(made, **fields)


@pytest.mark.parametrize(
    ("policy", "visibility", "role", "expected"),
    [
        (Policy(), Visibility.PUBLIC, Role.MEMBER, None),
        (PUBLIC, Visibility.PUBLIC, Role.MEMBER, Vetting.PENDING),
        (PUBLIC, Visibility.PUBLIC, Role.SERVICE, Vetting.PENDING),
        (PUBLIC, Visibility.PUBLIC, Role.ADMIN, None),
        (PUBLIC, Visibility.COMMUNITY, Role.MEMBER, None),
        (PUBLIC, Visibility.PRIVATE, Role.MEMBER, None),
        (SIGNED, Visibility.PUBLIC, Role.ADMIN, Vetting.PENDING),
        (Policy(frozenset(Visibility)), Visibility.PRIVATE, Role.MEMBER, Vetting.PENDING),
    ],
)
def test_of_new(policy: Policy, visibility: Visibility, role: Role, expected: Vetting | None) -> None:
    assert of_new(policy, visibility, role) is expected


APPROVED, PENDING, REJECTED = Vetting.APPROVED, Vetting.PENDING, Vetting.REJECTED
KERNEL = {"properties": {"kernel_id": "k"}}


@pytest.mark.parametrize(
    ("policy", "before", "change", "role", "expected"),
    [
        # what may boot differently needs approval again
        (PUBLIC, image(APPROVED), KERNEL, Role.MEMBER, PENDING),
        (PUBLIC, image(APPROVED), {"properties": {"os_command_line": "init=/bin/sh"}}, Role.MEMBER, PENDING),
        (PUBLIC, image(APPROVED), {"properties": SIGNATURE}, Role.MEMBER, PENDING),
        (PUBLIC, image(APPROVED), {"properties": {"bdm_v2": "true"}}, Role.MEMBER, PENDING),
        (PUBLIC, image(APPROVED), {"disk_format": "qcow2"}, Role.MEMBER, PENDING),
        (PUBLIC, image(APPROVED), {"container_format": "ovf"}, Role.MEMBER, PENDING),
        (PUBLIC, image(APPROVED, properties={"kernel_id": "k"}), {"properties": {}}, Role.MEMBER, PENDING),
        # what may not, does not
        (PUBLIC, image(APPROVED), {"name": "m", "tags": ("a",), "min_ram": 5, "hidden": True}, Role.MEMBER, APPROVED),
        (PUBLIC, image(APPROVED), {"properties": {"os_distro": "debian"}}, Role.MEMBER, APPROVED),
        # administrators approve by doing, but do not stand for signatures
        (PUBLIC, image(APPROVED), KERNEL, Role.ADMIN, APPROVED),
        (SIGNED, image(APPROVED), KERNEL, Role.ADMIN, PENDING),
        (PUBLIC, image(None), KERNEL, Role.ADMIN, None),
        # what an administrator has deactivated does not come back by waiting
        (PUBLIC, image(APPROVED, status=ImageStatus.DEACTIVATED), KERNEL, Role.MEMBER, REJECTED),
        (PUBLIC, image(None, Visibility.PRIVATE, status=ImageStatus.DEACTIVATED), {"visibility": Visibility.PUBLIC}, Role.MEMBER, REJECTED),
        (PUBLIC, image(APPROVED, status=ImageStatus.DEACTIVATED), {"name": "m"}, Role.MEMBER, APPROVED),
        # visibilities
        (PUBLIC, image(None, Visibility.PRIVATE), {"visibility": Visibility.PUBLIC}, Role.MEMBER, PENDING),
        (PUBLIC, image(None, Visibility.PRIVATE), {"visibility": Visibility.PUBLIC}, Role.ADMIN, None),
        (PUBLIC, image(PENDING), {"visibility": Visibility.PRIVATE}, Role.MEMBER, None),
        (PUBLIC, image(APPROVED), {"visibility": Visibility.PRIVATE}, Role.MEMBER, None),
        (Policy(frozenset({Visibility.PUBLIC, Visibility.COMMUNITY})), image(APPROVED, Visibility.COMMUNITY),
         {"visibility": Visibility.PUBLIC}, Role.MEMBER, PENDING),
        # from before the policy
        (PUBLIC, image(None), {"name": "m"}, Role.MEMBER, None),
        (PUBLIC, image(None), KERNEL, Role.MEMBER, PENDING),
        # what waits, waits; what was refused, stays so
        (PUBLIC, image(PENDING), {"name": "m"}, Role.ADMIN, PENDING),
        (PUBLIC, image(REJECTED), {"name": "m"}, Role.MEMBER, REJECTED),
        (PUBLIC, image(REJECTED), {"visibility": Visibility.PRIVATE}, Role.MEMBER, REJECTED),
        (Policy(), image(REJECTED), {"name": "m"}, Role.ADMIN, REJECTED),
        (Policy(), image(PENDING), {"name": "m"}, Role.MEMBER, None),
    ],
)  # fmt: skip
def test_of_changed(policy: Policy, before: Image, change: dict[str, Any], role: Role, expected: Vetting | None) -> None:
    assert of_changed(policy, before, replace(before, **change), role) is expected


VISIBILITIES, ROLES = st.sampled_from(list(Visibility)), st.sampled_from(list(Role))
PROPERTIES = st.dictionaries(st.sampled_from([*sorted(BOOT_PROPERTIES), "os_distro"]), st.sampled_from("ab"), max_size=3)
IMAGES = st.builds(image, st.sampled_from([None, *Vetting]), VISIBILITIES, properties=PROPERTIES)


@given(IMAGES, VISIBILITIES, PROPERTIES, ROLES.filter(lambda role: role is not Role.ADMIN), st.sets(VISIBILITIES))
def test_nobody_but_an_administrator_gets_something_approved_by_changing_it(
    before: Image, visibility: Visibility, properties: dict[str, str], role: Role, vetted: set[Visibility]
) -> None:
    policy = Policy(frozenset(vetted))
    after = of_changed(policy, before, replace(before, visibility=visibility, properties=properties), role)
    if visibility in vetted and visibility is not before.visibility:
        assert after in (PENDING, REJECTED)
    if after is APPROVED:
        assert before.vetting is APPROVED
    if before.vetting is REJECTED:
        assert after is REJECTED
    if visibility in vetted and {k: v for k, v in before.properties.items() if k in BOOT_PROPERTIES} != {
        k: v for k, v in properties.items() if k in BOOT_PROPERTIES
    }:
        assert after in (PENDING, REJECTED)


@pytest.mark.parametrize(
    ("policy", "before", "role", "expected"),
    [
        (PUBLIC, image(APPROVED), Role.MEMBER, PENDING),
        (PUBLIC, image(None), Role.MEMBER, PENDING),
        (PUBLIC, image(APPROVED), Role.ADMIN, APPROVED),
        (SIGNED, image(APPROVED), Role.ADMIN, PENDING),
        (PUBLIC, image(REJECTED), Role.MEMBER, REJECTED),
        (PUBLIC, image(None, Visibility.PRIVATE), Role.MEMBER, None),
        (PUBLIC, image(APPROVED, status=ImageStatus.DEACTIVATED), Role.MEMBER, REJECTED),
    ],
)
def test_of_extended(policy: Policy, before: Image, role: Role, expected: Vetting | None) -> None:
    assert of_extended(policy, before, role) is expected


GOOD, BAD = Verdict(RAW, True, SIGNATURE), Verdict(RAW, False, SIGNATURE)
WAITS = image(PENDING, status=ImageStatus.PENDING, properties={**SIGNATURE, "os_distro": "debian"})


@pytest.mark.parametrize(
    ("policy", "wanted", "absent", "verdicts", "says"),
    [
        (PUBLIC, WAITS, [], [], None),
        (PUBLIC, replace(WAITS, status=ImageStatus.QUEUED), [], [], "bytes are not there"),
        (PUBLIC, WAITS, ["qcow2"], [], "format qcow2 are not there"),
        (SIGNED, WAITS, [], [GOOD], None),
        (SIGNED, WAITS, [], [BAD, GOOD], None),
        (SIGNED, WAITS, [], [], "no agent has checked"),
        (SIGNED, WAITS, [], [GOOD, BAD], "does not hold"),
        (SIGNED, WAITS, [], [Verdict(QCOW2, True, SIGNATURE)], "no agent has checked"),
        (SIGNED, WAITS, [], [Verdict(RAW, True, {**SIGNATURE, "img_signature": "y"})], "no agent has checked"),
        (SIGNED, replace(WAITS, properties={}), [], [GOOD], "has none"),
        (SIGNED, replace(WAITS, properties={"img_signature": "x"}), [], [GOOD], "has none"),
        (SIGNED, replace(WAITS, blobs={"raw": RAW, "qcow2": QCOW2}), [], [GOOD], "format qcow2"),
    ],
)
def test_what_stands_in_the_way_of_approval(
    policy: Policy, wanted: Image, absent: list[str], verdicts: list[Verdict], says: str | None
) -> None:
    why = obstacle(policy, wanted, absent, verdicts)
    assert why is None if says is None else why is not None and says in why
