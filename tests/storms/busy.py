"""A broker to which everything happens that its metrics tell of, short of leaving it alone: real stores, two workers, three sites.

`House` is the parts, `keep_busy` what clients, enemies and accidents do to them. Nothing here looks at metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import orjson
from yarl import URL

from broker import config
from tests.parts.broker import Api, BrokerProcess, Reply, serve
from tests.parts.cluster import Brokers, disk_of, disk_store, fetch, new_upload, put, s3_store, said, send, swift_store
from tests.parts.condition import until
from tests.parts.keystone import KeystonePart
from tests.parts.postgres import Postgres
from tests.parts.process import answers, free_ports
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart
from tests.parts.swift import SwiftPart

SLOTS, CAPACITY, PER_ADDRESS, REFUSALS = 2, 50_000_000, 20, 5
SITES = {"eu/az1": "127.0.1.0/24", "eu/az2": "127.0.2.0/24", "us/az1": "127.0.3.0/24"}


class Person(Api):
    """Speaks to the broker from an address of a site, without looking at what the contract says of the answers."""

    @property
    def session(self) -> aiohttp.ClientSession:
        return self._session

    async def send(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        sent = {**self._headers, **{name.replace("_", "-"): value for name, value in (headers or {}).items()}}
        if self._token is not None:
            sent.setdefault("Authorization", f"Bearer {self._token}")
        data = raw if raw is not None else orjson.dumps(body) if body is not None else None
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        async with self._session.request(method, URL(self.url + path), data=data, headers=sent, allow_redirects=False) as response:
            content = await response.read()
            return Reply(response.status, response.headers, orjson.loads(content) if content else None)

    async def ticket(self, *, expect: int = 201, **request: Any) -> Any:
        """Ask for a ticket, and get what is expected."""
        answer = await self.post("/v1/tickets", request)
        assert answer.status == expect, (answer.status, answer.body)
        return answer.body

    async def report(self, ticket: Mapping[str, Any], store: str, outcome: str, size: int = 0, seconds: float = 0.0) -> None:
        told = {"store": store, "outcome": outcome, "bytes": size, "seconds": seconds}
        answer = await self.post(f"/v1/tickets/{ticket['id']}/report", told)
        assert answer.status == 204, answer.body

    async def download(self, image: str, **wishes: Any) -> None:
        """Get an image as a client does, and tell how it went."""
        ticket = await self.ticket(operation="download", image=image, **wishes)
        source, began = ticket["sources"][0], time.monotonic()
        content = await fetch(self._session, source)
        await self.report(ticket, source["store"], "ok", len(content), time.monotonic() - began)


@dataclass(frozen=True)
class House:
    """A broker of two workers and its stores: ``disk-a`` has few slots, ``disk-b`` none, ``dead`` is about to die; perhaps more."""

    broker: BrokerProcess
    postgres: Postgres
    disk_b: StoresidePart
    dead: StoresidePart
    names: tuple[str, ...]
    """The stores that live."""
    stores: tuple[dict[str, Any], ...]
    keystone: KeystonePart | None

    @contextlib.asynccontextmanager
    async def person(self, subject: str, project: str, address: str, role: str = "member") -> AsyncIterator[Person]:
        connector = aiohttp.TCPConnector(local_addr=(address, 0), limit=0)
        token = await asyncio.to_thread(self.broker.token, role, project, subject)
        async with aiohttp.ClientSession(connector=connector) as session:
            yield Person(self.broker.url, session, token)


@contextlib.contextmanager
def house(
    postgres: Postgres, place: Path, *, seaweed: S3Part | None = None, swift: SwiftPart | None = None, keystone: KeystonePart | None = None
) -> Iterator[House]:
    """All of it running, until the block ends. Without a `keystone` the broker is told of one that is not there."""
    (nobody,) = free_ports(1)
    settings = f"""
