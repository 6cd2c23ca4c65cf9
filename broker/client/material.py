"""Where an upload's bytes come from: a file that can be read anywhere and again, or a pipe that passes once.

A pipe is read part by part into unnamed temporary files, so that parts are sent in parallel and again when one fails, with no
more than a few of them on disk and none in memory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO

from broker.client.send import Body
from broker.client.trouble import LocalTrouble
from broker.client.verify import GrowingDigest
from broker.client.wire import BLOCK


class FileMaterial:
    """A regular file. The SHA-256 of the whole is made by a thread of its own while parts are sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LocalTrouble(f"cannot read {path}: {error.strerror}") from None
        found = os.fstat(self.file)
        self.size = found.st_size
        self.modified_ns = found.st_mtime_ns
        if not os.path.isfile(path):
            self.close()
            raise LocalTrouble(f"{path} is no regular file", "pipe it in and name it -")
        if self.size == 0:
            self.close()
            raise LocalTrouble(f"{path} is empty", "an image holds at least one byte")
        self._digest: GrowingDigest | None = None
        self._sha256: str | None = None

    def begin_digest(self) -> None:
        if self._digest is None and self._sha256 is None:
            self._digest = GrowingDigest(self.file, "sha256", self.size)
            self._digest.advance(self.size)

    def sha256(self) -> str:
        """The digest of the whole; waits for it. Raises `LocalTrouble`."""
        self.begin_digest()
        if self._sha256 is None and self._digest is not None:
            try:
                self._sha256 = self._digest.finish()
            except OSError as error:
                raise LocalTrouble(f"cannot read {self.path}: {error.strerror}") from None
        assert self._sha256 is not None
        return self._sha256

    def body(self, number: int, part_size: int) -> Body:
        offset = (number - 1) * part_size
        return Body(self.file, offset, min(part_size, self.size - offset))

    def require_unchanged(self) -> None:
        """Raises `LocalTrouble` when somebody wrote to the file meanwhile."""
        found = os.fstat(self.file)
        if (found.st_size, found.st_mtime_ns) != (self.size, self.modified_ns):
            raise LocalTrouble(f"{self.path} was changed while it was uploaded", "upload it again when nobody writes to it")

    def close(self) -> None:
        digest = getattr(self, "_digest", None)
        if digest is not None:
            digest.close()
        os.close(self.file)


class PipeMaterial:
    """A stream of unknown length. `next` gives its parts in order; `size` is known once the last one was read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._read = 0
        self.size: int | None = None

    def next(self, part_size: int) -> IO[bytes] | None:
        """The next part in an unnamed file, shorter than `part_size` at the end only; ``None`` after it. Raises `LocalTrouble`."""
        if self.size is not None:
            return None
        spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - whoever sends it closes it
        buffer = memoryview(bytearray(BLOCK))
        length = 0
        try:
            while length < part_size:
                count = self._stream.readinto(buffer[: min(BLOCK, part_size - length)])  # type: ignore[attr-defined]
                if not count:
                    self.size = self._read + length
                    break
                self._hash.update(buffer[:count])
                written = 0
                while written < count:
                    written += os.write(spool.fileno(), buffer[written:count])
                length += count
        except OSError as error:
            spool.close()
            raise LocalTrouble(f"cannot keep a part of the input: {error.strerror}", "make room in TMPDIR") from None
        self._read += length
        if length == 0:
            spool.close()
            return None
        return spool

    def sha256(self) -> str:
        return self._hash.hexdigest()
