"""A broker and the fronts of deploy/ together: `store add` probes them through, images go up and come down through each, and the broker's
keys reach each by its own way."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from broker.sign.token import TokenSigner, generate_key
from tests.acceptance.test_fronts import KINDS, STARTS
from tests.parts.broker import BrokerProcess, serve
from tests.parts.condition import wait_for
from tests.parts.front import FrontPart
from tests.parts.postgres import Postgres
from tests.parts.process import answers, find_program
from tests.parts.storeside import start as start_storeside

CONTENT = random.Random(5).randbytes(2_500_000)
PLACES = [*KINDS, "haproxy-storeside", "envoy-storeside"]

# So that the image goes in parts where the store has them, and a key that was made a moment ago may take over.
SETTINGS = "[policy.uploads]\nsingle_put_limit = 1000000\n[keys]\noverlap_seconds = 4\n"


@dataclass(frozen=True)
class House:
    """A broker and the fronts at it, by the name of the store; `place` has the image's file."""

    broker: BrokerProcess
    fronts: Mapping[str, FrontPart]
    place: Path
    token: str

    def run(self, *arguments: str) -> str:
        """What the command prints for an administrator; fails unless it ends with 0."""
        environment = {**os.environ, "BROKER_URL": self.broker.url, "BROKER_TOKEN": self.token, "XDG_STATE_HOME": str(self.place)}
        program = find_program("broker", "pip install -e '.[test]'")
        done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, cwd=self.place, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def urls(self, image: str) -> dict[str, str]:
        """Where a new ticket says that the image is, by store."""
        ticket = json.loads(self.run("ticket", image, "--count", "5", "--json"))
        return {source["store"]: source["url"] for source in ticket["sources"]}

    def signing(self) -> str:
        """The key that signs now."""
        keys = [json.loads(line) for line in self.run("key", "list", "--json").splitlines()]
        return next(key["id"] for key in keys if key["state"] == "signing")


@contextlib.contextmanager
def front_of(broker: BrokerProcess, name: str, directory: Path) -> Iterator[FrontPart]:
    """A front that takes the broker's keys; KIND-storeside stands before a storeside that does so too."""
    keys = f"{broker.url}/.well-known/jwks.json"
    signer = TokenSigner([generate_key("ES256", 0)], broker.url)
    kind, _, behind = name.partition("-")
    directory.mkdir()
    with contextlib.ExitStack() as stack:
        more = {}
        if behind:
            (directory / "behind").mkdir()
            disk = stack.enter_context(start_storeside(directory / "behind", audience=name, signer=signer, keys=keys))
            more = {"storeside": disk.url, "root": disk.root}
        yield stack.enter_context(STARTS[kind](directory, audience=name, signer=signer, keys=keys, **more))


@pytest.fixture(scope="module")
def house(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    place = tmp_path_factory.mktemp("fronts")
    (place / "disk.raw").write_bytes(CONTENT)
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(serve(postgres.create(), place / "broker", settings=SETTINGS))
        house = House(
            broker, {name: stack.enter_context(front_of(broker, name, place / name)) for name in PLACES}, place, broker.token("admin")
        )
        house.run("site", "add", "eu/az1")
        for name, front in house.fronts.items():
            shown = house.run("store", "add", name, "--kind", "http", "--site", "eu/az1", "--endpoint", front.url, "--internal")
            assert "refuses overwriting" in shown
        yield house


def objects(front: FrontPart) -> list[Path]:
    return [file for file in front.root.rglob("*") if file.is_file() and ".broker" not in file.parts]


@pytest.mark.parametrize("name", PLACES)
def test_an_image_goes_up_and_comes_down(house: House, tmp_path: Path, name: str) -> None:
    front = house.fronts[name]
    house.run("put", "disk.raw", "--name", f"{name}.raw", "--format", "raw", "--to", name)
    (file,) = objects(front)
    assert file.read_bytes() == CONTENT
    target = tmp_path / "copy.raw"
    house.run("get", f"{name}.raw", "-o", str(target), "--from", name)
    assert target.read_bytes() == CONTENT
    house.run("image", "delete", f"{name}.raw")
    wait_for(lambda: not file.exists(), "the object was not deleted")


def kids(urls: Mapping[str, str]) -> set[str]:
    """The keys that signed these."""
    headers = [url.partition("?token=")[2].partition(".")[0] for url in urls.values()]
    return {json.loads(base64.urlsafe_b64decode(header + "==="))["kid"] for header in headers}


def all_answer(urls: Mapping[str, str], status: int) -> bool:
    return all(answers(url, (status,), headers={"Range": "bytes=0-0", "Connection": "close"}) for url in urls.values())


def test_keys_rotate_through_and_a_revoked_one_is_dead(house: House) -> None:
    """What the old key signed goes on after a rotation, and ends everywhere with its revocation. (Last: the administrator's
    token ends too.)"""
    house.run("put", "disk.raw", "--name", "disk", "--format", "raw", "--to", "nginx")
    for name in KINDS[1:]:
        house.run("copy", "disk", "--to", name)
    old, first = house.urls("disk"), house.signing()
    assert sorted(old) == sorted(KINDS)
    assert kids(old) == {first}
    assert all_answer(old, 206)
    house.run("key", "rotate")
    wait_for(lambda: kids(house.urls("disk")).isdisjoint({first}), "no other key took over")
    new = house.urls("disk")
    assert all_answer(new, 206)
    assert all_answer(old, 206)
    house.run("key", "revoke", first)
    wait_for(lambda: all_answer(old, 401), "a revoked key is still good somewhere")
    assert all_answer(new, 206)