[memory]
hot_bytes = 6000
[auth]
refusals_per_minute = {REFUSALS}
[auth.keystone]
url = "{keystone.url if keystone is not None else f"http://127.0.0.1:{nobody}"}"
[auth.keystone.roles]
admin = "admin"
"""
    database = postgres.create()
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(
            serve(database, place, settings=settings, http=f"max_connections_per_address = {PER_ADDRESS}\n", options=("--workers", "2"))
        )
        brokers = Brokers((running,), None, running.url, config.load(running.config).credentials_dir)  # type: ignore[arg-type]
        login = {"username": "broker", "user_domain_name": "Default", "project_name": "service", "project_domain_name": "Default"}
        brokers.credential("keystone", {**login, "password": keystone.passwords["broker"] if keystone is not None else "none"})
        a, b, dead = (stack.enter_context(disk_of(brokers, place / name, name)) for name in ("disk-a", "disk-b", "dead"))
        stores = [
            disk_store(
                a, "disk-a", read_slots=SLOTS, write_slots=20, read_bandwidth=10**8, write_bandwidth=10**8, capacity=CAPACITY
            ) | {"site": "eu/az1"},
            disk_store(b, "disk-b", capacity=CAPACITY) | {"site": "eu/az2"},
            disk_store(dead, "dead") | {"site": "us/az1"},
        ]  # fmt: skip
        if seaweed is not None:
            stores.append(s3_store(brokers, seaweed, read_slots=50, write_slots=50))
        if swift is not None:
            stores.append(swift_store(brokers, swift))
        names = tuple(store["name"] for store in stores if store["name"] != "dead")
        yield House(running, postgres, b, dead, names, tuple(stores), keystone)


# -- what happens


async def settle_in(house: House) -> None:
    """Sites and stores are registered, and one of them dies."""
    async with house.person("root", "operators", "127.0.0.1", "admin") as admin:
        for path, network in SITES.items():
            assert (await admin.post("/v1/sites", {"path": path, "networks": [network]})).status == 201
        for store in house.stores:
            made = await admin.post("/v1/stores", store)
            assert made.status == 201, made.body


async def keep_busy(house: House, number: int) -> str:
    """One round of everything; an image for which one has to wait after the last round. Who comes in a later round is somebody else,
    so that old failures are not held against them."""
    async with contextlib.AsyncExitStack() as stack:
        alice, bob, carol = [
            await stack.enter_async_context(house.person(f"{name}-{number}", name, f"127.0.{at}.{number + 1}"))
            for at, name in enumerate(("alice", "bob", "carol"), 1)
        ]
        admin = await stack.enter_async_context(house.person("root", "operators", "127.0.0.1", "admin"))
        content = secrets.token_bytes(1_500_000)
        images = {}
        for name in house.names:
            began = time.monotonic()
            sent = await put(alice, alice.session, content + name.encode(), name)
            await alice.report(sent, name, "ok", len(content), time.monotonic() - began)
            images[name] = sent["image"]
        both = (await put(alice, alice.session, content, "disk-b", "disk-a"))["image"]
        for image in (both, *images.values()):
            await _publish(admin, image)
        for person in (alice, bob, carol):
            await asyncio.gather(*(person.download(image) for name, image in images.items() if name != "disk-a"))
        await alice.download(images["disk-a"])
        asked = await alice.post("/v1/copies", {"image": images["disk-a"], "store": "disk-b"})  # no agent comes
        assert asked.status == 201, asked.body
        batch = await alice.post("/v1/tickets:batch", {"tickets": [{"operation": "download", "image": image} for image in images.values()]})
        for entry in batch.body["tickets"]:
            await alice.delete(f"/v1/tickets/{entry['id']}")
        await _refusals(alice, images["disk-b"])
        await _failures(house, (alice, bob, carol), both, number)
        await _bad_uploads(house, alice, content)
        await _enemies(house, number)
        await _keystone(house, number)
        await _quota(house, admin, images["disk-b"], number)
        return await _fill(house, (alice, bob, carol), images["disk-a"], keep=number > 0)


async def _publish(admin: Person, image: str) -> None:
    found = await admin.get(f"/v1/images/{image}")
    changed = await admin.patch(f"/v1/images/{image}", {"visibility": "public"}, found.etag)
    assert changed.status == 200, changed.body


async def _quota(house: House, admin: Person, image: str, number: int) -> None:
    """A project that may hold one lease asks for another."""
    project = f"frank-{number}"
    assert (await admin.send("PUT", f"/v1/quotas/{project}", {"max_leases": 1})).status in (200, 201)
    async with house.person("frank", project, "127.0.1.77") as frank:
        ticket = await frank.ticket(operation="download", image=image)
        await frank.ticket(expect=429, operation="download", image=image)
        assert (await frank.delete(f"/v1/tickets/{ticket['id']}")).status == 204


async def _fill(house: House, people: tuple[Person, ...], image: str, *, keep: bool) -> str:
    """Every slot of a store is taken, one waits in vain, then until one is given back. With `keep` slots stay taken; else all are
    given back."""
    alice, bob, carol = people
    wanted = {"operation": "download", "image": image, "only": ["disk-a"]}
    held = [(person, await person.ticket(**wanted)) for person in (alice, bob)]
    await carol.ticket(expect=429, **wanted)
    await carol.ticket(expect=429, wait=1, **wanted)
    connection = await asyncpg.connect(house.broker.database)
    try:
        waiting = asyncio.create_task(carol.ticket(wait=60, **wanted))

        async def in_line() -> bool:
            return bool(await connection.fetchval("SELECT count(*) FROM waits"))

        await until(in_line, "nobody waits")
    finally:
        await connection.close()
    await alice.delete(f"/v1/tickets/{held.pop(0)[1]['id']}")
    held.append((carol, await waiting))
    if not keep:
        for person, ticket in held:
            assert (await person.delete(f"/v1/tickets/{ticket['id']}")).status == 204
    return image


async def stand_in_line(house: House, image: str) -> None:
    """A project that holds a slot waits for another one, which nobody gives back, again and again."""
    async with house.person("betty", "bob", "127.0.2.77") as betty:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                await betty.post("/v1/tickets", {"operation": "download", "image": image, "only": ["disk-a"], "wait": 60})


async def _refusals(person: Person, image: str) -> None:
    """Requests that cannot be granted, and a client that asks again and again instead of reporting."""
    for _ in range(4):
        await person.ticket(operation="download", image=image)
    await person.ticket(expect=409, operation="download", image=image, avoid=["disk-b"])
    await person.ticket(expect=409, operation="upload", image={"name": "huge"}, size=10 * CAPACITY, only=["disk-b"])
    await person.get("/v1/nowhere")


async def _failures(house: House, people: tuple[Person, ...], image: str, number: int) -> None:
    """A store that fails clients of several projects and sites, and bytes that change behind the broker's back."""
    for person in people:
        ticket = await person.ticket(operation="download", image=image, only=["disk-b"])
        await person.report(ticket, "disk-b", "failed")
        await person.ticket(expect=409, operation="download", image=image, only=["disk-b"])
    async with house.person(f"dave-{number}", "dave", f"127.0.1.{number + 50}") as dave:
        ticket = await dave.ticket(operation="download", image=image)
        assert (await dave.post(f"/v1/tickets/{ticket['id']}/refresh")).status == 200
        store = ticket["sources"][0]["store"]
        assert (await dave.post(f"/v1/tickets/{ticket['id']}/activate", {"store": store})).status == 200
        await dave.report(ticket, store, "slow", 1000, 5.0)
        victim = secrets.token_bytes(200_000)
        image = (await put(dave, dave.session, victim, "disk-b"))["image"]
        ticket = await dave.ticket(operation="download", image=image)
        path = urlsplit(ticket["sources"][0]["url"]).path.lstrip("/")
        (house.disk_b.root / path).write_bytes(secrets.token_bytes(200_000))
        await dave.report(ticket, "disk-b", "corrupt")


