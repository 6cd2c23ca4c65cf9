"""What can go wrong at the client's side, each with what to do next.

What the broker says comes as the classes of `broker.errors`, rebuilt from its problem documents. These are the rest. No
text holds a signed URL or a token (invariant 13).
"""

from __future__ import annotations


class ClientError(Exception):
    """Something failed at the client's side. `hint` says what to do next; it may be empty."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class BrokerUnreachable(ClientError):
    """No answer from the broker within the patience that was allowed."""


class NoBroker(ClientError):
    """Something else answers at the broker's address."""


class TransferFailed(ClientError):
    """No place served the bytes to the end. What was fetched is kept and can be resumed."""


class VerificationFailed(ClientError):
    """The bytes differ from the digest that the broker promised. Nothing was put under the target's name."""


class LocalTrouble(ClientError):
    """A local file cannot be read or written: no space, no permission, it exists, or it changed meanwhile."""


class WrongSetting(LocalTrouble):
    """The broker's address is no URL, or what should hold a token does not."""
