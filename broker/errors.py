"""Every outcome that is not a success: one class each, with its HTTP status, its `type` to look up and a detail that is safe to show.

Rules: a detail never holds a secret, a signed URL or another principal's data (invariant 13); `retry_after` is set
exactly when trying again can help; `field` and `expected` are set whenever one field of the request is to blame.
Refusals for want of a slot or quota say, for the broker alone, what can be waited for: `stores` by number, with the seconds that the
transfer itself would take there, the `bytes` of a lease, and `who` was promised a turn,
and whether it `returned` as it was told to.
The `type` is served under ``/problems/NAME`` (RFC 9457 section 3.1.1) from the class's docstring.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class BrokerError(Exception):
    """Something went wrong inside the broker; the operator's log has the request id."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        detail: str = "",
        *,
        field: str | None = None,
        expected: str | None = None,
        retry_after: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail or self.title)
        self.detail = detail
        self.field = field
        self.expected = expected
        self.retry_after = retry_after
        self.extra = dict(extra or {})

    def problem(self) -> dict[str, Any]:
        """This error as an RFC 9457 object."""
        body: dict[str, Any] = {"type": f"/problems/{self.type}", "title": self.title, "status": self.status}
        if self.detail:
            body["detail"] = self.detail
        if self.field is not None:
            body["field"] = self.field
        if self.expected is not None:
            body["expected"] = self.expected
        if self.retry_after is not None:
            body["retry_after"] = self.retry_after
        return body | self.extra


class Malformed(BrokerError):
    """The request is not the JSON or HTTP that it claims to be. Nothing of it was used."""

    status, type, title = 400, "malformed", "Malformed request"


class Invalid(BrokerError):
    """A field has a value that the contract (/openapi.json) does not allow, or is unknown; `field` and `expected` say which and what."""

    status, type, title = 400, "invalid-field", "Invalid field"


class Unauthenticated(BrokerError):
    """No token, or one that is malformed, expired, revoked, for another audience, or signed by a key that is not trusted. Get a new one."""

    status, type, title = 401, "unauthenticated", "A valid bearer token is required"


class Forbidden(BrokerError):
    """The principal is known, but its role does not allow this."""

    status, type, title = 403, "forbidden", "Not allowed"


class NotFound(BrokerError):
    """No such thing, or none that this principal may see: the two cannot be told apart."""

    status, type, title = 404, "not-found", "Not found"


class MethodNotAllowed(BrokerError):
    """The path exists, the method on it does not; the Allow header lists those that do."""

    status, type, title = 405, "method-not-allowed", "Method not allowed"


class Conflict(BrokerError):
    """The thing is in a state that does not allow this, or one of that name exists already."""

    status, type, title = 409, "conflict", "Conflict"


class NoSource(BrokerError):
    """No replica can be offered to this client now; `excluded` gives the reason for each one it may know of."""

    status, type, title = 409, "no-source", "No source can be offered"


class NoDestination(BrokerError):
    """No store can take this upload; `excluded` gives the reason for each one the client may know of."""

    status, type, title = 409, "no-destination", "No destination can be offered"


class Mismatch(BrokerError):
    """What lies at the store differs from what was declared; `observed` and `declared` tell. The bytes will be deleted. Upload again."""

    status, type, title = 409, "mismatch", "The stored bytes differ from the declaration"


class NotUploaded(BrokerError):
    """The store does not have the object, or parts of it are missing (`missing`). Upload what is missing, then commit again."""

    status, type, title = 409, "not-uploaded", "Not everything has been uploaded"


class Unverifiable(BrokerError):
    """The store tells no digest that policy accepts as proof of the content. Declare another, upload in parts, or choose another store."""

    status, type, title = 409, "unverifiable", "The content cannot be verified at this store"


class LastReplica(BrokerError):
    """This is the last good replica of an active blob; delete the images that need it first (invariant 6)."""

    status, type, title = 409, "last-replica", "The last good replica stays"


class NotAcceptable(BrokerError):
    """The Accept header names no media type that this operation can answer with."""

    status, type, title = 406, "not-acceptable", "Not acceptable"


class HeadTimeout(BrokerError):
    """The head of a request did not arrive in time; the connection is closed."""

    status, type, title = 408, "head-timeout", "The request came too slowly"


class Gone(BrokerError):
    """The ticket or upload has ended (released, expired, failed or reaped). Ask for a new one."""

    status, type, title = 410, "gone", "No longer there"


class PreconditionFailed(BrokerError):
    """The thing has changed since the ETag in If-Match was read. Read it again, then decide."""

    status, type, title = 412, "precondition-failed", "Changed meanwhile"


class TooLarge(BrokerError):
    """The request body, or the blob for every store, is over the stated limit."""

    status, type, title = 413, "too-large", "Too large"


class UnsupportedMediaType(BrokerError):
    """Bodies are application/json (application/merge-patch+json for PATCH)."""

    status, type, title = 415, "unsupported-media-type", "Unsupported media type"


class IdempotencyMismatch(BrokerError):
    """This Idempotency-Key was used for another request. Use a fresh key."""

    status, type, title = 422, "idempotency-mismatch", "Idempotency-Key used for another request"


class PreconditionRequired(BrokerError):
    """PATCH and DELETE need If-Match with the ETag that GET gave (RFC 6585 section 3)."""

    status, type, title = 428, "precondition-required", "If-Match is required"


class TooManyRefusals(BrokerError):
    """Many bearer tokens from this address, or from everywhere, were refused a moment ago, and this one was not looked at. Wait."""

    status, type, title = 429, "too-many-refusals", "Too many refused tokens"


class HeadTooLarge(BrokerError):
    """The target, a header or all of them together are over the stated limit; the connection is closed."""

    status, type, title = 431, "head-too-large", "The request's head is too large"


class Busy(BrokerError):
    """Every store that has the blob is at its limit of concurrent transfers; Retry-After says when a slot is expected."""

    status, type, title = 429, "busy", "All slots are taken"
    stores: Mapping[int, float] = {}
    bytes: int = 0
    who: str = ""
    returned: bool = False


class QuotaExceeded(BrokerError):
    """The project holds as many leases, or leases on as many bytes, as administrators allow it; Retry-After says when one should end."""

    status, type, title = 429, "quota-exceeded", "The project's quota is used up"
    stores: Mapping[int, float] = {}
    bytes: int = 0


class StoreUnavailable(BrokerError):
    """The store did not answer, or answered nonsense. Nothing was changed; try again."""

    status, type, title = 503, "store-unavailable", "The store cannot be reached"


class TooManyConnections(BrokerError):
    """This broker keeps no more connections open, in all or from this address. Close some, or try again."""

    status, type, title = 503, "too-many-connections", "Too many connections"


class Unavailable(BrokerError):
    """The catalogue, or who issued the token, cannot be reached, or too many large bodies are under way. Nothing was half done; the same
    request may be sent again."""

    status, type, title = 503, "unavailable", "Temporarily unavailable"


def problem_types() -> dict[str, type[BrokerError]]:
    """Every problem type by name."""
    found: list[type[BrokerError]] = [BrokerError, *BrokerError.__subclasses__()]
    return {cls.type: cls for cls in found}
