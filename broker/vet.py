"""Which images need an administrator's approval, when again, and what approval asks for (M16). Pure: images and policy are arguments.

Rules
- An image needs approval by its visibility, as policy says. It is ``pending`` from when it is made, or gets that visibility; what
  it was before counts no more. One that was made before policy asked for it is left alone until it changes in a way that counts.
- A change counts that could change what boots: bytes in another format, `BOOT_PROPERTIES`, the declared formats; and so does
  another visibility. A new name, a tag, any other property does not.
- What an administrator makes or changes needs no approval by another one, unless policy asks for signatures: those are for
  an agent to judge.
- A rejected image stays so, whatever becomes of it, until an administrator approves it: only its owner could make it look harmless.
  A deactivated one that would have to wait counts as rejected: what merely waits is active again once its owner makes it private.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from broker.model import Image, ImageStatus, Role, Vetting, Visibility

SIGNATURE_PROPERTIES = (
    "img_signature", "img_signature_hash_method", "img_signature_key_type", "img_signature_certificate_uuid",
)  # fmt: skip
"""OpenStack, "Image signature verification"."""

BOOT_PROPERTIES = frozenset({
    "kernel_id", "ramdisk_id", "os_command_line", "block_device_mapping", "bdm_v2", "img_block_device_mapping", "mappings",
    "root_device_name", *SIGNATURE_PROPERTIES,
})  # fmt: skip
"""Properties by which a machine boots another kernel, other volumes or with other arguments (Glance, "Useful image properties"), and those
that say who stands for the bytes."""


@dataclass(frozen=True, slots=True)
class Policy:
    """`visibilities` are those whose images need approval; with `signatures` approval needs that an agent found the signature good."""

    visibilities: frozenset[Visibility] = frozenset()
    signatures: bool = False


class Verdict(NamedTuple):
    """What an agent said of the signature of a blob, having looked at `properties` and the bytes."""

    blob: UUID
    valid: bool
    properties: Mapping[str, str]


def needs_approval(policy: Policy, visibility: Visibility, role: Role) -> bool:
    """Whether what a principal of that role does to an image of that visibility has to be approved."""
    return visibility in policy.visibilities and (role is not Role.ADMIN or policy.signatures)


def of_new(policy: Policy, visibility: Visibility, role: Role) -> Vetting | None:
    """The vetting of an image that is made."""
    return Vetting.PENDING if needs_approval(policy, visibility, role) else None


def of_changed(policy: Policy, before: Image, after: Image, role: Role) -> Vetting | None:
    """The vetting of an image after its words were changed, `before` and `after`, by a principal of that role."""
    if before.vetting is Vetting.REJECTED:
        return before.vetting
    if after.visibility not in policy.visibilities:
        return None
    if before.vetting is Vetting.PENDING or not needs_approval(policy, after.visibility, role):
        return before.vetting
    return _withheld(before) if before.visibility is not after.visibility or boots_differently(before, after) else before.vetting


def of_extended(policy: Policy, image: Image, role: Role) -> Vetting | None:
    """The vetting of an image that gets the bytes of one more format."""
    if image.vetting in (Vetting.REJECTED, Vetting.PENDING):
        return image.vetting
    return _withheld(image) if needs_approval(policy, image.visibility, role) else image.vetting


def _withheld(image: Image) -> Vetting:
    """What an image becomes that has to be approved from now on."""
    return Vetting.REJECTED if image.status is ImageStatus.DEACTIVATED else Vetting.PENDING


def boots_differently(before: Image, after: Image) -> bool:
    """Whether a change of an image's words could change what boots from it."""
    if (before.disk_format, before.container_format) != (after.disk_format, after.container_format):
        return True
    return any(before.properties.get(name) != after.properties.get(name) for name in BOOT_PROPERTIES)


def signature_properties(properties: Mapping[str, str]) -> dict[str, str]:
    """Those of an image's properties that are its signature."""
    return {name: properties[name] for name in SIGNATURE_PROPERTIES if name in properties}


def obstacle(policy: Policy, image: Image, absent: Iterable[str], verdicts: Iterable[Verdict]) -> str | None:
    """Why an image cannot be approved as it is; ``None`` when it can. `absent` are formats whose bytes are not there yet."""
    if image.status is ImageStatus.QUEUED:
        return "its bytes are not there yet"
    if missing := sorted(absent):
        return f"the bytes of its format {missing[0]} are not there yet"
    if not policy.signatures:
        return None
    signed = signature_properties(image.properties)
    if len(signed) < len(SIGNATURE_PROPERTIES):
        return "policy asks for a signature, and the image has none"
    last = {verdict.blob: verdict.valid for verdict in verdicts if verdict.properties == signed}
    for format, blob in sorted(image.blobs.items()):
        if blob not in last:
            return f"policy asks for a signature, and no agent has checked that of its format {format} as it is now"
        if not last[blob]:
            return f"the signature does not hold for its format {format}"
    return None
