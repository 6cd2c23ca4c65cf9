"""A broker's service without its web side: a context on a real database, with real stores or one that tests can break.

`desk` makes brokers that share one database; each has a memory, a pool's connections and drivers of its own.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import aiohttp
import asyncpg
import pytest
from yarl import URL

from broker import errors, metrics
from broker.catalog import leases, reports, sites, stores
from broker.catalog.coalesce import Coalescer
from broker.model import Abilities, Client, Handle, Observation, PartSeen, Principal, Role, Store
from broker.service.context import Context, Policy
from broker.service.keys import Keyring
from broker.service.memory import Memory
from broker.sign.token import TokenSigner, generate_key
from broker.stores.base import Limits, PartWrite, Write
from broker.stores.base import Store as Driver
from broker.stores.registry import open_store
from tests.parts.records import s3_record, storeside_record, swift_record
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart
from tests.parts.swift import SwiftPart

STRONG = Abilities(
    reads=True, ranges=True, writes=True, deletes=True, refuses_tampering=True, refuses_expired=True, binds_length=True,
    binds_md5=True, binds_sha256=True, observes=("sha256", "md5"), multipart=True, observes_parts=("md5",), seals_parts=True, copies=True,
)  # fmt: skip


def client(project: str = "p", role: Role = Role.MEMBER, subject: str = "u", site: str | None = None) -> Client:
    """Somebody who asks."""
    return Client(Principal(subject, project, role, time.time() + 3600, site), "i", "127.0.0.1", site)


def digests(content: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "md5": hashlib.md5(content).hexdigest()}


@dataclass
class FakeStore:
    """A store in this process. It seals by copying. `broken` names methods that fail; `before` is called with each method's name."""

    objects: dict[str, bytes] = field(default_factory=dict)
    open: dict[str, dict[int, bytes]] = field(default_factory=dict)
    _begun_at: dict[str, str] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    before: Callable[[str], Any] | None = None
    kind: ClassVar[str] = "fake"
    schemes: ClassVar[tuple[str, ...]] = ("http",)
    limits = Limits(max_put=1 << 30, min_part=1, max_part=1 << 30, max_parts=10_000, max_object=1 << 40)

    async def _enter(self, name: str) -> None:
        self.calls.append(name)
        if self.before is not None:
            await self.before(name)
        if name in self.broken:
            raise errors.StoreUnavailable("the store is down")

    def sign_get(self, key: str, expires_at: float, now: float, filename: str | None = None) -> Handle:
        return Handle("GET", f"http://fake/{key}" + ("" if filename is None else f"?{filename}"), {}, expires_at)

    def sign_put(self, write: Write, now: float) -> Handle:
        return Handle("PUT", f"http://fake/{write.key}", {}, write.expires_at)

    def sign_part(self, key: str, upload: str, part: PartWrite, now: float) -> Handle:
        return Handle("PUT", f"http://fake/{key}?{upload}&{part.number}", {}, part.expires_at)

    def put(self, url: str, body: bytes) -> None:
        """What a client does with a URL."""
        key, _, query = url.removeprefix("http://fake/").partition("?")
        if query:
            upload, _, number = query.partition("&")
            if upload in self.open:
                self.open[upload][int(number)] = body
        else:
            self.objects[key] = body

    def _seen(self, content: bytes) -> Observation:
        return Observation(len(content), time.time(), "broker", digests(content))

    async def stat(self, key: str) -> Observation | None:
        await self._enter("stat")
        return self._seen(self.objects[key]) if key in self.objects else None

    async def seal(self, staging: str, final: str, metadata: Mapping[str, str]) -> str:
        await self._enter("seal")
        if staging not in self.objects:
            raise errors.NotUploaded("nothing to seal")
        self.objects[final] = self.objects.pop(staging)
        return final

    async def delete(self, key: str) -> bool:
        await self._enter("delete")
        return self.objects.pop(key, None) is not None

    async def begin(self, key: str, size: int | None, part_size: int, metadata: Mapping[str, str]) -> str:
        await self._enter("begin")
        upload = f"m{len(self.calls)}-{random.random()}"
        self.open[upload] = {}
        self._begun_at[upload] = key
        return upload

    async def parts(self, key: str, upload: str) -> Sequence[PartSeen]:
        await self._enter("parts")
        if upload not in self.open:
            raise errors.Gone("no such upload")
        return [PartSeen(number, len(body), {"md5": hashlib.md5(body).hexdigest()}) for number, body in sorted(self.open[upload].items())]

    async def finish(self, key: str, upload: str, parts: Sequence[PartSeen], metadata: Mapping[str, str]) -> str:
        await self._enter("finish")
        if upload in self.open:
            bodies = self.open.pop(upload)
            self.objects[key] = b"".join(bodies[part.number] for part in parts)
        elif key not in self.objects:
            raise errors.Gone("no such upload")
        return key

    async def abort(self, key: str, upload: str) -> None:
        await self._enter("abort")
        self.open.pop(upload, None)

    async def multiparts(self, key: str) -> Sequence[str]:
        await self._enter("multiparts")
        return [upload for upload in self.open if self._begun_at[upload] == key]

    async def clock_skew(self) -> float:
        return 0.0


