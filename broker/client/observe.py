"""What an agent sees of a blob where the broker cannot look: size and digests of a file on a mount, or of what a pipe delivers."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from broker.client.local import directory_path, open_file
from broker.client.progress import Progress
from broker.client.trouble import LocalTrouble
from broker.client.wire import BLOCK, StoreTrouble, describe
from broker.model import CONTENT_DIGESTS, Digests


@dataclass(frozen=True, slots=True)
class Observed:
    """Bytes, and their digests by algorithm."""

    size: int
    digests: Digests

    def document(self) -> dict[str, object]:
        return {"size": self.size, "digests": dict(self.digests)}


def algorithms(declared: Collection[str]) -> tuple[str, ...]:
    """Which digests to make of a blob that has these: those that prove content."""
    return tuple(name for name in CONTENT_DIGESTS if name in declared) or ("sha256",)


def key_below(endpoint: str, path: Path) -> str:
    """The key of a file in the directory that a store of kind ``path`` is. Raises `LocalTrouble` when it lies elsewhere."""
    directory, name = directory_path(endpoint), os.path.abspath(path)
    if not name.startswith(directory + "/"):
        raise LocalTrouble(f"{name} does not lie below {directory}", "name a file of this store, or its key with --key")
    return name.removeprefix(directory + "/")


async def observe(path: Path | None, names: Collection[str], progress: Progress) -> Observed:
    """Read a file, or with ``None`` standard input, to its end and make these digests. Links in the path are not followed.

    Raises `LocalTrouble`, also when the file changed meanwhile.
    """
    ended = threading.Event()
    try:
        return await asyncio.to_thread(_observe, path, names, progress, ended)
    finally:
        ended.set()


def _observe(path: Path | None, names: Collection[str], progress: Progress, ended: threading.Event) -> Observed:
    try:
        file = 0 if path is None else open_file(os.path.abspath(path))
    except OSError as error:
        raise LocalTrouble(f"cannot read {path}: {describe(error)}", "links are not followed: name the file by its real path") from None
    except StoreTrouble:
        raise LocalTrouble(f"{path} is no regular file", "pipe it in and name it -") from None
    try:
        before = os.fstat(file)
        if stat.S_ISREG(before.st_mode):
            progress.total = before.st_size
        progress.stage = "fetching"
        found = _read(file, names, progress, ended)
        if path is not None and _stamp(os.fstat(file)) != _stamp(before):
            raise LocalTrouble(f"{path} changed while it was read", "only what changes no more can be a replica")
        return found
    except OSError as error:
        raise LocalTrouble(f"cannot read {path or 'the standard input'}: {describe(error)}") from None
    finally:
        if path is not None:
            os.close(file)


def _read(file: int, names: Collection[str], progress: Progress, ended: threading.Event) -> Observed:
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in names}
    buffer = memoryview(bytearray(BLOCK))
    size = 0
    while not ended.is_set() and (count := os.readv(file, [buffer])):
        for each in hashes.values():
            each.update(buffer[:count])
        size += count
        progress.done = size
    return Observed(size, {name: each.hexdigest() for name, each in hashes.items()})


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns
