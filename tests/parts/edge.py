"""nginx as deploy/nginx/edge.conf configures it: the edge that carries the bytes of Glance's clients."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.fill import fill
from tests.parts.front import DEPLOY
from tests.parts.process import find_program, free_ports, listens, running


@dataclass(frozen=True, slots=True)
class EdgePart:
    """A running edge: its URL, the process id of its master, and where it keeps what it spools."""

    url: str
    pid: int
    state: Path

    @property
    def logs(self) -> tuple[Path, ...]:
        return (self.state / "access.log", self.state / "error.log", self.state.parent / "edge.out")


@contextlib.contextmanager
def start(
    directory: Path, broker: str, *, resolver: str = "127.0.0.1", trusted: Path = Path("/etc/ssl/certs/ca-certificates.crt")
) -> Iterator[EdgePart]:
    """Run the edge of the broker at the URL `broker` until the block ends. `resolver` knows the stores' names, `trusted` has the
    authorities that they are verified by."""
    state = directory / "state"
    state.mkdir(mode=0o700, parents=True)
    (port,) = free_ports(1)
    values = {
        "LISTEN": f"127.0.0.1:{port}", "BROKER": broker.removeprefix("http://"), "USER": "root", "STATE": str(state),
        "RESOLVER": resolver, "TRUSTED": str(trusted),
    }  # fmt: skip
    configuration = directory / "edge.conf"
    configuration.write_text(fill((DEPLOY / "nginx" / "edge.conf").read_text(), values))
    arguments = [find_program("nginx", "apt-get install nginx"), "-c", str(configuration), "-g", "daemon off;"]
    with running(arguments, log=directory / "edge.out", ready=lambda: listens(port), end=signal.SIGTERM) as process:
        yield EdgePart(f"http://127.0.0.1:{port}", process.pid, state)
