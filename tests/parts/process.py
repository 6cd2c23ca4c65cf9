"""Starts and ends other programs for tests, the demo and the benchmarks.

Rules: everything binds to 127.0.0.1 on ports that were free a moment ago; a program is ended by its own process id, and
the kernel ends it when the process that started it dies; a missing program is an error that names the command to install
it, never a skipped test.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_READY_SECONDS = 60.0
_END_SECONDS = 30.0
_BLOCK = 100
_left: list[int] = []
"""Ports of this process's newest block that were not chosen yet."""


class PartMissing(RuntimeError):
    """A program that a test needs is not installed; the text says how to install it."""


class PartFailed(RuntimeError):
    """A program ended, or did not become ready in time; the text ends with its log."""


def find_program(name: str, install: str) -> str:
    """The path of program `name`, looked for beside the interpreter first. Raises `PartMissing` with the command `install`."""
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = shutil.which(name, path=places)
    if found is None:
        raise PartMissing(f"{name} is not installed; install it with: {install}")
    return found


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports of 127.0.0.1 that nobody listens on, below those that the kernel gives to outgoing connections.

    They are this process's own until it ends: no other that chooses here takes them meanwhile, nor while a program is started again.
    """
    ports: list[int] = []
    while len(ports) < count:
        if not _left:
            _left.extend(_block())
        port = _left.pop()
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


def _block() -> range:
    """Ports of which the one before the first is held by this process, as every process does that chooses some, until it ends."""
    for first in random.sample(range(12000, 32000, _BLOCK), 20000 // _BLOCK):
        guard = socket.socket()
        try:
            guard.bind(("127.0.0.1", first))
        except OSError:
            guard.close()
            continue
        guard.detach()  # closed by the kernel
        return range(first + 1, first + _BLOCK)
    raise PartFailed("no free ports on 127.0.0.1")


def die_with_parent(end: signal.Signals = signal.SIGKILL) -> None:
    """To be run between fork and exec: the kernel sends the program `end` when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, end)


@contextlib.contextmanager
def running(
    arguments: Sequence[str],
    *,
    log: Path,
    ready: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
    end: signal.Signals = signal.SIGKILL,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends. Its output goes to the file `log`; `ready` is asked until it says yes.

    Raises `PartFailed` when the program ends early or is not ready within a minute. It is killed, not asked: what it
    holds is thrown away anyway. One with processes of its own, which would outlive it, is asked first by the signal `end`.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(arguments), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent,
            env={**os.environ, **(environment or {})}, preexec_fn=partial(die_with_parent, end),
        )  # fmt: skip
    try:
        _wait(process, ready, log)
        yield process
    finally:
        process.send_signal(end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + _READY_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            tail = log.read_bytes()[-2000:].decode(errors="replace")
            raise PartFailed(f"{process.args!r} did not become ready (exit code {process.poll()}):\n{tail}")
        time.sleep(0.03)


def listens(port: int) -> bool:
    """Whether something on 127.0.0.1 accepts connections on `port`."""
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answers(
    url: str, statuses: Sequence[int] = (200,), method: str = "GET", headers: Mapping[str, str] | None = None, authority: Path | None = None
) -> bool:
    """Whether `url` answers with one of `statuses`. `authority` signed its certificate."""
    import ssl
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, method=method, headers=dict(headers or {}))
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=None if authority is None else str(authority))),
    )
    try:
        with opener.open(request, timeout=5) as response:
            return response.status in statuses
    except urllib.error.HTTPError as error:
        return error.code in statuses
    except OSError:
        return False
