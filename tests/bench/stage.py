"""What the benchmarks run on: PostgreSQL with the catalogue, a broker process, the bare comparator, the requests.

PostgreSQL and wrk share one core, the server that is measured has the other one to itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from broker import app, embedded
from broker.catalog import connect, migrations
from broker.cli.token import sign
from broker.model import Role
from broker.service import keys
from tests.bench import bare, catalogue, naive
from tests.bench.load import LOAD_CPU, SERVER_CPU, Request
from tests.parts.process import answers, find_program, free_ports, running

AUDIENCE = "transfer-broker"


class Stage:
    """One database with the catalogue, and the configuration of a broker on it."""

    def __init__(self, place: Path, url: str, tokens: Sequence[str], jwks: Any) -> None:
        self.place = place
        self.url = url
        self.tokens = tokens
        self.jwks = jwks

    @contextlib.contextmanager
    def broker(self, name: str, hot_bytes: int, uploads: str = "") -> Iterator[tuple[int, int]]:
        """A broker with settings of its own; its port and process id."""
        port, metrics_port = free_ports(2)
        config = self.place / f"{name}.toml"
        config.write_text(
            f'data_dir = "{self.place}"\n[http]\npublic_url = "http://127.0.0.1:8080"\n'
            f'listen = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{metrics_port}"\n'
            f'[database]\nurl = "{self.url}"\n[memory]\nhot_bytes = {hot_bytes}\n[log]\nlevel = "warning"\n'
            f"[policy.admission]\nproject_tickets_per_hour = 0\n{uploads}"
        )
        with server([find_program("broker", "pip install -e ."), "serve", "--config", str(config)], port, self.place / f"{name}.log") as up:
            yield up

    @contextlib.contextmanager
    def bare(self, answer: bytes) -> Iterator[tuple[int, int]]:
        """The bare handler with answers like `answer`; its port and process id."""
        (port,) = free_ports(1)
        shape = self.place / f"answer-{port}.json"
        shape.write_bytes(answer)
        with server([sys.executable, bare.__file__, str(port), str(shape)], port, self.place / f"bare-{port}.log") as up:
            yield up

    def tickets(self, count: int) -> list[Request]:
        """Requests for one blob each."""
        asked = catalogue.zipf(count)
        return [
            Request(
                "/v1/tickets",
                orjson.dumps({"operation": "download", "blob": str(catalogue.blob_id(n)), "count": 3}).decode(),
                self._token(i),
            )
            for i, n in enumerate(asked)
        ]

    def batches(self, count: int, blobs: int) -> list[Request]:
        """Requests for many blobs each."""
        asked = iter(catalogue.zipf(count * blobs))
        requests = []
        for i in range(count):
            tickets = [{"operation": "download", "blob": str(catalogue.blob_id(next(asked))), "count": 3} for _ in range(blobs)]
            requests.append(Request("/v1/tickets:batch", orjson.dumps({"tickets": tickets}).decode(), self._token(i)))
        return requests

    def _token(self, i: int) -> str:
        return self.tokens[i % len(self.tokens)]


@contextlib.contextmanager
def server(command: Sequence[str], port: int, log: Path) -> Iterator[tuple[int, int]]:
    """A program on the server's core; its port and process id."""
    pinned = ["taskset", "-c", str(SERVER_CPU), *command]
    with running(pinned, log=log, ready=lambda: answers(f"http://127.0.0.1:{port}/v1", (200, 404, 405))) as process:
        yield port, process.pid


def post(port: int, request: Request) -> bytes:
    """One request of the mix, sent once."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {request.token}"}
    sent = urllib.request.Request(f"http://127.0.0.1:{port}{request.path}", data=request.body.encode(), headers=headers)
    with urllib.request.urlopen(sent, timeout=30) as answer:
        return bytes(answer.read())


@contextlib.asynccontextmanager
async def stage(kind: str) -> AsyncIterator[Stage]:
    """PostgreSQL with a full catalogue whose stores are of `kind` (`catalogue.KINDS`). Takes about half a minute."""
    os.sched_setaffinity(0, {LOAD_CPU})
    place = Path(tempfile.mkdtemp(prefix="bench-"))
    place.chmod(0o711)
    server_ = await embedded.start(place / "postgres")
    try:
        url = server_.url("postgres")
        connection: Any = await connect.connect_one(url)
        await migrations.migrate(connection)
        await catalogue.fill(connection, kind)
        await connection.close()
        write_credentials(place)
        yield Stage(place, url, *await principals(place, url))
    finally:
        await server_.stop()
        shutil.rmtree(place, ignore_errors=True)


def write_credentials(place: Path) -> None:
    """Credentials for the stores of the catalogue, which nobody ever talks to."""
    folder = place / "credentials"
    folder.mkdir()
    for name, content in {
        "s3": {"access_key": "BENCHKEY", "secret_key": "bench-secret"},
        "swift": {"temp_url_key": "bench-key", "auth_url": "http://store.example/auth/v1.0", "user": "a:b", "key": "bench"},
    }.items():
        path = folder / f"{name}.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(content))


async def principals(place: Path, url: str) -> tuple[list[str], Any]:
    """Bearer tokens of a hundred projects, signed by the broker's own key, and its public half."""
    pool = await connect.connect(url, min_size=1, max_size=1)
    now = time.time()
    keyring = await keys.load(pool, app.passphrase(place / "keys.passphrase"), "http://127.0.0.1:8080")
    await pool.close()
    tokens = [sign(keyring, AUDIENCE, Role.MEMBER, f"project-{n}", f"user-{n}", 86400, None, now) for n in range(catalogue.PRINCIPALS)]
    return tokens, keyring.jwks(now)


def on_stage(kind: str, work: Any) -> None:
    """Run ``work(stage)`` with PostgreSQL up."""

    async def run() -> None:
        async with stage(kind) as built:
            await asyncio.to_thread(work, built)

    asyncio.run(run())


@contextlib.contextmanager
def naive_server(stage: Stage) -> Iterator[tuple[int, int]]:
    """The naive broker on the same catalogue; its port and process id."""
    (port,) = free_ports(1)
    command = [sys.executable, naive.__file__, str(port), stage.url, AUDIENCE, orjson.dumps(stage.jwks).decode()]
    with server(command, port, stage.place / "naive.log") as up:
        yield up
