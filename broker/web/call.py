"""What a handler gets and gives: one request, checked against the contract, and its answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from aiohttp import web

from broker.errors import Conflict, Invalid, PreconditionFailed, PreconditionRequired, Unauthenticated
from broker.model import Client, new_id
from broker.service import idempotency
from broker.service.context import Context
from broker.service.idempotency import Claim
from broker.service.listing import Versioned


class Answer(NamedTuple):
    """A success. `body` is JSON text or a value to be made such; ``None`` for 204."""

    status: int
    body: Any = None
    headers: Mapping[str, str] | None = None
    """A multidict where a field comes more than once."""


@dataclass(slots=True)
class Call:
    """One request. `path`, `query` and `headers` hold the contract's parameters, `body` what was parsed, as `media_type` says."""

    context: Context
    operation: str
    path: dict[str, Any] = field(default_factory=dict)
    query: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, Any] = field(default_factory=dict)
    body: Any = None
    media_type: str | None = None
    _client: Client | None = None
    _request: web.BaseRequest | None = None

    def is_gone(self) -> bool:
        """Whether the client has closed the connection: nobody will read an answer."""
        return self._request is not None and self._request.transport is None

    @property
    def client(self) -> Client:
        """Who asks. Only operations that the contract secures have one."""
        if self._client is None:
            raise Unauthenticated()
        return self._client

    def id(self, name: str) -> UUID:
        """The UUID in the path (the contract checked its form)."""
        return UUID(self.path[name])

    async def claim(self) -> Claim:
        """The id for what this request makes, the same for every retry with its Idempotency-Key. Raises `IdempotencyMismatch`."""
        key = self.headers.get("Idempotency-Key")
        if key is None:  # every request is a new one
            return Claim(new_id(self.context.clock()))
        return await idempotency.claim(self.context, self.client, key, self.operation, {"path": self.path, "body": self.body})

    async def create(self, verb: Callable[[Claim], Awaitable[Versioned]]) -> Versioned:
        """What `verb` makes, once: of the same request sent twice at once, the slower one is shown what the other made."""
        claim = await self.claim()
        try:
            return await verb(claim)
        except Conflict:
            if claim.repeated or "Idempotency-Key" not in self.headers:
                raise
        return await verb(Claim(claim.id, repeated=True))

    @property
    def expected_version(self) -> int | None:
        """The version that If-Match names (RFC 9110 section 13.1.1); ``None`` for ``*``, any.

        Raises `PreconditionRequired`, `PreconditionFailed`, `Invalid`.
        """
        given = self.headers.get("If-Match")
        if given is None:
            raise PreconditionRequired()
        text = given.strip()
        if text == "*":
            return None
        if len(text) < 2 or text[0] != '"' or text[-1] != '"':
            raise Invalid("If-Match is no single strong ETag.", field="If-Match", expected="the ETag that GET gave, with its quotes")
        if not (text[1:-1].isascii() and text[1:-1].isdecimal() and len(text) < 12):
            raise PreconditionFailed()
        return int(text[1:-1])


Handler = Callable[[Call], Awaitable[Answer]]


def versioned(found: Versioned, status: int = 200, location: str | None = None) -> Answer:
    """An answer with its ETag, and for what was created its Location."""
    headers = {"ETag": f'"{found.version}"'}
    if location is not None:
        headers["Location"] = location
    return Answer(status, found.body, headers)