async def _bad_uploads(house: House, person: Person, content: bytes) -> None:
    """Other bytes than declared; and a store that dies between the ticket and the commit, if it has not yet."""
    ticket = await person.ticket(operation="upload", image={"name": "lie"}, only=["disk-a"])
    (place,) = ticket["destinations"]
    if "parts" in place:
        await send(person.session, place["parts"][0], content[:1000])
    else:
        await send(person.session, place, content[:1000])
    refused = await person.post(f"/v1/tickets/{ticket['id']}/commit", said(content[:999]))
    assert refused.status == 409, refused.body
    lost = secrets.token_bytes(1000)
    ticket = await person.ticket(**new_upload(lost, only=["dead"]))
    with contextlib.suppress(ProcessLookupError):
        os.kill(house.dead.pid, signal.SIGKILL)
    await until(lambda: not answers(f"{house.dead.url}/", range(600)))
    answer = await person.post(f"/v1/tickets/{ticket['id']}/commit", said(lost))
    assert answer.status == 503, answer.body


def _stranger(address: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(address, 0)))


async def _enemies(house: House, number: int) -> None:
    """Guessed tokens, too many connections, heads without end."""
    async with _stranger(f"127.0.9.{number + 1}") as session:
        statuses = set()
        for _ in range(3 * REFUSALS):
            async with session.get(f"{house.broker.url}/v1/images", headers={"Authorization": f"Bearer {secrets.token_hex(20)}"}) as answer:
                statuses.add(answer.status)
    assert 401 in statuses
    host, port = urlsplit(house.broker.url).hostname, urlsplit(house.broker.url).port
    opened = [await asyncio.open_connection(host, port, local_addr=(f"127.0.8.{number + 1}", 0)) for _ in range(3 * PER_ADDRESS)]
    opened.append(await asyncio.open_connection(host, port, local_addr=(f"127.0.7.{number + 1}", 0)))
    reader, writer = opened[-1]
    with contextlib.suppress(ConnectionError):
        writer.write(b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 200_000)
        await writer.drain()
        await reader.read()
    for _, writer in opened:
        writer.close()


