"""A broker that says what a test tells it to say, and stores that do what they should not.

Every request to it is checked against the contract (schemas/openapi.json), and so is every answer it gives: an engine that
works with this one speaks the protocol. Stores serve files from memory; the way they misbehave is chosen by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import jsonschema_rs
import orjson
from aiohttp import web

_CONTRACT = orjson.loads((Path(__file__).parents[2] / "schemas" / "openapi.json").read_bytes())


def check(name: str, document: Any) -> None:
    """Fails the test when `document` is not what the contract calls `name`."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": _CONTRACT["components"]}
    jsonschema_rs.Draft202012Validator(schema).validate(document)


def rfc3339(instant: float) -> str:
    return datetime.fromtimestamp(instant, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass
class FakeStore:
    """One store: how it behaves, and what was asked of it.

    `mode`: good · cut (ends after `after` bytes) · hang (sends `after` bytes, then nothing) · corrupt (one byte differs, at offset
    `after`) · wrong-range · wrong-size · whole (200 for ranges) · chunked (whole, without a length) · slow (64 KiB every 50 ms) ·
    status (answers `status`) · expired-once (403 for URLs that were not signed again)
    """

    name: str
    mode: str = "good"
    after: int = 1 << 20
    status: int = 500
    state: str = "standby"
    lives: float = 3600.0
    kind: str = "http"
    part_size: int | None = None
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    parts: dict[int, bytes] = field(default_factory=dict)
    taken: list[int] = field(default_factory=list)
    refuse_parts: int = 0


@dataclass
class FakeBroker:
    """One blob, some stores, and everything that was reported."""

    content: bytes
    stores: dict[str, FakeStore]
    blob: UUID = field(default_factory=uuid4)
    image: UUID = field(default_factory=uuid4)
    pieces: int | None = None
    digest: str | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    generation: int = 0
    ticket_state: str = "open"
    busy: int = 0
    retry_after: int = 0
    down: bool = False
    url: str = ""
    tickets: list[UUID] = field(default_factory=list)
    keys: dict[str, int] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        return self.digest or hashlib.sha256(self.content).hexdigest()

    def outcomes(self) -> dict[str, str]:
        return {report["store"]: report["outcome"] for report in self.reports if report.get("final", True)}

    # --- the broker ---

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._note])
        app.router.add_post("/v1/tickets", self._create)
        app.router.add_get("/v1/tickets/{ticket}", self._ticket)
        app.router.add_delete("/v1/tickets/{ticket}", self._release)
        app.router.add_post("/v1/tickets/{ticket}/refresh", self._refresh)
        app.router.add_post("/v1/tickets/{ticket}/activate", self._activate)
        app.router.add_post("/v1/tickets/{ticket}/report", self._report)
        app.router.add_post("/v1/tickets/{ticket}/parts", self._parts)
        app.router.add_post("/v1/tickets/{ticket}/commit", self._commit)
        app.router.add_get("/v1/blobs/{blob}", self._blob)
        app.router.add_get("/v1/images/{image}", self._no_image)
        app.router.add_get("/stores/{store}/{generation}", self._serve)
        app.router.add_put("/stores/{store}/{generation}/{number}", self._take)
        return app

    @web.middleware
    async def _note(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        if request.path.startswith("/v1/"):
            self.asked.append((request.method, request.path.rpartition("/")[2]))
            if self.down:
                assert request.transport is not None
                request.transport.abort()
                raise web.HTTPServiceUnavailable
            assert request.method != "POST" or request.headers["Idempotency-Key"]
            assert request.headers["X-Client-Instance"]
        return await handler(request)

    async def _no_image(self, _: web.Request) -> web.Response:
        return self._problem("not-found", 404)

    def _problem(self, name: str, status: int, **more: Any) -> web.Response:
        body = {"type": f"/problems/{name}", "title": name, "status": status, **more}
        check("Problem", body)
        return web.json_response(body, status=status, content_type="application/problem+json")

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        check("TicketRequest", body)
        self.requests.append(body)
        if self.busy:
            self.busy -= 1
            return self._problem("busy", 429, retry_after=self.retry_after)
        self.tickets.append(uuid4())
        for store in self.stores.values():
            store.state = "standby"
        chosen = [name for name in self.stores if name not in body.get("avoid", ())]
        for name in chosen[: body.get("parallel", 1)]:
            self.stores[name].state = "active"
        if not chosen:
            return self._problem("no-source", 409)
        return self._answer(body["operation"], 201, chosen)

    def _answer(self, operation: str, status: int = 200, chosen: list[str] | None = None) -> web.Response:
        names = chosen or list(self.stores)
        places = [
            self._source(rank, name) if operation == "download" else self._destination(rank, name) for rank, name in enumerate(names, 1)
        ]
        blob: dict[str, Any] = {"id": str(self.blob)}
        if operation == "download":
            blob |= {"size": len(self.content), "digests": {"sha256": self.sha256}, "state": "active"}
        body = {
            "id": str(self.tickets[-1]), "operation": operation, "state": self.ticket_state, "blob": blob, "image": str(self.image),
            "expires_at": rfc3339(time.time() + 3600), ("sources" if operation == "download" else "destinations"): places, "excluded": [],
        }  # fmt: skip
        check("Ticket", body)
        return web.json_response(body, status=status)

    def _place(self, rank: int, store: FakeStore) -> dict[str, Any]:
        estimate = {"seconds": 1.0, "rate": 1e8, "setup_seconds": 0.01, "success": 1.0, "basis": "a prior"}
        return {
            "rank": rank, "store": store.name, "site": "eu/az1", "kind": store.kind, "state": store.state, "estimate": estimate,
            "weight": 1.0, "expires_at": rfc3339(time.time() + store.lives),
        }  # fmt: skip

    def _source(self, rank: int, name: str) -> dict[str, Any]:
        store = self.stores[name]
        place = self._place(rank, store)
        return place | {"method": "GET", "url": f"{self.url}/stores/{name}/{self.generation}?sig=SECRET", "headers": {"X-Signed": "yes"}}

    def _destination(self, rank: int, name: str) -> dict[str, Any]:
        store = self.stores[name]
        place = self._place(rank, store)
        if store.state == "standby":
            return place
        if store.part_size is None:
            return place | {"method": "PUT", "url": f"{self.url}/stores/{name}/{self.generation}/1", "headers": {}}
        return place | {"part_size": store.part_size, "parts": [self._part(store, number) for number in self._numbers(store)[:2]]}

    def _numbers(self, store: FakeStore) -> list[int]:
        size = self.requests[-1].get("size") if self.requests else None
        if size is None or store.part_size is None:
            return [1]
        return list(range(1, -(-size // store.part_size) + 1))

    def _part(self, store: FakeStore, number: int, size: int | None = None) -> dict[str, Any]:
        assert store.part_size is not None
        size = size or next((request["size"] for request in reversed(self.requests) if "size" in request), None)
        offset = (number - 1) * store.part_size
        length = store.part_size if size is None else min(store.part_size, size - offset)
        return {
            "number": number, "offset": offset, "length": length, "method": "PUT", "headers": {},
            "url": f"{self.url}/stores/{store.name}/{self.generation}/{number}", "expires_at": rfc3339(time.time() + store.lives),
        }  # fmt: skip

    async def _ticket(self, request: web.Request) -> web.Response:
        places = [
            {
                "store": store.name, "state": store.state, "part_size": store.part_size or 1,
                "seen": [{"number": number, "size": len(part)} for number, part in sorted(store.parts.items())],
            }
            for store in self.stores.values()
        ]  # fmt: skip
        body = {
            "id": request.match_info["ticket"], "operation": "upload", "state": self.ticket_state, "blob": {"id": str(self.blob)},
            "expires_at": rfc3339(time.time() + 3600), "places": places,
        }  # fmt: skip
        check("TicketState", body)
        return web.json_response(body)

    async def _release(self, request: web.Request) -> web.Response:
        return web.Response(status=204)

    async def _refresh(self, request: web.Request) -> web.Response:
        self.generation += 1
        for store in self.stores.values():
            store.lives = 3600
        return self._answer("download" if self.content else "upload")

    async def _activate(self, request: web.Request) -> web.Response:
        body = await request.json()
        check("StoreChoice", body)
        self.stores[body["store"]].state = "active"
        return self._answer(self.requests[-1]["operation"])

    async def _report(self, request: web.Request) -> web.Response:
        body = await request.json()
        check("Report", body)
        self.reports.append(body)
        return web.Response(status=204)

    async def _parts(self, request: web.Request) -> web.Response:
        body = await request.json()
        check("PartsRequest", body)
        self.generation += 1
        store = self.stores[body["store"]]
        answer = {"store": store.name, "parts": [self._part(store, number, body.get("size")) for number in body["numbers"]]}
        check("PartsAnswer", answer)
        return web.json_response(answer)

    async def _commit(self, request: web.Request) -> web.Response:
        body = await request.json()
        check("CommitRequest", body)
        self.commits.append(body)
        store = self.stores[body["store"]]
        content = b"".join(part for _, part in sorted(store.parts.items()))
        observed = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if observed["size"] != body["size"] or observed["sha256"] != body["digests"]["sha256"]:
            return self._problem("mismatch", 409, declared=body["digests"], observed=observed)
        self.ticket_state = "committed"
        replica = {
            "id": str(uuid4()), "blob": str(self.blob), "store": store.name, "site": "eu/az1", "purpose": "origin",
            "state": "active", "deletable": True,
        }  # fmt: skip
        blob = {"id": str(self.blob), "size": len(content), "digests": body["digests"], "state": "active"}
        answer = {"id": request.match_info["ticket"], "state": "committed", "image": str(self.image), "blob": blob, "replica": replica}
        check("CommitAnswer", answer)
        return web.json_response(answer)

    async def _blob(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = {"id": str(self.blob), "size": len(self.content), "digests": {"sha256": self.sha256}, "state": "active"}
        if self.pieces:
            starts = range(0, len(self.content), self.pieces)
            digests = [hashlib.sha256(self.content[start : start + self.pieces]).hexdigest() for start in starts]
            body["pieces"] = {"length": self.pieces, "algorithm": "sha256", "digests": digests}
        check("Blob", body)
        return web.json_response(body)

    # --- the stores ---

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        store = self.stores[request.match_info["store"]]
        store.requests.append(request.headers.get("Range", ""))
        assert request.headers["X-Signed"] == "yes"
        if store.mode == "status":
            return web.Response(status=store.status)
        if store.mode == "expired-once" and int(request.match_info["generation"]) == 0:
            return web.Response(status=403)
        start, end = 0, len(self.content)
        status = 200
        headers = {}
        if store.mode not in ("whole", "chunked"):
            first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
            start, end, status = int(first), int(last) + 1, 206
            told = start + 1 if store.mode == "wrong-range" else start
            size = len(self.content) + 1 if store.mode == "wrong-size" else len(self.content)
            headers["Content-Range"] = f"bytes {told}-{end - 1}/{size}"
        body = self.content[start:end]
        if store.mode == "corrupt" and start <= store.after < end:
            place = store.after - start
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        response = web.StreamResponse(status=status, headers=headers)
        if store.mode != "chunked":
            response.content_length = len(body)
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await self._send(request, response, store, body)
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, store: FakeStore, body: bytes) -> None:
        step = 65536 if store.mode == "slow" else 1 << 20
        for place in range(0, len(body), step):
            block = body[place : place + step]
            if store.mode in ("cut", "hang") and store.sent + len(block) > store.after:
                await response.write(block[: max(0, store.after - store.sent)])
                store.sent = store.after
                if store.mode == "hang":
                    await asyncio.sleep(3600)
                assert request.transport is not None
                request.transport.close()
                return
            await response.write(block)
            store.sent += len(block)
            if store.mode == "slow":
                await asyncio.sleep(0.05)
        await response.write_eof()

    async def _take(self, request: web.Request) -> web.Response:
        store = self.stores[request.match_info["store"]]
        number = int(request.match_info["number"])
        store.requests.append(f"PUT {number}")
        if store.mode == "status":
            await request.read()
            return web.Response(status=store.status)
        if store.mode == "expired-once" and int(request.match_info["generation"]) == 0:
            await request.read()
            return web.Response(status=403)
        content = await request.read()
        if store.refuse_parts:
            store.refuse_parts -= 1
            return web.Response(status=500)
        if store.mode == "slow":
            await asyncio.sleep(0.3)
        if store.mode == "hang" and len(store.taken) >= 2:
            await asyncio.sleep(3600)
        store.parts[number] = content[:-1] + bytes([content[-1] ^ 1]) if store.mode == "corrupt" else content
        store.taken.append(number)
        return web.Response(headers={"ETag": f'"{hashlib.md5(store.parts[number]).hexdigest()}"'})


@contextlib.asynccontextmanager
async def serving(broker: FakeBroker) -> AsyncIterator[FakeBroker]:
    """Serve on a free port of 127.0.0.1 until the block ends."""
    runner = web.AppRunner(broker.application(), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    broker.url = f"http://127.0.0.1:{port}"
    try:
        yield broker
    finally:
        await runner.cleanup()
