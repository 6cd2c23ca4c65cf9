"""A request's body held to what its token binds, while it streams.

The end comes last: of a body that is too short, too long or has another digest, the reader never gets the final chunk, but
`Refused`. So whoever has read to the end has the right bytes, and whoever keeps nothing before the end keeps no wrong ones.
"""

from __future__ import annotations

import hashlib

from broker.storeside.refused import Refused
from broker.storeside.verify import Grant


class Body:
    """The body of a request with `grant`: give every chunk to `take` and its result to the application.

    ``whole`` says whether the end was reached and everything fits; `refused` is the first refusal, and every later call repeats it.
    """

    def __init__(self, grant: Grant) -> None:
        # What POST binds is the finished object, not this body.
        bound = grant.token.digest if grant.token.method == "PUT" else None
        name, _, self._digest = (bound or "").partition(":")
        self._hash = hashlib.new(name, usedforsecurity=False) if bound else None
        self._length = grant.body_length
        self._count = 0
        self.whole = False
        self.refused: Refused | None = None
        if self._length == 0:
            self._check()

    @property
    def missing(self) -> int | None:
        """How many bytes are still to come, when that is known."""
        return None if self._length is None else self._length - self._count

    def take(self, chunk: bytes, *, last: bool = False) -> bytes:
        """`chunk`, unless the body cannot be right any more. `last` says that nothing follows.

        Raises `Refused` (400).
        """
        if self.refused is None:
            self._count += len(chunk)
            if self._hash is not None:
                self._hash.update(chunk)
            if self._length is not None and self._count > self._length:
                self._fail("the body is longer than the request says")
            elif last or self._count == self._length:
                self._check()
        if self.refused is not None:
            raise self.refused
        return chunk

    def cut(self) -> Refused:
        """The client has gone before the end."""
        self.refused, self.whole = self.refused or Refused(400, "the body ended early"), False
        return self.refused

    def _check(self) -> None:
        if self._length is not None and self._count < self._length:
            self._fail("the body is shorter than the request says")
        elif self._hash is not None and self._hash.hexdigest() != self._digest:
            self._fail("the body's digest is not the one that the token binds")
        else:
            self.whole = True

    def _fail(self, reason: str) -> None:
        self.refused, self.whole = Refused(400, reason), False

    def answerable(self, method: str, status: int) -> Refused | None:
        """What to answer instead of the application's `status`: it may not say yes to a write that it has not read to the end."""
        if self.refused is not None:
            return self.refused
        if method in ("PUT", "POST") and status < 300 and not self.whole:
            return Refused(500, "the application did not read the body to its end")
        return None
