"""Invariant 1: no image byte passes through the broker. A gigabyte moves, and the kernel counts what the broker carries."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from broker import config
from broker.sign.token import TokenSigner, generate_key
from tests.parts import traffic
from tests.parts.broker import serve
from tests.parts.process import find_program
from tests.parts.storeside import start

MEBIBYTE = 1 << 20
SIZE = 256 * MEBIBYTE
DOWNLOADS = 3


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path, noise = tmp_path / "image.raw", random.Random(5).randbytes(MEBIBYTE)
    with path.open("wb") as file:
        for number in range(SIZE // MEBIBYTE):
            file.write(number.to_bytes(8) + noise[8:])
    return path


def test_a_gigabyte_costs_the_broker_less_than_a_megabyte(database: str, image: Path, tmp_path: Path) -> None:
    program = find_program("broker", "pip install -e '.[test]'")
    with serve(database, tmp_path / "broker") as broker:
        signer = TokenSigner([generate_key("ES256", 0)], config.load(broker.config).http.public_url)  # only its issuer counts here
        (tmp_path / "disk").mkdir()
        with start(tmp_path / "disk", signer=signer, keys=f"{broker.url}/.well-known/jwks.json") as store:
            token = broker.token("admin")
            environment = {**os.environ, "BROKER_URL": broker.url, "BROKER_TOKEN": token, "XDG_STATE_HOME": str(tmp_path / "state")}

            def run(*arguments: str) -> None:
                done = subprocess.run([program, *arguments], capture_output=True, env=environment, cwd=tmp_path, check=False)
                assert done.returncode == 0, done.stderr.decode()

            run("site", "add", "eu/az1")
            run("store", "add", store.audience, "--kind", "http", "--site", "eu/az1", "--endpoint", store.url, "--internal")
            traffic.check(broker.pid, broker.url, token)
            before, stored = sum(traffic.carried(broker.pid)), sum(traffic.carried(store.pid))
            run("put", image.name, "--name", "large")
            for _ in range(DOWNLOADS):
                run("get", "large", "-o", "down.raw", "--force")
            assert sum(traffic.carried(store.pid)) - stored >= (1 + DOWNLOADS) * SIZE  # the bytes did go where they should
            assert 10_000 < sum(traffic.carried(broker.pid)) - before < 1_000_000


def test_the_counter_is_not_trusted_where_it_is_blind(database: str, tmp_path: Path) -> None:
    """A process whose sockets it cannot see, here because it is another one than the one that answers."""
    with serve(database, tmp_path / "broker") as broker:
        with pytest.raises(traffic.Uncounted):
            traffic.check(os.getpid(), broker.url, "no token")
        read, written = traffic.check(broker.pid, broker.url, broker.token())
        assert min(read, written) > 0
