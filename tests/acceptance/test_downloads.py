"""Clients that know nothing of tickets: curl follows a redirect, aria2 reads Link fields and Metalinks.

The stores answer at addresses of their own, since aria2 takes all ports of one address for one host.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import os
import random
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest

from broker.sign.token import TokenSigner, generate_key
from tests.parts import storeside
from tests.parts.cluster import Brokers, brokers_on, disk_store, new_upload, ok, register, said, send
from tests.parts.postgres import Postgres
from tests.parts.process import find_program
from tests.parts.storeside import StoresidePart
from tests.parts.tap import tapped

MEBIBYTE = 1 << 20
_numbers = itertools.count(1)


@dataclass
class Bytes:
    """What no other test has, and the digests of its pieces."""

    content: bytes = field(default_factory=lambda: random.Random(f"downloads {next(_numbers)}").randbytes(4 * MEBIBYTE + 17))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pieces(self) -> dict[str, object]:
        starts = range(0, len(self.content), MEBIBYTE)
        digests = [hashlib.sha256(self.content[at : at + MEBIBYTE]).hexdigest() for at in starts]
        return {"length": MEBIBYTE, "algorithm": "sha256", "digests": digests}


@dataclass(frozen=True)
class House:
    """A broker and three disks."""

    brokers: Brokers
    disks: Sequence[StoresidePart]

    async def upload(self, content: Bytes, *stores: str) -> str:
        """Put it on every store; where the broker has the content of the image."""
        name, blob = f"image {content.sha256}", None
        async with aiohttp.ClientSession() as session:
            api = self.brokers.api(session)
            for store in stores:
                asked = (
                    new_upload(content.content, name) if blob is None else {"operation": "upload", "blob": blob, **said(content.content)}
                )
                ticket = ok(await api.post("/v1/tickets", {**asked, "only": [store]}), 201)
                assert await send(session, ticket["destinations"][0], content.content) == 201
                committed = await api.post(f"/v1/tickets/{ticket['id']}/commit", {**said(content.content), "pieces": content.pieces})
                blob = ok(committed)["blob"]["id"]
            (image,) = ok(await api.get(f"/v1/images?name={quote(name)}"))["images"]
        return f"{self.brokers.running[0].url}/v1/images/{image['id']}/content"

    def everywhere(self, content: Bytes) -> str:
        return asyncio.run(self.upload(content, *(disk.audience for disk in self.disks)))

    def aria2(self, url: str, place: Path, *arguments: str) -> str:
        """Fetch it; the digest of the file. The token goes to the broker alone, by a netrc file."""
        netrc, found = place / "netrc", place / "found"
        netrc.touch(mode=0o600)
        netrc.write_text(f"machine 127.0.0.1 login token password {self.brokers.token()}\n")
        options = ["--no-conf", "--quiet", f"--dir={found}", "--follow-metalink=mem", f"--netrc-path={netrc}", "--file-allocation=none"]
        options += ["--split=3", "--min-split-size=1M", "--max-tries=2", "--retry-wait=0", "--connect-timeout=5", "--timeout=10"]
        run("aria2c", *options, *arguments, url)
        (file,) = (path for path in found.iterdir() if path.suffix != ".meta4")
        return sha256(file)


def run(program: str, *arguments: str) -> None:
    found = find_program(program, f"apt-get install {program.removesuffix('c')}")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.returncode}:\n{done.stdout}\n{done.stderr}"


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def served(disk: StoresidePart) -> int:
    """How many times a disk has sent bytes."""
    with urllib.request.urlopen(f"{disk.metrics_url}/metrics") as answer:
        samples = [
            line for line in answer.read().decode().splitlines() if line.startswith('storeside_requests_total{method="GET",status="20')
        ]
    return sum(int(float(sample.rpartition(" ")[2])) for sample in samples)


@pytest.fixture(scope="module")
def house(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    place = tmp_path_factory.mktemp("downloads")
    with contextlib.ExitStack() as stack:
        brokers = stack.enter_context(brokers_on(postgres.create(), place, 1))
        signer = TokenSigner([generate_key("ES256", 0)], brokers.issuer)
        disks = []
        for number in (2, 3, 4):
            (place / f"disk-{number}").mkdir()
            started = storeside.start(
                place / f"disk-{number}", audience=f"disk-{number}", signer=signer, keys=f"{brokers.issuer}/.well-known/jwks.json",
                host=f"127.0.0.{number}",
            )  # fmt: skip
            disks.append(stack.enter_context(started))
        asyncio.run(register(brokers, *(disk_store(disk, disk.audience) for disk in disks)))
        yield House(brokers, disks)


def test_curl_follows_and_keeps_its_token_from_the_store(house: House, tmp_path: Path) -> None:
    async def follow() -> None:
        async with tapped(house.disks[0].url) as tap:
            await register(house.brokers, disk_store(house.disks[0], "tapped", endpoint=tap.url))
            url = await house.upload(content, "tapped")
            user = f"token:{house.brokers.token()}"
            arguments = ("--fail", "--silent", "--show-error", "--location", "--user", user, "--output", str(tmp_path / "out"), url)
            await asyncio.to_thread(run, "curl", *arguments)
            # The broker may be removing the staged object at the same time.
            *_, read = (fields for seen, fields in zip(tap.seen, tap.fields, strict=True) if seen[0] == "GET")
            assert not {"authorization", "x-auth-token"} & {name.lower() for name in read}

    content = Bytes()
    asyncio.run(follow())
    assert sha256(tmp_path / "out") == content.sha256


def test_a_redirect_has_every_source_and_the_digest(house: House) -> None:
    content = Bytes()
    url = house.everywhere(content)

    async def look() -> None:
        token = house.brokers.token()
        async with aiohttp.ClientSession() as session:
            async with session.get(url, headers={"Authorization": basic("anyone", token)}, allow_redirects=False) as answer:
                assert answer.status == 302
                links = answer.headers.getall("Link")
                assert [link.partition(">")[2] for link in links] == [f"; rel=duplicate; pri={number}" for number in (1, 2, 3)]
                assert links[0].startswith(f"<{answer.headers['Location']}>")
                assert f"SHA-256={base64.b64encode(bytes.fromhex(content.sha256)).decode()}" in answer.headers["Digest"]
            for wrong in ("Basic not-base64!", basic("anyone", "no token"), basic(token, "")):
                async with session.get(url, headers={"Authorization": wrong}, allow_redirects=False) as answer:
                    assert answer.status == 401

    asyncio.run(look())


@pytest.mark.parametrize("accept", [[], ["--no-want-digest-header", "--follow-metalink=false"]], ids=["metalink", "links"])
def test_aria2_takes_pieces_from_several_stores(accept: list[str], house: House, tmp_path: Path) -> None:
    content = Bytes()
    url, before = house.everywhere(content), [served(disk) for disk in house.disks]
    assert house.aria2(url, tmp_path) == content.sha256
    assert sum(served(disk) > count for disk, count in zip(house.disks, before, strict=True)) > 1


def test_aria2_repairs_a_corrupt_piece(house: House, tmp_path: Path) -> None:
    content = Bytes()
    url = house.everywhere(content)
    for disk in house.disks[:2]:
        (file,) = (path for path in disk.root.rglob("*") if path.is_file() and path.read_bytes() == content.content)
        with file.open("r+b") as opened:
            opened.seek(2 * MEBIBYTE + 5)
            opened.write(b"wrong")
    assert house.aria2(url, tmp_path) == content.sha256


def test_aria2_survives_dead_stores(house: House, tmp_path: Path) -> None:
    content = Bytes()
    url = house.everywhere(content)
    for disk in house.disks[:2]:
        os.kill(disk.pid, 9)
    assert house.aria2(url, tmp_path) == content.sha256