@dataclass
class Desk:
    """Brokers on one database, and the stores that they know."""

    pool: asyncpg.Pool[asyncpg.Record]
    session: aiohttp.ClientSession
    signer: TokenSigner
    credentials: dict[str, dict[str, str]] = field(default_factory=dict)
    fakes: dict[str, FakeStore] = field(default_factory=dict)
    contexts: list[Context] = field(default_factory=list)

    async def broker(self, **policy: Any) -> Context:
        """A broker. Keywords are fields of its Policy."""
        counts = metrics.create()
        memory = Memory(self.pool, self._open, counts, time.time)
        await memory.reload_stores()
        context = Context(
            db=self.pool,
            grants=Coalescer(self.pool, leases.grant, "grant", counts),
            reports=Coalescer(self.pool, partial(reports.record, half_life_seconds=600.0), "report", counts),
            memory=memory,
            keys=Keyring(self.pool, b"passphrase", "http://broker.test"),
            policy=Policy(**policy),
            metrics=counts,
            clock=time.time,
            rng=random.Random(7),
            probe=None,  # type: ignore[arg-type]
        )
        self.contexts.append(context)
        return context

    def _open(self, store: Store) -> Driver:
        if store.kind == "fake":
            return self.fakes[store.name]
        return open_store(store, self.credentials, self.signer, self.session)

    async def fake(self, name: str = "fake", abilities: Abilities = STRONG, **options: Any) -> FakeStore:
        """Register a store that tests can break."""
        self.fakes[name] = FakeStore()
        await self.register(Store(0, name, "fake", "eu/az1", "http://fake", abilities=abilities, **options))
        return self.fakes[name]

    async def register(self, store: Store) -> None:
        """Register a store, before brokers are made."""
        assert not self.contexts
        if await sites.get(self.pool, store.site) is None:
            await sites.insert(self.pool, store.site, "", [])
        await stores.insert(self.pool, store, [])

    async def seaweedfs(self, part: S3Part) -> None:
        self.credentials["s3"] = part.credential
        await self.register(replace(s3_record(part), credential="s3"))

    async def swift(self, part: SwiftPart) -> None:
        self.credentials["swift"] = part.credential
        await self.register(replace(swift_record(part), credential="swift"))

    async def storeside(self, part: StoresidePart) -> None:
        self.signer = part.signer
        await self.register(storeside_record(part))

    async def send(self, shown: Mapping[str, Any], body: bytes) -> int:
        """PUT `body` as a ticket's destination or part says; the status."""
        headers = {name: value for name, value in shown["headers"].items() if name.lower() != "content-length"}
        try:
            async with self.session.put(URL(shown["url"], encoded=True), data=body, headers=headers, allow_redirects=False) as response:
                return response.status
        except aiohttp.ClientOSError:
            return 0

    async def fetch(self, context: Context, store: str, key: str) -> bytes:
        """The bytes at a location, read as a client would."""
        now = time.time()
        handle = context.memory.driver(store).sign_get(key, now + 60, now)
        async with self.session.get(URL(handle.url, encoded=True), headers=handle.headers) as response:
            assert response.status == 200
            return await response.read()


@pytest.fixture
async def desk(pool: asyncpg.Pool[asyncpg.Record]) -> AsyncIterator[Desk]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        desk = Desk(pool, session, TokenSigner([generate_key("ES256", time.time() - 60)], "http://broker.test"))
        yield desk
        for context in desk.contexts:
            await context.grants.close()
            await context.memory.close()
