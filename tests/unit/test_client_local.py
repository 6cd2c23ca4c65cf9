"""Reading from a mount: which names are opened, that no link is followed, and that the kernel and we copy the same."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.client import local
from broker.client.fetch import Window
from broker.client.local import LocalReader, path_of
from broker.client.observe import Observed, algorithms, key_below, observe
from broker.client.progress import Progress
from broker.client.trouble import LocalTrouble
from broker.client.wire import StoreTrouble, Why

CONTENT = secrets.token_bytes((3 << 20) + 17)


@pytest.mark.parametrize(
    "url",
    [
        "file://host/a", "file:///a/../b", "file:///a/%2e%2e/b", "file:///a//b", "file:///", "file:a", "http://h/a", "file:///a?b", "file:///a#b",
        "file:////etc/passwd", "file:///a/.",
    ],
)  # fmt: skip
def test_what_names_no_file_of_this_machine_is_not_opened(url: str) -> None:
    with pytest.raises(StoreTrouble, match="names no file"):
        path_of(url)
    assert path_of("file:///srv/my%20images/%C3%BC") == "/srv/my images/ü"


def fetch(source: Path, target: Path, start: int = 0, end: int = len(CONTENT), size: int = len(CONTENT)) -> LocalReader:
    reader = LocalReader(size, 1.0)
    file = os.open(target, os.O_RDWR | os.O_CREAT)
    try:
        reader.fetch(f"file://{source}", {}, Window(start, end), file)
    finally:
        os.close(file)
    return reader


@pytest.mark.parametrize("refused", [None, errno.EXDEV, errno.EINVAL])
def test_a_range_is_copied_by_the_kernel_or_by_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int | None) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(refused, "refused")

    if refused is not None:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "a").write_bytes(CONTENT)
    whole = fetch(tmp_path / "a", tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == CONTENT
    assert (whole.received, whole.seconds > 0, whole.setup_seconds is not None) == (len(CONTENT), True, True)
    fetch(tmp_path / "a", tmp_path / "part", 1000, 2_000_000)
    assert (tmp_path / "part").read_bytes() == bytes(1000) + CONTENT[1000:2_000_000]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda place: (place / "d/a").unlink(), Why.MISSING),
        (lambda place: ((place / "d/a").unlink(), (place / "d/a").symlink_to(place / "real")), Why.WRONG),
        (lambda place: ((place / "d").rename(place / "e"), (place / "d").symlink_to(place / "e")), Why.WRONG),
        (lambda place: ((place / "d/a").unlink(), (place / "d/a").mkdir()), Why.WRONG),
        (lambda place: ((place / "d/a").unlink(), os.mkfifo(place / "d/a")), Why.WRONG),
        (lambda place: (place / "d/a").write_bytes(CONTENT + b"x"), Why.WRONG),
        (lambda place: (place / "d/a").write_bytes(b""), Why.WRONG),
    ],
)
def test_only_a_regular_file_of_the_right_size_is_read(tmp_path: Path, spoil: Callable[[Path], Any], why: Why) -> None:
    (tmp_path / "d").mkdir()
    for name in ("real", "d/a"):
        (tmp_path / name).write_bytes(CONTENT)
    spoil(tmp_path)
    with pytest.raises(StoreTrouble) as error:
        fetch(tmp_path / "d/a", tmp_path / "target")
    assert (error.value.why, str(tmp_path) in str(error.value)) == (why, False)
    assert (tmp_path / "target").read_bytes() == b""


def test_a_full_disk_is_our_trouble_not_the_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_bytes(CONTENT)
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(LocalTrouble, match="No space"):
        fetch(tmp_path / "a", tmp_path / "target")


def test_whoever_stops_it_stops_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    reader = LocalReader(len(CONTENT), 1.0)
    reader.wire.abort()
    with pytest.raises(StoreTrouble, match="stopped"), (tmp_path / "b").open("wb") as target:
        reader.fetch(f"file://{tmp_path}/a", {}, Window(0, len(CONTENT)), target.fileno())


async def test_an_agent_observes_a_file_that_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(CONTENT)
    names = algorithms({"md5": "", "sha1": "", "sha256": ""})
    assert (names, algorithms({}), algorithms({"sha1": ""})) == (("sha256", "md5"), ("sha256",), ("sha256",))
    seen = Observed(len(CONTENT), {name: hashlib.new(name, CONTENT).hexdigest() for name in names})
    progress = Progress()
    assert await observe(file, names, progress) == seen
    assert (progress.done, progress.total) == (len(CONTENT), len(CONTENT))
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(LocalTrouble, match="cannot read"):
        await observe(tmp_path / "link", names, Progress())
    with pytest.raises(LocalTrouble, match="no regular file"):
        await observe(tmp_path, names, Progress())

    class Spoiling(Progress):
        """Somebody writes while the file is read."""

        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, value)
            if name == "done" and value:
                file.write_bytes(CONTENT + b"more")

    with pytest.raises(LocalTrouble, match="changed while"):
        await observe(file, names, Spoiling())


def test_the_key_of_a_file_follows_from_the_stores_directory() -> None:
    assert key_below("file:///srv/my%20images/", Path("/srv/my images/a/../b/c.raw")) == "b/c.raw"
    for endpoint, path in (("file:///srv", Path("/srvx/a")), ("file:///srv", Path("/srv")), ("rbd://x/y", Path("/srv/a"))):
        with pytest.raises(LocalTrouble, match=r"is no directory|does not lie"):
            key_below(endpoint, path)
    assert local.directory_path("file:///srv/") == "/srv"
