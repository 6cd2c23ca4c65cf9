"""Tickets: where can I get or put this, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from broker import errors
from broker.model import Direction, new_ids
from broker.service import commit, explain, negotiate, report, stale, tickets, upload, wait
from broker.web.call import Answer, Call

__all__ = [
    "activate_place", "commit_upload", "create_ticket", "create_tickets", "explain_ticket", "get_ticket", "refresh_ticket",
    "release_ticket", "report_transfer", "sign_parts",
]  # fmt: skip


LAST_SECONDS = 0.5
"""So near to the end of its wait a request takes whatever there is."""


async def create_ticket(call: Call) -> Answer:
    call.context.pace.count(call.client.principal.project, 1)
    if call.body["operation"] == "upload":
        return _created(await _create(call))
    return _created(await stale.ticket(call.context, call.client, call.body, lambda: _create(call)))


async def _create(call: Call) -> Mapping[str, Any]:
    if call.body["operation"] == "download" and "Idempotency-Key" not in call.headers:  # a new one for sure
        return await _download(call, new_ids(1, call.context.clock())[0])
    claim = await call.claim()
    ticket = await tickets.show_again(call.context, call.client, claim.id) if claim.repeated else None
    if ticket is None:
        try:
            if call.body["operation"] == "download":
                ticket = await _download(call, str(claim.id))
            else:
                ticket = await _upload(call, claim.id)
        except errors.Busy:
            # Of the same request sent twice at once, the slower one gets no lease, but the other one's ticket.
            ticket = await tickets.show_again(call.context, call.client, claim.id) if "Idempotency-Key" in call.headers else None
            if ticket is None:
                raise
    return ticket


async def _download(call: Call, id: str) -> dict[str, Any]:
    context, client, body = call.context, call.client, call.body
    clock, seconds = asyncio.get_running_loop().time, body.get("wait")
    last = clock() + (seconds or 0) - LAST_SECONDS

    async def ask(due: frozenset[int]) -> dict[str, Any]:
        return await negotiate.download(context, client, body, id, due, patient=clock() < last)

    return await wait.patiently(context, client, id, Direction.READ, seconds, ask, call.is_gone)


async def _upload(call: Call, id: UUID) -> dict[str, Any]:
    context, client, body = call.context, call.client, call.body

    async def ask(due: frozenset[int]) -> dict[str, Any]:
        return await upload.upload(context, client, body, id)

    return await wait.patiently(context, client, str(id), Direction.WRITE, body.get("wait"), ask, call.is_gone)


def _created(ticket: Mapping[str, Any]) -> Answer:
    return Answer(201, ticket, {"Location": f"/v1/tickets/{ticket['id']}"})


async def create_tickets(call: Call) -> Answer:
    asked = call.body["tickets"]
    for index, request in enumerate(asked):
        if "wait" in request:
            raise errors.Invalid(
                "A batch does not wait.", field=f"tickets.{index}.wait", expected="no wait; ask for a single ticket to wait"
            )
    call.context.pace.count(call.client.principal.project, len(asked))
    ids = new_ids(len(asked), call.context.clock())
    named = list(zip(ids, asked, strict=True))
    results = await stale.tickets(call.context, call.client, asked, lambda: negotiate.download_many(call.context, call.client, named))
    return Answer(200, {"tickets": [result.problem() if isinstance(result, errors.BrokerError) else result for result in results]})


async def explain_ticket(call: Call) -> Answer:
    return Answer(200, await explain.explain(call.context, call.client, call.body))


async def get_ticket(call: Call) -> Answer:
    return Answer(200, await tickets.get_ticket(call.context, call.client, call.id("ticket")))


async def release_ticket(call: Call) -> Answer:
    await tickets.release_ticket(call.context, call.client, call.id("ticket"))
    return Answer(204)


async def refresh_ticket(call: Call) -> Answer:
    await call.claim()
    return Answer(200, await tickets.refresh_ticket(call.context, call.client, call.id("ticket")))


async def activate_place(call: Call) -> Answer:
    await call.claim()
    return Answer(200, await tickets.activate_place(call.context, call.client, call.id("ticket"), call.body))


async def sign_parts(call: Call) -> Answer:
    await call.claim()
    return Answer(200, await upload.sign_parts(call.context, call.client, call.id("ticket"), call.body))


async def commit_upload(call: Call) -> Answer:
    await call.claim()
    return Answer(200, await commit.commit(call.context, call.client, call.id("ticket"), call.body))


async def report_transfer(call: Call) -> Answer:
    await call.claim()
    await report.report_transfer(call.context, call.client, call.id("ticket"), call.body)
    return Answer(204)
