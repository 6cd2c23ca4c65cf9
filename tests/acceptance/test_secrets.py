"""Invariant 13: a whole story, most of it unhappy, all of it logged; then every secret in use is looked for where it must not be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import asyncpg
import pytest
from cryptography.hazmat.primitives import serialization

from broker import config
from broker.catalog import connect
from broker.sign.token import SigningKey
from tests.parts.authority import Authority
from tests.parts.broker import Api, BrokerProcess, Reply, serve
from tests.parts.cluster import (
    Brokers,
    brokers_on,
    disk_of,
    disk_store,
    fetch,
    new_upload,
    ok,
    opened,
    put,
    register,
    s3_store,
    said,
    send,
    swift_store,
)
from tests.parts.postgres import Postgres
from tests.parts.process import find_program
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart
from tests.parts.swift import SwiftPart

PASSWORD = "hunter2-of-the-database"
CONTENT = os.urandom(40_000)


class Listening(Api):
    """Keeps every refusal, and every signature that was handed out."""

    def __init__(self, url: str, session: aiohttp.ClientSession, token: str | None, refusals: list[str], signatures: set[str]) -> None:
        super().__init__(url, session, token)
        self._heard = refusals, signatures

    async def send(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        reply = await super().send(method, path, body, raw=raw, headers=headers)
        refusals, signatures = self._heard
        if reply.status >= 400:
            refusals.append(f"{reply.body} {dict(reply.headers)}")
        else:
            signatures.update(signatures_in(reply.body))
        return reply


def signatures_in(body: Any) -> set[str]:
    """What makes the URLs of an answer work."""
    found: set[str] = set()
    for url in re.findall(r"'url': '([^']+)'", str(body)):
        query = parse_qs(urlsplit(url).query)
        for name in ("X-Amz-Signature", "temp_url_sig"):
            found.update(query.get(name, ()))
        found.update(token.rpartition(".")[2] for token in query.get("token", ()))
    return found


@dataclass(frozen=True)
class House:
    brokers: Brokers
    disk: StoresidePart
    weed: S3Part
    swift: SwiftPart
    secured: BrokerProcess
    """A third broker, whose API speaks TLS."""
    authority: Authority


@pytest.fixture
def house(postgres: Postgres, seaweedfs: S3Part, swift: SwiftPart, tmp_path: Path) -> Iterator[House]:
    """Two brokers that log all they can, with a password in the database's URL."""
    database = f"{postgres.create()}&password={PASSWORD}"
    own = Authority(tmp_path / "authority")
    with (
        brokers_on(database, tmp_path, 2, settings='[log]\nlevel = "debug"\n') as brokers,
        disk_of(brokers, tmp_path / "disk") as disk,
        serve(database, tmp_path, settings='[log]\nlevel = "debug"\n', authority=own) as secured,
    ):
        settings = {"bucket": seaweedfs.bucket, "region": seaweedfs.region, "prefix": f"{tmp_path.name}/"}
        asyncio.run(register(brokers, s3_store(brokers, seaweedfs, settings=settings), disk_store(disk), swift_store(brokers, swift)))
        yield House(brokers, disk, seaweedfs, swift, secured, own)


