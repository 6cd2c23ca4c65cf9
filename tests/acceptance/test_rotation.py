"""Keys change under load: two brokers, a storeside, nginx and HAProxy, with clients that ask for tickets and use every URL that still
should work. Rotations disturb nobody; a revoked key is dead everywhere in the time that the README states."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import jwt
import orjson
import pytest

from broker.client.answers import instant
from broker.model import Role
from broker.sign.rotation import LEAD_SECONDS, READING_SECONDS
from broker.sign.token import TokenSigner, generate_key
from tests.parts import haproxy, nginx
from tests.parts.broker import Api, mint
from tests.parts.cluster import Brokers, brokers_on, disk_of, disk_store, opened, put, register
from tests.parts.condition import until
from tests.parts.postgres import Postgres
from tests.parts.process import find_program

OVERLAP = 6
REFRESH = 1  # of the storeside and of broker-storeside-keys, as the tests start them
BROKERS_KNOW = 2 + 5  # the README's two seconds, on a busy machine
DEAD_AFTER = dict.fromkeys(("disk", "nginx", "haproxy"), 2 + REFRESH + READING_SECONDS)
DEAD_AFTER["haproxy"] += 5  # its reload, on a busy machine
PAUSE_SECONDS = 0.1
"""Between a client's tickets: a load, and no more of the machine than others need."""
CONTENT = random.Random(3).randbytes(2000)


@dataclass
class Load:
    """Clients of all brokers at once, and what they saw."""

    brokers: Brokers
    session: aiohttp.ClientSession
    image: str
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    issued: list[dict[str, Any]] = field(default_factory=list)
    latest: dict[int, str] = field(default_factory=dict)
    """The key that each broker signed with last."""
    revoking: str | None = None
    revoked: str | None = None
    revoked_at: float = 0.0
    last_accepted: dict[str, float] = field(default_factory=dict)
    stopped: bool = False

    def revoked_ago(self, instant: float) -> float:
        return instant - self.revoked_at

    async def client(self, at: int) -> None:
        """Ask a broker for tickets and use what it gives, and what was given before."""
        api = self.brokers.api(self.session, at=at % 2, subject=f"client-{at}")
        draw = random.Random(at)
        while not self.stopped:
            began = time.monotonic()
            reply = await api.post("/v1/tickets", {"operation": "download", "image": self.image, "count": 3})
            if reply.status != 201 or len(reply.body["sources"]) != 3:
                self.wrong.append(f"a ticket was refused: {reply.status} {reply.body}")
                continue
            self.counts["tickets"] += 1
            for source in reply.body["sources"]:
                source["kid"] = kid = kid_of(source["url"])
                if kid == self.revoked and self.revoked_ago(began) > BROKERS_KNOW:
                    self.wrong.append(f"broker {at % 2} signed with a key that was revoked {self.revoked_ago(began):.2f} s before")
                self.latest[at % 2] = kid
                await self.use(source, "new")
                self.issued.append(source)
            for source in draw.sample(self.issued, min(3, len(self.issued))):
                await self.use(source, "old")
            await asyncio.sleep(PAUSE_SECONDS)

    async def use(self, source: dict[str, Any], age: str) -> None:
        began, store, kid = time.monotonic(), source["store"], source["kid"]
        try:
            async with opened(self.session, source) as response:
                status = response.status
                right = status == 200 and await response.read() == CONTENT
        except aiohttp.ClientError:
            self.counts[f"{store}: connections lost in a reload"] += 1
            return
        if kid == self.revoked:
            late = self.revoked_ago(began)
            if status == 200:
                self.last_accepted[store] = max(late, self.last_accepted.get(store, 0.0))
                self.counts[f"{store}: revoked, accepted {'in time' if late <= DEAD_AFTER[store] else 'too late'}"] += 1
            elif late > DEAD_AFTER[store]:
                self.counts[f"{store}: revoked, refused after the time"] += 1
        elif kid == self.revoking:
            self.counts[f"{store}: while the key was revoked"] += 1
        else:
            self.counts[f"{store}: {age} URLs {'accepted' if right else 'REFUSED'}"] += 1
            if not right:
                self.wrong.append(f"{store} answered {status} to a good token of {kid}")


def kid_of(url: str) -> str:
    kid: str = jwt.get_unverified_header(parse_qs(urlsplit(url).query)["token"][0])["kid"]
    return kid


@pytest.fixture
def bed(postgres: Postgres, tmp_path: Path) -> Iterator[Brokers]:
    settings = f"[keys]\noverlap_seconds = {OVERLAP}\nrotate_after_seconds = 0\n[auth]\nrefusals_per_minute = 1000000\n"
    with contextlib.ExitStack() as stack:
        brokers = stack.enter_context(brokers_on(postgres.create(), tmp_path / "brokers", 2, settings=settings))
        keys, signer = f"{brokers.issuer}/.well-known/jwks.json", TokenSigner([generate_key("ES256", 0)], brokers.issuer)
        parts = {"disk": stack.enter_context(disk_of(brokers, tmp_path / "disk"))}
        for name, kind in (("nginx", nginx), ("haproxy", haproxy)):
            (tmp_path / name).mkdir()
            parts[name] = stack.enter_context(kind.start(tmp_path / name, audience=name, signer=signer, keys=keys))
        asyncio.run(register(brokers, *(disk_store(part, name) for name, part in parts.items())))
        yield brokers


