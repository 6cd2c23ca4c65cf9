"""Records of objects: what fits, and that nobody but a broker makes, changes, moves or reads one."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.model import Purpose, Visibility
from broker.sign.record import MAX_LENGTH, PIECE, Record, RecordedImage, Sealer, carries, pieces

SEALER = Sealer([b"the passphrase"])
OTHER = Sealer([b"another passphrase"])
ID = UUID(int=7)
RECORD = Record(
    "blob/key", ID, "demo", Purpose.CACHE, 123, {"sha256": "a" * 64, "sha512": "b" * 128, "md5": "c" * 32, "sha1": "d" * 40},
    RecordedImage(ID, "qcow2", "näme", "demo", Visibility.COMMUNITY), 1_790_000_000,
)  # fmt: skip


@pytest.mark.parametrize("record", [RECORD, replace(RECORD, image=None), replace(RECORD, size=None, digests={})])
def test_what_was_sealed_is_opened(record: Record) -> None:
    metadata = SEALER.seal(record)
    assert carries(metadata)
    assert SEALER.open({"blob": "x", **metadata}, record.key) == record


@settings(max_examples=50, deadline=None)
@given(name=st.text(min_size=1, max_size=255), project=st.text(min_size=1, max_size=100))
def test_every_name_fits_the_metadata_of_every_store(name: str, project: str) -> None:
    image = RecordedImage(ID, "raw", name, project, Visibility.PRIVATE)
    metadata = SEALER.seal(replace(RECORD, project=project, image=image))
    assert all(value.isascii() and value.isprintable() and len(value) <= PIECE for value in metadata.values())
    assert sum(map(len, metadata.values())) <= MAX_LENGTH
    opened = SEALER.open(metadata, RECORD.key)
    assert opened is not None
    assert opened.image is not None
    assert opened.image.project == project
    assert opened.image.name == name or (opened.image.name.endswith("…") and name.startswith(opened.image.name[:-1]))


def test_what_cannot_fit_is_not_recorded() -> None:
    image = RecordedImage(ID, "raw", "x", "\U0001f600" * 255, Visibility.PRIVATE)
    assert SEALER.seal(replace(RECORD, project="\U0001f600" * 255, image=image)) == {}


def test_nobody_else_makes_changes_moves_or_reads_one() -> None:
    metadata = SEALER.seal(RECORD)
    assert SEALER.open(metadata, "blob/another") is None
    assert SEALER.open(OTHER.seal(RECORD), RECORD.key) is None
    text = "".join(metadata.values())
    for place in range(0, len(text), 37):
        other = "A" if text[place] != "A" else "B"
        changed = text[:place] + other + text[place + 1 :]
        assert SEALER.open({"record-1": changed[:PIECE], "record-2": changed[PIECE:]}, RECORD.key) is None
    for junk in ({"record-1": ""}, {"record-1": "ü" * 10}, {"record-1": "x" * 5000}, {}):
        assert SEALER.open(junk, RECORD.key) is None
    assert "demo" not in text


def test_an_old_passphrase_opens_when_it_is_given() -> None:
    metadata = OTHER.seal(RECORD)
    assert Sealer([b"the passphrase", b"another passphrase"]).open(metadata, RECORD.key) == RECORD


def test_pieces_are_told_from_the_rest() -> None:
    assert pieces({"record-1": "a", "blob": "b", "records": "c"}) == {"record-1": "a"}
