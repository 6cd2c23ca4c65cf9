"""The demo, as a process of its own: what it says last, what the broker carried, and that nothing of it lives on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
_PR_SET_CHILD_SUBREAPER = 36
_READY_SECONDS = 120
_END_SECONDS = 120


@pytest.fixture
def orphanage() -> Iterator[None]:
    """Orphans below this process become its children for a while: that is how they are found."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1) == 0
    yield
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory outside of pytest's own, which PostgreSQL's account could not pass when this runs as root."""
    with tempfile.TemporaryDirectory(prefix="broker-test-demo-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def _children() -> set[int]:
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        found.update(map(int, (thread / "children").read_text().split()))
    return found


def _command(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def _survivors(before: set[int]) -> list[str]:
    """What still runs of the children that came after `before`. The kernel tells PostgreSQL to stop, which takes it a moment."""
    end = time.monotonic() + _END_SECONDS
    while True:
        new = _children() - before
        for pid in new:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # the dead ones are ours to bury
        alive = [_command(pid) or str(pid) for pid in new if pid in _children()]
        if not alive or time.monotonic() > end:
            return alive
        time.sleep(0.1)


def _demo(place: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "deploy.demo", "--keep", str(place), *arguments]


def test_once(orphanage: None, place: Path) -> None:
    before = _children()
    done = subprocess.run(_demo(place / "demo", "--once"), cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    last = re.fullmatch(r"demo ok: moved ([0-9]+) bytes, broker carried ([0-9]+) bytes", done.stdout.splitlines()[-1])
    assert last is not None, done.stdout[-500:]
    moved, carried = map(int, last.groups())
    assert moved >= 4 * 50_000_000
    assert 10_000 < carried < 1_000_000  # tickets alone are more than nothing
    assert _survivors(before) == []
    assert {file.name: file.stat().st_mode & 0o777 for file in (place / "demo/data/credentials").iterdir()} == {"s3-az1.json": 0o600}
    secrets = (place / "demo/token").read_text().strip()
    assert secrets not in done.stdout + (place / "demo/broker.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_lives_on_after_an_early_end(number: signal.Signals, orphanage: None, place: Path) -> None:
    before = _children()
    log = place / "output"
    with log.open("wb") as output:
        demo = subprocess.Popen(_demo(place / "demo"), cwd=TOP, stdout=output, stderr=subprocess.STDOUT)
    end = time.monotonic() + _READY_SECONDS
    while "[2/6]" not in log.read_text():  # broker, PostgreSQL and both stores run
        assert demo.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    demo.send_signal(number)
    assert demo.wait(_END_SECONDS) == (130 if number == signal.SIGINT else -number)
    assert _survivors(before) == []
    assert "Traceback" not in log.read_text()


def test_a_port_in_use_is_named(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = subprocess.run(_demo(place / "demo", "--port", str(port)), cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"port {port} already" in done.stderr
    assert f"kept in {place / 'demo'}" in done.stderr
    assert "Traceback" not in done.stderr
