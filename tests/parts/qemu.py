"""A PC under QEMU's software emulation, without a disk until one is added: its console is the first serial port.

It is told everything over QMP, signed URLs too, so that none stands in a command line or on a disk. The commands are those of
https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html.
"""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.parts.process import find_program, running

INSTALL = "apt-get install qemu-system-x86 qemu-block-extra"
_SECONDS = 120.0


class Refused(RuntimeError):
    """QEMU's answer to a command was an error; the text is its description, which may quote a URL."""


class Machine:
    """A machine that waits for `execute("cont")`."""

    def __init__(self, qmp: socket.socket, console: socket.socket) -> None:
        self._qmp, self._console = qmp, console
        self._said = qmp.makefile("rb")
        self._printed = console.makefile("rb")
        self._events: list[dict[str, Any]] = []
        json.loads(self._said.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode())
        while True:
            answer = json.loads(self._said.readline())
            if "error" in answer:
                raise Refused(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]
            self._events.append(answer)

    def event(self, name: str) -> dict[str, Any]:
        """The data of the next event with that name, which may have come already; those before it are forgotten."""
        while True:
            event = self._events.pop(0) if self._events else json.loads(self._said.readline())
            if event.get("event") == name:
                found: dict[str, Any] = event.get("data", {})
                return found

    def boot(self, node: str) -> None:
        """Give it that block node as its disk, and start it. It pauses when a read fails."""
        self.execute("device_add", {"driver": "virtio-blk-pci", "drive": node, "rerror": "stop", "werror": "stop"})
        self.execute("cont")

    def line(self) -> bytes:
        """The next line of the console."""
        return self._printed.readline()

    def key(self) -> None:
        """Type a character."""
        self._console.sendall(b" ")

    def is_paused(self) -> bool:
        return bool(self.execute("query-status")["status"] == "io-error")


@contextlib.contextmanager
def start() -> Iterator[Machine]:
    """A machine until the block ends."""
    program = find_program("qemu-system-x86_64", INSTALL)
    with tempfile.TemporaryDirectory(prefix="qemu-") as name, contextlib.ExitStack() as stack:  # short: it is the path of sockets
        place = Path(name)
        arguments = [program, "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "32", "-S"]
        sockets = []
        for option in ("qmp", "serial"):
            arguments += ["-chardev", f"socket,id={option},path={place / option},server=on,wait=off", f"-{option}", f"chardev:{option}"]
            sockets.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            sockets[-1].settimeout(_SECONDS)
        waiting = [(made, str(place / option)) for made, option in zip(sockets, ("qmp", "serial"), strict=True)]

        def ready() -> bool:
            while waiting and waiting[0][0].connect_ex(waiting[0][1]) == 0:
                waiting.pop(0)
            return not waiting

        stack.enter_context(running(arguments, log=place / "log", ready=ready))
        yield Machine(*sockets)
