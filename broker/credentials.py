"""What the broker opens stores with: named sets of secrets, kept outside of the catalogue.

A credential NAME is the JSON object of texts in ``credentials_dir/NAME.json`` (mode 0600), or in the environment variable
``BROKER_CREDENTIAL_NAME`` (upper case, ``-`` as ``_``), which comes first. Files are read again when they change. Which
entries a credential has is the business of the kind of store (README, "Connect a store").

Rules: no text of an error, log or ``repr`` holds a value.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import orjson

_log = logging.getLogger(__name__)
VARIABLE = "BROKER_CREDENTIAL_"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")
_MAX_BYTES = 64 << 10


class CredentialError(Exception):
    """A credential is missing or cannot be read; the text names it, never its content."""


def is_name(name: str) -> bool:
    """Whether a credential may be called that."""
    return _NAME.match(name) is not None


def variable_of(name: str) -> str:
    """The environment variable that comes before the file of the credential `name`."""
    return VARIABLE + name.upper().replace("-", "_")


class Credential(Mapping[str, str]):
    """One credential's entries. Equal ones compare equal; ``repr`` shows the entries' names only."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, str]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> str:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Credential({', '.join(self._entries)})"


class Credentials(Mapping[str, Credential]):
    """The credentials of this broker, by name. As a mapping it holds those that can be read now."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[str, tuple[tuple[int, int, int], Credential]] = {}
        self._given: dict[str, Credential] = {}  # by the environment

    def __getitem__(self, name: str) -> Credential:
        try:
            return self.read(name)
        except CredentialError as error:
            _log.warning("%s", error)
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        names = {path.stem for path in self.directory.glob("*.json")} if self.directory.is_dir() else set()
        return iter(sorted(names))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Credentials({str(self.directory)!r})"

    def changed(self) -> bool:
        """Whether a file that was read before has changed since, or is gone. Reads nothing."""
        return any(_stamp(self.directory / f"{name}.json") != stamp for name, (stamp, _) in self._read.items())

    def forget(self) -> None:
        """Read every file anew when next asked for."""
        self._read.clear()

    def read(self, name: str) -> Credential:
        """The credential as it is now: one `stat`, and a read when the file changed. Raises `CredentialError`."""
        if not is_name(name):
            raise CredentialError("the name of a credential is lower-case letters, digits, - and _")
        variable = variable_of(name)
        text = os.environ.get(variable)
        if text is not None:
            given = self._given[name] = _parse(text.encode(), f"the environment variable {variable}")
            return given
        return self._from_file(name)

    def secrets(self) -> Iterator[str]:
        """Every value that was read so far and is long enough to be a secret, for scrubbing logs."""
        for credential in (*self._given.values(), *(credential for _, credential in self._read.values())):
            yield from (value for value in credential.values() if len(value) >= 8)

    def parse_file(self, name: str) -> Credential:
        """What the file holds, whatever the environment says. Raises `CredentialError`."""
        path = self.directory / f"{name}.json"
        try:
            with path.open("rb") as file:
                return _parse(file.read(_MAX_BYTES + 1), f"credential {name}")
        except OSError as error:
            raise CredentialError(f"credential {name}: {path} cannot be read: {error.strerror}") from None

    def _from_file(self, name: str) -> Credential:
        path = self.directory / f"{name}.json"
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
                known = self._read.get(name)
                if known is not None and known[0] == stamp:
                    return known[1]
                content = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise CredentialError(f"credential {name}: {path} cannot be read: {error.strerror}") from None
        if found.st_mode & (stat.S_IROTH | stat.S_IWOTH):
            _log.warning("credential %s: everybody can read %s; run: chmod 600 %s", name, path, path)
        credential = _parse(content, f"credential {name}")
        self._read[name] = (stamp, credential)
        return credential


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _parse(content: bytes, whose: str) -> Credential:
    try:
        entries = orjson.loads(content) if len(content) <= _MAX_BYTES else None
    except orjson.JSONDecodeError:
        raise CredentialError(f"{whose} holds no JSON") from None
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise CredentialError(f"{whose} must be a JSON object of texts of at most {_MAX_BYTES} bytes")
    return Credential(entries)
