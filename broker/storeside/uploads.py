"""Multipart uploads: parts in any order into one sparse file, which becomes the object when it is finished.

An upload begins with its first part: its id is in the signed token, so nobody else can name it, and it belongs to one path. It
lives in ``.broker/uploads/PATH_HASH-ID/``:

``data``      the bytes; linked as the object at the end, never copied
``journal``   one line of JSON for each part that arrived whole; a later line replaces every part that it overlaps
``ended``     what finishing answered, or ``null`` when it was given up. From then on no part is taken, so a replayed
              token changes nothing; kept for `REMEMBER_SECONDS`, longer than any token lives

A part is struck from the journal before its bytes are touched again and recorded only when it is whole and on the disk. Parts
lock their range of ``data``, finishing locks all of it (open-file-description locks: they end with the process).
Finishing reads the file once for its SHA-256 (about a second per gigabyte), so that what is told of the object is what lies there.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from broker.storeside.disk import Record, Tree, disk_errors, read_whole, segments, write_all, write_whole
from broker.storeside.receive import Received
from broker.storeside.refused import Refused

MAX_JOURNAL_BYTES = 32 << 20
"""Of 10,000 parts each may be sent a dozen times. Who has a token could send one for ever, and all of it is read when the upload ends."""

REMEMBER_SECONDS = 8 * 24 * 3600.0

_READ_BYTES = 4 << 20
_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_LIBC = ctypes.CDLL(None)
_PUNCH_HOLE_KEEP_SIZE = 3
_GONE = "no such upload, or it has ended"


@dataclass(frozen=True, slots=True)
class Part:
    """A part that arrived whole: where it lies in the object (bytes), and its digests (lowercase hex)."""

    offset: int
    length: int
    sha256: str
    md5: str

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Wanted:
    """A part as whoever finishes names it; digests are compared when given."""

    offset: int
    length: int
    sha256: str | None = None
    md5: str | None = None


class Uploads:
    """The uploads of a tree. Every method blocks; call it in a thread."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.forget()

    @contextlib.contextmanager
    def part(self, path: str, upload: str, offset: int, length: int) -> Iterator[int]:
        """A descriptor to write bytes ``offset … offset + length`` to; call `record` in the block when they are whole.

        Raises `Refused`: 400 for an empty part, 404 when the upload has ended, 409 when parts were sent again too often, 503 when the
        range is being written by another request.
        """
        if length == 0:
            raise Refused(400, "a part may not be empty")
        with disk_errors(), self._directory(path, upload, make=True) as directory, _opened(directory, "data", _FILE) as data:
            _lock(data, offset, length)
            self._check_open(directory, data)
            _check_journal(directory)
            _append(directory, {"offset": offset, "length": length})
            try:
                yield data
            except Refused:
                with contextlib.suppress(OSError):
                    _append(directory, {"offset": offset, "length": length})
                _free(data, offset, length)
                raise

    def record(self, path: str, upload: str, offset: int, descriptor: int, received: Received) -> Part:
        """Remember that the part at `offset` is whole, after it is safely on the disk."""
        part = Part(offset, received.length, received.sha256, received.md5)
        with disk_errors(), self._directory(path, upload) as directory:
            os.fdatasync(descriptor)
            _append(directory, asdict(part))
        return part

    def parts(self, path: str, upload: str) -> list[Part]:
        """The parts that arrived, by offset. Raises `Refused` (404)."""
        with disk_errors(), self._directory(path, upload) as directory:
            if self._ended(directory):
                raise Refused(404, _GONE)
            return _read_journal(directory)

    def finish(
        self, path: str, upload: str, wanted: Sequence[Wanted], metadata: Mapping[str, str], length: int | None, digest: str | None
    ) -> dict[str, Any]:
        """Make the object of exactly `wanted`; the same answer when it was made already.

        Raises `Refused`: 404 unknown or given up, 409 parts missing or different, 400 not what the token binds, 412 an object is
        there, 503 a part is still being written.
        """
        with disk_errors(), self._directory(path, upload) as directory:
            answer = self._ended(directory)
            if answer:
                return answer[0]
            with _opened(directory, "data", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC) as data:
                _lock(data, 0, 0)
                answer = self._ended(directory)
                if answer:
                    return answer[0]
                size = _check_parts(wanted, _read_journal(directory), length)
                os.ftruncate(data, size)
                digests = _digests(data, ("sha256", "md5") if digest is not None and digest.startswith("md5:") else ("sha256",))
                if digest is not None and digest.partition(":")[2] != digests[digest.partition(":")[0]]:
                    raise Refused(400, "the object's digest is not the one that the token binds")
                self._tree.place(directory, "data", data, path, Record(digests["sha256"], digests.get("md5"), metadata))
                result = {"size": size, "digests": digests}
                self._end(directory, result)
                return result

    def abort(self, path: str, upload: str) -> None:
        """Give the upload up and free its bytes. An unknown one is remembered, so that a late part does not begin it.

        Raises `Refused` (404 when it has ended, 503 while a part is being written).
        """
        with disk_errors(), self._directory(path, upload, make=True) as directory, _opened(directory, "data", _FILE) as data:
            _lock(data, 0, 0)
            if self._ended(directory):
                raise Refused(404, _GONE)
            self._end(directory, None)

    # --- the directory of one upload ---

    @contextlib.contextmanager
    def _directory(self, path: str, upload: str, *, make: bool = False) -> Iterator[int]:
        segments(path)  # what could not be finished is not begun
        name = f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{upload}"
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self._tree.uploads)
                os.fsync(self._tree.uploads)
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._tree.uploads)
        except FileNotFoundError:
            raise Refused(404, _GONE) from None
        try:
            if make and self._ended(descriptor):
                raise Refused(404, _GONE)
            yield descriptor
        finally:
            os.close(descriptor)

    def _ended(self, directory: int) -> tuple[dict[str, Any]] | None:
        """Nothing while the upload is open, else what finishing answered. Raises `Refused` (404) when it was given up."""
        try:
            answer = orjson.loads(read_whole(directory, "ended"))
        except FileNotFoundError:
            return None
        if answer is None:
            raise Refused(404, _GONE)
        return (answer,)

    def _end(self, directory: int, answer: dict[str, Any] | None) -> None:
        write_whole(directory, "ended", orjson.dumps(answer))
        for name in ("data", "journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
        os.fsync(directory)

    def _check_open(self, directory: int, data: int) -> None:
        """After the lock was taken: the file may have become an object while we waited to open it."""
        try:
            named = os.stat("data", dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            raise Refused(404, _GONE) from None
        ours = os.fstat(data)
        if named.st_ino != ours.st_ino or ours.st_nlink != 1 or self._ended(directory):
            raise Refused(404, _GONE)

    def forget(self) -> None:
        """Drop what ended longer ago than any token lives."""
        for name in os.listdir(self._tree.uploads):
            with contextlib.suppress(OSError):
                ended = os.stat(f"{name}/ended", dir_fd=self._tree.uploads, follow_symlinks=False)
                if time.time() - ended.st_mtime > REMEMBER_SECONDS:
                    shutil.rmtree(name, dir_fd=self._tree.uploads)


@contextlib.contextmanager
def _opened(directory: int, name: str, flags: int) -> Iterator[int]:
    descriptor = os.open(name, flags, 0o644, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _free(descriptor: int, offset: int, length: int) -> None:
    """Give back the space of a part that did not arrive whole (fallocate(2)); a file system that cannot keeps it until the upload ends."""
    _LIBC.fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length))


def _lock(descriptor: int, offset: int, length: int) -> None:
    """Lock a range of an open file alone (length 0: to the end, however far). Raises `Refused` (503) when another request has it."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, length, 0))
    except (BlockingIOError, PermissionError):
        raise Refused(503, "another request is writing here", {"Retry-After": "1"}) from None


def _append(directory: int, line: dict[str, Any]) -> None:
    """One line, whole or ignored: a torn one is closed by the next line's beginning."""
    descriptor = os.open("journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        write_all(descriptor, b"\n" + orjson.dumps(line) + b"\n")
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _check_journal(directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.stat("journal", dir_fd=directory, follow_symlinks=False).st_size > MAX_JOURNAL_BYTES:
            raise Refused(409, "the parts of this upload were sent too often; begin another")


def _read_journal(directory: int) -> list[Part]:
    try:
        lines = read_whole(directory, "journal").splitlines()
    except FileNotFoundError:
        return []
    parts: list[Part] = []  # by offset, never overlapping
    for line in lines:
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        first = bisect.bisect_right(parts, entry["offset"], key=lambda part: part.end)
        last = bisect.bisect_left(parts, entry["offset"] + entry["length"], lo=first, key=lambda part: part.offset)
        parts[first:last] = [Part(**entry)] if "sha256" in entry else []
    return parts


def _check_parts(wanted: Sequence[Wanted], recorded: Sequence[Part], length: int | None) -> int:
    """The size of the whole, when `wanted` is contiguous from 0, as long as the token says, and just what is `recorded`."""
    end = 0
    for want in wanted:
        if want.offset != end:
            raise Refused(409, "the parts are not contiguous")
        end += want.length
    if length is not None and end != length:
        raise Refused(400, "the parts are not as long as the token says")
    known = {part.offset: part for part in recorded}
    for want in wanted:
        part = known.get(want.offset)
        if part is None or part.length != want.length:
            raise Refused(409, f"the part at offset {want.offset} is missing")
        if want.sha256 not in (None, part.sha256) or want.md5 not in (None, part.md5):
            raise Refused(409, f"the part at offset {want.offset} has another digest")
    return end


def _digests(descriptor: int, names: Sequence[str]) -> dict[str, str]:
    """Digests of the whole file, each in a thread of its own."""
    results: dict[str, str] = {}
    failed: list[OSError] = []

    def one(name: str) -> None:
        digest, position, buffer = hashlib.new(name, usedforsecurity=False), 0, memoryview(bytearray(_READ_BYTES))
        try:
            while count := os.preadv(descriptor, [buffer], position):
                digest.update(buffer[:count])
                position += count
        except OSError as error:
            failed.append(error)
        results[name] = digest.hexdigest()

    others = [threading.Thread(target=one, args=(name,)) for name in names[1:]]
    for thread in others:
        thread.start()
    one(names[0])
    for thread in others:
        thread.join()
    if failed:
        raise failed[0]
    return results
