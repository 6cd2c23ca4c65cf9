"""What was used up, how long that is remembered, conditions and ranges."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.claims import TransferToken
from broker.storeside.conditional import Conditions, http_date
from broker.storeside.disk import Tree
from broker.storeside.refused import Refused
from broker.storeside.used import MARGIN_SECONDS, Used

NOW = 1_795_365_748.0
TOKEN = TransferToken("https://broker", "disk", "s", "PUT", "/x", NOW + 600, NOW, "id-1")


@pytest.fixture
def used(tmp_path: Path) -> Used:
    return Used(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))


def take(used: Used, token: TransferToken = TOKEN) -> bool:
    try:
        with used.once(token):
            return True
    except Refused as refused:
        return refused.status != 403


def test_once(used: Used, tmp_path: Path) -> None:
    used.check(TOKEN)
    assert [take(used), take(used), take(used, replace(TOKEN, id="id-2"))] == [True, False, True]
    with pytest.raises(Refused, match="was used"):
        used.check(TOKEN)
    assert not take(Used(os.open(tmp_path, os.O_RDONLY)))  # after a restart


def test_a_failure_takes_the_mark_back(used: Used) -> None:
    with pytest.raises(KeyboardInterrupt), used.once(TOKEN):
        raise KeyboardInterrupt
    used.check(TOKEN)
    assert take(used)


def test_a_disk_that_fails_keeps_the_mark(used: Used, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object is gone when syncing its directory fails; the token would delete the next one of that name."""
    (tmp_path / "root").mkdir()
    tree = Tree(tmp_path / "root")
    (tmp_path / "root" / "a").write_bytes(b"x")
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / "root")):
            raise OSError(errno.EIO, "the disk failed")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Refused) as refused, used.once(TOKEN):
        tree.delete("/a")
    assert refused.value.status == 500
    assert not (tmp_path / "root" / "a").exists()
    with pytest.raises(Refused, match="was used"):
        used.check(TOKEN)


def test_marks_are_forgotten_after_their_tokens(used: Used, tmp_path: Path) -> None:
    late = replace(TOKEN, id="late", expires_at=NOW + 90_000)
    assert take(used) and take(used, late)
    used.forget(TOKEN.expires_at + MARGIN_SECONDS)
    assert not take(used)
    used.forget(TOKEN.expires_at + MARGIN_SECONDS + 3600)
    assert len(os.listdir(tmp_path)) == 1
    assert not take(used, late)
    used.forget(NOW + 200_000)
    assert os.listdir(tmp_path) == []


ETAG, AT = '"abc"', 1_700_000_000.5
AFTER, SAME, BEFORE = http_date(AT + 1), http_date(AT), http_date(AT - 1)


@pytest.mark.parametrize(
    ("fields", "get", "delete"),
    [
        ({}, True, True),
        ({"If-Match": "*"}, True, True),
        ({"If-Match": '"x", "abc"'}, True, True),
        ({"If-Match": 'W/"abc"'}, 412, 412),
        ({"If-Match": '"x"'}, 412, 412),
        ({"If-Match": "abc"}, 412, 412),
        ({"If-Match": '"a,b", "abc"'}, True, True),
        ({"If-None-Match": "*"}, False, 412),
        ({"If-None-Match": 'W/"abc"'}, False, 412),
        ({"If-None-Match": '"x"'}, True, True),
        ({"If-Unmodified-Since": SAME}, True, True),
        ({"If-Unmodified-Since": BEFORE}, 412, 412),
        ({"If-Unmodified-Since": BEFORE, "If-Match": ETAG}, True, True),
        ({"If-Modified-Since": SAME}, False, True),
        ({"If-Modified-Since": AFTER}, False, True),
        ({"If-Modified-Since": BEFORE}, True, True),
        ({"If-Modified-Since": AFTER, "If-None-Match": '"x"'}, True, True),
        ({"If-Modified-Since": "yesterday"}, True, True),
        ({"If-Modified-Since": "Sat, 01 Jan 99999 00:00:00 GMT"}, True, True),
        ({"If-Match": ETAG, "If-None-Match": ETAG}, False, 412),
    ],
)
def test_conditions(fields: dict[str, str], get: bool | int, delete: bool | int) -> None:
    for method, expected in (("GET", get), ("HEAD", get), ("DELETE", delete)):
        if expected == 412 and expected is not True:
            with pytest.raises(Refused) as refused:
                Conditions(fields).check(method, ETAG, AT)
            assert refused.value.status == 412
        else:
            assert Conditions(fields).check(method, ETAG, AT) is expected


@pytest.mark.parametrize(
    ("fields", "span"),
    [
        ({"If-Range": ETAG}, (0, 2)),
        ({"If-Range": 'W/"abc"'}, None),
        ({"If-Range": '"x"'}, None),
        ({"If-Range": SAME}, None),
    ],
)
def test_if_range(fields: dict[str, str], span: tuple[int, int] | None) -> None:
    assert Conditions({"Range": "bytes=0-1", **fields}).span(ETAG, 10) == span


@given(st.text("bytes=0123456789-, ", max_size=20).map(lambda text: "bytes=" + text) | st.text(max_size=20), st.integers(0, 100))
def test_a_range_lies_within_the_object(field: str, size: int) -> None:
    try:
        span = Conditions({"Range": field}).span(ETAG, size)
    except Refused:
        return
    if span is not None:
        assert 0 <= span[0] < span[0] + span[1] <= size


@pytest.mark.parametrize("field", ["bytes=10-", "bytes=10-12", "bytes=-0"])
def test_a_range_behind_the_end(field: str) -> None:
    with pytest.raises(Refused) as refused:
        Conditions({"Range": field}).span(ETAG, 10)
    assert (refused.value.status, refused.value.headers) == (416, {"Content-Range": "bytes */10"})
