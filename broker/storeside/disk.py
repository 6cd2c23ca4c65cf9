"""Objects as plain files under one directory, with what is known of their bytes beside them.

Rules:

* A path is walked segment by segment from the root's descriptor, following no symbolic link (openat with O_NOFOLLOW): nothing
  outside the root can be reached, whatever lies inside. What `broker.storeside.target` does not take and the hidden
  ``.broker`` are refused.
* An object appears whole or not at all: written to ``.broker/tmp``, synced, then linked under its name. link() never
  overwrites, so an object's bytes never change. The file system must have hard links.
* Digests are of the bytes as they were written. They are told only while size and modification time are those of then.
* What is known is kept in the extended attribute ``user.broker``, or, where there are none, in ``.broker/records/INODE``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from broker.storeside.refused import Refused
from broker.storeside.target import check_path

HIDDEN = ".broker"
ATTRIBUTE = "user.broker"
RESERVED = ("healthz",)
"""Top-level names that the server answers itself."""

MAX_METADATA_BYTES = 2048
"""All names and values together: an extended attribute holds 4 KB at most on ext4."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LEFTOVER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of an object's bytes. Digests are lowercase hex; `metadata` is what the writer said of them."""

    sha256: str | None = None
    md5: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """An object opened for reading. Whoever gets it closes `descriptor`."""

    descriptor: int
    size: int
    record: Record
    etag: str
    modified_at: float


