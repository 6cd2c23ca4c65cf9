"""What is kept with an object at its store, so that a lost catalogue can be made again from the stores: the record.

Rules
- Metadata is what the writer of an object says, and on most stores a client may say what it likes. So a record is sealed by a key of
  the brokers' own (Fernet: authenticated encryption), and names the one key in a store that it is good for: nobody can make one, change
  one, or take one from another object. Nor can anyone read it who may read the object: it names images and projects.
- The sealing key comes from the passphrase of the signing keys (scrypt), which every broker has, and which outlives the database.
- A record is ASCII in pieces ``record-1``, ``record-2``, …: of `PIECE` characters, since Swift takes 256 bytes a value, and
  `MAX_LENGTH` in all, since S3 takes 2 KB of metadata. A name that is too long for that is cut.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import orjson
from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from broker.model import DIGEST_HEX_LENGTH, MAX_BLOB_SIZE, Digests, Purpose, Visibility

PIECE = 240
MAX_LENGTH = 1500
_NAME = "record-"
_MOST_PIECES = -(-MAX_LENGTH // PIECE)
_SALT = b"transfer-broker: records of objects"
_CUT = "…"


@dataclass(frozen=True, slots=True)
class RecordedImage:
    """The image that an object was written for, as it was then."""

    id: UUID
    format: str
    name: str
    project: str
    visibility: Visibility


@dataclass(frozen=True, slots=True)
class Record:
    """What a broker knew of an object when it had it written. `digests` and `size` are what had been declared by then."""

    key: str
    blob: UUID
    project: str
    purpose: Purpose
    size: int | None
    digests: Digests
    image: RecordedImage | None
    written_at: int


class Sealer:
    """Seals records by the first of `passphrases`, and opens those that were sealed by any of them. Takes some 50 ms each to make."""

    __slots__ = ("_fernet",)

    def __init__(self, passphrases: Sequence[bytes]) -> None:
        self._fernet = MultiFernet([Fernet(_sealing_key(passphrase)) for passphrase in passphrases])

    def seal(self, record: Record) -> dict[str, str]:
        """The metadata that keeps `record`; nothing when it is too long even without its image's name."""
        sealed = self._seal(record)
        while len(sealed) > MAX_LENGTH:
            if record.image is None or record.image.name == _CUT:
                return {}
            record = replace(record, image=replace(record.image, name=_shorter(record.image.name)))
            sealed = self._seal(record)
        return {f"{_NAME}{number}": sealed[start : start + PIECE] for number, start in enumerate(range(0, len(sealed), PIECE), 1)}

    def _seal(self, record: Record) -> str:
        return self._fernet.encrypt(orjson.dumps(_to_list(record))).decode()

    def open(self, metadata: Mapping[str, str], key: str) -> Record | None:
        """The record among `metadata` of the object at `key`; ``None`` when it is not ours, or another object's.

        `carries` tells whether there is anything that claims to be one.
        """
        sealed = "".join(metadata.get(f"{_NAME}{number}", "") for number in range(1, _MOST_PIECES + 1))
        if len(sealed) > MAX_LENGTH:
            return None
        try:
            record = _from_list(orjson.loads(self._fernet.decrypt(sealed.encode())))
        except (InvalidToken, ValueError, TypeError, KeyError):
            return None
        return record if record.key == key else None


def carries(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata hold something that claims to be a record."""
    return f"{_NAME}1" in metadata


def pieces(metadata: Mapping[str, str]) -> dict[str, str]:
    """Those of the metadata that are pieces of a record."""
    return {name: value for name, value in metadata.items() if name.startswith(_NAME)}


def _sealing_key(passphrase: bytes) -> bytes:
    return base64.urlsafe_b64encode(hashlib.scrypt(passphrase, salt=_SALT, n=1 << 14, r=8, p=1, dklen=32))


def _shorter(name: str) -> str:
    return name.removesuffix(_CUT)[: len(name.removesuffix(_CUT)) * 3 // 4] + _CUT


def _to_list(record: Record) -> list[Any]:
    """A list, for it has to be short; its first item says how to read it."""
    image = record.image
    return [
        1, record.key, str(record.blob), record.project, record.purpose.value, record.size, dict(record.digests),
        None if image is None else [str(image.id), image.format, image.name, image.project, image.visibility.value], record.written_at,
    ]  # fmt: skip


def _from_list(told: Any) -> Record:
    """Raises `ValueError`, `TypeError` or `KeyError` for what no broker of this version wrote."""
    version, key, blob, project, purpose, size, digests, image, written_at = told
    if version != 1 or (size is not None and not 0 <= int(size) <= MAX_BLOB_SIZE):
        raise ValueError("another version's record")
    if any(len(value) != DIGEST_HEX_LENGTH[name] for name, value in digests.items()):
        raise ValueError("a digest of another length")
    recorded = None
    if image is not None:
        id, format, name, owner, visibility = image
        recorded = RecordedImage(UUID(id), format, name, owner, Visibility(visibility))
    return Record(key, UUID(blob), project, Purpose(purpose), size, digests, recorded, int(written_at))
