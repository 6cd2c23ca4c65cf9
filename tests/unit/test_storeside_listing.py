"""What the file server lists: every object once, over pages, and nothing that is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from broker.storeside import listing


@pytest.fixture
def root(tmp_path: Path) -> int:
    for name in ("b/1", "b/2", "b-c", "a", "b/d/x", "ü/y", ".broker/tmp/z", "c/.hidden"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "away").symlink_to("/etc")
    (tmp_path / "a%41").write_bytes(b"could be read in two ways")
    os.mkfifo(tmp_path / "pipe")
    return os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_pages(root: int, most: int) -> None:
    seen: list[str] = []
    more, after = True, ""
    while more:
        paths, more = listing.page(root, after, most)
        assert len(paths) <= most
        seen += paths
        after = paths[-1] if paths else after
    os.close(root)
    assert sorted(seen) == sorted(["/a", "/b-c", "/b/1", "/b/2", "/b/d/x", "/c/.hidden", "/ü/y"])
    assert len(seen) == len(set(seen))


def test_it_goes_on_where_an_object_was_deleted(root: int) -> None:
    assert listing.page(root, "/b/11", 100)[0] == ["/b/2", "/b/d/x", "/b-c", "/c/.hidden", "/ü/y"]
    assert listing.page(root, "/zzz", 100) == (["/ü/y"], False)
    os.close(root)
