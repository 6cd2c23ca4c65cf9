"""The service on a real catalogue, beside stores of which a test decides what they tell."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID

import asyncpg

from broker import errors, metrics
from broker.catalog import blobs, sites, stores
from broker.model import Abilities, Blob, BlobState, Client, Exposure, Observation, Principal, Role, Store, new_id
from broker.service import images, keys, replicas
from broker.service.context import Context, Policy
from broker.service.idempotency import Claim
from broker.service.memory import Memory
from broker.stores.probe import Probed, ProbeStep

MD5 = "900150983cd24fb0d6963f7d28e17f72"
OTHER_MD5 = "0" * 32
SIZE = 3


_WORKS = Probed(Abilities(reads=True, writes=True), (ProbeStep("writing", True, "PUT: 200"),))


@dataclass
class Told:
    """What the stores tell: objects by (store, key), and how a probe goes."""

    objects: dict[tuple[str, str], Observation] = field(default_factory=dict)
    probed: Probed | errors.BrokerError = _WORKS
    probes: int = 0


class Driver:
    """The little of a store that registrations use."""

    def __init__(self, told: Told, name: str) -> None:
        self._told = told
        self._name = name

    async def stat(self, key: str) -> Observation | None:
        return self._told.objects.get((self._name, key))


@dataclass
class Registry:
    """One broker's service: a context, and what its stores tell."""

    context: Context
    told: Told
    db: asyncpg.Pool[asyncpg.Record]

    def put(self, store: str, key: str, *, size: int = SIZE, digests: Mapping[str, str] | None = None) -> None:
        """Let `store` have an object."""
        self.told.objects[store, key] = Observation(size, time.time(), "broker", {"md5": MD5} if digests is None else digests)

    async def add_store(self, name: str, exposure: Exposure = Exposure.PUBLIC, **fields: Any) -> None:
        """Register a store at site ``eu``, without a probe."""
        if await sites.get(self.db, "eu") is None:
            await sites.insert(self.db, "eu", "", [])
        await stores.insert(self.db, Store(0, name, "s3", "eu", "http://127.0.0.1:1", exposure=exposure, **fields), [])
        await self.context.memory.reload_stores()

    async def add_blob(self, state: BlobState = BlobState.QUEUED) -> UUID:
        """A blob of three bytes."""
        id = new_id()
        await blobs.insert(self.db, Blob(id, SIZE, {"md5": MD5}, state))
        return id

    async def add_image(self, client: Client, formats: Mapping[str, UUID], **fields: Any) -> UUID:
        """An image; its blobs are linked by an administrator and the owner set afterwards, since new blobs are nobody's."""
        request = {"name": "debian", "blobs": {format: str(blob) for format, blob in formats.items()}, **fields}
        made = await images.create_image(self.context, ADMIN, request, Claim(new_id()))
        id = UUID(made.body["id"])
        await self.db.execute(
            "UPDATE images SET project = $2, subject = $3 WHERE id = $1", id, client.principal.project, client.principal.subject
        )
        for blob in formats.values():
            self.context.memory.forget("blob", str(blob))
        return id

    async def add_replica(self, client: Client, blob: UUID, store: str, key: str, **fields: Any) -> UUID:
        """A registered replica of an object that is there."""
        self.put(store, key)
        made = await replicas.register_replica(self.context, client, blob, {"store": store, "key": key, **fields}, Claim(new_id()))
        return UUID(made.body["id"])


def client(role: Role, project: str = "p", subject: str = "alice") -> Client:
    return Client(Principal(subject, project, role, time.time() + 3600), "host", "127.0.0.1", None)


ADMIN = client(Role.ADMIN, "ops", "root")
SERVICE = client(Role.SERVICE, "nova", "nova")
ALICE = client(Role.MEMBER)
BOB = client(Role.MEMBER, "q", "bob")
READER = client(Role.READER)


@asynccontextmanager
async def running(pool: asyncpg.Pool[asyncpg.Record]) -> AsyncIterator[Registry]:
    """The service of one broker on `pool`. It does not follow the change log: its own writes it has to know at once."""
    told = Told()
    counted = metrics.create()
    memory = Memory(pool, lambda store: cast(Any, Driver(told, store.name)), counted, time.time)

    async def probe(store: Store) -> Probed:
        told.probes += 1
        if isinstance(told.probed, errors.BrokerError):
            raise told.probed
        return told.probed

    keyring = keys.Keyring(pool, b"passphrase", "https://broker.test")
    unused: Any = None
    context = Context(
        pool, unused, unused, memory, keyring, policy=Policy(), metrics=counted, clock=time.time, rng=random.Random(1), probe=probe
    )
    await memory.catch_up()
    try:
        yield Registry(context, told, pool)
    finally:
        await memory.close()
