"""nova-compute downloads by tickets: Nova's own code, with deploy/nova/nova.patch and the handler beside it.

The broker is its image service. One of two stores dies in the middle.
"""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from deploy import boot_image
from tests.parts import traffic
from tests.parts.cluster import Brokers, brokers_on, disk_of, disk_store, ok, put, reasons, register
from tests.parts.postgres import Postgres
from tests.parts.process import find_program
from tests.parts.relay import relayed
from tests.parts.storeside import StoresidePart

DEPLOYED = Path(__file__).parents[2] / "deploy" / "nova"
PROGRAM = Path(__file__).parents[1] / "parts" / "nova_fetch.py"
SIZE = 48 << 20
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class House:
    brokers: Brokers
    disks: tuple[StoresidePart, StoresidePart]
    patched: Path
    """nova/image/glance.py with the patch."""
    packages: Path
    """Where Python finds that the handler is installed."""
    content: bytes
    """The image, a qcow2."""

    async def fetch(self, place: Path, backend: str, image: str) -> str:
        """Let a Nova on the machine `backend` fetch the image to ``raw`` in `place`, which is made; what it said."""
        place.mkdir()
        configuration = place / "nova.conf"
        program = find_program("broker", "pip install -e '.[test]'")
        configuration.write_text(f"[glance]\napi_servers = {self.brokers.running[0].url}\n[transfer_broker]\ncommand = {program}\n")
        paths = os.pathsep.join(map(str, (self.packages, DEPLOYED)))
        environment = {**os.environ, "PYTHONPATH": paths, "TOKEN": self.brokers.token(), "BROKER_INSTANCE": backend}
        arguments = [str(PROGRAM), backend, str(self.patched), str(configuration), image, str(place / "raw")]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = await asyncio.wait_for(process.communicate(), 180)
        said = output.decode()
        assert process.returncode == 0, said
        return said


@pytest.fixture(scope="module")
def house(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    place = tmp_path_factory.mktemp("nova")
    found = importlib.util.find_spec("nova")
    assert found is not None and found.submodule_search_locations is not None
    patched = place / "nova" / "image" / "glance.py"
    patched.parent.mkdir(parents=True)
    patched.write_bytes((Path(found.submodule_search_locations[0]) / "image" / "glance.py").read_bytes())
    patch = find_program("patch", "apt-get install patch")
    subprocess.run([patch, "--strip=1", "--fuzz=0", f"--input={DEPLOYED / 'nova.patch'}"], cwd=place, check=True, capture_output=True)

    setup = configparser.ConfigParser()
    setup.read(DEPLOYED / "setup.cfg")
    known = place / "packages" / "transfer_broker_nova-1.dist-info"
    known.mkdir(parents=True)
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: transfer-broker-nova\nVersion: 1\n")
    entries = setup["options.entry_points"]
    (known / "entry_points.txt").write_text("".join(f"[{group}]\n{lines}\n" for group, lines in entries.items()))

    with contextlib.ExitStack() as stack:
        brokers = stack.enter_context(brokers_on(postgres.create(), place, 1))
        disks = tuple(stack.enter_context(disk_of(brokers, place / name, name)) for name in ("disk-1", "disk-2"))
        content = boot_image.make(place, SIZE).read_bytes()
        yield House(brokers, (disks[0], disks[1]), patched, place / "packages", content)


async def test_two_novas_download_from_two_stores_and_one_dies(house: House, tmp_path: Path) -> None:
    broker, backends = house.brokers.running[0], ("eventlet", "threading")
    async with relayed(urlsplit(house.disks[0].url).port or 0) as dying, aiohttp.ClientSession() as session:
        stores = [disk_store(house.disks[0], "dying", endpoint=dying.url), disk_store(house.disks[1], "well", cost=4.0)]
        await register(house.brokers, *stores)
        api = house.brokers.api(session)
        image = (await put(api, session, house.content, "dying", "well", format="qcow2"))["image"]
        traffic.check(broker.pid, broker.url, house.brokers.token())
        before, dying.left = traffic.carried(broker.pid), 20 * MEBIBYTE
        said = await asyncio.gather(*(house.fetch(tmp_path / backend, backend, image) for backend in backends))
        carried = sum(traffic.carried(broker.pid)) - sum(before)
        assert carried < MEBIBYTE
        failed = []
        for backend in backends:
            asking = api.as_(house.brokers.token(), X_Client_Instance=backend)
            ticket = ok(await asking.post("/v1/tickets", {"operation": "download", "image": image}), 201)
            failed += reasons(ticket["excluded"]).items()
        assert ("dying", "recently-failed") in failed
    expected = tmp_path / "expected"
    boot_image.write_raw(expected, SIZE)
    for backend, words in zip(backends, said, strict=True):
        assert "came by a ticket" in words and '"store":"well"' in words
        assert (tmp_path / backend / "raw").read_bytes() == expected.read_bytes()
        assert sorted(path.name for path in (tmp_path / backend).iterdir()) == ["nova.conf", "raw"]
        assert not [secret for secret in house.brokers.secrets if secret in words]
