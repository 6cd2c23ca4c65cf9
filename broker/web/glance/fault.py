"""Errors in Glance's shape, as python-glanceclient, openstacksdk and Nova read them.

``{"error": {"code": 409, "title": "Conflict", "message": "…"}}``: both clients look for ``message`` in the members of the object, and
python-glanceclient fails on a member that is none. `message` says which field is wrong and what was expected, since nothing else of the
error is shown to whoever typed the command.
"""

from __future__ import annotations

from http import HTTPStatus

import orjson

from broker.errors import BrokerError, Busy, Conflict, PreconditionFailed, QuotaExceeded, Unavailable
from broker.log import scrub
from broker.web import problem


def render(error: BrokerError, token_given: bool = False) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and header fields of an error."""
    if isinstance(error, PreconditionFailed):  # nobody who speaks Glance states a precondition: another request was quicker
        error = Conflict("The image was changed by another request meanwhile. Read it again, then decide.")
    elif isinstance(error, Busy | QuotaExceeded):  # Nova comes again for 503 alone
        error = Unavailable(message(error), retry_after=error.retry_after)
    status, _, headers = problem.render(error, token_given)
    told = scrub(message(error))
    body = {"error": {"code": status, "title": HTTPStatus(status).phrase, "message": told}}
    return status, orjson.dumps(body), headers | {"Content-Type": "application/json"}


def message(error: BrokerError) -> str:
    """All that an error says, in one text."""
    told = error.detail or error.title
    if error.field is not None:
        told += f" Field: {error.field}."
    if error.expected is not None:
        told += f" Expected: {error.expected}."
    return told
