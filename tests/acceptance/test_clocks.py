"""Two brokers whose clocks are 5 s apart, on one database and one store: everything that both take part in is right at either.

The clock is the one that the composition root hands to everything which decides, signs or verifies, so one process can have two.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker.cli.token import sign
from broker.model import Role
from broker.sign.token import TokenSigner, generate_key
from tests.parts import storeside
from tests.parts.broker import AUDIENCE, PROJECT, Api, RunningBroker, broker_on
from tests.parts.cluster import SITE, disk_store, fetch, new_upload, ok, put, reasons, said, send, sources
from tests.parts.condition import until

APART = 5.0
FAILURE_SECONDS = 8.0
CONTENT = b"clock" * 1000
SETTINGS = {"policy": {"ranking": {"failure_seconds": FAILURE_SECONDS}, "admission": {"min_lease_seconds": 8.0, "max_lease_seconds": 8.0}}}


class Place:
    """The brokers, the one with the later clock first; ``one`` is a store with a single read slot, ``free`` one without limits."""

    def __init__(self, brokers: list[RunningBroker], session: aiohttp.ClientSession, image: str) -> None:
        self.brokers, self.session, self.image = brokers, session, image

    def api(self, at: int, role: str = "member", **who: Any) -> Api:
        return Api(self.brokers[at].url, self.session, self.brokers[at].token(role, **who))

    async def download(self, at: int, only: str, **headers: str) -> Any:
        return await self.api(at).post("/v1/tickets", {"operation": "download", "image": self.image, "only": [only]}, **headers)


@pytest.fixture
async def place(database: str, session: aiohttp.ClientSession, tmp_path: Path) -> AsyncIterator[Place]:
    issuer = "http://clocks.test"
    settings = {**SETTINGS, "http": {"public_url": issuer}}
    async with (
        broker_on(database, tmp_path, settings, clock=lambda: time.time() + APART) as ahead,
        broker_on(database, tmp_path, settings) as behind,
    ):
        admin = Api(ahead.url, session, ahead.token("admin"))
        ok(await admin.post("/v1/sites", {"path": SITE}), 201)
        signer = TokenSigner([generate_key("ES256", 0)], issuer)  # never used: the brokers sign
        keys = f"{ahead.url}/.well-known/jwks.json"
        (tmp_path / "one").mkdir(), (tmp_path / "free").mkdir()
        with (
            storeside.start(tmp_path / "one", audience="one", signer=signer, keys=keys) as one,
            storeside.start(tmp_path / "free", audience="free", signer=signer, keys=keys) as free,
        ):
            for store in (disk_store(one, "one", read_slots=1), disk_store(free, "free")):
                # While they were started nobody answered for their keys: this process was waiting for them.
                await until(partial(registered, admin, store))
            made = await put(Api(ahead.url, session, ahead.token()), session, CONTENT, "one", "free")
            place = Place([ahead, behind], session, made["image"])

            async def known() -> bool:
                return bool((await place.download(1, "free")).status == 201)

            await until(known)
            yield place


async def registered(admin: Api, store: dict[str, Any]) -> bool:
    made = await admin.post("/v1/stores", store)
    assert made.status in (201, 503), made.body
    return made.status == 201


async def tickets_tokens_and_uploads(place: Place) -> None:
    """What one signs the store takes at once; what one gives the other serves; a bearer token is good at both from its first second."""
    for at in (0, 1):
        other = place.api(1 - at)
        ticket = ok(await place.download(at, "free"), 201)
        assert await fetch(place.session, sources(ticket)["free"]) == CONTENT
        assert ok(await other.get(f"/v1/tickets/{ticket['id']}"))["state"] == "open"
        again = ok(await other.post(f"/v1/tickets/{ticket['id']}/refresh"))
        assert await fetch(place.session, sources(again)["free"]) == CONTENT
        report = {"store": "free", "outcome": "ok", "bytes": len(CONTENT), "seconds": 0.1}
        assert (await other.post(f"/v1/tickets/{ticket['id']}/report", report)).status == 204
        assert (await other.delete(f"/v1/tickets/{ticket['id']}")).status == 204
        content = CONTENT + bytes([at])
        upload = ok(await place.api(at).post("/v1/tickets", {**new_upload(content), "only": ["free"]}), 201)
        assert await send(place.session, upload["destinations"][0], content) in (200, 201)
        assert ok(await other.post(f"/v1/tickets/{upload['id']}/commit", said(content)))["image"]
    for ahead in (APART, -APART):
        token = sign(place.brokers[0].context.keys, AUDIENCE, Role.MEMBER, PROJECT, "alice", 60, None, time.time() + ahead)
        for at in (0, 1):
            assert (await place.api(at).as_(token).get("/v1/images")).status == 200


async def leases_and_idempotency(place: Place) -> None:
    """The one slot is never granted twice, ends when the database says so, and a retry at the other broker is the same ticket."""
    for at in (0, 1):
        ticket = ok(await place.download(at, "one", Idempotency_Key=f"key-{at}"), 201)
        retried = ok(await place.download(1 - at, "one", Idempotency_Key=f"key-{at}"), 201)
        assert retried["id"] == ticket["id"]
        ends = [ok(await place.api(each).get(f"/v1/tickets/{ticket['id']}"))["places"][0]["lease_expires_at"] for each in (0, 1)]
        assert ends[0] == ends[1]
        for each in (0, 1):
            full = await place.download(each, "one")
            assert full.status == 429
            assert 1 <= int(full.headers["Retry-After"]) <= 120
        if at == 0:
            assert (await place.api(1).delete(f"/v1/tickets/{ticket['id']}")).status == 204

    async def ended() -> bool:  # nobody gives the second one back
        return bool((await place.download(0, "one")).status == 201)

    await until(ended)


async def exclusions_and_the_change_log(place: Place) -> None:
    """A failure excludes at both, and ends at both; what one broker changes the other takes over."""
    body = {"operation": "download", "image": place.image}
    ticket = ok(await place.download(1, "free"), 201)
    report = {"store": "free", "outcome": "failed", "bytes": 0, "seconds": 0.1}
    assert (await place.api(0).post(f"/v1/tickets/{ticket['id']}/report", report)).status == 204
    for each in (0, 1):
        seen = await place.api(each).post("/v1/tickets", body)
        assert reasons(seen.body["excluded"]).get("free") == "recently-failed", (each, seen.body)
    for each in (0, 1):

        async def back(each: int = each) -> bool:
            return bool((await place.download(each, "free")).status == 201)

        await until(back)
    for at in (0, 1):
        for enabled in (False, True):
            ok(await place.api(at, "admin").patch("/v1/stores/free", {"enabled": enabled}, "*"))

            async def told(at: int = at, enabled: bool = enabled) -> bool:
                return ((await place.download(1 - at, "free")).status == 201) is enabled

            await until(told)


async def test_clocks_that_are_apart(place: Place) -> None:
    """One test, since to set the stage costs more than the checks."""
    await tickets_tokens_and_uploads(place)
    await leases_and_idempotency(place)
    await exclusions_and_the_change_log(place)
