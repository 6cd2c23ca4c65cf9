"""GET of an image's bytes: a redirect to a store, where that may be.

Rules
- These clients send their token on to wherever they are redirected. So only stores that an administrator trusts with tokens are
  redirected to (setting ``tokens: trusted``); where an image has no copy at one, 409 says what to do.
- What is redirected to is the ticket that POST /v1/tickets would give for those stores: ranked, leased, recorded. Who asks again while
  that is open was failed by its store, and is sent to another one, as long as there is one (`broker.service.repeats`).
- Where all stores are full the request waits, then is told 503: the one refusal after which Nova comes again.
- An image without bytes answers 204.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from broker.accept import Reason
from broker.errors import NoSource
from broker.model import TOKENS, Direction, new_ids
from broker.service import negotiate, visible, wait
from broker.service.asked import parsed
from broker.service.images import main_format
from broker.web import redirect
from broker.web.call import Answer, Call
from broker.web.glance.images import found

__all__ = ["glance_download_image"]

WAIT_SECONDS = 30.0
"""How long a request waits for a slot. These clients do not: Nova asks three more times, a second apart, then gives the machine up."""

_HOW = (
    "Your client would send its token on to a store that it is redirected to, so an administrator has to trust that store with tokens "
    "(setting tokens: trusted). Without: use an edge, or ask for a ticket (POST /v1/tickets with this image, or `broker get`)."
)


async def glance_download_image(call: Call) -> Answer:
    image = (await found(call)).body
    format = main_format(image)
    if format is None:
        return Answer(204)
    trusted = _trusted(call)
    if not trusted:
        raise NoSource(_HOW)
    ticket = await negotiated(call, image, format, trusted, call.query.get("prefer", ""))
    sources = redirect.openable(ticket)
    if not sources:
        raise NoSource(_HOW)
    return Answer(302, None, redirect.redirect(sources[:1], ticket["blob"]["digests"]))


async def negotiated(
    call: Call, image: Mapping[str, Any], format: str, stores: Sequence[str], prefer: str, count: int = 1
) -> dict[str, Any]:
    """A ticket for `count` sources at `stores`, which `prefer` names some of, with commas. Where one is open that nothing was said of, from
    another store, if there is one. Raises `NoSource`, `Busy`."""
    call.context.pace.count(call.client.principal.project, 1)
    asked: dict[str, Any] = {
        "operation": "download", "image": image["id"], "formats": [format], "count": count, "only": stores, "schemes": ["https", "http"],
    }  # fmt: skip
    if preferred := [name for name in prefer.split(",") if name in stores]:
        asked["prefer"] = preferred
    earlier = call.context.repeats.earlier(call.client.name, image["blobs"][format]["id"], call.context.clock())
    others = [name for name in stores if name != earlier]
    if 0 < len(others) < len(stores):
        with contextlib.suppress(NoSource):
            return await _ticket(call, asked | {"only": others})
    return await _ticket(call, asked)


async def _ticket(call: Call, asked: dict[str, Any]) -> dict[str, Any]:
    """The ticket, waited for while every store is full. Raises `NoSource`, `Busy`."""
    context, client, id = call.context, call.client, new_ids(1, call.context.clock())[0]

    async def ask(due: frozenset[int]) -> dict[str, Any]:
        return await negotiate.download(context, client, asked, id, due)

    try:
        return parsed(await wait.patiently(context, client, id, Direction.READ, WAIT_SECONDS, ask, call.is_gone))
    except NoSource as error:
        raise _why_none(error) from None


def _trusted(call: Call) -> list[str]:
    """The stores that clients of this principal may be sent to with their tokens."""
    return [store.name for store in visible.stores(call.context, call.client) if store.settings.get(TOKENS) == "trusted"]


def _why_none(error: NoSource) -> NoSource:
    """The same with the reasons in its text, since these clients show nothing else."""
    reasons = [(each["store"], each["reason"]) for each in error.extra.get("excluded", ())]
    told = ", ".join(f"{store} ({'not trusted with tokens' if reason == Reason.AVOIDED else reason})" for store, reason in reasons)
    return NoSource(f"{error.detail} {told + '. ' + _HOW if told else ''}".strip(), retry_after=error.retry_after)
