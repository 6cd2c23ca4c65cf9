"""Reads a blob from a file on a shared mount or a local disk: what a ``file://`` handle names.

Rules
- No symbolic link is followed, at no place in the path: whoever can write to the mount could else have another file of this machine
  read. The mount is registered by its real path.
- Only a regular file of the blob's size is read.
- The kernel copies where it can (``copy_file_range``): file systems that share blocks move none (XFS, Btrfs), NFS 4.2 copies at the
  server. What was copied is verified like everything else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from broker.client.fetch import Reader, Window
from broker.client.trouble import LocalTrouble
from broker.client.wire import BLOCK, StoreTrouble, Why, describe

_AT_ONCE = 16 << 20
"""Bytes that the kernel is asked to copy at a time; whoever takes the window away waits for so many."""

_NOT_BY_KERNEL = frozenset((errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EBADF, errno.ETXTBSY))


class LocalReader(Reader):
    """Copies ranges of one file. It has a wire only to be stopped by."""

    def fetch(self, url: str, headers: Mapping[str, str], window: Window, file: int) -> None:
        """As `Reader.fetch` says."""
        began = self._began = time.monotonic()
        try:
            source = open_file(path_of(url))
            try:
                size = os.fstat(source).st_size
                if size != self.size:
                    raise StoreTrouble(Why.WRONG, f"holds {size} bytes instead of {self.size}")
                if self.setup_seconds is None:
                    self.setup_seconds = time.monotonic() - began
                self._copy_file(source, window, file)
            finally:
                os.close(source)
        except OSError as error:
            raise trouble_of(error) from None
        finally:
            self._seconds += time.monotonic() - began
            self._began = None

    def _copy_file(self, source: int, window: Window, file: int) -> None:
        by_kernel = True
        while window.position < window.end:
            if self.wire.stopped:
                raise StoreTrouble(Why.STOPPED, "stopped")
            if by_kernel:
                count = window.copy(source, file, _AT_ONCE, _NOT_BY_KERNEL)
                if count is None:
                    by_kernel = False
                    continue
            else:
                count = os.preadv(source, [self._buffer[: min(BLOCK, max(1, window.end - window.position))]], window.position)
                window.write(file, self._buffer[:count])
            if count == 0 and window.position < window.end:
                raise StoreTrouble(Why.BROKEN, "the file became shorter")
            self.received += count


def path_of(url: str) -> str:
    """The path that a ``file://`` URL names. Raises `StoreTrouble` when it is none of this machine."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    segments = path.split("/")
    if parts.scheme != "file" or parts.netloc or parts.query or parts.fragment or segments[0] or {"", ".", ".."} & set(segments[1:]):
        raise StoreTrouble(Why.WRONG, "the handle names no file of this machine")
    return path


def directory_path(endpoint: str) -> str:
    """The directory that the endpoint of a store of kind ``path`` names. Raises `LocalTrouble` for another kind of store's."""
    if not endpoint.startswith("file:///"):
        raise LocalTrouble("this store is no directory", "name the key with --key")
    return unquote(urlsplit(endpoint).path).rstrip("/")


def open_file(path: str) -> int:
    """Open a regular file to read, following no link. Raises `OSError`, and `StoreTrouble` for what is no regular file."""
    *directories, name = path.strip("/").split("/")
    at = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for directory in directories:
            below = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    finally:
        with contextlib.suppress(OSError):
            os.close(at)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise StoreTrouble(Why.WRONG, "is no regular file")
    return file


def trouble_of(error: OSError) -> StoreTrouble | LocalTrouble:
    """What went wrong with a file in our words, without its path."""
    if error.errno in (errno.ENOENT, errno.ENODEV):
        return StoreTrouble(Why.MISSING, "has no such file here: is it mounted?")
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return StoreTrouble(Why.WRONG, "has a symbolic link in its path, which is not followed")
    if error.errno in (errno.EACCES, errno.EPERM):
        return StoreTrouble(Why.REFUSED, "may not be read here")
    return StoreTrouble(Why.BROKEN, f"cannot be read: {describe(error)}")
