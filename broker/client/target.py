"""The local file that a download becomes: grows under a temporary name beside its target, and gets its name when it is verified.

Rules: never a wrong file under the target's name; an existing target stays unless it is to be replaced; two downloads to one
target exclude each other; a full disk is said before the first byte where that can be known.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from broker.client.fetch import disk_trouble
from broker.client.journal import DownloadState, journal_of, load_download, save_download, temporary_of
from broker.client.plan import covered
from broker.client.trouble import LocalTrouble


class Target:
    """An open temporary file. Raises `LocalTrouble` whenever the file system refuses."""

    def __init__(self, path: Path, *, replace: bool) -> None:
        self.path = path
        self.replace = replace
        self.temporary = temporary_of(path)
        self.journal = journal_of(path)
        require_free(path, replace=replace)
        try:
            self.file = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise LocalTrouble(f"cannot write beside {path}: {error.strerror}", "choose another place with -o") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.file)
            raise LocalTrouble(f"another download to {path} is running", "wait for it, or choose another place with -o") from None

    def resume(self, blob: str, size: int) -> DownloadState | None:
        """What an earlier run left of this very blob; anything else is thrown away."""
        state = load_download(self.journal, os.fstat(self.file).st_size)
        if state is None or state.blob != blob or state.size != size:
            os.ftruncate(self.file, 0)
            self.journal.unlink(missing_ok=True)
            return None
        return state

    def require_room(self, size: int, state: DownloadState | None) -> None:
        """Refuse to begin what cannot end for lack of space."""
        needed = size - (covered(state.done) if state else 0)
        found = os.fstatvfs(self.file)
        if needed > found.f_bavail * found.f_frsize:
            free = found.f_bavail * found.f_frsize
            self.discard_empty()
            raise LocalTrouble(f"not enough space: {needed} bytes are needed, {free} are free", "make room or choose another place with -o")

    def discard_empty(self) -> None:
        """Leave no empty temporary file behind."""
        if os.fstat(self.file).st_size == 0:
            self.temporary.unlink(missing_ok=True)

    def save(self, state: DownloadState) -> None:
        try:
            save_download(self.journal, state, self.file)
        except OSError as error:
            raise disk_trouble(error) from None

    def discard(self) -> None:
        """Throw away what was fetched."""
        self.journal.unlink(missing_ok=True)
        self.temporary.unlink(missing_ok=True)

    def finish(self, size: int) -> None:
        """Force everything to disk and give the file its name, atomically."""
        try:
            os.ftruncate(self.file, size)
            os.fsync(self.file)
            give_name(self.temporary, self.path, replace=self.replace)
            self.journal.unlink(missing_ok=True)
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise disk_trouble(error) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.file)


def require_free(path: Path, *, replace: bool) -> None:
    """Raises `LocalTrouble` when no file may get this name."""
    if path.is_dir():
        raise LocalTrouble(f"{path} is a directory", "name a file with -o")
    if path.exists() and not replace:
        raise LocalTrouble(f"{path} exists already", "replace it with --force, or choose another place with -o")


def give_name(temporary: Path, path: Path, *, replace: bool) -> None:
    """Give a finished file its name. Raises `LocalTrouble` for one that appeared meanwhile, unless it is to be replaced, and `OSError`.

    A hard link never replaces anything; where there are none, a rename does after a last look.
    """
    if replace:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
        temporary.unlink()
    except FileExistsError:
        raise LocalTrouble(f"{path} appeared meanwhile", f"what was fetched is kept in {temporary}; use --force") from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        require_free(path, replace=False)
        temporary.replace(path)
