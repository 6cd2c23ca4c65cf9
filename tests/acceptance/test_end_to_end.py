"""The whole house: `broker put`, `ls`, `show`, `ticket`, `copy` and `get` as a person types them, on SeaweedFS and storeside, with a
broker in a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from broker import config
from broker.sign.token import TokenSigner, generate_key
from tests.parts.broker import BrokerProcess, serve
from tests.parts.postgres import Postgres
from tests.parts.process import find_program
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart, start

MEBIBYTE = 1 << 20


@cache
def content() -> bytes:
    return random.Random(3).randbytes(70 * MEBIBYTE + 321)


@cache
def sha256() -> str:
    return hashlib.sha256(content()).hexdigest()


@dataclass(frozen=True)
class House:
    """A broker with two stores at two sites, and the command line."""

    broker: BrokerProcess
    storeside: StoresidePart
    environment: dict[str, str]
    place: Path

    def run(self, *arguments: str, code: int = 0, stdin: bytes | None = None) -> str:
        """What the command prints; fails unless it ends with `code`."""
        program = find_program("broker", "pip install -e '.[test]'")
        done = subprocess.run([program, *arguments], input=stdin, capture_output=True, env=self.environment, cwd=self.place, check=False)
        assert done.returncode == code, f"{arguments} ended with {done.returncode}:\n{done.stdout.decode()}\n{done.stderr.decode()}"
        assert "Traceback" not in done.stderr.decode()
        return done.stdout.decode() if code == 0 else done.stderr.decode()


@contextlib.contextmanager
def house_on(database: str, seaweedfs: S3Part, place: Path) -> Iterator[House]:
    with serve(database, place / "broker") as broker:
        settings = config.load(broker.config)
        credentials = settings.credentials_dir
        credentials.mkdir(parents=True, exist_ok=True)
        file = credentials / "weed.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps(seaweedfs.credential))
        issuer = settings.http.public_url
        signer = TokenSigner([generate_key("ES256", 0)], issuer)
        (place / "disk").mkdir()
        with start(place / "disk", audience="disk-1", signer=signer, keys=f"{broker.url}/.well-known/jwks.json") as storeside:
            environment = {
                **os.environ, "BROKER_URL": broker.url, "BROKER_TOKEN": broker.token("admin"), "XDG_STATE_HOME": str(place / "state"),
            }  # fmt: skip
            house = House(broker, storeside, environment, place)
            house.run("site", "add", "eu/az1")
            house.run("site", "add", "eu/az2")
            house.run(
                "store", "add", "weed", "--kind", "s3", "--site", "eu/az1", "--internal", "--endpoint", seaweedfs.endpoint,
                "--credential", "weed", "--setting", f"bucket={seaweedfs.bucket}", "--setting", f"region={seaweedfs.region}",
            )  # fmt: skip
            house.run("store", "add", "disk-1", "--kind", "http", "--site", "eu/az2", "--endpoint", storeside.url, "--internal")
            yield house


@pytest.fixture(scope="module")
def shared(postgres: Postgres, seaweedfs: S3Part, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One for all tests that mind their own images."""
    with house_on(postgres.create(), seaweedfs, tmp_path_factory.mktemp("house")) as house:
        yield house


@pytest.fixture
def house(shared: House, tmp_path: Path) -> House:
    """The shared one, seen from a directory of the test's own."""
    return replace(shared, environment=dict(shared.environment), place=tmp_path)


@pytest.fixture
def own_house(database: str, seaweedfs: S3Part, tmp_path: Path) -> Iterator[House]:
    """One that a test may take apart."""
    with house_on(database, seaweedfs, tmp_path) as house:
        yield house


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(content())
    return path


