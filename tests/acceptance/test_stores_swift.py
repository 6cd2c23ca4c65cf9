"""Swift against the real thing: TempURLs by clients; copies, manifests and deletion by the broker's own token."""

from __future__ import annotations

import time
from dataclasses import replace

import aiohttp
import pytest
from yarl import URL

from broker.errors import Invalid, NotFound, NotUploaded, StoreUnavailable
from broker.model import Store
from broker.stores.base import PartWrite, Write
from broker.stores.swift import SwiftStore
from tests.acceptance import store_contract as contract
from tests.parts.records import swift_record
from tests.parts.swift import SwiftPart


@pytest.fixture
def store(swift: SwiftPart, http_session: aiohttp.ClientSession) -> SwiftStore:
    return SwiftStore(swift_record(swift), swift.credential, http_session)


async def own_listing(store: SwiftStore, swift: SwiftPart, container: str, prefix: str) -> list[str]:
    """The names in a container, as its owner sees them."""
    answer = await store._ask("GET", container, "", query={"prefix": prefix, "format": "plain"}, expect=(200, 204))
    return answer.body.decode().split()


async def test_single_upload(store: SwiftStore, http_session: aiohttp.ClientSession) -> None:
    await contract.check_single(http_session, store, ["md5"])
    await contract.check_octet_stream(http_session, store)
    await contract.check_filename(http_session, store)
    await contract.check_missing(store)


async def test_sha512_signatures_and_a_strange_prefix(swift: SwiftPart, http_session: aiohttp.ClientSession) -> None:
    store = SwiftStore(swift_record(swift, digest="sha512", prefix="image blobs/ü+%/"), swift.credential, http_session)
    await contract.check_single(http_session, store, ["md5"])
    await contract.check_multipart(http_session, store)


async def test_large_object(store: SwiftStore, swift: SwiftPart, http_session: aiohttp.ClientSession) -> None:
    final = await contract.check_multipart(http_session, store)
    seen = await store.stat(final)
    assert seen is not None
    assert seen.metadata["blob"] == "b-2"
    # The ETag of a manifest proves nothing about the content; its segments do.
    assert seen.digests == {}
    assert [part.number for part in seen.parts] == [1, 2, 3]
    assert all(len(part.digests["md5"]) == 32 for part in seen.parts)
    upload = seen.metadata["upload"]
    assert len(await own_listing(store, swift, "images_segments", f"sealed/{upload}/")) == 3
    assert await store.delete(final) is True
    assert await own_listing(store, swift, "images_segments", f"sealed/{upload}/") == []


async def test_staged_segments_are_deleted_even_those_that_came_late(
    store: SwiftStore, swift: SwiftPart, http_session: aiohttp.ClientSession
) -> None:
    key, bodies = contract.fresh_key("late"), contract.part_bodies(store, 2)
    upload, handles = await contract.begin_parts(http_session, store, key, bodies)
    for handle, body in zip(handles, bodies, strict=True):
        await contract.send(http_session, handle, body)
    await store.finish(key, upload, await store.parts(key, upload), {})
    assert await own_listing(store, swift, "images_segments", f"staging/{upload}/") == []
    await contract.send(http_session, handles[0], bodies[0])
    await store.abort(key, upload)
    assert await own_listing(store, swift, "images_segments", f"staging/{upload}/") == []
    assert await contract.read(http_session, store, key) == b"".join(bodies)


async def test_abort_and_wrong_parts(store: SwiftStore, http_session: aiohttp.ClientSession) -> None:
    await contract.check_abort(http_session, store)
    await contract.check_wrong_parts(http_session, store)
    await contract.check_swapped_part(http_session, store)


async def test_a_wrong_size_is_not_joined(store: SwiftStore, http_session: aiohttp.ClientSession) -> None:
    key, bodies = contract.fresh_key("size"), contract.part_bodies(store, 2)
    upload, handles = await contract.begin_parts(http_session, store, key, bodies)
    for handle, body in zip(handles, bodies, strict=True):
        await contract.send(http_session, handle, body)
    seen = list(await store.parts(key, upload))
    with pytest.raises(NotUploaded):
        await store.finish(key, upload, [replace(seen[0], size=seen[0].size + 1), seen[1]], {})
    assert await store.stat(key) is None
    assert await store.finish(key, upload, seen, {}) == key


