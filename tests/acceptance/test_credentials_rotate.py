"""The keys of S3 and Swift change while brokers work: they take the new ones without a restart, and no good URL is refused."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import orjson
import pytest

from broker.client.answers import instant
from broker.sign.tempurl import temp_url
from tests.parts.cluster import Brokers, brokers_on, fetch, ok, opened, put, register, s3_store, swift_store
from tests.parts.condition import until
from tests.parts.postgres import Postgres
from tests.parts.seaweedfs import S3Part
from tests.parts.swift import SwiftPart

CONTENTS: dict[str, bytes] = {}
"""What was uploaded, by image."""


@pytest.fixture(scope="module")
def brokers(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    with brokers_on(postgres.create(), tmp_path_factory.mktemp("brokers"), 2) as running:
        yield running


def replace_credential(brokers: Brokers, name: str, entries: Mapping[str, str]) -> None:
    """As an operator should: in one step."""
    new = brokers.credentials_dir / f"{name}.new"
    new.touch(mode=0o600)
    new.write_bytes(orjson.dumps(dict(entries)))
    new.replace(brokers.credentials_dir / f"{name}.json")


async def uploaded(brokers: Brokers, session: aiohttp.ClientSession, store: str) -> str:
    """A new image there."""
    content = secrets.token_bytes(3000)
    image: str = (await put(brokers.api(session), session, content, store))["image"]
    CONTENTS[image] = content
    return image


async def source(brokers: Brokers, session: aiohttp.ClientSession, image: str, at: int) -> dict[str, Any]:
    """The one source of a ticket of the broker number `at`."""
    ticket = ok(await brokers.api(session, at=at).post("/v1/tickets", {"operation": "download", "image": image}), 201)
    assert [each["store"] for each in ticket["sources"]], ticket["excluded"]
    return dict(ticket["sources"][0])


async def until_all(brokers: Brokers, session: aiohttp.ClientSession, image: str, condition: Callable[[dict[str, Any]], bool]) -> None:
    """Until every broker gives such a source; whatever it gives meanwhile has to work."""
    for at in range(len(brokers.running)):
        async with asyncio.timeout(60):
            while True:
                place = await source(brokers, session, image, at)
                assert await fetch(session, place) == CONTENTS[image]
                if condition(place):
                    break
                await asyncio.sleep(0.1)


def access_key(place: Mapping[str, Any]) -> str:
    return parse_qs(urlsplit(place["url"]).query)["X-Amz-Credential"][0].partition("/")[0]


async def status_of(session: aiohttp.ClientSession, place: Mapping[str, Any]) -> int:
    async with opened(session, place) as response:
        return response.status


async def test_the_keys_of_an_s3_store_change(brokers: Brokers, seaweedfs: S3Part) -> None:
    await register(brokers, s3_store(brokers, seaweedfs, "weed"))
    first, second = seaweedfs.credential, dict(zip(("access_key", "secret_key"), seaweedfs.second, strict=True))
    async with aiohttp.ClientSession() as session:
        image = await uploaded(brokers, session, "weed")
        old = await source(brokers, session, image, 0)
        assert access_key(old) == first["access_key"]
        replace_credential(brokers, "weed", second)
        await until_all(brokers, session, image, lambda place: access_key(place) == second["access_key"])
        assert await fetch(session, old) == CONTENTS[image]  # the store knows both still
        # The broker's own requests go by the new one too.
        await put(brokers.api(session, at=1), session, secrets.token_bytes(100), "weed")


async def test_keys_for_a_session_are_renewed_under_load(brokers: Brokers, seaweedfs: S3Part) -> None:
    """Every second a credential that ends in 20 s, of one key and the other in turn: each URL works, and none outlives what signed it."""
    name = "lent"
    pairs = (tuple(seaweedfs.credential.values()), seaweedfs.second)
    ends: dict[str, list[int]] = {pair[0]: [] for pair in pairs}

    def renew(turn: int) -> None:
        access, secret = pairs[turn % 2]
        ends[access].append(int(time.time()) + 20)
        entries = {"access_key": access, "secret_key": secret, "expires_at": str(ends[access][-1])}
        replace_credential(brokers, name, entries) if turn else brokers.credential(name, entries)

    renew(0)
    store = s3_store(brokers, seaweedfs, "weed-lent")
    await register(brokers, {**store, "credential": name, "settings": {**store["settings"], "prefix": "lent/"}})
    used = 0
    async with aiohttp.ClientSession() as session:
        image = await uploaded(brokers, session, "weed-lent")
        stop = asyncio.Event()

        async def client(at: int) -> None:
            nonlocal used
            while not stop.is_set():
                place = await source(brokers, session, image, at)
                assert await fetch(session, place) == CONTENTS[image]
                assert instant(place["expires_at"]) <= max(ends[access_key(place)])
                used += 1
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as group:
            for at in (0, 1, 0, 1):
                group.create_task(client(at))
            for turn in range(1, 8):
                before = used
                await asyncio.sleep(1)
                await until(lambda before=before: used > before)  # type: ignore[misc]
                renew(turn)
            last = pairs[7 % 2][0]

            def newest(place: Mapping[str, Any]) -> bool:
                return access_key(place) == last and instant(place["expires_at"]) == ends[last][-1]

            await until_all(brokers, session, image, newest)
            stop.set()
    print(f"{used} URLs used while the credential was renewed 7 times")


async def test_the_two_key_slots_of_a_swift_account(brokers: Brokers, swift: SwiftPart) -> None:
    """Step by step as the README says: the new key into the second slot, then the credential, then the old key out."""
    keys = [secrets.token_hex(20) for _ in range(2)]
    login = {"X-Auth-User": "other:other", "X-Auth-Key": swift.key}
    async with aiohttp.ClientSession() as session:
        async with session.get(swift.auth_url, headers=login) as answer:
            headers = {"X-Auth-Token": answer.headers["X-Auth-Token"]}
        account = f"{swift.endpoint}/v1/AUTH_other"

        async def set_keys(first: str, second: str) -> None:
            slots = {"X-Account-Meta-Temp-URL-Key": first, "X-Account-Meta-Temp-URL-Key-2": second}
            async with session.post(account, headers=headers | slots) as answer:
                assert answer.status == 204

        await set_keys(keys[0], "")
        for container in ("turning", "turning_segments"):
            async with session.put(f"{account}/{container}", headers=headers) as answer:
                assert answer.status in (201, 202)
        entries = {**swift.credential, "user": "other:other", "temp_url_key": keys[0]}
        del entries["temp_url_key2"]
        store = swift_store(brokers, swift, "turning", settings={"account": "AUTH_other", "container": "turning"})
        brokers.credential("turning", entries)
        await register(brokers, store)
        image = await uploaded(brokers, session, "turning")
        old = await source(brokers, session, image, 0)
        assert await fetch(session, old) == CONTENTS[image]

        await set_keys(keys[0], keys[1])
        replace_credential(brokers, "turning", {**entries, "temp_url_key": keys[1], "temp_url_key2": keys[0]})
        await until_all(brokers, session, image, lambda place: True)
        assert await fetch(session, old) == CONTENTS[image]

        replace_credential(brokers, "turning", {**entries, "temp_url_key": keys[1]})
        # The old one goes when no broker signs with it any more.
        await until_all(brokers, session, image, lambda place: signature(place, keys[1]))
        await set_keys("", keys[1])

        async def old_is_dead() -> bool:
            return await status_of(session, old) == 401

        await until(old_is_dead, seconds=120)
        await until_all(brokers, session, image, lambda place: True)


def signature(place: Mapping[str, Any], key: str) -> bool:
    """Whether a TempURL is signed with `key`."""

    parts = urlsplit(place["url"])
    expires = float(parse_qs(parts.query)["temp_url_expires"][0])
    made = temp_url(place["method"], f"{parts.scheme}://{parts.netloc}", parts.path, key, expires, digest="sha256")
    return parse_qs(urlsplit(made).query)["temp_url_sig"] == parse_qs(parts.query)["temp_url_sig"]
