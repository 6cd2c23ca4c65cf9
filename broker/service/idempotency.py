"""What a POST with an Idempotency-Key stands for: the id of what it makes, the same for every retry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from broker.catalog import idempotency
from broker.model import Client, new_id
from broker.service.context import Context


class Claim(NamedTuple):
    """The id of the thing to be made. `repeated`: this request was seen before, so the thing may exist, and is then shown again."""

    id: UUID
    repeated: bool = False


async def claim(context: Context, client: Client, key: str, operation: str, request: Mapping[str, Any]) -> Claim:
    """Claim the id for `request` to `operation` (with whatever its path named among `request`'s entries).

    Keys belong to principals. Raises `IdempotencyMismatch` and `Unavailable`.
    """
    fresh = new_id(context.clock())
    principal = client.principal
    owner = orjson.dumps([principal.project, principal.subject]).decode()
    fingerprint = hashlib.sha256(orjson.dumps([operation, request], option=orjson.OPT_SORT_KEYS)).digest()
    found = await idempotency.claim(context.db, owner, key, fingerprint, fresh)
    return Claim(found, found != fresh)
