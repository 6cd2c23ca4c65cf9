"""A broker and the fronts of deploy/ together: `store add` probes them through, images go up and come down through each, and the broker's
keys reach them by their own ways."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.sign.token import TokenSigner, generate_key
from tests.acceptance.test_fronts import KINDS, STARTS
from tests.parts.broker import BrokerProcess, serve
from tests.parts.front import FrontPart, wait_for
from tests.parts.postgres import Postgres
from tests.parts.process import find_program
from tests.parts.storeside import start as start_storeside

CONTENT = random.Random(5).randbytes(5_000_000)
Run = Callable[..., str]


@pytest.fixture(scope="module")
def broker(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    place = tmp_path_factory.mktemp("broker")
    # So that the image of five megabytes goes in parts where the store has them.
    with serve(postgres.create(), place, settings="[policy.uploads]\nsingle_put_limit = 1000000\n") as process:
        yield process


@pytest.fixture(scope="module")
def run(broker: BrokerProcess, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command line, with an administrator's token."""
    place = tmp_path_factory.mktemp("commands")
    (place / "disk.raw").write_bytes(CONTENT)
    environment = {**os.environ, "BROKER_URL": broker.url, "BROKER_TOKEN": broker.token("admin"), "XDG_STATE_HOME": str(place)}
    program = find_program("broker", "pip install -e '.[test]'")

    def command(*arguments: str) -> str:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, cwd=place, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    command("site", "add", "eu/az1")
    return command


@contextlib.contextmanager
def front_of(broker: BrokerProcess, kind: str, directory: Path, storeside: bool) -> Iterator[FrontPart]:
    """A front that takes the broker's keys, if wished before a storeside that does so too."""
    keys = f"{broker.url}/.well-known/jwks.json"
    signer = TokenSigner([generate_key("ES256", 0)], broker.url)
    name = f"{kind}-storeside" if storeside else kind
    with contextlib.ExitStack() as stack:
        more = {}
        if storeside:
            (directory / "behind").mkdir()
            disk = stack.enter_context(start_storeside(directory / "behind", audience=name, signer=signer, keys=keys))
            more = {"storeside": disk.url, "root": disk.root}
        yield stack.enter_context(STARTS[kind](directory, audience=name, signer=signer, keys=keys, **more))


PLACES = [(kind, storeside) for kind in KINDS for storeside in ([False, True] if kind != "nginx" else [False])]


@pytest.mark.parametrize(("kind", "storeside"), PLACES)
def test_images_go_up_and_come_down(broker: BrokerProcess, run: Run, tmp_path: Path, kind: str, storeside: bool) -> None:
    with front_of(broker, kind, tmp_path, storeside) as front:
        name = front.audience
        found = run("store", "add", name, "--kind", "http", "--site", "eu/az1", "--endpoint", front.url)
        assert "refuses overwriting" in found
        run("put", "disk.raw", "--name", f"{name}.raw", "--format", "raw", "--to", name)
        objects = [file for file in front.root.rglob("*") if file.is_file() and ".broker" not in file.parts]
        assert [file.read_bytes() == CONTENT for file in objects] == [True]
        target = tmp_path / "copy.raw"
        run("get", f"{name}.raw", "-o", str(target), "--from", name)
        assert target.read_bytes() == CONTENT
        run("image", "delete", f"{name}.raw")
        wait_for(lambda: not objects[0].exists(), "the object was not deleted")