async def _keystone(house: House, number: int) -> None:
    """Tokens that Keystone knows and does not know, and a Keystone that is gone."""
    if house.keystone is not None and number:
        house.keystone.end()
    async with _stranger(f"127.0.6.{number + 1}") as session:
        tokens = [secrets.token_hex(16)]
        if house.keystone is not None and not number:
            tokens += [await asyncio.to_thread(house.keystone.token, "admin", "admin")] * 2
        for token in tokens:
            async with session.get(f"{house.broker.url}/v1/images", headers={"X-Auth-Token": token}) as answer:
                assert answer.status in (200, 401, 503), await answer.text()


async def lose_the_database(house: House) -> None:
    """Connections end and new ones hang until a background job has noticed; requests are answered 503 meanwhile."""
    url = house.broker.database
    name = url.partition("?")[0].rpartition("/")[2]
    connection = await asyncpg.connect(url.replace(f"/{name}", "/postgres", 1))
    async with house.person("eve", "eve", "127.0.1.99") as eve, aiohttp.ClientSession() as session:

        async def noticed() -> bool:
            assert (await eve.post("/v1/images", {"name": "x"})).status in (201, 503)
            async with session.get(f"{house.broker.metrics_url}/metrics") as answer:
                text = await answer.text()
            return re.search(r'^broker_jobs_total\{outcome="unavailable"', text, re.MULTILINE) is not None

        async def back() -> bool:
            return (await eve.post("/v1/images", {"name": "x"})).status == 201

        try:
            os.kill(house.postgres.pid, signal.SIGSTOP)
            await connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            await until(noticed, "no job noticed that the database is gone")
        finally:
            os.kill(house.postgres.pid, signal.SIGCONT)
            await connection.close()
        await until(back, "the broker did not come back with its database")


def kill_a_worker(house: House) -> None:
    """The one that takes its place counts at once what the catalogue has."""
    children = Path(f"/proc/{house.broker.pid}/task/{house.broker.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
