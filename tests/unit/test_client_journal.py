"""What survives a kill, also when it was cut in the middle of a line, or somebody wrote nonsense into it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from uuid import UUID, uuid4

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.client.journal import (
    DownloadState,
    Origin,
    PartDone,
    UploadState,
    compacted,
    load_download,
    load_upload,
    save_download,
    upload_journal,
)
from broker.client.plan import Span

BLOB = str(UUID(int=7))


def _save(path: Path, state: DownloadState) -> None:
    data = os.open(path.with_name("data"), os.O_RDWR | os.O_CREAT)
    try:
        save_download(path, state, data)
    finally:
        os.close(data)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state = DownloadState(BLOB, 100, {"sha256": "ab"}, (Origin(0, 10, "a"), Origin(10, 30, "b"), Origin(50, 60, "a")))
    _save(tmp_path / "journal", state)
    assert load_download(tmp_path / "journal", 60) == state
    assert state.done == (Span(0, 30), Span(50, 60))


def test_the_data_is_forced_to_disk_before_it_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def watch(owner: object, name: str) -> None:
        really = getattr(owner, name)

        def watched(*arguments: object) -> object:
            order.append(name)
            return really(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(os, "fdatasync")
    watch(os, "fsync")
    watch(Path, "replace")
    _save(tmp_path / "journal", DownloadState(BLOB, 1, {}))
    assert order == ["fdatasync", "fsync", "replace"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"size": "many"},
        {"origins": [[0, 200, "a"]]},
        {"origins": [[5, 5, "a"]]},
        {"origins": [[-1, 5, "a"]]},
        {"origins": [[0, 61, "a"]]},
        {"origins": 7},
        {"digests": []},
    ],
)
def test_claims_that_cannot_be_are_not_believed(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "journal"
    good = DownloadState(BLOB, 100, {}, (Origin(0, 60, "a"),)).document()
    path.write_bytes(orjson.dumps(good))
    assert load_download(path, 60) is not None
    path.write_bytes(orjson.dumps(good | change))
    assert load_download(path, 60) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_nonsense_is_no_journal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "nonsense"
    path.write_bytes(content)
    assert load_download(path, 1 << 40) is None
    assert load_upload(path).ticket is None


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from("ab")), max_size=10))
def test_compacting_keeps_who_sent_what(runs: list[tuple[int, str]]) -> None:
    origins, start = [], 0
    for length, store in runs:
        origins.append(Origin(start, start + length, store))
        start += length
    merged = compacted(origins[::-1])
    assert {(byte, o.store) for o in merged for byte in range(o.start, o.end)} == {
        (byte, o.store) for o in origins for byte in range(o.start, o.end)
    }
    assert all(before.store != after.store for before, after in itertools.pairwise(merged))


def test_an_upload_is_found_again_but_for_a_cut_last_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "upload.jsonl"
    state, ticket = UploadState(path), uuid4()
    state.begin(ticket, "weed", 16)
    parts = [PartDone(number, 16, {"sha256": str(number)}) for number in (2, 1, 3)]
    for part in parts:
        state.add(part)
    assert load_upload(path) == state
    path.write_bytes(path.read_bytes()[:-9])
    again = load_upload(path)
    assert (again.ticket, again.store, again.part_size, set(again.parts)) == (ticket, "weed", 16, {1, 2})
    again.begin(ticket, "other", 16)
    assert load_upload(path).parts == {}
    again.end()
    assert load_upload(path).ticket is None


def test_another_state_of_the_file_is_another_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    paths = {
        upload_journal(tmp_path / name, size, modified, what)
        for name in "ab"
        for size in (1, 2)
        for modified in (1, 2)
        for what in ({"broker": "x"}, {"broker": "y"})
    }
    assert len(paths) == 16
    assert all(path.parent == tmp_path / "transfer-broker" / "uploads" for path in paths)
