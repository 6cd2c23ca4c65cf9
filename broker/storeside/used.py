"""Tokens that were used up, remembered until they would have expired, across restarts.

The rule of a token that writes:

* PUT of an object, DELETE: works once. It is marked, durably, before the object appears or goes; a write that was refused or cut
  takes the mark back, so the same token may try again, unless the disk failed in it (500). After a success it is dead, even when the
  object has been deleted since. A crash in between leaves the mark: what was not acknowledged may need another token.
* PUT of a part: may be repeated until its upload ends (`broker.storeside.uploads`), then never again; finishing again gives the
  first answer.
* Reading: as often as one likes.

A mark is an empty file ``.broker/used/HOUR/HASH``: the hour in which the token expires, so that a whole hour is forgotten at once,
`MARGIN_SECONDS` after its end; and the SHA-256 of the token's id. Creating it is atomic for all processes on one root. There are
as many as objects written and deleted during the life of their tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator

from broker.claims import TransferToken
from broker.storeside.disk import disk_errors
from broker.storeside.refused import Refused

MARGIN_SECONDS = 3600.0
"""For clocks that are set back."""

_HOUR = 3600


class Used:
    """The marks below `directory`, a descriptor. Every method blocks; call it in a thread."""

    def __init__(self, directory: int) -> None:
        self._directory = directory

    def check(self, token: TransferToken) -> None:
        """Raises `Refused` (403) when the token was used: before its body is taken."""
        with contextlib.suppress(FileNotFoundError):
            os.stat(_place(token), dir_fd=self._directory, follow_symlinks=False)
            raise _used()

    @contextlib.contextmanager
    def once(self, token: TransferToken) -> Iterator[None]:
        """Do the block, unless the token was used; it is not when the block fails. Raises `Refused` (403)."""
        place = _place(token)
        with disk_errors():
            self._mark(place)
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, Refused) and error.status == 500):  # a disk that failed may have done it all the same
                with contextlib.suppress(OSError):
                    os.unlink(place, dir_fd=self._directory)
            raise

    def forget(self, now: float) -> None:
        """Drop the marks of tokens that expired long enough before `now` (POSIX seconds)."""
        for hour in os.listdir(self._directory):
            if hour.isdecimal() and (int(hour) + 1) * _HOUR + MARGIN_SECONDS < now:
                shutil.rmtree(hour, ignore_errors=True, dir_fd=self._directory)

    def _mark(self, place: str) -> None:
        hour, _, name = place.partition("/")
        with contextlib.suppress(FileExistsError):
            os.mkdir(hour, 0o700, dir_fd=self._directory)
            os.fsync(self._directory)
        parent = os.open(hour, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent))
            os.fsync(parent)
        except FileExistsError:
            raise _used() from None
        finally:
            os.close(parent)


def _place(token: TransferToken) -> str:
    return f"{int(token.expires_at) // _HOUR}/{hashlib.sha256(token.id.encode()).hexdigest()}"


def _used() -> Refused:
    return Refused(403, "the token was used", why="used")
