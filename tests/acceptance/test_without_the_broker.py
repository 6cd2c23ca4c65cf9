"""The broker dies: what it has signed goes on being good until its end, and nothing else becomes so."""

from __future__ import annotations

import contextlib
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.sign.token import TokenSigner, generate_key
from tests.acceptance.test_fronts import KINDS
from tests.acceptance.test_fronts_broker import CONTENT, House, all_answer, front_of
from tests.parts.broker import serve
from tests.parts.condition import wait_for
from tests.parts.postgres import Postgres
from tests.parts.process import answers
from tests.parts.storeside import start as start_storeside

PLACES = ["storeside", *KINDS]
SETTINGS = "[policy.uploads]\nurl_ttl_seconds = 20\n[policy.admission]\nmin_ticket_seconds = 20\n"


@pytest.fixture
def house(postgres: Postgres, tmp_path: Path) -> Iterator[House]:
    (tmp_path / "disk.raw").write_bytes(CONTENT)
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(serve(postgres.create(), tmp_path / "broker", settings=SETTINGS))
        fronts = {name: stack.enter_context(front_of(broker, name, tmp_path / name)) for name in KINDS}
        (tmp_path / "storeside").mkdir()
        keys, signer = f"{broker.url}/.well-known/jwks.json", TokenSigner([generate_key("ES256", 0)], broker.url)
        disk = stack.enter_context(start_storeside(tmp_path / "storeside", audience="storeside", signer=signer, keys=keys))
        house = House(broker, fronts, tmp_path, broker.token("admin"))
        house.run("site", "add", "eu/az1")
        for name, url in (("storeside", disk.url), *((name, front.url) for name, front in fronts.items())):
            house.run("store", "add", name, "--kind", "http", "--site", "eu/az1", "--endpoint", url, "--internal")
        yield house


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as response:
        return bytes(response.read())


def test_stores_go_on_verifying(house: House) -> None:
    """Every kind of store that verifies tokens, after a kill -9: good URLs work, altered ones do not, and all end in their time."""
    house.run("put", "disk.raw", "--name", "disk", "--format", "raw", "--to", PLACES[0])
    for name in PLACES[1:]:
        house.run("copy", "disk", "--to", name)
    urls = house.urls("disk")
    assert sorted(urls) == sorted(PLACES)
    os.kill(house.broker.pid, signal.SIGKILL)
    wait_for(lambda: not answers(f"{house.broker.url}/v1"), "the broker lives on")
    tokens = {name: url.partition("?token=")[2] for name, url in urls.items()}
    for name, url in urls.items():
        assert fetched(url) == CONTENT, name
        for other in PLACES:
            if other != name:
                forged = {other: urls[other].replace(tokens[other], tokens[name])}
                assert all_answer(forged, 401) or all_answer(forged, 403), f"the token for {name} opened {other}"
        assert all_answer({name: url + "x"}, 401), name  # a signature with one character too many
    wait_for(lambda: all_answer(urls, 401), "a URL is good after its end", seconds=90)
