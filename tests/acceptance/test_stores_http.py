"""Stores with tokens against the real thing: the verifying file server as a process of its own."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace

import aiohttp
import pytest
from yarl import URL

from broker.errors import Conflict, Invalid, StoreUnavailable
from broker.model import Abilities, PartSeen, Store
from broker.sign.token import TokenSigner, generate_key
from broker.stores.base import Write
from broker.stores.http import HttpStore
from tests.acceptance import store_contract as contract
from tests.parts.records import STORESIDE, storeside_record
from tests.parts.storeside import ISSUER, StoresidePart


@pytest.fixture
def store(storeside_part: StoresidePart, http_session: aiohttp.ClientSession) -> HttpStore:
    return HttpStore(storeside_record(storeside_part), storeside_part.signer, http_session)


async def test_single_upload(store: HttpStore, http_session: aiohttp.ClientSession) -> None:
    await contract.check_single(http_session, store, ["sha256", "md5"])
    await contract.check_octet_stream(http_session, store)
    now = time.time()
    assert URL(store.sign_get("k", now + 60, now, "name").url).query.keys() == {"token"}  # verifiers refuse anything else


async def test_strange_prefix(storeside_part: StoresidePart, http_session: aiohttp.ClientSession) -> None:
    store = HttpStore(storeside_record(storeside_part, prefix="image blobs/ü+%/"), storeside_part.signer, http_session)
    await contract.check_single(http_session, store, ["sha256", "md5"])
    await contract.check_multipart(http_session, store, "sha256")


@pytest.mark.parametrize("digest", ["sha256", "md5"])
async def test_multipart(digest: str, store: HttpStore, http_session: aiohttp.ClientSession) -> None:
    final = await contract.check_multipart(http_session, store, digest)
    seen = await store.stat(final)
    assert seen is not None
    assert seen.metadata["blob"] == "b-2"
    assert len(seen.digests["sha256"]) == 64
    assert await store.delete(final) is True


async def test_abort_and_wrong_parts(store: HttpStore, http_session: aiohttp.ClientSession) -> None:
    await contract.check_abort(http_session, store)
    await contract.check_wrong_parts(http_session, store)
    await contract.check_swapped_part(http_session, store)


async def test_another_object_is_never_taken_for_the_upload(store: HttpStore, http_session: aiohttp.ClientSession) -> None:
    key, bodies = contract.fresh_key("taken"), contract.part_bodies(store, 2)
    upload, handles = await contract.begin_parts(http_session, store, key, bodies)
    for handle, body in zip(handles, bodies, strict=True):
        await contract.send(http_session, handle, body)
    seen = await store.parts(key, upload)
    now = time.time()
    await contract.send(http_session, store.sign_put(Write(key, now + 60, 3), now), b"abc")
    with pytest.raises(Conflict):
        await store.finish(key, upload, seen, {})
    assert await contract.read(http_session, store, key) == b"abc"


async def test_bindings(store: HttpStore, http_session: aiohttp.ClientSession) -> None:
    content, now = secrets.token_bytes(1000), time.time()
    for write in (
        Write(contract.fresh_key(), now + 60, len(content) - 1),
        Write(contract.fresh_key(), now + 60, None, {"sha256": contract.sha256(b"other")}),
        Write(contract.fresh_key(), now + 60, None, {"md5": contract.md5(b"other")}),
    ):
        status, _ = await contract.send(http_session, store.sign_put(write, now), content)
        assert status in (0, 400)
        assert await store.stat(write.key) is None


async def test_what_is_not_enforced_is_not_claimed(store: HttpStore, storeside_part: StoresidePart) -> None:
    import jwt

    now = time.time()
    write = Write("k", now + 60, 3, {"sha256": contract.sha256(b"abc")})
    claims = [
        jwt.decode(URL(handle.url).query["token"], options={"verify_signature": False})
        for handle in (store.sign_put(write, now), store.assuming(Abilities()).sign_put(write, now))
    ]
    assert (claims[0]["len"], claims[0]["dig"]) == (3, f"sha256:{contract.sha256(b'abc')}")
    assert "len" not in claims[1]
    assert "dig" not in claims[1]
    assert {claim["sub"] for claim in claims} == {"transfer"}
    assert claims[0]["jti"] != claims[1]["jti"]
    assert claims[0]["aud"] == storeside_part.audience


async def test_digests_that_the_store_was_not_seen_to_compute_are_left_out(store: HttpStore, http_session: aiohttp.ClientSession) -> None:
    key, now = contract.fresh_key(), time.time()
    await contract.send(http_session, store.sign_put(Write(key, now + 60, 3), now), b"abc")
    seen = await store.assuming(replace(STORESIDE, observes=("md5",))).stat(key)
    assert seen is not None
    assert seen.digests == {"md5": contract.md5(b"abc")}


async def test_internal_endpoint_is_the_one_the_broker_opens(storeside_part: StoresidePart, http_session: aiohttp.ClientSession) -> None:
    record = replace(storeside_record(storeside_part), endpoint="https://disk.example.org/images/", internal_endpoint=storeside_part.url)
    store = HttpStore(record, storeside_part.signer, http_session)
    now = time.time()
    url = URL(store.sign_get("a/b", now + 60, now).url)
    assert (url.host, url.path) == ("disk.example.org", "/images/a/b")
    assert await store.stat("none") is None
    assert abs(await store.clock_skew()) <= 2


async def test_a_key_that_the_store_does_not_know(storeside_part: StoresidePart, http_session: aiohttp.ClientSession) -> None:
    stranger = TokenSigner([generate_key("ES256", time.time() - 60)], ISSUER)
    store = HttpStore(storeside_record(storeside_part), stranger, http_session)
    with pytest.raises(StoreUnavailable):
        await store.stat("k")
    nobody = HttpStore(storeside_record(storeside_part), TokenSigner([], ISSUER), http_session)
    with pytest.raises(StoreUnavailable):
        nobody.sign_get("k", time.time() + 60, time.time())


async def test_parts_keep_their_numbers_whatever_is_missing(store: HttpStore, http_session: aiohttp.ClientSession) -> None:
    key, bodies = contract.fresh_key("gap"), [b"a" * 10, b"b" * 10]
    upload, handles = await contract.begin_parts(http_session, store, key, bodies)
    assert await store.parts(key, upload) == []
    await contract.send(http_session, handles[1], bodies[1])
    assert await store.parts(key, upload) == [PartSeen(2, 10, {"sha256": contract.sha256(bodies[1]), "md5": contract.md5(bodies[1])})]


@pytest.mark.parametrize("endpoint", ["ftp://h", "http://", "http://user:password@h", "http://h/?a=b"])
async def test_bad_endpoint(endpoint: str, http_session: aiohttp.ClientSession) -> None:
    with pytest.raises(Invalid) as error:
        HttpStore(Store(1, "s", "http", "x", endpoint), TokenSigner([], ISSUER), http_session)
    assert error.value.field == "endpoint"
    assert "password" not in str(error.value)
