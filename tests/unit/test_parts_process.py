"""The starters of real parts: what is missing is said, what is started ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parts.process import PartFailed, PartMissing, find_program, free_ports, running

ROOT = Path(__file__).parents[2]


def test_a_missing_program_names_its_install_command() -> None:
    with pytest.raises(PartMissing, match="apt-get install no-such-thing"):
        find_program("no-such-program", "apt-get install no-such-thing")


def test_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_no_two_processes_choose_the_same_port() -> None:
    """Whether anyone listens there yet or not: far more choices than would be likely to differ by chance."""
    script = "from tests.parts.process import free_ports\nprint(*free_ports(500), flush=True)\ninput()"
    others = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        chosen = [port for other in others for port in (other.stdout or pytest.fail("no output")).readline().split()]
    finally:
        for other in others:
            other.communicate("\n")
    chosen += map(str, free_ports(100))
    assert len(set(chosen)) == len(chosen) == 1100


def test_a_part_that_ends_early_shows_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(PartFailed, match="my last words"),
        running([sys.executable, "-c", "print('my last words')"], log=tmp_path / "log", ready=lambda: False),
    ):
        pytest.fail("it was never ready")


def test_a_part_ends_with_the_block(tmp_path: Path) -> None:
    with running(["sleep", "60"], log=tmp_path / "log", ready=lambda: True) as process:
        os.kill(process.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_part_dies_with_whoever_started_it(tmp_path: Path) -> None:
    script = (
        "import os, pathlib\nfrom tests.parts.process import running\n"
        f"with running(['sleep', '60'], log=pathlib.Path({str(tmp_path / 'log')!r}), ready=lambda: True) as process:\n"
        "    print(process.pid, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    child = int(output)
    for _ in range(1000):
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.01)
    pytest.fail("the part outlived the process that started it")
