"""A PC boots from a ticket: QEMU's curl driver reads the disk at the store, and what the machine prints comes from the disk's far end.

The guest (deploy/boot_image.py) prints the line of the last mebibyte, then, for each key, that of the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from deploy import boot_image
from tests.parts import qemu, seaweedfs, traffic
from tests.parts.cluster import Brokers, brokers_on, ok, put, reasons, register, s3_store, sources, swift_store
from tests.parts.condition import wait_for
from tests.parts.postgres import Postgres
from tests.parts.process import find_program, running
from tests.parts.qemu import Machine, Refused
from tests.parts.seaweedfs import S3Part
from tests.parts.swift import SwiftPart

README = Path(__file__).parents[2] / "README.rst"
SIZE = 16 << 20
LAST = SIZE // (1 << 20) - 1
REDIRECT = Path(__file__).parents[2] / "deploy" / "qemu" / "redirect.py"
HTTP = {"driver": "http", "timeout": 60}
"""QEMU waits for a read for five seconds, when nobody says otherwise; a busy machine may need longer."""
ALLOWED_BYTES = 1 << 20
"""What the broker may read and write while a disk is moved. It is its own work, mostly: its database, and stores that it looks after."""


@dataclass(frozen=True)
class House:
    """A broker with the stores ``weed`` and ``swift``, and the disk as an image in each format, on both."""

    brokers: Brokers
    weed: S3Part
    swift: SwiftPart
    images: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """For programs that use the client."""
        return {**os.environ, "BROKER_URL": self.brokers.running[0].url, "BROKER_TOKEN": self.brokers.token(), "BROKER_INSTANCE": "host"}

    async def ticket(self, format: str, *only: str) -> Any:
        """A ticket for the same machine."""
        async with aiohttp.ClientSession() as session:
            asked = {"operation": "download", "image": self.images[format], **({"only": only} if only else {})}
            return ok(await self.brokers.api(session).as_(self.brokers.token(), X_Client_Instance="host").post("/v1/tickets", asked), 201)

    def url(self, format: str, store: str) -> str:
        """A signed URL from a ticket."""
        found: str = sources(asyncio.run(self.ticket(format, store)))[store]["url"]
        return found

    @contextlib.contextmanager
    def swift_refuses(self) -> Iterator[None]:
        """Swift takes no URL that was signed before: it answers as it does when they have ended, without a wait for that."""
        login = urllib.request.Request(self.swift.auth_url, headers={"X-Auth-User": self.swift.user, "X-Auth-Key": self.swift.key})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(login, timeout=10) as answer:
            token = answer.headers["X-Auth-Token"]

        def sign_by(key: str) -> None:
            headers = {"X-Auth-Token": token, "X-Account-Meta-Temp-URL-Key": key}
            account = f"{self.swift.endpoint}/v1/{self.swift.account}"
            opener.open(urllib.request.Request(account, method="POST", headers=headers), timeout=10).close()

        sign_by("another one")
        try:
            yield
        finally:
            sign_by(self.swift.temp_url_key)


@pytest.fixture(scope="module")
def house(postgres: Postgres, swift: SwiftPart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    place = tmp_path_factory.mktemp("boot")
    with seaweedfs.start(place / "weed") as weed, brokers_on(postgres.create(), place, 1) as brokers:
        asyncio.run(register(brokers, s3_store(brokers, weed), swift_store(brokers, swift)))
        disk = place / "raw"
        boot_image.write_raw(disk, SIZE)
        (place / "qcow2").mkdir()
        files = {"raw": disk, "qcow2": boot_image.make(place / "qcow2", SIZE)}

        async def upload(format: str) -> str:
            async with aiohttp.ClientSession() as session:
                api, content = brokers.api(session), files[format].read_bytes()
                done = await put(api, session, content, "weed", "swift", name="my-image" if format == "qcow2" else "raw", format=format)
                found: str = done["image"]
                return found

        yield House(brokers, weed, swift, {format: asyncio.run(upload(format)) for format in files})


def shown() -> str:
    """The commands that README.rst shows."""
    block = r"^\.\. run by tests/acceptance/test_boot\.py\n\n\.\. code-block:: console\n\n((?:   .*\n)+)"
    found = re.search(block, README.read_text(), re.MULTILINE)
    assert found is not None
    return "".join(line[5:] + "\n" for line in found[1].splitlines() if line.startswith(("   $ ", "   > ")))


@pytest.fixture
def machine() -> Iterator[Machine]:
    with qemu.start() as started:
        yield started


def test_a_machine_boots_from_a_signed_url_and_goes_on_with_the_next_one(house: House, machine: Machine) -> None:
    machine.execute("blockdev-add", {**HTTP, "url": house.url("raw", "swift"), "node-name": "url-1", "read-only": True})
    machine.execute("blockdev-add", {"driver": "raw", "file": "url-1", "node-name": "disk", "read-only": True})
    machine.boot("disk")
    assert machine.line() == boot_image.TEXT
    machine.key()
    assert machine.line() == boot_image.line(LAST - 1, SIZE)

    with house.swift_refuses():
        machine.key()
        assert machine.event("BLOCK_IO_ERROR")["action"] == "stop"
        wait_for(machine.is_paused)
    machine.execute("blockdev-add", {**HTTP, "url": house.url("raw", "swift"), "node-name": "url-2", "read-only": True})
    machine.execute("blockdev-reopen", {"options": [{"driver": "raw", "file": "url-2", "node-name": "disk", "read-only": True}]})
    machine.execute("blockdev-del", {"node-name": "url-1"})
    machine.execute("cont")
    assert machine.line() == boot_image.line(LAST - 2, SIZE)  # the guest has seen no error


def test_an_overlay_becomes_whole_while_the_machine_runs_and_needs_no_url_then(house: House, machine: Machine, tmp_path: Path) -> None:
    broker = house.brokers.running[0]
    traffic.check(broker.pid, broker.url, house.brokers.token())
    before = traffic.carried(broker.pid)
    overlay = tmp_path / "overlay.qcow2"
    program = find_program("qemu-img", "apt-get install qemu-utils")
    subprocess.run([program, "create", "-q", "-f", "qcow2", str(overlay), str(SIZE)], check=True)
    for number in (1, 2):
        below = {**HTTP, "url": house.url("qcow2", "swift")}
        machine.execute("blockdev-add", {"driver": "qcow2", "file": below, "node-name": f"image-{number}", "read-only": True})
    own = {"driver": "qcow2", "file": {"driver": "file", "filename": str(overlay)}, "node-name": "disk"}
    machine.execute("blockdev-add", {**own, "backing": "image-1"})
    machine.boot("disk")
    assert machine.line() == boot_image.TEXT
    machine.execute("blockdev-reopen", {"options": [{**own, "backing": "image-2"}]})
    machine.execute("blockdev-del", {"node-name": "image-1"})
    machine.key()
    assert machine.line() == boot_image.line(LAST - 1, SIZE)

    machine.execute("block-stream", {"device": "disk", "job-id": "stream"})
    job = machine.event("BLOCK_JOB_COMPLETED")
    assert (job["offset"], job.get("error")) == (SIZE, None)
    assert overlay.stat().st_size > SIZE
    with house.swift_refuses():
        machine.execute("blockdev-del", {"node-name": "image-2"})
        machine.key()
        assert machine.line() == boot_image.line(LAST - 2, SIZE)
    carried = sum(traffic.carried(broker.pid)) - sum(before)
    assert carried < ALLOWED_BYTES < SIZE


def test_what_the_readme_shows_boots(house: House, tmp_path: Path) -> None:
    commands = shown().replace("python deploy/qemu/redirect.py", f"{sys.executable} {REDIRECT}").replace("64M", str(SIZE))
    commands = commands.replace('"driver":"http",', '"driver":"http","timeout":60,')
    programs = [line.split()[0] for line in commands.splitlines()]
    assert {"qemu-img", "qemu-system-x86_64"} <= set(programs)
    # The shell ends with its last command, and takes what it has in the background with it.
    script = "trap 'kill $(jobs -p)' EXIT\n" + commands
    with subprocess.Popen(
        ["bash", "-eu"], cwd=tmp_path, env=house.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as shell:
        try:
            assert shell.stdin is not None and shell.stdout is not None
            shell.stdin.write(script.encode())
            shell.stdin.close()
            assert shell.stdout.readline() == boot_image.TEXT
            with socket.socket(socket.AF_UNIX) as qmp:
                qmp.connect(os.path.relpath(tmp_path / "qmp"))
                qmp.sendall(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
                assert shell.wait(60) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)


def test_reads_are_redirected_so_that_s3_will_do_and_a_store_may_die(house: House, machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="returned error: 403"):  # HEAD, which the signature of a GET does not allow
        machine.execute("blockdev-add", {**HTTP, "url": house.url("raw", "weed"), "node-name": "signed", "read-only": True})

    arguments, log = [sys.executable, str(REDIRECT), house.images["raw"], "--prefer", "weed"], tmp_path / "redirect"
    with running(arguments, log=log, ready=lambda: log.read_bytes().endswith(b"\n"), environment=house.environment, end=signal.SIGTERM):
        url = log.read_text().strip()
        machine.execute("blockdev-add", {**HTTP, "url": url, "node-name": "url", "read-only": True})
        machine.execute("blockdev-add", {"driver": "raw", "file": "url", "node-name": "disk", "read-only": True})
        machine.boot("disk")
        assert machine.line() == boot_image.TEXT
        machine.key()
        assert machine.line() == boot_image.line(LAST - 1, SIZE)

        os.kill(house.weed.pid, signal.SIGKILL)
        machine.key()
        assert machine.event("BLOCK_IO_ERROR")["action"] == "stop"
        wait_for(machine.is_paused)
        machine.execute("cont")
        assert machine.line() == boot_image.line(LAST - 2, SIZE)
    assert "Traceback" not in log.read_text()
    excluded = asyncio.run(house.ticket("raw"))["excluded"]
    assert reasons(excluded) == {"weed": "recently-failed"}
