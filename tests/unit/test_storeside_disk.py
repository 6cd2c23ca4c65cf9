"""Records of objects on file systems without extended attributes, leftovers of crashes, and the names of objects."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.storeside.application import Application
from broker.storeside.counted import Counted
from broker.storeside.disk import Record, Tree, disk_errors, segments
from broker.storeside.gate import Gate
from broker.storeside.jwks import KeySource
from broker.storeside.limits import Limits
from broker.storeside.receive import Received
from broker.storeside.refused import Refused
from broker.storeside.uploads import REMEMBER_SECONDS, Uploads, Wanted

RECORD = Record("a" * 64, "b" * 32, {"blob": "7"})


@pytest.fixture(params=["attributes", "sidecars"])
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    if request.param == "sidecars":

        def unsupported(*_: object) -> None:
            raise OSError(errno.ENOTSUP, "no attributes")

        monkeypatch.setattr(os, "setxattr", unsupported)
        monkeypatch.setattr(os, "getxattr", unsupported)
    return Tree(tmp_path)


def write(tree: Tree, path: str, data: bytes = b"data") -> None:
    with tree.temporary() as (descriptor, name):
        os.write(descriptor, data)
        tree.place(tree.tmp, name, descriptor, path, RECORD)


def found(tree: Tree, path: str) -> Record:
    result = tree.find(path)
    os.close(result.descriptor)
    return result.record


def test_what_is_known_of_an_object_is_kept(tree: Tree, tmp_path: Path) -> None:
    write(tree, "/a/b")
    assert found(tree, "/a/b") == RECORD
    with pytest.raises(Refused, match="never overwritten"):
        write(tree, "/a/b", b"other")
    assert found(tree, "/a/b") == RECORD
    (tmp_path / "a" / "b").write_bytes(b"longer than before")
    assert found(tree, "/a/b") == Record()
    tree.delete("/a/b")
    assert os.listdir(tmp_path / ".broker" / "records") == []
    assert os.listdir(tmp_path / ".broker" / "tmp") == []


def test_what_came_by_another_way_is_served_without_digests(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "copied").write_bytes(b"by hand")
    assert found(tree, "/copied") == Record()


def test_leftovers_of_a_crash_go_when_nobody_writes_them(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    old = time.time() - 3600
    with tree.temporary() as (descriptor, name):
        os.utime(descriptor, (old, old))
        (tmp_path / ".broker" / "tmp" / "leftover").write_bytes(b"")
        os.utime(tmp_path / ".broker" / "tmp" / "leftover", (old, old))
        Tree(tmp_path).close()
        assert os.listdir(tmp_path / ".broker" / "tmp") == [name]


def test_ended_uploads_are_remembered_longer_than_any_token_lives(tmp_path: Path) -> None:
    uploads = Uploads(Tree(tmp_path))
    uploads.abort("/a", "one")
    uploads.abort("/a", "two")
    Uploads(Tree(tmp_path))
    assert len(os.listdir(tmp_path / ".broker" / "uploads")) == 2
    (one,) = (tmp_path / ".broker" / "uploads").glob("*-one")
    old = time.time() - REMEMBER_SECONDS - 1
    os.utime(one / "ended", (old, old))
    Uploads(Tree(tmp_path))
    assert [name.rpartition("-")[2] for name in os.listdir(tmp_path / ".broker" / "uploads")] == ["two"]


def test_finishing_goes_on_after_a_crash_between_link_and_note(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    uploads = Uploads(tree)
    with uploads.part("/a", "u", 0, 4) as descriptor:
        os.pwrite(descriptor, b"data", 0)
        uploads.record("/a", "u", 0, descriptor, Received(4, "s", "m"))
    (directory,) = (tmp_path / ".broker" / "uploads").iterdir()
    os.link(directory / "data", tmp_path / "a")
    with pytest.raises(Refused) as refused, uploads.part("/a", "u", 0, 4):
        pass  # the object is there: no part may touch its bytes any more
    assert refused.value.status == 404
    (directory / "journal").write_bytes(b'{"offset":0,"length":4,"sha256":"s","md5":"m"}\n{"offs')
    assert uploads.finish("/a", "u", [Wanted(0, 4)], {}, 4, None)["size"] == 4
    assert os.listdir(directory) == ["ended"]
    assert (tmp_path / "a").read_bytes() == b"data"


def test_one_part_is_not_sent_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try costs lines in the journal, which is read whole at the end."""
    tree = Tree(tmp_path)
    uploads = Uploads(tree)
    monkeypatch.setattr("broker.storeside.uploads.MAX_JOURNAL_BYTES", 4000)

    def send(times: int) -> None:
        for _ in range(times):
            with uploads.part("/a", "u", 0, 4) as descriptor:
                os.pwrite(descriptor, b"data", 0)
                uploads.record("/a", "u", 0, descriptor, Received(4, "a" * 64, "b" * 32))

    with pytest.raises(Refused) as refused:
        send(1000)
    assert refused.value.status == 409
    (journal,) = tmp_path.glob(".broker/uploads/*/journal")
    assert 4000 < journal.stat().st_size < 4500
    assert uploads.finish("/a", "u", [Wanted(0, 4)], {}, 4, None)["size"] == 4


def test_what_was_left_just_before_a_start_goes_too(tmp_path: Path) -> None:
    """A server that is started again at once must not keep it until the next start."""
    tree = Tree(tmp_path)
    left = tmp_path / ".broker" / "tmp" / "left"
    left.write_bytes(b"half")
    application = Application(Tree(tmp_path), Gate(KeySource("none"), audience="a", issuer="i"), Limits(), Counted())
    assert left.exists()
    os.utime(left, (time.time() - 61, time.time() - 61))
    with tree.temporary() as (_, name):
        os.utime(tmp_path / ".broker" / "tmp" / name, (time.time() - 61, time.time() - 61))
        application.forget(time.time())
        assert os.listdir(tmp_path / ".broker" / "tmp") == [name]


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.ENAMETOOLONG, 400), (errno.EIO, 500)])
def test_what_the_disk_says_becomes_an_answer(number: int, status: int) -> None:
    with pytest.raises(Refused) as refused, disk_errors():
        raise OSError(number, "text", "/secret/path")
    assert refused.value.status == status
    assert "secret" not in refused.value.reason


@given(
    st.text(st.characters(codec="utf-8"), max_size=30).map(lambda text: "/" + text)
    | st.sampled_from(["", "a", "/..", "/a/../b", "/.BROKER/x"])
)
def test_a_path_is_refused_or_stays_below_the_root(path: str) -> None:
    try:
        names = segments(path)
    except Refused:
        return
    assert "/" + "/".join(names) == path
    assert os.path.normpath(path) == path
    assert names[0].casefold() != ".broker"
