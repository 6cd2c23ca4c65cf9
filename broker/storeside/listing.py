"""What the tree holds, for a broker that makes its catalogue again: a page of paths at a time.

``GET /.broker/objects``, with the path of the last object of the page before in ``X-Broker-After`` (percent-encoded), answers
``{"objects": [PATH, …], "more": true|false}``. No object has that path, and no token for an object will do: the token's subject has
to be `SUBJECT`, which a broker says in no other.

Rules: names are sorted in each directory, so that a listing can go on where it ended; no symbolic link is followed; what
`broker.storeside.target` would refuse as a path is left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from itertools import islice

from broker.storeside.disk import HIDDEN, segments
from broker.storeside.refused import Refused

PATH = "/.broker/objects"
SUBJECT = "broker:list"
AFTER = "X-Broker-After"
PAGE = 10_000
"""Of 150 bytes each they are 1.5 MB: a broker takes 2 MiB at most."""

MAX_PAGE_BYTES = 3 << 19


def page(root: int, after: str, most: int = PAGE) -> tuple[list[str], bool]:
    """The paths of up to `most` objects below the directory `root` that come after `after`, and whether there are more. Blocks."""
    found: list[str] = []
    length = 0
    for path in islice(_walk(root, "", after.split("/")[1:]), most + 1):
        length += len(path.encode()) + 3
        if len(found) == most or length > MAX_PAGE_BYTES:
            return found, True
        found.append(path)
    return found, False


def _walk(directory: int, above: str, after: list[str]) -> Iterator[str]:
    """The objects below `directory`, whose path is `above`; those that come after the path `after` in it."""
    first, rest = (after[0], after[1:]) if after else ("", [])
    for name in sorted(os.listdir(directory)):
        if name < first or (not above and name.casefold() == HIDDEN):
            continue
        path = f"{above}/{name}"
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except NotADirectoryError:
            if name != first and _is_object(directory, name, path):
                yield path
            continue
        except OSError:  # a link, or gone meanwhile
            continue
        try:
            yield from _walk(descriptor, path, rest if name == first else [])
        finally:
            os.close(descriptor)


def _is_object(directory: int, name: str, path: str) -> bool:
    """Whether a request could name it and would find a file."""
    try:
        segments(path)
        return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except (Refused, OSError, UnicodeEncodeError):
        return False
