"""The README's commands for backup and restore, typed as they stand: what a dump holds goes on, what came after it is found again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from tests.acceptance.test_readme import README
from tests.parts.broker import Api
from tests.parts.cluster import Brokers, disk_of, disk_store, fetch, new_upload, ok, put, register, said, send
from tests.parts.generations import generation, run_json
from tests.parts.postgres import DEBIAN_15, Postgres
from tests.parts.process import find_program, free_ports

MEBIBYTE = 1 << 20
SETTINGS = f"[policy.uploads]\nsingle_put_limit = {MEBIBYTE}\nmin_part_size = {MEBIBYTE}\n"
LARGE = random.Random(5).randbytes(MEBIBYTE + 100)


def commands(name: str) -> str:
    """The block of the README that is marked ``.. NAME``."""
    match = re.search(rf"^\.\. {name}\n\n\.\. code-block:: console\n\n((?:   .*\n)+)", README.read_text(), re.MULTILINE)
    assert match is not None
    return "\n".join(line.strip().removeprefix("$ ") for line in match[1].splitlines())


def typed(name: str, place: Path, database: str, brokers: Brokers) -> None:
    """Type that block in `place`, for this database and these brokers."""
    text = commands(name)
    for said_, meant in (
        ("/var/lib/transfer-broker", str(place / "data")),
        ("broker.toml", str(brokers.running[0].config)),
        ("postgresql://broker@db.example.org/broker", database),
    ):
        text = text.replace(said_, meant)
    paths = os.pathsep.join((str(DEBIAN_15), str(Path(find_program("broker", "pip install -e .")).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": paths, "PGURL": database}
    done = subprocess.run(["bash", "-euxc", text], cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Before(NamedTuple):
    """What there is when the backup is made."""

    image: str
    download: dict[str, Any]
    written: dict[str, Any]
    parts: dict[str, Any]
    token: str


async def _before(brokers: Brokers) -> Before:
    """A committed image, a ticket for it, an upload of which everything is written, and one of which half is."""
    async with aiohttp.ClientSession() as session:
        api = brokers.api(session)
        image = (await put(api, session, b"first" * 100, "disk"))["image"]
        download = ok(await api.post("/v1/tickets", {"operation": "download", "image": image}), 201)
        written = ok(await api.post("/v1/tickets", new_upload(b"written" * 100, "written")), 201)
        assert await send(session, written["destinations"][0], b"written" * 100) == 201
        parts = ok(await api.post("/v1/tickets", {**new_upload(LARGE, "parts")}), 201)
        first, _ = parts["destinations"][0]["parts"]
        assert await send(session, first, LARGE[:MEBIBYTE]) == 200
    return Before(image, download, written, parts, brokers.token())


async def _after(brokers: Brokers, before: Before) -> str:
    """What happens between backup and loss: an upload is committed, an image made, the key changed. The image's id."""
    async with aiohttp.ClientSession() as session:
        api = brokers.api(session)
        ok(await api.post(f"/v1/tickets/{before.written['id']}/commit", said(b"written" * 100)))
        late: str = (await put(api, session, b"late" * 100, "disk", image={"name": "late"}))["image"]
        ok(await brokers.api(session, "admin").post("/v1/keys", {}))
    return late


async def _downloaded(api: Api, session: aiohttp.ClientSession, image: str) -> bytes:
    ticket = ok(await api.post("/v1/tickets", {"operation": "download", "image": image}), 201)
    found = await fetch(session, ticket["sources"][0])
    ok(await api.post(f"/v1/tickets/{ticket['id']}/report", {"store": "disk", "outcome": "ok", "bytes": len(found), "seconds": 0.1}), 204)
    return found


async def _goes_on(brokers: Brokers, before: Before, late: str) -> None:
    async with aiohttp.ClientSession() as session:
        api = brokers.api(session).as_(before.token)
        report = {"store": "disk", "outcome": "ok", "bytes": 500, "seconds": 0.1}
        ok(await api.post(f"/v1/tickets/{before.download['id']}/report", report), 204)
        assert await _downloaded(api, session, before.image) == b"first" * 100
        assert await _downloaded(api, session, before.written["image"]) == b"written" * 100
        assert await _downloaded(api, session, late) == b"late" * 100
        # The client of the upload that was committed after the backup asks again; that of the other one goes on.
        again = ok(await api.post(f"/v1/tickets/{before.written['id']}/commit", said(b"written" * 100)))
        assert again["replica"]["state"] == "active"
        state = ok(await api.get(f"/v1/tickets/{before.parts['id']}"))
        assert [part["number"] for part in state["places"][0]["seen"]] == [1]
        (second,) = ok(await api.post(f"/v1/tickets/{before.parts['id']}/refresh"))["destinations"][0]["parts"]
        assert await send(session, second, LARGE[MEBIBYTE:]) == 200
        ok(await api.post(f"/v1/tickets/{before.parts['id']}/commit", said(LARGE)))
        assert await _downloaded(api, session, before.parts["image"]) == LARGE


def test_a_backup_is_restored(postgres_15: Postgres, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    first, second = postgres_15.create(), postgres_15.create("template1")
    with contextlib.ExitStack() as stack:
        with generation(first, tmp_path, port, SETTINGS) as brokers:
            disk = stack.enter_context(disk_of(brokers, tmp_path / "disk"))
            brokers.credential("unused", {"key": "x"})
            asyncio.run(register(brokers, disk_store(disk, read_slots=4, write_slots=4)))
            before = asyncio.run(_before(brokers))
            typed("backup", tmp_path, first, brokers)
            late = asyncio.run(_after(brokers, before))
        postgres_15.drop(first)
        config = brokers.running[0].config
        config.write_text(config.read_text().replace(first, second))
        for file in ("keys.passphrase", "credentials/unused.json"):
            (tmp_path / "data" / file).unlink()
        typed("restore", tmp_path, second, brokers)
        assert (tmp_path / "data/credentials/unused.json").exists()
        with generation(second, tmp_path, port, SETTINGS) as restored:
            asyncio.run(_goes_on(restored, before, late))
            assert run_json(restored, "check") == []
    postgres_15.drop(second)
