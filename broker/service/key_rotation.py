"""Signing keys over the API, for administrators: list, rotate, revoke; and what brokers do by themselves when a key is old.

Rules: what changes is logged with who asked for it. This broker knows its own change at once, the others within 2 s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog

from broker import errors
from broker.catalog import keys
from broker.model import Client
from broker.service.context import Context
from broker.service.idempotency import Claim
from broker.service.instants import instant
from broker.service.keys import WrongPassphrase
from broker.service.sites import require_admin
from broker.sign import rotation
from broker.sign.rotation import Life, Plan

_log = structlog.get_logger(__name__)


async def list_keys(context: Context, client: Client) -> dict[str, Any]:
    """Every key, those that ended or were revoked lately too. Raises `Forbidden` and `Unavailable`."""
    require_admin(client)
    now = context.clock()
    return {"keys": [_render(row.life, now) for row in await keys.load(context.db, dead=True)]}


async def rotate_keys(context: Context, client: Client, request: Mapping[str, Any], claim: Claim) -> dict[str, Any]:
    """Let the next key take over; the keys as they are then.

    Raises `Forbidden`, `Unavailable`, and `Conflict` while a rotation is under way, or when this broker's passphrase is not that of
    the others.
    """
    require_admin(client)
    asked_at = (claim.id.int >> 80) / 1000  # RFC 9562: a UUID of version 7 begins with its milliseconds

    def decide(lives: Sequence[Life], now: float) -> Plan:
        if claim.repeated and any(asked_at <= life.signs_from < math.inf for life in lives):
            return Plan()
        return rotation.rotate(lives, now, context.keys.terms, request.get("algorithm"))

    try:
        plan = await context.keys.change(decide)
    except rotation.UnderWay as error:
        raise errors.Conflict(
            f"A rotation is under way: key {error.life.id} signs from {instant(error.life.signs_from)}.",
            retry_after=max(1.0, math.ceil(error.life.signs_from - context.clock())),
        ) from None
    except WrongPassphrase:
        raise _other_passphrase() from None
    if plan != Plan():
        _log.info("signing keys rotated", by=client.principal.subject, project=client.principal.project, next=_next(context))
    await _spread(context)
    return await list_keys(context, client)


async def revoke_key(context: Context, client: Client, kid: str) -> dict[str, Any]:
    """End a key at once; the keys as they are then. If it signed, another one signs from now on.

    Raises `Forbidden`, `NotFound` (also when it has ended or was revoked before), `Conflict` and `Unavailable`.
    """
    require_admin(client)
    try:
        await context.keys.change(lambda lives, now: rotation.revoke(lives, kid, now))
    except KeyError:
        raise errors.NotFound("No such key, or it is dead already.") from None
    except WrongPassphrase:
        raise _other_passphrase() from None
    _log.warning("signing key revoked", kid=kid, by=client.principal.subject, project=client.principal.project, next=_next(context))
    await _spread(context)
    return await list_keys(context, client)


async def look_after(context: Context) -> None:
    """Rotate when the signing key is old, and see that none is missing. Raises `Unavailable`."""
    keyring = context.keys
    if _needed(context, keyring.lives, context.clock()) == Plan():
        return
    try:
        plan = await keyring.change(lambda lives, now: _needed(context, lives, now))
    except WrongPassphrase as error:
        _log.error("signing keys cannot be rotated", error=str(error))
        return
    if plan != Plan():
        _log.info("signing keys rotated", by="age", next=_next(context))


def _needed(context: Context, lives: Sequence[Life], now: float) -> Plan:
    terms = context.keys.terms
    return rotation.rotate(lives, now, terms) if rotation.due(lives, now, terms) else rotation.complete(lives, now, "ES256")


def _next(context: Context) -> str | None:
    """The key that signs once what was decided has happened."""
    later = rotation.signing(
        context.keys.lives, max((life.signs_from for life in context.keys.lives if life.signs_from < math.inf), default=0)
    )
    return None if later is None else later.id


async def _spread(context: Context) -> None:
    """Let all of this broker know its own change at once. If the catalogue is gone by now the change log will tell: the change stands."""
    with suppress(errors.Unavailable):
        await context.memory.catch_up()


def _other_passphrase() -> errors.Conflict:
    return errors.Conflict("This broker has another key passphrase than those that made the keys. Start it anew with the right one.")


def _render(life: Life, now: float) -> dict[str, Any]:
    ends = {"signs_from": life.signs_from, "signs_until": life.signs_until, "kept_until": life.kept_until, "revoked_at": life.revoked_at}
    return {"id": life.id, "algorithm": life.algorithm, "state": life.state(now).value, "created_at": instant(life.created_at)} | {
        name: None if math.isinf(at) else instant(at) for name, at in ends.items()
    }