async def key_command(brokers: Brokers, token: str, *arguments: str) -> list[dict[str, Any]]:
    """`broker key …`, as an administrator types it."""
    program = find_program("broker", "pip install -e '.[test]'")
    environment = {**os.environ, "BROKER_URL": brokers.running[0].url, "BROKER_TOKEN": token}
    process = await asyncio.create_subprocess_exec(
        program, "key", *arguments, "--json", env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return [orjson.loads(line) for line in out.splitlines()]


async def rotated(load: Load, token: str, *options: str) -> str:
    """Rotate, and wait until every broker signs with the next key; that one."""
    found = await key_command(load.brokers, token, "rotate", *options)
    heir: str = max((key for key in found if key["state"] in ("scheduled", "signing")), key=lambda key: key["signs_from"])["id"]
    await until(lambda: set(load.latest.values()) == {heir} and len(load.latest) == 2)
    return heir


def test_keys_change_under_load(bed: Brokers) -> None:
    asyncio.run(keys_change_under_load(bed))


async def keys_change_under_load(brokers: Brokers) -> None:
    connector = aiohttp.TCPConnector(force_close=True)  # so that each request meets what the front knows now
    async with aiohttp.ClientSession(connector=connector) as session:
        admin = brokers.token(Role.ADMIN, ttl=86_400)
        made = await put(brokers.api(session), session, CONTENT, "disk", "nginx", "haproxy")
        load = Load(brokers, session, made["image"])
        async with asyncio.TaskGroup() as group:
            for at in range(4):
                group.create_task(load.client(at))
            await until(lambda: len(load.latest) == 2)
            (first,) = set(load.latest.values())
            signed_with = [
                first,
                await rotated(load, admin, "--algorithm", "RS256"),
                await rotated(load, admin),
            ]
            assert len(set(signed_with)) == 3
            # The heir of a key that is revoked must be known everywhere.
            async with asyncio.timeout(120):
                while not any(
                    key["state"] == "standby" and age(key) > OVERLAP + LEAD_SECONDS for key in await key_command(brokers, admin, "list")
                ):
                    await asyncio.sleep(0.2)
            load.revoking = signed_with[-1]
            bearer = await mint(brokers.running[0].database, brokers.running[0].config, Role.MEMBER)
            assert jwt.get_unverified_header(bearer)["kid"] == load.revoking
            own = [Api(broker.url, session, bearer) for broker in brokers.running]
            assert [(await api.get("/v1/images")).status for api in own] == [200, 200]
            answer = await brokers.api(session, Role.ADMIN).as_(admin).delete(f"/v1/keys/{load.revoking}")
            load.revoked, load.revoked_at = load.revoking, time.monotonic()
            assert answer.status == 200, answer.body
            dead = {
                store: [source for source in load.issued if (source["store"], source["kid"]) == (store, load.revoked)]
                for store in DEAD_AFTER
            }
            assert all(dead.values())
            bearers = 0
            while load.revoked_ago(time.monotonic()) < max(DEAD_AFTER.values()) or any(
                not load.counts[f"{store}: revoked, refused after the time"] for store in DEAD_AFTER
            ):
                for at, api in enumerate(own):
                    began = time.monotonic()
                    status = (await api.get("/v1/images")).status
                    if load.revoked_ago(began) > BROKERS_KNOW:
                        bearers += 1
                        if status != 401:
                            load.wrong.append(f"broker {at} answered {status} to a bearer token of a revoked key")
                for sources in dead.values():
                    await load.use(random.choice(sources), "old")
                await asyncio.sleep(PAUSE_SECONDS)
            load.stopped = True
        print(f"\nkeys that signed: {len(signed_with) + 1}; bearer tokens of the revoked key refused after {BROKERS_KNOW} s: {bearers}")
        for what, number in sorted(load.counts.items()):
            print(f"{number:6} {what}")
        for store, late in sorted(load.last_accepted.items()):
            print(f"{store} accepted the revoked key for the last time after {late:.2f} s (stated: {DEAD_AFTER[store]:.0f} s)")
        assert not load.wrong, load.wrong[:5]
        assert not [what for what in load.counts if "too late" in what]
        assert bearers
        for store in DEAD_AFTER:
            assert load.counts[f"{store}: new URLs accepted"] and load.counts[f"{store}: old URLs accepted"]


def age(key: dict[str, Any]) -> float:
    return time.time() - instant(key["created_at"])
