"""Errors as an edge's client reads them, Glance's shape, and once more in header fields: nginx keeps of the answer to its question
(``auth_request``) those alone."""

from __future__ import annotations

import json

import orjson

from broker.errors import BrokerError
from broker.web.glance import fault


def render(error: BrokerError, token_given: bool = False) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and header fields of an error."""
    status, body, headers = fault.render(error, token_given)
    told = json.dumps(orjson.loads(body))  # in ASCII, on one line
    return status, body, headers | {"Edge-Status": str(status), "Edge-Reason": told}
