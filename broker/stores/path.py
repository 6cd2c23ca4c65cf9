"""Directories that many machines have at the same path: NFS, CephFS, Lustre, or one machine's own disk. The handle is ``file://``.

The endpoint is the directory as clients have it, such as ``file:///srv/images``: absolute, without a host, below the root. There
are no settings and no credential.

Rules
- A key is a path below the directory: segments that are names, never ``.`` or ``..``, so that no handle leaves it.
- What links do cannot be seen from here. Clients follow none (`broker.client.local`), so the directory is registered by its
  real path.
"""

from __future__ import annotations

from typing import ClassVar
from urllib.parse import quote, unquote, urlsplit

from broker.errors import Invalid
from broker.model import Store
from broker.stores.handed import HandedStore

_EXPECTED = "file:///DIRECTORY: an absolute path other than the root, without . and .."
MAX_NAME_BYTES = 255
"""NAME_MAX of Linux: no file system there has longer names."""


class PathStore(HandedStore):
    """One directory. Raises `Invalid` when its endpoint is none."""

    kind: ClassVar[str] = "path"
    schemes: ClassVar[tuple[str, ...]] = ("file",)

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._directory = directory_of(store.endpoint)

    def check_key(self, key: str) -> None:
        if not _is_below(key.split("/")):
            raise Invalid("This cannot be a file's path.", field="key", expected="names of at most 255 bytes, other than . and ..")

    def _url(self, key: str) -> str:
        return f"file://{quote(f'{self._directory}/{key}')}"


def directory_of(endpoint: str) -> str:
    """The directory that an endpoint names. Raises `Invalid`."""
    try:
        parts = urlsplit(endpoint)
        directory = unquote(parts.path, errors="strict").rstrip("/")
    except ValueError:
        raise Invalid("The endpoint names no directory.", field="endpoint", expected=_EXPECTED) from None
    plain = parts.scheme == "file" and not (parts.netloc or parts.query or parts.fragment)
    if not plain or not directory.startswith("/") or not _is_below(directory[1:].split("/")):
        raise Invalid("The endpoint names no directory.", field="endpoint", expected=_EXPECTED)
    return directory


def _is_below(segments: list[str]) -> bool:
    return all(segment not in ("", ".", "..") and segment.isprintable() and len(segment.encode()) <= MAX_NAME_BYTES for segment in segments)