async def story(house: House, session: aiohttp.ClientSession, refusals: list[str], signatures: set[str]) -> list[str]:
    """What goes well, and then all that does not. Returns more secrets: those that were sent where they do not belong."""

    def api(role: str = "member", at: int = 0, token: str | None = None) -> Listening:
        return Listening(house.brokers.running[at].url, session, token or house.brokers.token(role), refusals, signatures)

    member, admin = api(), api("admin", 1)
    made = await put(member, session, CONTENT, "weed", "disk", "swift")
    large = {"operation": "upload", "image": {"name": "large"}, "size": 200 << 20, "only": ["swift"]}
    ok(await member.post("/v1/tickets", large), 201)
    ticket = ok(await api(at=1).post("/v1/tickets", {"operation": "download", "image": made["image"]}), 201)
    for source in ticket["sources"]:
        assert await fetch(session, source) == CONTENT
        async with opened(session, source, method="DELETE") as response:
            assert response.status in (401, 403, 405)
    # Secrets where none belong: in paths, queries, headers, bodies, names and keys.
    url = ticket["sources"][0]["url"]
    bearer = house.brokers.token()
    for wrong in (bearer[:-4] + "AAAA", "Basic dXNlcjpodW50ZXIy", url, f"{bearer}.{bearer}"):
        assert (await api(token=wrong).get("/v1/images")).status == 401
    path = f"/v1/blobs/{made['blob']['id']}/replicas"
    for body in ({"store": "weed", "key": f"demo/{url}"}, {"store": url, "key": "x"}, {"store": "weed", "key": "demo/x", bearer: bearer}):
        assert (await member.post(path, body)).status in (400, 403, 404, 409)
    await member.get(f"/v1/images?marker={bearer}")
    await member.get(f"/v1/tickets/{bearer}")
    await member.post("/v1/images", {"name": "x"}, **{"Idempotency-Key": bearer})
    await member.send("POST", "/v1/images", raw=b'{"name": "' + bearer.encode())
    await member.post(
        f"/v1/tickets/{ticket['id']}/report", {"store": "weed", "outcome": "failed", "detail": f"403 for {url} with {bearer}"[:500]}
    )
    leaked = {
        "name": "leaky",
        "kind": "s3",
        "site": "eu/az1",
        "endpoint": house.weed.endpoint,
        "internal": True,
        "settings": {"secret_key": house.weed.secret_key},
    }
    assert (await admin.post("/v1/stores", leaked)).status == 400
    assert (await admin.post("/v1/stores", {**leaked, "endpoint": f"http://u:{house.swift.key}@127.0.0.1"})).status == 400
    house.brokers.credential("wrong", {"access_key": house.weed.access_key, "secret_key": "w" + house.weed.secret_key})
    settings = {"bucket": house.weed.bucket}
    assert (await admin.post("/v1/stores", {**leaked, "settings": settings, "credential": "wrong"})).status in (409, 503)
    # Bytes that differ, a store that dies, a database that goes away.
    lie = ok(await member.post("/v1/tickets", {"operation": "upload", "image": {"name": "lie"}, "size": 7, "only": ["disk"]}), 201)
    assert await send(session, lie["destinations"][0], b"7 bytes") == 201
    assert (await member.post(f"/v1/tickets/{lie['id']}/commit", said(b"7 other"))).status == 409
    dying = ok(await member.post("/v1/tickets", new_upload(os.urandom(99), only=["disk"])), 201)
    os.kill(house.disk.pid, 9)
    assert (await member.post(f"/v1/tickets/{dying['id']}/commit", said(b"9" * 99))).status in (409, 503)
    assert (await admin.post("/v1/stores/disk/probe")).status == 503
    await cut_off(house)
    for at in (0, 1):
        while (await api(at=at).get("/v1/images")).status == 503:
            await asyncio.sleep(0.1)
    return [url, bearer]


async def over_tls(house: House) -> None:
    """What a broker with a certificate logs: of good and bad clients, and of a pair of files that does not fit."""
    context = ssl.create_default_context(cafile=str(house.authority.certificate))
    async with aiohttp.ClientSession() as session:
        for token in (house.brokers.token(), "nonsense"):
            headers = {"Authorization": f"Bearer {token}"}
            async with session.get(f"{house.secured.url}/v1/images", headers=headers, ssl=context) as response:
                assert response.status == 401  # the others' token: this one has another name
        for url in (house.secured.url, house.secured.url.replace("https", "http")):
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"{url}/v1")
    key = tls_key(house)
    key.write_text(key.read_text() + key.read_text()[:40])
    key.with_suffix(".pem").write_text("no certificate\n" + key.read_text())
    os.kill(house.secured.pid, signal.SIGHUP)
    while "cannot be taken up" not in house.secured.log.read_text():
        await asyncio.sleep(0.05)


def tls_key(house: House) -> Path:
    return house.secured.config.with_suffix(".key")


def processes(house: House) -> dict[str, str]:
    """The title of every process that this test started, and the environment of those that are ours and of what they started."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            below.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))

    def family(pid: int) -> set[int]:
        return {pid}.union(*(family(child) for child in below.get(pid, ())))

    ours = set().union(*(family(pid) for pid in (*(broker.pid for broker in house.brokers.running), house.secured.pid, house.disk.pid)))
    found = {}
    for pid in family(os.getpid()) - {os.getpid()}:
        with contextlib.suppress(OSError):
            found[f"title of {pid}"] = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            if pid in ours:
                found[f"environment of {pid}"] = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return found


def unlocked(key: SigningKey) -> str:
    """A signing key as it is in the broker's memory."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private.private_bytes(encoding, form, serialization.NoEncryption()).decode()


