"""Clients of a storm. They cooperate: bytes move only under a lease, and what they hold they give back, but for some who forget.

A client stays with a broker until that one fails it, then goes to another; with an Idempotency-Key, but for most downloads: what an
unanswered one was granted ends by itself. It counts its lease from
before it first asked, and stops what still moves a good while before the end. A transfer has ended when the store has closed the
connection: only then is the lease given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import aiohttp
import orjson
from yarl import URL

ANSWER_SECONDS = 1.0
"""A broker that does not answer for so long is left."""

CHUNK = 16 << 10

_TIMEOUT = aiohttp.ClientTimeout(total=ANSWER_SECONDS)


@dataclass
class Tally:
    """What the clients were answered, and what they moved."""

    answers: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    transfers: int = 0
    cut: int = 0
    """Transfers that had to stop before their lease could end."""
    doubled: int = 0
    """Second requests with a token in use, which the store refused."""
    committed: list[str] = field(default_factory=list)
    """Images of acknowledged commits."""
    wrong: list[str] = field(default_factory=list)


@dataclass
class Client:
    """One client. `brokers` are URLs, `lease_seconds` how long a lease lasts that is not renewed."""

    session: aiohttp.ClientSession
    brokers: Sequence[str]
    token: str
    image: str
    content: bytes
    lease_seconds: float
    draw: random.Random
    tally: Tally

    def __post_init__(self) -> None:
        self._at = self.draw.choice(self.brokers)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(_NoBroker):
                await (self._upload() if self.draw.random() < 0.1 else self._download())

    async def _download(self) -> None:
        began = self._now()
        asked = {"operation": "download", "image": self.image, "parallel": self.draw.choice((1, 1, 1, 2))}
        ticket = await self._ticket(asked)
        if ticket is None:
            return
        active = [source for source in ticket["sources"] if source["state"] == "active"]
        end = began + self.lease_seconds - 1.5
        if self.draw.random() < 0.2 and (standby := [s for s in ticket["sources"] if s["state"] == "standby"]):
            since = self._now()
            place = self.draw.choice(standby)
            status, body = await self._ask("POST", f"/v1/tickets/{ticket['id']}/activate", {"store": place["store"]})
            if status == 200:
                active = [source for source in body["sources"] if source["store"] == place["store"] and source["state"] == "active"]
                end = since + self.lease_seconds - 1.5
        fate = self.draw.random()
        if fate < 0.02:
            return  # forgotten before a byte moved
        stores = [source["store"] for source in active]
        moving = asyncio.gather(*[self._get(source, end) for source in active])
        if fate < 0.15:
            await self._ask("POST", f"/v1/tickets/{ticket['id']}/refresh", None)
        elif fate < 0.3 and stores:
            await self._ask("POST", f"/v1/tickets/{ticket['id']}/report", {**_report(stores[0], 1), "final": False})
        await moving
        if fate < 0.34:
            return  # forgotten afterwards
        if fate < 0.6:
            for store in stores:
                await self._ask("POST", f"/v1/tickets/{ticket['id']}/report", _report(store, len(self.content)))
        await self._ask("DELETE", f"/v1/tickets/{ticket['id']}", None)

    async def _upload(self) -> None:
        began = self._now()
        content = self.draw.randbytes(16) + self.content[: self.draw.randrange(len(self.content))]
        said = {"size": len(content), "digests": {"sha256": hashlib.sha256(content).hexdigest()}}
        ticket = await self._ticket({"operation": "upload", "image": {"name": "storm"}, **said})
        if ticket is None:
            return
        fate, places = self.draw.random(), [place for place in ticket.get("destinations", ()) if place["state"] == "active"]
        if fate < 0.04 or not places:
            return  # forgotten
        arrived = await self._put(places[0], content, began + self.lease_seconds - 1.5)
        if arrived and fate < 0.7:
            status, body = await self._ask("POST", f"/v1/tickets/{ticket['id']}/commit", {**said, "store": places[0]["store"]})
            if status == 200:
                self.tally.committed.append(body["image"])
                return
        await self._ask("DELETE", f"/v1/tickets/{ticket['id']}", None)

    # -- brokers

    async def _ticket(self, asked: Mapping[str, Any]) -> Any:
        """A ticket, or ``None`` when there is no slot now."""
        status, body = await self._ask("POST", "/v1/tickets", asked)
        if status == 201:
            return body
        await asyncio.sleep(self.draw.uniform(0.02, 0.3))
        return None

    async def _ask(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """What some broker answers. Raises `_NoBroker` when none does."""
        headers = {"Authorization": f"Bearer {self.token}"}
        if method == "POST" and (body is None or body.get("operation") != "download" or self.draw.random() < 0.3):
            headers["Idempotency-Key"] = uuid4().hex
        for _ in range(12):
            try:
                async with self.session.request(method, self._at + path, json=body, headers=headers, timeout=_TIMEOUT) as response:
                    content = await response.read()
                    status = response.status
            except (aiohttp.ClientError, TimeoutError):
                self.tally.unanswered += 1
            else:
                self.tally.answers[
                    f"{method} {path.rpartition('/')[2] if 'tickets/' in path and method == 'POST' else 'ticket'} {status}"
                ] += 1
                if status not in (200, 201, 204, 429, 503):
                    self.tally.wrong.append(f"{method} {path}: {status} {content[:200]!r}")
                if status != 503:
                    return status, orjson.loads(content) if content else None
                await asyncio.sleep(0.05)
            self._at = self.draw.choice(self.brokers)
        raise _NoBroker

    # -- stores

    async def _get(self, source: Mapping[str, Any], end: float) -> None:
        """Read a source slowly, so that transfers overlap."""
        second: asyncio.Task[None] | None = None

        async def read(reader: asyncio.StreamReader) -> int:
            nonlocal second
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.partition(b"\r\n")[0]:
                self.tally.wrong.append(f"GET: {head[:40]!r}")
            if self.draw.random() < 0.1:
                second = asyncio.create_task(self._second(source, end))
            got = 0
            while chunk := await reader.read(CHUNK):
                got += len(chunk)
                await asyncio.sleep(self.draw.uniform(0, 0.003))
            return got

        got = await self._open(source, b"", end, read)
        if got is not None:
            self.tally.transfers += 1
            if got != len(self.content):
                self.tally.wrong.append(f"GET: {got} bytes of {len(self.content)}")
        if second is not None:
            await second

    async def _second(self, source: Mapping[str, Any], end: float) -> None:
        """Use the same token once more while it is in use."""

        async def read(reader: asyncio.StreamReader) -> int:
            head = await reader.readuntil(b"\r\n")
            self.tally.doubled += b" 429 " in head
            if b" 429 " not in head:  # the first had been sent already
                return 0
            await reader.read()
            return 0

        await self._open(source, b"", end, read)

    async def _put(self, place: Mapping[str, Any], content: bytes, end: float) -> bool:
        async def read(reader: asyncio.StreamReader) -> int:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.read()
            return int(head.split(None, 2)[1])

        status = await self._open(place, content, end, read)
        if status is not None:
            self.tally.transfers += 1
            if status not in (200, 201):
                self.tally.wrong.append(f"PUT: {status}")
        return status in (200, 201)

    async def _open(self, place: Mapping[str, Any], content: bytes, end: float, read: Callable[[asyncio.StreamReader], Any]) -> Any:
        """One request on a connection of its own, which the store closes. ``None``: the lease would have ended."""
        url = URL(place["url"], encoded=True)
        headers = {"Host": f"{url.host}:{url.port}", "Connection": "close", **place.get("headers", {})}
        if content:
            headers["Content-Length"] = str(len(content))
        head = f"{place.get('method', 'GET')} {url.raw_path_qs} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in headers.items())
        writer = None
        try:
            async with asyncio.timeout_at(end):
                reader, writer = await _connect(url)
                writer.write(head.encode() + b"\r\n")
                for begin in range(0, len(content), CHUNK):
                    writer.write(content[begin : begin + CHUNK])
                    await writer.drain()
                    await asyncio.sleep(self.draw.uniform(0, 0.01))
                return await read(reader)
        except TimeoutError:
            self.tally.cut += 1
            return None
        finally:
            if writer is not None:
                writer.close()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


class _NoBroker(Exception):
    """No broker answered."""


async def _connect(url: URL) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that takes little at a time, so that a body is not all in the kernel's buffers at once."""
    connection = socket.socket()
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK)
    await asyncio.get_running_loop().sock_connect(connection, (url.host, url.port))
    return await asyncio.open_connection(sock=connection, limit=2 * CHUNK)


def _report(store: str, count: int) -> dict[str, Any]:
    return {"store": store, "outcome": "ok", "bytes": count, "seconds": 0.1}
