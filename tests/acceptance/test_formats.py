"""One image in several formats (M19): siblings come by upload, and `broker get` takes the one that it can use soonest and converts it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker.model import Role
from broker.sign.token import TokenSigner, generate_key
from tests.parts import storeside
from tests.parts.broker import Api, RunningBroker, broker_on
from tests.parts.cluster import new_upload, ok, said, send
from tests.parts.process import find_program

DISK = secrets.token_bytes(1 << 20) + bytes(7 << 20)
"""8 MiB, of which a qcow2 holds one."""


@dataclass
class House:
    broker: RunningBroker
    session: aiohttp.ClientSession
    place: Path

    def api(self, role: Role = Role.MEMBER, project: str = "demo") -> Api:
        return Api(self.broker.url, self.session, self.broker.token(role, project, site="eu/az1"))

    async def put(self, content: bytes, **target: Any) -> dict[str, Any]:
        ticket = ok(await self.api().post("/v1/tickets", {**new_upload(content), **target}), 201)
        assert await send(self.session, ticket["destinations"][0], content) == 201
        done: dict[str, Any] = ok(await self.api().post(f"/v1/tickets/{ticket['id']}/commit", said(content)))
        return done

    def disk(self, format: str, *options: str) -> bytes:
        """The disk in another format, made by QEMU's own tool."""
        raw, other = self.place / "disk.raw", self.place / f"disk.{format}"
        raw.write_bytes(DISK)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, *options, str(raw), str(other)], check=True)
        return other.read_bytes()

    def hostile(self) -> bytes:
        """A disk that names another file of whoever opens it."""
        secret, path = self.place / "secret", self.place / "hostile"
        secret.write_bytes(b"secret" * 1000)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(path), "1M"], check=True)
        return path.read_bytes()

    async def get(self, *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
        """What `broker get` says at its end as JSON, and to people."""
        process = await asyncio.create_subprocess_exec(
            find_program("broker", "pip install -e '.[test]'"), "get", *arguments, "--json", cwd=self.place,
            env={**os.environ, "BROKER_URL": self.broker.url, "BROKER_TOKEN": self.broker.token(site="eu/az1")},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, words = await process.communicate()
        assert process.returncode == code, words.decode()
        return json.loads(output.splitlines()[-1]) if code == 0 else {}, words.decode()


@pytest.fixture
async def house(database: str, tmp_path: Path) -> AsyncIterator[House]:
    objects = tmp_path / "objects"
    objects.mkdir()
    async with broker_on(database, tmp_path) as broker, aiohttp.ClientSession() as session:
        house = House(broker, session, tmp_path)
        signer, keys = TokenSigner([generate_key("ES256", 0)], broker.url), f"{broker.url}/.well-known/jwks.json"
        starting = storeside.start(objects, audience="disk", signer=signer, keys=keys)
        disk = await asyncio.to_thread(starting.__enter__)
        ok(await house.api(Role.ADMIN).post("/v1/sites", {"path": "eu/az1"}), 201)
        # 1 MB a second: a byte that is not fetched saves a microsecond.
        store = {"name": "disk", "kind": "http", "site": "eu/az1", "endpoint": disk.url, "internal": True, "read_bandwidth": 1_000_000}
        ok(await house.api(Role.ADMIN).post("/v1/stores", store), 201)
        yield house
        await asyncio.to_thread(starting.__exit__, None, None, None)


async def test_what_is_had_soonest_is_fetched_and_converted(house: House) -> None:
    image = (await house.put(DISK, image={"name": "disk"}, format="raw"))["image"]
    for format in ("qcow2", "vmdk"):
        assert (await house.put(house.disk(format), image=image, format=format))["format"] == format
    assert set(ok(await house.api().get(f"/v1/images/{image}"))["blobs"]) == {"raw", "qcow2", "vmdk"}
    # Who may add a format to an image says that it is the same disk: its owner alone.
    stranger = {**new_upload(b"x" * 100), "image": image, "format": "vhdx"}
    assert (await house.api(Role.MEMBER, "other").post("/v1/tickets", stranger)).status == 404

    for rates, fetched in (
        (("--convert", "qcow2=100000000"), "qcow2"),
        (("--convert", "vmdk"), "vmdk"),
        (("--convert", "qcow2=1000", "--convert", "vmdk=1000"), None),  # it takes longer to convert one MB than to fetch the whole
    ):
        done, _ = await house.get("disk", "--format", "raw", *rates, "-o", "got.raw", "--force")
        assert (house.place / "got.raw").read_bytes() == DISK
        assert (done["format"], done["converted_from"], done["verified_by"]) == ("raw", fetched, "sha256"), done
        assert (done["size"] < 3 << 20) == (fetched is not None)
    assert sorted(path.name for path in house.place.iterdir() if "got.raw" in path.name) == ["got.raw"]
    # A disk that would copy other files of this machine is not converted.
    await house.put(house.hostile(), image={"name": "hostile"}, format="qcow2")
    _, words = await house.get("hostile", "--format", "raw", "--convert", "qcow2", "-o", "out.raw", code=1)
    assert "backing file" in words
    assert not (house.place / "out.raw").exists()