def lines_of(pem: str) -> set[str]:
    return {line for line in pem.splitlines() if len(line) > 40 and "-----" not in line}


async def cut_off(house: House) -> None:
    """End every connection of the brokers to their database."""
    connection: asyncpg.Connection[asyncpg.Record] = await connect.connect_one(house.brokers.database)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await connection.close()


def commands(house: House, place: Path) -> dict[str, str]:
    """What the command line prints when it is told wrong things, as well as right ones."""
    token = house.brokers.token(subject="typist")
    environment = {**os.environ, "BROKER_URL": house.brokers.running[0].url, "BROKER_TOKEN": token, "XDG_STATE_HOME": str(place)}
    program = find_program("broker", "pip install -e '.[test]'")
    (place / "file.raw").write_bytes(CONTENT[::-1])
    printed = {}
    for arguments in (
        ("put", "file.raw", "--name", "by-command", "--to", "weed"),
        ("get", "by-command", "-o", "out.raw"),
        ("get", "by-command", "-o", "no/such/place"),
        ("put", "file.raw", "--name", "dead", "--to", "disk"),
        ("ls",),
    ):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, cwd=place, check=False, timeout=120)
        printed[" ".join(arguments)] = done.stdout + done.stderr
    assert (place / "out.raw").exists(), printed
    assert (place / "out.raw").read_bytes() == CONTENT[::-1]
    return printed


async def test_no_secret_is_anywhere(house: House, tmp_path: Path) -> None:
    """Invariant 13: in no log line, metric, problem, argument of a process, or output of a command."""
    refusals: list[str] = []
    signatures: set[str] = set()
    seen = processes(house)
    assert len([name for name in seen if name.startswith("environment")]) >= 4
    async with aiohttp.ClientSession() as session:
        sent = await story(house, session, refusals, signatures)
        exposition = ""
        tls = tls_key(house).read_text()
        await over_tls(house)
        for broker in (*house.brokers.running, house.secured):
            async with session.get(f"{broker.metrics_url}/metrics") as response:
                exposition += await response.text()
    settings = config.load(house.brokers.running[0].config)
    connection = await connect.connect_one(house.brokers.database)
    pems = "\n".join(row["private_pem"] for row in await connection.fetch("SELECT private_pem FROM signing_keys"))
    await connection.close()
    looked_at = await asyncio.to_thread(commands, house, tmp_path)
    looked_at |= {broker.log.name: broker.log.read_text() for broker in (*house.brokers.running, house.secured)}
    looked_at |= {"storeside": house.disk.log.read_text(), "metrics": exposition, "problems": "\n".join(refusals)}
    looked_at |= {f"{name}, before": text for name, text in seen.items()} | processes(house)
    secrets = {
        "passphrase": {settings.keys.passphrase_file.read_text().strip()},
        "database password": {PASSWORD},
        "private key": lines_of(pems) | lines_of("".join(unlocked(key) for key, _ in house.brokers.keyring.signer._keys)),
        "key of the certificate": lines_of(tls),
        "store credential": {
            house.weed.secret_key, house.swift.temp_url_key, house.swift.temp_url_key2, house.swift.key, "w" + house.weed.secret_key
        },
        "bearer token": {token.rpartition(".")[2] for token in (*house.brokers.secrets, sent[1])},
        "signature": signatures | signatures_in(f"'url': '{sent[0]}'"),
    }  # fmt: skip
    assert len(signatures) >= 10
    assert len(refusals) >= 15
    assert sum(len(log) for name, log in looked_at.items() if name.startswith("broker-")) > 1000
    assert all(len(secret) >= 8 for kind in secrets.values() for secret in kind)
    for where, text in looked_at.items():
        for kind, values in secrets.items():
            for value in values:
                at = text.find(value)
                assert at < 0, f"a {kind} is in {where}: …{text[max(0, at - 200) : at]}<here>"
        assert "Traceback" not in text or where.startswith("broker-"), where
    total = sum(map(len, secrets.values()))
    print(
        f"\n{total} secrets of {len(secrets)} kinds: none in {len(looked_at)} places ({len(''.join(looked_at.values()))} characters)",
        file=sys.stderr,
    )
