"""What survives a kill: which ranges of a download are on disk, and which parts of an upload were taken.

A download's journal lies beside its temporary file and is replaced as a whole: first the data is forced to disk, then the
claim about it is written to a new file, forced, and renamed. A claimed range is therefore really there, even after power was
lost. Neither journal holds a URL or a token.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from broker.client.plan import Span, Spans, union
from broker.client.settings import state_directory

_FORMAT = 1


class Origin(NamedTuple):
    """Who delivered which bytes."""

    start: int
    end: int
    store: str


@dataclass(frozen=True, slots=True)
class DownloadState:
    """What an earlier run left: for which blob, which bytes, and from where they came."""

    blob: str
    size: int
    digests: Mapping[str, str]
    origins: tuple[Origin, ...] = ()

    @property
    def done(self) -> Spans:
        return union(Span(origin.start, origin.end) for origin in self.origins)

    def document(self) -> dict[str, Any]:
        return {
            "format": _FORMAT, "blob": self.blob, "size": self.size, "digests": dict(self.digests),
            "origins": [list(origin) for origin in self.origins],
        }  # fmt: skip


def temporary_of(target: Path) -> Path:
    """Where a download grows until it is verified: beside its target, so that the last step is a rename."""
    return target.with_name(f".{target.name}.part")


def journal_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.part.journal")


def compacted(origins: Sequence[Origin]) -> tuple[Origin, ...]:
    """Neighbours from one store as one."""
    merged: list[Origin] = []
    for origin in sorted(origins):
        if merged and merged[-1].end == origin.start and merged[-1].store == origin.store:
            merged[-1] = Origin(merged[-1].start, origin.end, origin.store)
        else:
            merged.append(origin)
    return tuple(merged)


def save_download(path: Path, state: DownloadState, data: int) -> None:
    """Force the open file `data` to disk, then claim `state`. Raises `OSError`."""
    os.fdatasync(data)
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(orjson.dumps(state.document()))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def load_download(path: Path, held: int) -> DownloadState | None:
    """The claims of an earlier run about a temporary file that holds `held` bytes; ``None`` when there are none that can be read."""
    try:
        document = orjson.loads(path.read_bytes())
        if document["format"] != _FORMAT:
            return None
        size = int(document["size"])
        origins = tuple(Origin(int(start), int(end), str(store)) for start, end, store in document["origins"])
        digests = {str(name): str(value) for name, value in document["digests"].items()}
        if any(not 0 <= origin.start < origin.end <= min(size, held) for origin in origins):
            return None
        return DownloadState(str(document["blob"]), size, digests, origins)
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
        return None


@dataclass(frozen=True, slots=True)
class PartDone:
    """A part that the store took, with our own digests of it."""

    number: int
    size: int
    digests: Mapping[str, str]


@dataclass(slots=True)
class UploadState:
    """An upload under way: its ticket, the store in use, and the parts that it took. ``None`` in `ticket`: nothing was begun."""

    path: Path
    ticket: UUID | None = None
    store: str = ""
    part_size: int = 0
    parts: dict[int, PartDone] = field(default_factory=dict)

    def begin(self, ticket: UUID, store: str, part_size: int) -> None:
        """Forget what was, remember this. Raises `OSError`."""
        self.ticket, self.store, self.part_size, self.parts = ticket, store, part_size, {}
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_bytes(orjson.dumps({"format": _FORMAT, "ticket": ticket, "store": store, "part_size": part_size}) + b"\n")
        fresh.replace(self.path)

    def add(self, part: PartDone) -> None:
        """One more part; a line of its own, so that a cut last line spoils nothing. Raises `OSError`."""
        self.parts[part.number] = part
        with self.path.open("ab") as file:
            file.write(orjson.dumps({"number": part.number, "size": part.size, "digests": dict(part.digests)}) + b"\n")

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()


def upload_journal(source: Path, size: int, modified_ns: int, what: Mapping[str, Any]) -> Path:
    """The journal's path for this very state of a file and what is to become of it (broker, name, image, store …)."""
    identity = orjson.dumps({"path": str(source.absolute()), "size": size, "modified": modified_ns, **what}, option=orjson.OPT_SORT_KEYS)
    return state_directory() / f"{hashlib.sha256(identity).hexdigest()[:32]}.jsonl"


def load_upload(path: Path) -> UploadState:
    """What an earlier run left; empty when there is nothing, or nothing that can be read."""
    state = UploadState(path)
    try:
        lines = path.read_bytes().split(b"\n")
        head = orjson.loads(lines[0])
        if head["format"] != _FORMAT:
            return state
        state.ticket, state.store, state.part_size = UUID(head["ticket"]), str(head["store"]), int(head["part_size"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return UploadState(path)
    for line in lines[1:]:
        try:
            part = orjson.loads(line)
            done = PartDone(int(part["number"]), int(part["size"]), {str(key): str(value) for key, value in part["digests"].items()})
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            break
        state.parts[done.number] = done
    return state
