"""What makes a dialect: a contract, the handlers of its operations, and how it tells errors.

A dialect renders the decisions of the same service verbs for clients that speak another API than the broker's own: no ranking,
policy or SQL is in one. Its paths are its own, also those below its prefixes that no operation has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broker.errors import BrokerError
from broker.web.call import Handler
from broker.web.contract import Contract

Render = Callable[[BrokerError, bool], tuple[int, bytes, dict[str, str]]]
"""From an error, and whether a token was given, to status, body and header fields."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """One API. `handlers` are named as the operations of the contract, in snake_case; `prefixes` end in no slash. `request_id` is one more
    header field that tells the request's id, where clients look for it under another name than X-Request-Id. `unknown` is what
    a path below its prefixes is told that no operation has."""

    contract: Contract
    prefixes: tuple[str, ...]
    handlers: Mapping[str, Handler]
    render: Render
    request_id: str | None = None
    unknown: str = "There is no such path."

    def has(self, path: str) -> bool:
        """Whether `path` is one of this dialect's."""
        return any(path == prefix or path.startswith(prefix + "/") for prefix in self.prefixes)
