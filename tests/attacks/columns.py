"""The columns of the table: each kind of store as a real server with an attacker's and a victim's object in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from broker.model import Abilities, Store
from broker.sign.token import SigningKey, TokenSigner, generate_key, jwks
from broker.stores.http import HttpStore
from broker.stores.s3 import S3Store
from broker.stores.swift import SwiftStore
from tests.attacks.api import broker_column
from tests.attacks.target import Target, TokenTarget
from tests.parts import envoy, haproxy, nginx, rclone, seaweedfs, storeside, swift
from tests.parts.front import FrontPart
from tests.parts.process import answers, free_ports, running
from tests.parts.records import FRONT, RCLONE, SEAWEEDFS, STORESIDE, SWIFT, s3_record, swift_record
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import ISSUER, StoresidePart
from tests.parts.swift import SwiftPart

OTHER_BUCKET = "elsewhere"
_REVOKED_SECONDS = 60.0

Column = Callable[[Path], AbstractAsyncContextManager[Target]]


@contextlib.asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), connector=connector) as session:
        yield session


# --- S3 ---


async def _s3(kind: str, part: S3Part, abilities: Abilities, session: aiohttp.ClientSession) -> Target:
    store = S3Store(s3_record(part, kind, abilities), part.credential, session)
    elsewhere = S3Store(s3_record(replace(part, bucket=OTHER_BUCKET), kind, abilities), part.credential, session)
    await elsewhere._ask("PUT", "", expect=(200,))
    return Target(kind=kind, scheme="s3", origin=part.endpoint, store=store, elsewhere=elsewhere)


@contextlib.asynccontextmanager
async def seaweedfs_column(place: Path) -> AsyncIterator[Target]:
    with seaweedfs.start(place) as part:
        async with _session() as session:
            yield await _s3("SeaweedFS", part, SEAWEEDFS, session)


@contextlib.asynccontextmanager
async def rclone_column(place: Path) -> AsyncIterator[Target]:
    with rclone.start(place) as part:
        async with _session() as session:
            yield await _s3("rclone", part, RCLONE, session)


# --- Swift ---


@contextlib.asynccontextmanager
async def swift_column(place: Path) -> AsyncIterator[Target]:
    with swift.start(place) as part:
        async with _session() as session:
            record = swift_record(part, SWIFT)
            store = SwiftStore(record, part.credential, session)
            elsewhere = SwiftStore(replace(record, settings={**record.settings, "container": OTHER_BUCKET}), part.credential, session)
            await elsewhere._ask("PUT", OTHER_BUCKET, "", expect=(201, 202))
            yield Target(
                kind="Swift",
                scheme="tempurl",
                origin=part.endpoint,
                store=store,
                elsewhere=elsewhere,
                elsewhere_key=await _foreign(part, store),
            )


async def _foreign(part: SwiftPart, store: SwiftStore) -> str:
    """The key of another account."""
    key = secrets.token_hex(20)
    login = urllib.request.Request(part.auth_url, headers={"X-Auth-User": "other:other", "X-Auth-Key": part.key})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(login, timeout=10) as response:
        token, url = response.headers["X-Auth-Token"], response.headers["X-Storage-Url"]
    headers = {"X-Auth-Token": token, "X-Account-Meta-Temp-URL-Key": key}
    opener.open(urllib.request.Request(url, method="POST", headers=headers), timeout=10).close()
    return key


S3API = replace(SEAWEEDFS, binds_sha256=True, observes=("md5",), observes_parts=("md5",), seals_parts=False)


@contextlib.asynccontextmanager
async def s3api_column(place: Path) -> AsyncIterator[Target]:
    with swift.start(place) as part:
        async with _session() as session:
            s3 = S3Part(part.endpoint, part.container, part.user, part.key, part.pid)
            target = await _s3("Swift s3api", s3, S3API, session)
            yield target


# --- tokens ---


@dataclass(kw_only=True)
class PartTarget(TokenTarget):
    """A part of the tests that reads a key set from a file, or has its own way to be given one."""

    server: StoresidePart
    place: Path | None = None

    async def publish(self, keys: Sequence[SigningKey]) -> None:
        if self.place is None:
            await asyncio.to_thread(self.server.publish, keys)  # type: ignore[attr-defined]
        else:
            self.place.write_text(json.dumps(jwks(keys)))
        end = time.monotonic() + _REVOKED_SECONDS
        while not await self._uses(keys):
            assert time.monotonic() < end, f"{self.kind} does not take the new key set"
            await asyncio.sleep(0.1)

    async def _uses(self, keys: Sequence[SigningKey]) -> bool:
        """Whether a token of the second key is taken just when it is among `keys`. Every answer of several workers must be the same."""
        for _ in range(4):
            token = TokenSigner(self.keys[1:], self.issuer).sign(self.claims("GET", self.mine.key), time.time())
            if (await self.fire(self.carrying(token, self.mine.key))).ok != (self.keys[1] in keys):
                return False
        return True


def _keys() -> tuple[SigningKey, SigningKey]:
    return generate_key("ES256", 0), generate_key("ES256", 0)


def _stores(
    url: str, audience: str, signer: TokenSigner, session: aiohttp.ClientSession, abilities: Abilities
) -> tuple[HttpStore, HttpStore]:
    record = Store(3, audience, "http", "eu/az1", url, settings={"audience": audience}, abilities=abilities)
    other = replace(record, name="other", settings={"audience": f"{audience}-2"})
    return HttpStore(record, signer, session), HttpStore(other, signer, session)


@contextlib.asynccontextmanager
async def storeside_column(place: Path) -> AsyncIterator[Target]:
    keys = _keys()
    published = place / "published.json"
    published.write_text(json.dumps(jwks(keys)))
    signer = TokenSigner(keys[:1], ISSUER)
    with storeside.start(place, signer=signer, keys=str(published)) as part:
        async with _session() as session:
            store, elsewhere = _stores(part.url, part.audience, signer, session, STORESIDE)
            yield PartTarget(
                kind="storeside",
                scheme="token",
                origin=part.url,
                store=store,
                elsewhere=elsewhere,
                own=True,
                keys=keys,
                issuer=ISSUER,
                audience=part.audience,
                server=part,
                place=published,
            )


ADAPTER = replace(STORESIDE, multipart=False, observes=(), observes_parts=(), seals_parts=False)
_ROOT = Path(__file__).resolve().parents[2]


def _adapter(kind: str, *arguments: str) -> Column:
    """A server in Python behind one of our adapters; ``{port}`` in its arguments is where it listens."""

    @contextlib.asynccontextmanager
    async def column(place: Path) -> AsyncIterator[Target]:
        keys, published, audience = _keys(), place / "published.json", "disk-9"
        published.write_text(json.dumps(jwks(keys)))
        (port,) = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        environment = {"STORE_KEYS": str(published), "STORE_AUDIENCE": audience, "STORE_ISSUER": ISSUER, "PYTHONPATH": str(_ROOT)}
        command = [sys.executable, *(argument.replace("{port}", str(port)) for argument in arguments)]
        signer = TokenSigner(keys[:1], ISSUER)
        with running(command, log=place / "log", ready=lambda: answers(url, (401, 400)), environment=environment) as process:
            part = StoresidePart(url, place, audience, signer, process.pid, place / "log")
            async with _session() as session:
                store, elsewhere = _stores(url, audience, signer, session, ADAPTER)
                yield PartTarget(
                    kind=kind,
                    scheme="token",
                    origin=url,
                    store=store,
                    elsewhere=elsewhere,
                    own=True,
                    parts=False,
                    keys=keys,
                    issuer=ISSUER,
                    audience=audience,
                    server=part,
                    place=published,
                )

    return column


def _front(kind: str, start: Callable[[Path], AbstractContextManager[FrontPart]]) -> Column:
    """A front as deploy/ configures it."""

    @contextlib.asynccontextmanager
    async def column(place: Path) -> AsyncIterator[Target]:
        keys = _keys()
        with start(place) as front:
            signer = TokenSigner(keys[:1], ISSUER)
            async with _session() as session:
                store, elsewhere = _stores(front.url, front.audience, signer, session, FRONT)
                target = PartTarget(
                    kind=kind,
                    scheme="token",
                    origin=front.url,
                    store=store,
                    elsewhere=elsewhere,
                    own=True,
                    front=True,
                    parts=False,
                    keys=keys,
                    issuer=ISSUER,
                    audience=front.audience,
                    server=front,
                    behind=next((log for log in front.logs if log.parent.name == "origin" and log.name == "access.log"), None),
                )
                await asyncio.to_thread(front.publish, keys)
                yield target

    return column


_GUNICORN = ("-m", "gunicorn", "--bind", "127.0.0.1:{port}", "--threads", "8", "tests.attacks.python.wsgi:app")

COLUMNS: Mapping[str, Column] = {
    "SeaweedFS": seaweedfs_column,
    "rclone": rclone_column,
    "Swift": swift_column,
    "Swift s3api": s3api_column,
    "storeside": storeside_column,
    "aiohttp": _adapter("aiohttp", "-m", "tests.attacks.python.middleware", "{port}"),
    "ASGI": _adapter("ASGI", "-m", "uvicorn", "--no-access-log", "--port", "{port}", "tests.attacks.python.asgi:app"),
    "WSGI": _adapter("WSGI", *_GUNICORN),
    "nginx": _front("nginx", nginx.start),
    "HAProxy": _front("HAProxy", haproxy.start),
    "Envoy": _front("Envoy", envoy.start),
    "broker": broker_column,
}
