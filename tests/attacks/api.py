"""The broker itself as a column: its API with bearer tokens, two projects on it, and a file server behind."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web
from yarl import URL

from broker.model import Role
from broker.sign.token import SigningKey, generate_key, jwks
from broker.stores.http import HttpStore
from tests.attacks import forge
from tests.attacks.target import Thing, TokenTarget, fresh_key
from tests.attacks.wire import Reply, Shot
from tests.parts.broker import AUDIENCE
from tests.parts.cluster import SITE, brokers_on, disk_of, disk_store
from tests.parts.postgres import Postgres
from tests.parts.records import STORESIDE, storeside_record

ATTACKER, VICTIM = "project-a", "project-b"


@dataclass(kw_only=True)
class ApiTarget(TokenTarget):
    """`mine` and `victim` are images, private ones of two projects; keys are their ids, and markers stand in their names."""

    admin: str
    known: dict[str, Any] = field(default_factory=dict)
    """What else the attacker may have heard of: the victim's blob, replica, key and tickets."""

    def bearer(self, project: str, role: str = "member", **claims: Any) -> str:
        now = int(time.time())
        payload = {"iss": self.issuer, "aud": self.audience, "sub": "somebody", "project": project, "role": role, "iat": now, "nbf": now}
        signer = self.keys[0]
        merged = {name: value for name, value in {**payload, "exp": now + 600, **claims}.items() if value is not ...}
        return forge.signed({"alg": signer.algorithm, "kid": signer.id, "typ": "JWT"}, merged, signer.private)

    def honest(self, key: str, **claims: Any) -> str:
        return self.bearer(VICTIM if key == self.victim.key else ATTACKER, **claims)

    def carrying(self, token: str, key: str, method: str = "GET", body: bytes | None = None) -> Shot:
        return Shot(method, f"/v1/images/{key}", (("Authorization", f"Bearer {token}"),), body)

    def asking(self, method: str, path: str, body: Any = None, *headers: tuple[str, str], project: str = ATTACKER) -> Shot:
        """A request of a member of `project`."""
        sent = (("Authorization", f"Bearer {self.bearer(project)}"), *headers)
        if body is None:
            return Shot(method, path, sent)
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        return Shot(method, path, (*sent, ("Content-Type", kind)), orjson.dumps(body))

    async def ask(self, method: str, path: str, body: Any = None, *, project: str = ATTACKER) -> Any:
        """What the broker says to an honest request."""
        reply = await self.fire(self.asking(method, path, body, project=project))
        assert reply.ok, f"{method} {path}: {reply.status} {reply.body!r}"
        return orjson.loads(reply.body) if reply.body else None

    async def truth(self, key: str) -> bytes | None:
        reply = await self.fire(Shot("GET", f"/v1/images/{key}", (("Authorization", f"Bearer {self.admin}"),)))
        if reply.status == 404:
            return None
        image = orjson.loads(reply.body)
        return Thing(key, image["name"].encode()).content if image["visibility"] == "private" and image["blobs"] else b"changed"

    async def is_honest(self) -> bool:
        own = await self.fire(self.carrying(self.honest(self.mine.key), self.mine.key))
        foreign = await self.fire(self.carrying(self.honest(self.mine.key), self.victim.key))
        return own.status == 200 and foreign.status == 404

    async def prepare(self) -> None:
        for project, role in ((ATTACKER, "mine"), (VICTIM, "victim")):
            name = f"{role}-{secrets.token_hex(16)}."
            content = secrets.token_bytes(1000)
            ticket = await self._upload(project, {"name": name}, content)
            done = await self.ask(
                "POST", f"/v1/tickets/{ticket['id']}/commit", {"size": 1000, "digests": _sha256(content)}, project=project
            )
            setattr(self, role, Thing(done["image"], name.encode()))
            if role == "victim":
                down = await self.ask("POST", "/v1/tickets", {"operation": "download", "image": done["image"]}, project=project)
                up = await self._upload(project, {"name": "under way"}, secrets.token_bytes(10))
                replica = done["replica"]
                self.known = {
                    "blob": done["blob"]["id"],
                    "replica": replica["id"],
                    "download": down["id"],
                    "upload": up["id"],
                    "content": content,
                }
                self.known |= {"key": replica["key"], "image of the upload": up["image"], "blob of the upload": up["blob"]["id"]}

    async def _upload(self, project: str, image: dict[str, Any], content: bytes) -> Any:
        ticket = await self.ask("POST", "/v1/tickets", {"operation": "upload", "image": image, "size": len(content)}, project=project)
        async with aiohttp.ClientSession() as session:
            place = ticket["destinations"][0]
            async with session.put(URL(place["url"], encoded=True), data=content, headers=place["headers"]) as answer:
                assert answer.status == 201
        return ticket


def _sha256(content: bytes) -> dict[str, str]:
    import hashlib

    return {"sha256": hashlib.sha256(content).hexdigest()}


@contextlib.asynccontextmanager
async def broker_column(place: Path) -> AsyncIterator[ApiTarget]:
    keys = (generate_key("ES256", 0), generate_key("ES256", 0))
    async with _issuer(keys) as issuer, contextlib.AsyncExitStack() as stack:
        settings = "[auth]\nrefusals_per_minute = 1_000_000  # the table sends more than anybody may\n"
        settings += f'[[auth.issuers]]\nissuer = "{issuer}"\naudience = "{AUDIENCE}"\njwks_url = "{issuer}/jwks"\n'

        async def started(part: contextlib.AbstractContextManager[Any]) -> Any:
            """Parts that have a loop of their own are started beside this one."""
            running = await asyncio.to_thread(part.__enter__)
            stack.push_async_callback(asyncio.to_thread, part.__exit__, None, None, None)
            return running

        server = await started(Postgres(None))
        brokers = await started(brokers_on(server.create(), place / "broker", 1, settings=settings))
        disk = await started(disk_of(brokers, place / "disk"))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        admin = brokers.api(session, Role.ADMIN)
        assert (await admin.post("/v1/sites", {"path": SITE})).status == 201
        assert (await admin.post("/v1/stores", disk_store(disk))).status == 201
        yield ApiTarget(
            kind="broker",
            scheme="bearer",
            origin=brokers.running[0].url,
            store=HttpStore(storeside_record(disk, STORESIDE), brokers.keyring.signer, session),
            own=True,
            keys=keys,
            issuer=issuer,
            audience=AUDIENCE,
            admin=brokers.token(Role.ADMIN),
        )


@contextlib.asynccontextmanager
async def _issuer(keys: tuple[SigningKey, ...]) -> AsyncIterator[str]:
    """An identity provider's key set."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(jwks(keys))

    application = web.Application()
    application.router.add_get("/jwks", answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


__all__ = ["ATTACKER", "VICTIM", "ApiTarget", "Reply", "broker_column", "fresh_key"]