def segments(path: str) -> tuple[str, ...]:
    """The names on the way to the object at `path` (absolute, percent-decoded). Raises `Refused` (400, or 404 for what is not served)."""
    check_path(path)
    names = tuple(path[1:].split("/"))
    if any(len(name.encode()) > 255 for name in names):
        raise Refused(400, "the path is too long")
    if names[0].casefold() == HIDDEN or names in [(name,) for name in RESERVED]:
        raise Refused(404, "no such object")
    return names


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """What the disk says, as an answer: nothing of the machine shows."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Refused(507, "the store is full") from None
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise Refused(404, "no such object") from None
        if error.errno == errno.ENOTDIR:
            raise Refused(409, "an object is in the way of the path") from None
        if error.errno == errno.ENAMETOOLONG:
            raise Refused(400, "the path is too long") from None
        raise Refused(500, "the store's disk failed") from None


class Tree:
    """The files under `root`, which must exist. Every method blocks; call it in a thread."""

    def __init__(self, root: Path) -> None:
        self.root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        hidden = _made(self.root, HIDDEN)
        self.tmp = _made(hidden, "tmp")
        self.uploads = _made(hidden, "uploads")
        self._records = _made(hidden, "records")
        self.used = _made(hidden, "used")
        os.close(hidden)
        self._attributes = self._has_attributes()
        self.sweep()

    def close(self) -> None:
        for descriptor in (self.root, self.tmp, self.uploads, self._records, self.used):
            os.close(descriptor)

    # --- reading ---

    def find(self, path: str) -> Found:
        """The object at `path`. Raises `Refused` (404)."""
        names = segments(path)
        with disk_errors(), self._directory(names[:-1]) as parent:
            # O_NONBLOCK: a FIFO that somebody put there must not hold us.
            descriptor = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise Refused(404, "no such object")
        record = self._recorded(descriptor, status)
        etag = f'"{record.sha256 or f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"}"'
        return Found(descriptor, status.st_size, record, etag, status.st_mtime)

    def exists(self, path: str) -> bool:
        names = segments(path)
        try:
            with self._directory(names[:-1]) as parent:
                os.stat(names[-1], dir_fd=parent, follow_symlinks=False)
        except OSError:
            return False
        return True

    # --- writing ---

    def check_room(self, length: int | None) -> None:
        """Raises `Refused` (507) when `length` bytes do not fit now: better before the body than in the middle of it."""
        status = os.fstatvfs(self.root)
        if length is not None and length > status.f_bavail * status.f_frsize:
            raise Refused(507, "the store is full")

    @contextlib.contextmanager
    def temporary(self) -> Iterator[tuple[int, str]]:
        """A fresh file in ``.broker/tmp``, locked while it is written and gone afterwards: its descriptor and name."""
        name = secrets.token_hex(16)
        with disk_errors():
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=self.tmp)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor, name
        finally:
            os.unlink(name, dir_fd=self.tmp)
            os.close(descriptor)

    def place(self, directory: int, name: str, descriptor: int, path: str, record: Record) -> None:
        """Make the finished file `name` of `directory`, open as `descriptor`, the object at `path`.

        Raises `Refused` (412) when another one is there.
        """
        names = segments(path)
        with disk_errors():
            self._keep(descriptor, record)
            os.fsync(descriptor)
            for _ in range(3):  # a DELETE beside us may take the empty directory away
                with contextlib.suppress(FileNotFoundError), self._directory(names[:-1], make=True) as parent:
                    self._link(directory, name, descriptor, parent, names[-1])
                    os.fsync(parent)
                    return
        raise Refused(503, "the directory keeps vanishing", {"Retry-After": "1"})

    def _link(self, directory: int, name: str, descriptor: int, parent: int, final: str) -> None:
        try:
            os.link(name, final, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            there, ours = os.stat(final, dir_fd=parent, follow_symlinks=False), os.fstat(descriptor)
            if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
                self._drop(ours.st_ino)
                raise Refused(412, "an object is there already; objects are never overwritten") from None

    def delete(self, path: str) -> None:
        """Remove the object at `path` and the directories that it leaves empty. Raises `Refused` (404)."""
        names = segments(path)
        os.close(self.find(path).descriptor)
        with disk_errors(), self._directory(names[:-1]) as parent:
            inode = os.stat(names[-1], dir_fd=parent, follow_symlinks=False).st_ino
            os.unlink(names[-1], dir_fd=parent)
            os.fsync(parent)
        self._drop(inode)
        for depth in range(len(names) - 1, 0, -1):
            try:
                with self._directory(names[: depth - 1]) as parent:
                    os.rmdir(names[depth - 1], dir_fd=parent)
            except OSError:
                return

    # --- what is known of the bytes ---

    def _keep(self, descriptor: int, record: Record) -> None:
        status = os.fstat(descriptor)
        text = orjson.dumps(
            {
                "size": status.st_size,
                "mtime_ns": status.st_mtime_ns,
                "sha256": record.sha256,
                "md5": record.md5,
                "metadata": dict(record.metadata),
            }
        )
        if self._attributes:
            os.setxattr(descriptor, ATTRIBUTE, text)
        else:
            write_whole(self._records, str(status.st_ino), text)

    def _drop(self, inode: int) -> None:
        """Forget a file that is going; an attribute goes with it by itself."""
        if not self._attributes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(str(inode), dir_fd=self._records)

    def _recorded(self, descriptor: int, status: os.stat_result) -> Record:
        """The record, unless the file was changed since, or came here by another way."""
        try:
            text = os.getxattr(descriptor, ATTRIBUTE) if self._attributes else read_whole(self._records, str(status.st_ino))
            known = orjson.loads(text)
            if (known["size"], known["mtime_ns"]) != (status.st_size, status.st_mtime_ns):
                return Record()
            return Record(known["sha256"], known["md5"], known["metadata"])
        except (OSError, ValueError, KeyError, TypeError):
            return Record()

    def _has_attributes(self) -> bool:
        with self.temporary() as (descriptor, _):
            try:
                os.setxattr(descriptor, ATTRIBUTE, b"{}")
            except OSError:
                return False
        return True

    # --- directories ---

    @contextlib.contextmanager
    def _directory(self, names: Sequence[str], *, make: bool = False) -> Iterator[int]:
        """The directory `names` below the root, walked without following links; made on the way when `make`."""
        current = os.dup(self.root)
        try:
            for name in names:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o755, dir_fd=current)
                below = os.open(name, _DIRECTORY, dir_fd=current)
                os.close(current)
                current = below
            yield current
        finally:
            os.close(current)

    def sweep(self) -> None:
        """Remove what a crash left, a minute ago or earlier, in ``.broker/tmp``; files under a living writer are locked."""
        for name in os.listdir(self.tmp):
            with contextlib.suppress(OSError):
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.tmp)
                try:
                    if time.time() - os.fstat(descriptor).st_mtime > _LEFTOVER_SECONDS:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.unlink(name, dir_fd=self.tmp)
                finally:
                    os.close(descriptor)


def _made(parent: int, name: str) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    return os.open(name, _DIRECTORY, dir_fd=parent)


def write_all(descriptor: int, text: bytes) -> None:
    """A few bytes in one call. Raises `OSError` when the disk took only some of them."""
    if os.write(descriptor, text) != len(text):
        raise OSError(errno.ENOSPC, "the disk is full")


def write_whole(directory: int, name: str, text: bytes) -> None:
    """Replace the small file `name` of `directory` in one step, durably."""
    temporary = f"{name}.{secrets.token_hex(4)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        write_all(descriptor, text)
        os.fsync(descriptor)
    except OSError:
        os.unlink(temporary, dir_fd=directory)
        raise
    finally:
        os.close(descriptor)
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


def read_whole(directory: int, name: str) -> bytes:
    """All of the small file `name` of `directory`."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