def _same(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == sha256()


def test_put_copy_ticket_and_get(house: House, image: Path, tmp_path: Path) -> None:
    id = house.run("put", str(image), "--name", "demo", "--format", "raw", "--to", "weed").strip()
    assert [line.split("\t")[:3] for line in house.run("ls", "--name", "demo").splitlines()] == [[id, "demo", "active"]]
    assert sha256() in house.run("show", "demo")
    house.run("copy", "demo", "--to", "disk-1")
    stores = {line.split("\t")[2] for line in house.run("ls", "replicas").splitlines()}
    assert stores == {"weed", "disk-1"}
    ranked = house.run("ticket", "demo").splitlines()
    assert [line.split("\t")[0] for line in ranked] == ["1", "2"]
    house.run("get", "demo", "-o", "both.raw", "--parallel", "2")
    assert _same(tmp_path / "both.raw")
    for store in ("weed", "disk-1"):
        done = json.loads(house.run("get", id, "-o", f"{store}.raw", "--from", store, "--json").splitlines()[-1])
        assert _same(tmp_path / f"{store}.raw")
        assert [source["store"] for source in done["sources"]] == [store]
    paths = {tuple(line.split("\t")[1:3]) for line in house.run("ls", "paths").splitlines()}
    assert {("weed", "read"), ("disk-1", "read")} <= paths or not paths  # reports are kept for clients whose site is known


def test_a_dead_store_is_passed_over(own_house: House, image: Path, tmp_path: Path) -> None:
    own_house.run("put", str(image), "--name", "demo", "--to", "disk-1")
    own_house.run("copy", "demo", "--to", "weed")
    os.kill(own_house.storeside.pid, 9)
    own_house.run("get", "demo", "-o", "after.raw", "--prefer", "disk-1")
    assert _same(tmp_path / "after.raw")


@pytest.mark.parametrize("store", ["weed", "disk-1"])
def test_a_pipe_up_and_a_pipe_down(store: str, house: House, tmp_path: Path) -> None:
    house.run("put", "-", "--name", f"piped-{store}", "--to", store, stdin=content())
    house.run("get", f"piped-{store}", "-o", "down.raw")
    assert _same(tmp_path / "down.raw")


def test_images_and_replicas_are_changed_and_deleted(own_house: House, tmp_path: Path) -> None:
    small = tmp_path / "small.raw"
    small.write_bytes(b"x" * 1000)
    id = own_house.run("put", str(small), "--name", "small", "--property", "os=linux", "--to", "weed").strip()
    blob, first = own_house.run("ls", "replicas").split("\t")[1], own_house.run("ls", "replicas").split("\t")[0]
    assert "stays" in own_house.run("replica", "remove", first, code=1)
    own_house.run("copy", "small", "--to", "disk-1")
    assert "cache" in own_house.run("replica", "set", first, "--purpose", "cache")
    own_house.run("replica", "remove", first)
    assert [line.split("\t")[2] for line in own_house.run("ls", "replicas", "--state", "active").splitlines()] == ["disk-1"]
    assert "bigger" in own_house.run("image", "set", "small", "--name", "bigger", "--unset", "os")
    other = own_house.run("image", "create", "same", "--blob", f"raw={blob}").strip()
    own_house.run("image", "delete", id)
    own_house.run("get", other, "-o", "same.raw")
    assert (tmp_path / "same.raw").read_bytes() == small.read_bytes()
    assert "disk-1" in own_house.run("image", "delete", "same")
    assert own_house.run("ls") == ""


def test_stores_and_sites_are_changed_and_removed(own_house: House) -> None:
    own_house.run("store", "set", "disk-1", "--read-slots", "5", "--read-only")
    assert json.loads(own_house.run("store", "show", "disk-1", "--json"))["read_slots"] == 5
    own_house.run("store", "set", "disk-1", "--read-slots", "none")
    assert json.loads(own_house.run("store", "show", "disk-1", "--json")).get("read_slots") is None
    assert "ranges" in own_house.run("store", "probe", "weed")
    own_house.run("site", "set", "eu/az2", "--network", "10.0.0.0/8")
    assert "10.0.0.0/8" in own_house.run("site", "list")
    own_house.run("store", "remove", "disk-1")
    own_house.run("site", "remove", "eu/az2")
    assert [line.split("\t")[0] for line in own_house.run("ls", "stores").splitlines()] == ["weed"]


def test_exit_codes_and_next_steps(house: House, image: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.raw"
    small.write_bytes(b"x" * 1000)
    house.run("put", str(small), "--name", "small")
    (tmp_path / "small").write_bytes(b"mine")
    assert "--force" in house.run("get", "small", code=1)
    assert "broker ls" in house.run("get", "nothing", code=4)
    assert "No such store" in house.run("put", str(image), "--name", "x", "--to", "nowhere", code=2)
    house.environment["BROKER_TOKEN"] = "wrong"
    assert "broker token create" in house.run("ls", code=3)
    house.environment["BROKER_URL"] = "http://127.0.0.1:9"
    assert "BROKER_URL" in house.run("ls", "--wait", "0", code=6)
