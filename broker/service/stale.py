"""Tickets while the catalogue cannot be reached (invariant 5): from memory alone, for a stated grace, and marked ``stale``.

Rules
- Only for downloads of a blob, and by an image, that this broker has in memory, and only for so long after it last read the change
  log: later, or of anything else, the answer stays 503.
- Only from stores without a limit of concurrent reads: where slots are counted nobody can be let in uncounted (invariant 3);
  nor for projects with a quota.
- What has changed meanwhile (rights, corrupt replicas, failures told to other brokers) is not known here: that is what the mark says.
- It is not recorded, then or later: it is good for its URLs, and everything else that is asked of it is answered 404. So a ticket
  that exists was always recorded before it was answered, and nobody waits for rows that died with a broker.
- An Idempotency-Key whose request cannot be looked up gets a ticket of its own: no lease can be taken twice, since there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from broker import errors
from broker.model import Client, new_ids
from broker.service import negotiate
from broker.service.context import Context

PATIENCE_SECONDS = 1.0
"""How long a catalogue is waited for that has not answered the change log's reader either."""


async def ticket(
    context: Context, client: Client, request: Mapping[str, Any], ask: Callable[[], Awaitable[Mapping[str, Any]]]
) -> Mapping[str, Any]:
    """The ticket that `ask` gets; when the catalogue cannot be reached, a stale one if there can be any. Raises what `ask` raises."""
    result: Mapping[str, Any] | errors.BrokerError
    (result,) = await tickets(context, client, [request], lambda: _listed(ask))
    if isinstance(result, errors.BrokerError):
        raise result
    return result


async def tickets(
    context: Context,
    client: Client,
    requests: Sequence[Mapping[str, Any]],
    ask: Callable[[], Awaitable[Sequence[Any]]],
) -> Sequence[Any]:
    """The same for a batch: each its ticket or its error, unless the catalogue is needed for all of them."""
    memory = context.memory
    try:
        if memory.is_fresh():
            return await ask()
        async with asyncio.timeout(PATIENCE_SECONDS + max([request.get("wait", 0) for request in requests], default=0)):
            return await ask()
    except errors.Unavailable as error:
        unreached = error
    except TimeoutError:
        unreached = errors.Unavailable("The catalogue does not answer.", retry_after=context.policy.admit.min_retry_seconds)
    if memory.unread_seconds() < context.grace_seconds:
        found = [await _known(context, client, request, unreached) for request in requests]
        if not all(result is unreached for result in found):
            return found
    raise unreached


async def _listed(ask: Callable[[], Awaitable[Mapping[str, Any]]]) -> Sequence[Mapping[str, Any]]:
    return [await ask()]


async def _known(context: Context, client: Client, request: Mapping[str, Any], unreached: errors.Unavailable) -> Any:
    """A stale ticket or an error; `unreached` where memory does not hold what is asked for."""
    try:
        return await negotiate.from_memory(context, client, request, new_ids(1, context.clock())[0])
    except errors.Unavailable:
        return unreached
    except errors.BrokerError as error:
        return error
