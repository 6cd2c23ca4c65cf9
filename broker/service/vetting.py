"""Approval over the API (M16): what waits for it, what agents say of signatures, what administrators decide.

Rules (`broker.vet` has those that decide)
- Only administrators approve and reject, and on the image as they saw it: a decision names the version. Approval names every blob
  that it is for, so that it can be told later what was approved.
- An agent of the role service or admin tells its verdict on a signature together with the properties that it looked at; if the
  image has others by now, the verdict is refused. The broker sees no byte, and believes its agents.
- Its project, administrators and services see what was decided of an image; who decided, administrators and services alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

import structlog

from broker import errors, vet
from broker.catalog import blobs, images, verdicts
from broker.catalog.transaction import transaction
from broker.catalog.verdicts import Recorded
from broker.model import BlobState, Client, Image, Principal, Role, Vetting
from broker.service import visible
from broker.service.context import Context
from broker.service.instants import instant
from broker.service.listing import Versioned

log = structlog.get_logger(__name__)


async def get_vetting(context: Context, client: Client, id: UUID) -> Versioned:
    """What was decided of an image, and what stands in the way of its approval. Raises `NotFound`, `Forbidden`."""
    image = await _image(context, client, id)
    return await _shown(context, client, image)


async def decide_vetting(context: Context, client: Client, id: UUID, version: int | None, request: Mapping[str, Any]) -> Versioned:
    """Approve or reject an image as it was at `version`. Raises `NotFound`, `Forbidden`, `PreconditionFailed`, `Conflict`."""
    image = await _image(context, client, id)
    if version is not None and image.version != version:
        raise errors.PreconditionFailed("The image has changed since it was read.")
    image = await decide(context, client, image, Vetting(request["decision"]), request.get("reason", ""))
    return await _shown(context, client, image)


async def decide(context: Context, client: Client, image: Image, decision: Vetting, reason: str = "") -> Image:
    """Approve or reject `image`, as it is. Raises `Forbidden`, `Conflict` (policy asks for more), `PreconditionFailed`."""
    if client.principal.role is not Role.ADMIN:
        raise errors.Forbidden("Only administrators approve and reject images.")
    if decision is Vetting.APPROVED and (why := await _obstacle(context, image)) is not None:
        raise errors.Conflict(f"The image cannot be approved: {why}.")
    async with transaction(context.db) as connection:
        decided = await images.update(connection, replace(image, vetting=decision), image.version, deactivated=decision is Vetting.REJECTED)
        await verdicts.record(connection, image.id, _recorded(client, decision.value, image.blobs, {}, reason))
    log.info("image vetted", image=str(image.id), decision=decision.value, subject=client.principal.subject)
    context.memory.forget_image(image.id, image.blobs.values())
    return decided


async def expect_bytes(connection: Any, principal: Principal, id: UUID, policy: vet.Policy) -> None:
    """An image will get bytes that it has not: what is vetted waits from now on. In the transaction that makes that possible."""
    image = await images.get(connection, id)
    if image is not None and (now := vet.of_extended(policy, image, principal.role)) is not image.vetting:
        await images.set_vetting(connection, id, now)


async def tell_verdict(context: Context, client: Client, id: UUID, request: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what an agent found of an image's signature. Raises `NotFound`, `Forbidden`, `Conflict` (the image has changed since)."""
    if client.principal.role not in (Role.ADMIN, Role.SERVICE):
        raise errors.Forbidden("Only services and administrators say what a signature is worth.")
    image = await _image(context, client, id)
    blob = UUID(request["blob"])
    formats = {format: held for format, held in image.blobs.items() if held == blob}
    if not formats:
        raise errors.Conflict("The image has no such blob.", field="blob", expected="a blob of the image as it is now")
    if vet.signature_properties(image.properties) != request["signature"]:
        raise errors.Conflict("The image has another signature by now.", field="signature", expected="its properties img_signature…")
    outcome = "valid" if request["valid"] else "invalid"
    verdict = _recorded(client, outcome, formats, request["signature"], request.get("detail", ""))
    await verdicts.record(context.db, id, verdict)
    return _render(verdict._replace(at=context.clock()), names=True)


async def _obstacle(context: Context, image: Image) -> str | None:
    """Why the image cannot be approved."""
    states = await blobs.summaries(context.db, image.blobs.values())
    absent = [format for format, blob in image.blobs.items() if blob not in states or states[blob].state is not BlobState.ACTIVE]
    said = [
        vet.Verdict(blob, verdict.outcome == "valid", verdict.signature)
        for verdict in await verdicts.of_image(context.db, image.id)
        if verdict.outcome in ("valid", "invalid")
        for blob in verdict.blobs.values()
    ]
    return vet.obstacle(context.policy.vetting, image, absent, said)


async def _image(context: Context, client: Client, id: UUID) -> Image:
    image = await visible.image(context, client, id)
    if image.project != client.principal.project and not client.principal.sees_private_stores:
        raise errors.Forbidden("Only its project sees what was decided of an image.")
    return image


async def _shown(context: Context, client: Client, image: Image) -> Versioned:
    told = [_render(verdict, client.principal.sees_private_stores) for verdict in await verdicts.of_image(context.db, image.id)]
    body: dict[str, Any] = {"vetting": None if image.vetting is None else image.vetting.value, "history": told}
    if image.is_withheld and (why := await _obstacle(context, image)) is not None:
        body["obstacle"] = why
    return Versioned(body, image.version)


def _recorded(client: Client, outcome: str, about: Mapping[str, UUID], signature: Mapping[str, str], detail: str) -> Recorded:
    return Recorded(outcome, about, signature, client.principal.subject, client.principal.project, detail)


def _render(verdict: Recorded, names: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "outcome": verdict.outcome,
        "blobs": {format: str(blob) for format, blob in verdict.blobs.items()},
        "detail": verdict.detail,
        "at": instant(verdict.at),
    }
    return shown | {"subject": verdict.subject, "project": verdict.project} if names else shown
