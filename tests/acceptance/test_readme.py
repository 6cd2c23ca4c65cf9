"""The README renders, and its tour does what it shows: the blocks marked ``.. tested`` run in one shell, on real servers.

The mark is a comment before a ``console`` block, ``.. tested; prints: WORD WORD``: lines that begin with ``$ `` (and ``> `` for what
goes on) are run in order and must succeed, and what the block prints must hold every word. The other lines of a block are for people.
The program that uses the client runs after them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.parts.process import find_program, free_ports

README = Path(__file__).resolve().parents[2] / "README.rst"
PORTS = ("8080", "9180", "8481", "8482")
"""Those of the tour; free ones take their place."""

SECONDS = 180
_BLOCK = re.compile(r"^\.\. tested; prints:(?P<words>.*)\n\n\.\. code-block:: console\n\n(?P<lines>(?:(?:   .*)?\n)+)", re.MULTILINE)


class Block(NamedTuple):
    """One marked block: its commands, and the words that it must print."""

    commands: str
    words: list[str]


def blocks(page: Path = README) -> list[Block]:
    """The marked blocks, in order."""
    found = []
    for match in _BLOCK.finditer(page.read_text()):
        lines = [line[3:] for line in match["lines"].splitlines()]
        commands = [line[2:] for line in lines if line.startswith(("$ ", "> "))]
        found.append(Block("\n".join(commands), match["words"].split()))
    return found


def example() -> str:
    """The program in the section on the library."""
    (found,) = [program for program in programs() if "broker.client" in program]
    return found


def programs() -> list[str]:
    """Every program in Python, in order."""
    found = re.findall(r"^\.\. code-block:: python\n\n((?:(?:   .*)?\n)+)", README.read_text(), re.MULTILINE)
    return [re.sub(r"^   ", "", program, flags=re.MULTILINE) for program in found]


@pytest.fixture
def home() -> Iterator[Path]:
    """A home with a configuration on free ports. PostgreSQL's account must be able to pass through it, so not in pytest's own place."""
    place = Path(tempfile.mkdtemp(prefix="broker-readme-"))
    place.chmod(0o711 if os.getuid() == 0 else 0o700)
    yield place
    shutil.rmtree(place, ignore_errors=True)


def test_every_mark_is_found() -> None:
    marks = len(re.findall(r"^\.\. tested", README.read_text(), re.MULTILINE))
    assert len(blocks()) == marks
    assert marks >= 10


def test_the_tour(home: Path) -> None:
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    settings = home / ".config" / "transfer-broker" / "broker.toml"
    settings.parent.mkdir(parents=True)
    listen = f'listen = "127.0.0.1:{ports["8080"]}"\nmetrics_listen = "127.0.0.1:{ports["9180"]}"\n'
    settings.write_text(f'data_dir = "{home}/data"\n[http]\n{listen}')
    directories = {
        Path(find_program(name, install)).parent for name, install in (("broker", "pip install -e ."), ("curl", "apt-get install curl"))
    }
    tour = blocks()
    script = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT"]
    for number, block in enumerate(tour):
        commands = re.sub(r"(?<=127\.0\.0\.1:)(\d{4})\b", lambda found: ports[found[1]], block.commands)
        script += [f"echo '=== block {number}'", commands]
    (home / "example.py").write_text(example())
    script += ["echo '=== example'", "python example.py", "echo '=== end'"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "XDG_"))}
    environment |= {"HOME": str(home), "PATH": os.pathsep.join([*map(str, directories), os.environ["PATH"]])}
    output = run_script("\n".join(script), home, environment)
    printed = re.split(r"=== (?:block \d+|example|end)\n", output)
    assert len(printed) == len(tour) + 3, output
    for block, text in zip(tour, printed[1:-2], strict=True):
        missing = [word for word in block.words if word not in text]
        assert not missing, f"{missing} not in what this printed:\n{block.commands}\n\n{text}"
    assert "sha256" in printed[-2]
    assert (home / "from-python.raw").read_bytes() == (home / "disk.raw").read_bytes()


def run_script(script: str, home: Path, environment: dict[str, str]) -> str:
    """What the script prints. It has a process group of its own, which ends with it, whatever happens."""
    with subprocess.Popen(
        ["bash", "-c", script], cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    ) as shell:  # fmt: skip
        try:
            output, _ = shell.communicate(timeout=SECONDS)
        except BaseException:
            os.killpg(shell.pid, signal.SIGKILL)
            raise
    logs = "".join(f"\n--- {log.name}\n{log.read_text()}" for log in sorted(home.glob("*.log")))
    assert shell.returncode == 0, output + logs
    assert "Traceback" not in output + logs
    return output


def test_it_renders(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docutils", "--halt=2", "--writer=html5", str(README), str(tmp_path / "readme.html")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr or "install docutils: pip install -e '.[test]'"
    assert "Transfer broker" in (tmp_path / "readme.html").read_text()