async def test_listing_goes_over_pages(store: SwiftStore, http_session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.stores.swift._LISTING_PAGE", 2)
    await contract.check_multipart(http_session, store)


async def test_an_uploader_cannot_make_the_sealed_copy_expire(
    store: SwiftStore, swift: SwiftPart, http_session: aiohttp.ClientSession
) -> None:
    staging, final, now = contract.fresh_key("staging"), contract.fresh_key("final"), time.time()
    handle = store.sign_put(Write(staging, now + 60, 4), now)
    status, _ = await contract.send(http_session, handle, b"mine", headers={"X-Delete-After": "3600", "Content-Type": "text/html"})
    assert status == 201
    await store.seal(staging, final, {})
    answer = await store._ask("HEAD", "images", final, expect=(200,))
    assert "X-Delete-At" not in answer.headers
    assert answer.headers["Content-Type"] == "application/octet-stream"


async def test_an_honest_client_is_guarded_against_a_broken_line(store: SwiftStore, http_session: aiohttp.ClientSession) -> None:
    now = time.time()
    write = Write(contract.fresh_key(), now + 60, 4, {"md5": contract.md5(b"mine")})
    status, _ = await contract.send(http_session, store.sign_put(write, now), b"m1ne")
    assert status == 422
    part = PartWrite(1, 0, 4, now + 60, {"md5": contract.md5(b"mine")})
    status, _ = await contract.send(http_session, store.sign_part("k", "u", part, now), b"m1ne")
    assert status == 422


async def test_the_key_that_the_account_has_now_signs(swift: SwiftPart, http_session: aiohttp.ClientSession) -> None:
    credential = {**swift.credential, "temp_url_key": "a key of the past", "temp_url_key2": swift.temp_url_key2}
    store = SwiftStore(swift_record(swift), credential, http_session)
    # Learnt with the first token; before that the first key signs.
    assert await store.stat("none") is None
    await contract.check_single(http_session, store, ["md5"])


async def test_a_refused_token_is_renewed(store: SwiftStore) -> None:
    await store.clock_skew()
    store._login._token = "AUTH_tk_of_the_past"
    assert abs(await store.clock_skew()) <= 2


async def test_internal_endpoint_is_the_one_the_broker_opens(swift: SwiftPart, http_session: aiohttp.ClientSession) -> None:
    record = replace(swift_record(swift), endpoint="https://swift.example.org", internal_endpoint=swift.endpoint)
    store = SwiftStore(record, swift.credential, http_session)
    assert URL(store.sign_get("none", time.time() + 60, time.time()).url).host == "swift.example.org"
    assert await store.stat("none") is None


async def test_wrong_login_and_container(swift: SwiftPart, http_session: aiohttp.ClientSession) -> None:
    wrong = SwiftStore(swift_record(swift), {**swift.credential, "key": "not the key"}, http_session)
    with pytest.raises(StoreUnavailable) as refused:
        await wrong.stat("k")
    assert "not the key" not in str(refused.value)
    for record in (swift_record(swift, container="nowhere"), swift_record(swift, segments_container="nowhere")):
        with pytest.raises(NotFound):
            await SwiftStore(record, swift.credential, http_session).clock_skew()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"container": "c"}, "settings.account"),
        ({"account": "a"}, "settings.container"),
        ({"account": "a", "container": "c", "digest": "sha1"}, "settings.digest"),
        ({"account": "a", "container": "c", "tenant": "t"}, "settings.tenant"),
    ],
)
async def test_bad_settings(settings: dict[str, str], field: str, http_session: aiohttp.ClientSession) -> None:
    credential = {"temp_url_key": "k", "auth_url": "http://h/auth/v1.0", "user": "u", "key": "x"}
    with pytest.raises(Invalid) as error:
        SwiftStore(Store(1, "s", "swift", "x", "http://h", settings=settings), credential, http_session)
    assert error.value.field == field


@pytest.mark.parametrize("missing", ["temp_url_key", "auth_url", "user", "key"])
async def test_bad_credential(missing: str, http_session: aiohttp.ClientSession) -> None:
    credential = {"temp_url_key": "k", "auth_url": "http://h/auth/v1.0", "user": "u", "key": "x"}
    del credential[missing]
    with pytest.raises(Invalid) as error:
        SwiftStore(Store(1, "s", "swift", "x", "http://h", settings={"account": "a", "container": "c"}), credential, http_session)
    assert error.value.field == "credential"
    assert missing in f"{error.value.detail} {error.value.expected}"
