"""Two brokers as processes on one database, with a SeaweedFS, a storeside and a Swift registered through their API: `cluster`,
shared by all tests of a session, which take images of their own.

`brokers_on` starts brokers that belong together on any database, for tests that kill them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import botocore.session  # type: ignore[import-untyped]
import orjson
import pytest
from yarl import URL

from broker import app, config
from broker.catalog import connect
from broker.cli.token import sign
from broker.model import Role
from broker.service import keys
from broker.service.keys import Keyring
from broker.service.memory import FRESH_SECONDS
from broker.sign.token import TokenSigner, generate_key
from tests.parts import storeside
from tests.parts.broker import AUDIENCE, PROJECT, Api, BrokerProcess, Reply, serve
from tests.parts.condition import until
from tests.parts.postgres import Postgres
from tests.parts.process import free_ports
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart
from tests.parts.swift import SwiftPart

SITE = "eu/az1"


@dataclass(frozen=True)
class Brokers:
    """Brokers on one database, which sign with the same keys under the same name."""

    running: tuple[BrokerProcess, ...]
    keyring: Keyring
    issuer: str
    credentials_dir: Path
    secrets: list[str] = field(default_factory=list)
    """Every bearer token that was made here."""

    @property
    def database(self) -> str:
        return self.running[0].database

    def token(self, role: Role | str = Role.MEMBER, project: str = PROJECT, subject: str = "alice", ttl: float = 3600) -> str:
        made = sign(self.keyring, AUDIENCE, Role(role), project, subject, ttl, None, time.time())
        self.secrets.append(made)
        return made

    def api(
        self, session: aiohttp.ClientSession, role: Role | str = Role.MEMBER, *, at: int = 0, project: str = PROJECT, subject: str = "alice"
    ) -> Api:
        """Speaks to the broker number `at` as somebody with that role."""
        return Api(self.running[at].url, session, self.token(role, project, subject))

    def credential(self, name: str, entries: Mapping[str, str]) -> str:
        """Make a credential that every broker finds; its name."""
        self.credentials_dir.mkdir(parents=True, exist_ok=True)
        file = self.credentials_dir / f"{name}.json"
        file.touch(mode=0o600)
        file.write_bytes(orjson.dumps(dict(entries)))
        return name


@contextlib.contextmanager
def brokers_on(database: str, place: Path, count: int, *, settings: str = "") -> Iterator[Brokers]:
    """`count` brokers on the database with this URL, keeping their files in `place`. `settings` is more TOML for all."""
    ports = free_ports(count)
    issuer = f"http://127.0.0.1:{ports[0]}"
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(serve(database, place, settings=settings, port=port, public_url=issuer)) for port in ports]
        parsed = config.load(started[0].config)
        yield Brokers(tuple(started), asyncio.run(keyring_of(database, parsed)), issuer, parsed.credentials_dir)


async def keyring_of(database: str, settings: config.Settings) -> Keyring:
    """The keys that brokers with these settings sign with."""
    pool = await connect.connect(database, min_size=1, max_size=1)
    try:
        return await keys.load(pool, app.passphrase(settings.keys.passphrase_file), settings.http.public_url)
    finally:
        await pool.close()


@contextlib.contextmanager
def disk_of(brokers: Brokers, place: Path, name: str = "disk") -> Iterator[StoresidePart]:
    """A storeside that takes the keys of these brokers; `name` is how it is registered."""
    place.mkdir(parents=True, exist_ok=True)
    signer = TokenSigner([generate_key("ES256", 0)], brokers.issuer)
    with storeside.start(place, audience=name, signer=signer, keys=f"{brokers.issuer}/.well-known/jwks.json") as part:
        yield part


def s3_store(brokers: Brokers, part: S3Part, name: str = "weed", **options: Any) -> dict[str, Any]:
    """What is sent to register an S3 store."""
    return {
        "name": name, "kind": "s3", "site": SITE, "endpoint": part.endpoint, "credential": brokers.credential(name, part.credential),
        "settings": {"bucket": part.bucket, "region": part.region}, "internal": True, **options,
    }  # fmt: skip


def swift_store(brokers: Brokers, part: SwiftPart, name: str = "swift", **options: Any) -> dict[str, Any]:
    """What is sent to register a Swift store."""
    return {
        "name": name, "kind": "swift", "site": SITE, "endpoint": part.endpoint, "credential": brokers.credential(name, part.credential),
        "settings": {"account": part.account, "container": part.container}, "internal": True, **options,
    }  # fmt: skip


def disk_store(part: StoresidePart, name: str = "disk", **options: Any) -> dict[str, Any]:
    """What is sent to register a storeside."""
    settings = {"audience": part.audience}
    return {"name": name, "kind": "http", "site": SITE, "endpoint": part.url, "settings": settings, "internal": True, **options}


async def register(brokers: Brokers, *stores: Mapping[str, Any]) -> None:
    """Register stores at `SITE`, and wait until every broker knows them."""
    async with aiohttp.ClientSession() as session:
        admin = brokers.api(session, Role.ADMIN)
        assert (await admin.post("/v1/sites", {"path": SITE})).status in (201, 409)
        for store in stores:
            made = await admin.post("/v1/stores", store)
            assert made.status == 201, made.body
    await settle(brokers)


async def settle(brokers: Brokers) -> None:
    """Wait until every broker knows what was written so far, and has looked at the stores since: a broker notes what it has read."""
    connection = await asyncpg.connect(brokers.database)
    try:
        for _ in range(2):  # a broker looks at the stores after it has noted what it read: the second time it has done both
            xact = await connection.fetchval("SELECT pg_current_xact_id()::text")
            await connection.execute("NOTIFY changes")

            async def known(xact: str = xact) -> bool:
                return bool(await connection.fetchval(_ALL_KNOW, xact, FRESH_SECONDS))

            await until(known, "not every broker has read the change log")
    finally:
        await connection.close()


# Who has noted nothing for so long believes nothing that it remembers, and looks it up.
_ALL_KNOW = """
SELECT coalesce(bool_and(pg_visible_in_snapshot($1::text::xid8, seen)), true) FROM brokers
WHERE at > clock_timestamp() - make_interval(secs => $2)
"""


@dataclass(frozen=True)
class Cluster(Brokers):
    """Two brokers, and the stores ``weed``, ``disk`` and ``swift``."""

    weed: S3Part = None  # type: ignore[assignment]
    disk: StoresidePart = None  # type: ignore[assignment]
    swift: SwiftPart = None  # type: ignore[assignment]


@pytest.fixture(scope="session")
def cluster(postgres: Postgres, seaweedfs: S3Part, swift: SwiftPart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    place = tmp_path_factory.mktemp("cluster")
    with brokers_on(postgres.create(), place, 2) as brokers, disk_of(brokers, place / "disk") as disk:
        asyncio.run(register(brokers, s3_store(brokers, seaweedfs), disk_store(disk), swift_store(brokers, swift)))
        yield Cluster(
            brokers.running, brokers.keyring, brokers.issuer, brokers.credentials_dir, brokers.secrets, seaweedfs, disk, swift
        )  # fmt: skip


# -- what clients do


def digests(content: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "md5": hashlib.md5(content).hexdigest()}


def new_upload(content: bytes, name: str = "image", **fields: Any) -> dict[str, Any]:
    """A request for an upload of `content` as a new image."""
    return {"operation": "upload", "image": {"name": name}, "size": len(content), "digests": digests(content), **fields}


def said(content: bytes) -> dict[str, Any]:
    """A commit of `content`."""
    return {"size": len(content), "digests": digests(content)}


@contextlib.asynccontextmanager
async def opened(session: aiohttp.ClientSession, place: Mapping[str, Any], **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
    """Use a signed URL, exactly as it is spelled; `method`, `data` and `headers` may differ from what the place says."""
    headers = {name: value for name, value in place.get("headers", {}).items() if name.lower() != "content-length"}
    headers |= options.pop("headers", {})
    method = options.pop("method", place["method"])
    url = URL(options.pop("url", place["url"]), encoded=True)
    async with session.request(method, url, headers=headers, allow_redirects=False, **options) as response:
        yield response


async def send(session: aiohttp.ClientSession, place: Mapping[str, Any], content: bytes, **options: Any) -> int:
    """PUT `content` as a destination or a part says; the status."""
    async with opened(session, {"method": "PUT", **place}, data=content, **options) as response:
        return response.status


async def fetch(session: aiohttp.ClientSession, place: Mapping[str, Any]) -> bytes:
    """The bytes of a source."""
    async with opened(session, place) as response:
        assert response.status == 200, response.status
        return await response.read()


async def put(api: Api, session: aiohttp.ClientSession, content: bytes, *stores: str, **fields: Any) -> dict[str, Any]:
    """Upload `content` as a new image in one PUT to the first of `stores`, then as a replica to each of the others; the first commit."""
    first: dict[str, Any] = {}
    for store in stores:
        asked = {"operation": "upload", "blob": first["blob"]["id"], **said(content)} if first else new_upload(content, **fields)
        ticket = ok(await api.post("/v1/tickets", {**asked, "only": [store]}), 201)
        (place,) = ticket["destinations"]
        assert await send(session, place, content) in (200, 201)
        done = ok(await api.post(f"/v1/tickets/{ticket['id']}/commit", said(content)))
        first = first or done
    return first


def s3_client(part: S3Part) -> Any:
    """Somebody with the bucket's own keys: who works behind the broker's back."""
    return botocore.session.get_session().create_client(
        "s3", endpoint_url=part.endpoint, region_name=part.region, aws_access_key_id=part.access_key, aws_secret_access_key=part.secret_key
    )


def ok(reply: Reply, status: int = 200) -> Any:
    """The body of an answer with that status."""
    assert reply.status == status, reply.body
    return reply.body


def sources(ticket: Mapping[str, Any]) -> dict[str, Any]:
    """The sources of a ticket by store."""
    return {source["store"]: source for source in ticket["sources"]}


def reasons(excluded: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Why stores are excluded."""
    return {entry["store"]: entry["reason"] for entry in excluded}
