"""One PUT of a whole file or of one part, in a thread: read once, hashed while it is sent.

Rules: the length is always declared; what the store answers in its ETag is compared where it is an MD5 of the body; a store
that refuses early is heard out, so that its reason is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from broker.client.trouble import LocalTrouble
from broker.client.wire import BLOCK, StoreTrouble, Why, Wire, describe, refusal

_MD5 = re.compile(r'"?([0-9a-f]{32})"?\Z')
_WRITTEN = (200, 201, 204)


@dataclass(frozen=True, slots=True)
class Body:
    """What one PUT sends: `length` bytes of the open file from `offset`."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Hashed:
    """Digests of what was sent, and of its pieces when a piece length was given."""

    digests: Mapping[str, str]
    pieces: tuple[str, ...] = ()


class PieceDigests:
    """SHA-256 of consecutive pieces of `length` bytes, fed in any blocks."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._left = length
        self._hash = hashlib.sha256()
        self._digests: list[str] = []

    def update(self, data: memoryview) -> None:
        while data:
            block = data[: self._left]
            self._hash.update(block)
            self._left -= len(block)
            data = data[len(block) :]
            if self._left == 0:
                self._close()

    def finish(self) -> tuple[str, ...]:
        if self._left < self._length:
            self._close()
        return tuple(self._digests)

    def _close(self) -> None:
        self._digests.append(self._hash.hexdigest())
        self._hash, self._left = hashlib.sha256(), self._length


class Sender:
    """Sends bodies over one kept connection, and measures: `sent` bytes in all, `seconds` in requests."""

    def __init__(self, stall_seconds: float) -> None:
        self.wire = Wire(stall_seconds)
        self.sent = 0
        self.seconds = 0.0
        self.setup_seconds: float | None = None
        self._buffer = memoryview(bytearray(BLOCK))

    def send(self, url: str, headers: Mapping[str, str], body: Body, algorithms: Sequence[str], piece_length: int | None = None) -> Hashed:
        """PUT `body` and return its digests. Raises `StoreTrouble`, or `LocalTrouble` when the file cannot be read."""
        began = time.monotonic()
        before = self.sent
        try:
            hashed = self._send(url, headers, body, algorithms, piece_length)
        except BaseException:
            self.wire.close()
            self.sent = before
            raise
        finally:
            self.seconds += time.monotonic() - began
        return hashed

    def _send(self, url: str, headers: Mapping[str, str], body: Body, algorithms: Sequence[str], piece_length: int | None) -> Hashed:
        hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
        pieces = PieceDigests(piece_length) if piece_length else None
        connection = self._begin(url, headers, body.length)
        position = 0
        try:
            while position < body.length:
                block = self._read(body, position)
                for digest in hashes.values():
                    digest.update(block)
                if pieces is not None:
                    pieces.update(block)
                connection.send(block)
                position += len(block)
                self.sent += len(block)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._early(connection, error) from None
        self._check(response, hashes["md5"].hexdigest() if "md5" in hashes else None)
        return Hashed({name: digest.hexdigest() for name, digest in hashes.items()}, pieces.finish() if pieces is not None else ())

    def _begin(self, url: str, headers: Mapping[str, str], length: int) -> http.client.HTTPConnection:
        while True:
            began = time.monotonic()
            connection, target, kept = self.wire.open(url)
            try:
                connection.putrequest("PUT", target, skip_accept_encoding=True)
                for name, value in headers.items():
                    if name.lower() not in ("host", "content-length"):
                        connection.putheader(name, value)
                connection.putheader("Content-Length", str(length))
                connection.endheaders()
            except (OSError, http.client.HTTPException) as error:
                trouble = self.wire.broken(error)
                if kept and trouble.why is Why.BROKEN:
                    continue
                raise trouble from None
            if self.setup_seconds is None:
                self.setup_seconds = time.monotonic() - began
            return connection

    def _read(self, body: Body, position: int) -> memoryview:
        wanted = min(BLOCK, body.length - position)
        try:
            count = os.preadv(body.file, [self._buffer[:wanted]], body.offset + position)
        except OSError as error:
            raise LocalTrouble(f"cannot read the file: {describe(error)}") from None
        if count == 0:
            raise LocalTrouble("the file became shorter while it was read", "upload it again when nobody writes to it")
        return self._buffer[:count]

    def _early(self, connection: http.client.HTTPConnection, error: Exception) -> StoreTrouble:
        """A connection that broke while sending may still hold the store's answer."""
        if not self.wire.stopped and isinstance(error, ConnectionError) and not isinstance(error, http.client.RemoteDisconnected):
            with contextlib.suppress(OSError, http.client.HTTPException):
                response = connection.getresponse()
                if response.status not in _WRITTEN:
                    return refusal(response)
        return self.wire.broken(error)

    def _check(self, response: http.client.HTTPResponse, md5: str | None) -> None:
        status = response.status
        with contextlib.suppress(OSError, http.client.HTTPException):
            response.read(1 << 16)
        if not response.isclosed() or response.will_close:
            self.wire.close()
        if status not in _WRITTEN:
            raise refusal(response)
        told = _MD5.match(response.headers.get("ETag", ""))
        encrypted = response.headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
        if md5 is not None and told is not None and told[1] != md5 and not encrypted:
            raise StoreTrouble(Why.BROKEN, "took bytes other than those that were sent")


def digest_of(body: Body, algorithms: Sequence[str]) -> Mapping[str, str]:
    """Digests of a part of a file that need not be sent again. Raises `LocalTrouble`."""
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    buffer = memoryview(bytearray(BLOCK))
    position = 0
    while position < body.length:
        count = os.preadv(body.file, [buffer[: min(BLOCK, body.length - position)]], body.offset + position)
        if count == 0:
            raise LocalTrouble("the file became shorter while it was read", "upload it again when nobody writes to it")
        for digest in hashes.values():
            digest.update(buffer[:count])
        position += count
    return {name: digest.hexdigest() for name, digest in hashes.items()}
