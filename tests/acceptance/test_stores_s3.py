"""S3 against the real thing: SeaweedFS, which enforces what is signed, and rclone, which enforces little of it."""

from __future__ import annotations

import secrets
import socket
import time
from dataclasses import replace

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from broker.errors import Conflict, Gone, Invalid, NotFound, StoreUnavailable
from broker.model import Abilities, Store
from broker.stores.base import Write
from broker.stores.s3 import S3Store
from tests.acceptance import store_contract as contract
from tests.parts.records import RCLONE, SEAWEEDFS, s3_record
from tests.parts.seaweedfs import DOMAIN, S3Part


@pytest.fixture
def strong(seaweedfs: S3Part, http_session: aiohttp.ClientSession) -> S3Store:
    return S3Store(s3_record(seaweedfs), seaweedfs.credential, http_session)


@pytest.fixture
def weak(rclone: S3Part, http_session: aiohttp.ClientSession) -> S3Store:
    return S3Store(s3_record(rclone, "rclone", RCLONE), rclone.credential, http_session)


async def test_single_upload_on_a_strong_store(strong: S3Store, http_session: aiohttp.ClientSession) -> None:
    await contract.check_single(http_session, strong, ["sha256", "md5"])


async def test_single_upload_on_a_weak_store_is_sealed_by_a_copy(weak: S3Store, http_session: aiohttp.ClientSession) -> None:
    await contract.check_single(http_session, weak, ["md5"])


async def test_a_strong_store_that_only_copies_seals_too(strong: S3Store, http_session: aiohttp.ClientSession) -> None:
    store = strong.assuming(replace(SEAWEEDFS, refuses_overwrite=False))
    await contract.check_single(http_session, store, ["sha256", "md5"])


async def test_every_key_below_the_prefix_and_strange_keys(seaweedfs: S3Part, http_session: aiohttp.ClientSession) -> None:
    store = S3Store(s3_record(seaweedfs, prefix="image blobs/ü+%/"), seaweedfs.credential, http_session)
    await contract.check_single(http_session, store, ["sha256", "md5"])
    copying = store.assuming(replace(SEAWEEDFS, refuses_overwrite=False))
    await contract.check_single(http_session, copying, ["sha256", "md5"])
    await contract.check_multipart(http_session, store)


@pytest.mark.parametrize("kind", ["strong", "weak"])
async def test_type_is_octet_stream(kind: str, request: pytest.FixtureRequest, http_session: aiohttp.ClientSession) -> None:
    await contract.check_octet_stream(http_session, request.getfixturevalue(kind))


async def test_a_file_name_is_told(strong: S3Store, http_session: aiohttp.ClientSession) -> None:
    await contract.check_filename(http_session, strong)


async def test_a_file_name_is_signed(strong: S3Store, http_session: aiohttp.ClientSession) -> None:
    now, key = time.time(), contract.fresh_key("named")
    assert (await contract.send(http_session, strong.sign_put(Write(key, now + 60, 3), now), b"abc"))[0] == 200
    named = strong.sign_get(key, now + 60, now, "right.img")
    plain = strong.sign_get(key, now + 60, now)
    inline = "response-content-disposition=inline"
    for url, status in (
        (named.url, 200), (named.url.replace("right.img", "wrong.html"), 403), (f"{named.url}&{inline}", 403),
        (f"{plain.url}&{inline}", 403),
    ):  # fmt: skip
        assert (await contract.send(http_session, named._replace(url=url)))[0] == status, url
    await strong.delete(key)


@pytest.mark.parametrize("kind", ["strong", "weak"])
async def test_multipart(kind: str, request: pytest.FixtureRequest, http_session: aiohttp.ClientSession) -> None:
    store = request.getfixturevalue(kind)
    final = await contract.check_multipart(http_session, store)
    seen = await store.stat(final)
    assert seen is not None
    assert seen.metadata["blob"] == "b-2"
    assert await store.delete(final) is True


@pytest.mark.parametrize("kind", ["strong", "weak"])
async def test_abort_and_wrong_parts(kind: str, request: pytest.FixtureRequest, http_session: aiohttp.ClientSession) -> None:
    store = request.getfixturevalue(kind)
    await contract.check_abort(http_session, store)
    await contract.check_wrong_parts(http_session, store)
    await contract.check_swapped_part(http_session, store)


async def test_what_is_not_there_cannot_be_copied_to_its_key(weak: S3Store) -> None:
    await contract.check_missing(weak)


async def test_listing_goes_over_pages(strong: S3Store, http_session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.stores.s3._PARTS_PAGE", 2)
    await contract.check_multipart(http_session, strong)


async def test_another_object_is_never_taken_for_the_upload(strong: S3Store, http_session: aiohttp.ClientSession) -> None:
    key, bodies = contract.fresh_key("taken"), contract.part_bodies(strong, 2)
    upload, handles = await contract.begin_parts(http_session, strong, key, bodies)
    for handle, body in zip(handles, bodies, strict=True):
        await contract.send(http_session, handle, body)
    seen = await strong.parts(key, upload)
    now = time.time()
    await contract.send(http_session, strong.sign_put(Write(key, now + 60, 3), now), b"abc")
    with pytest.raises(Conflict):
        await strong.finish(key, upload, seen, {})
    await strong.abort(key, upload)
    await strong.delete(key)
    with pytest.raises(Gone):
        await strong.finish(key, upload, seen, {})


async def test_bindings_hold_on_a_strong_store(strong: S3Store, http_session: aiohttp.ClientSession) -> None:
    content, now = secrets.token_bytes(1000), time.time()
    digests = {"md5": contract.md5(content), "sha256": contract.sha256(content)}
    for bound in ({"md5": digests["md5"]}, {"sha256": digests["sha256"]}):
        key = contract.fresh_key("bound")
        handle = strong.sign_put(Write(key, now + 60, len(content), bound), now)
        status, _ = await contract.send(http_session, handle, secrets.token_bytes(1000))
        assert status == 400
        assert await strong.stat(key) is None
    key = contract.fresh_key("bound")
    handle = strong.sign_put(Write(key, now + 60, len(content)), now)
    status, _ = await contract.send(http_session, handle, content + b"!")
    assert status == 403
    assert await strong.stat(key) is None


async def test_an_object_with_a_content_coding_proves_nothing(strong: S3Store, http_session: aiohttp.ClientSession) -> None:
    """The header is not signed, so any uploader may send it; whoever reads the object would decode it, and get other bytes."""
    now, key = time.time(), contract.fresh_key("coded")
    plain = strong.sign_put(Write(key, now + 60, 3), now)
    status, _ = await contract.send(http_session, plain, b"abc", {"Content-Encoding": "gzip"})
    assert status == 200
    seen = await strong.stat(key)
    assert seen is not None
    assert (seen.size, dict(seen.digests)) == (3, {})


async def test_what_is_not_enforced_is_not_claimed(weak: S3Store) -> None:
    now = time.time()
    handle = weak.sign_put(Write("k", now + 60, 3, {"sha256": contract.sha256(b"abc"), "md5": contract.md5(b"abc")}), now)
    assert {name.lower() for name in handle.headers} == {"content-type", "content-length", "content-md5"}
    unprobed = weak.assuming(Abilities()).sign_put(Write("k", now + 60, 3, {"md5": contract.md5(b"abc")}), now)
    assert set(unprobed.headers) == {"Content-Type"}


async def test_internal_endpoint_is_the_one_the_broker_opens(seaweedfs: S3Part, http_session: aiohttp.ClientSession) -> None:
    record = replace(s3_record(seaweedfs), endpoint="https://objects.example.org", internal_endpoint=seaweedfs.endpoint)
    store = S3Store(record, seaweedfs.credential, http_session)
    now = time.time()
    url = URL(store.sign_get("none", now + 60, now).url, encoded=True)
    assert (url.scheme, url.host) == ("https", "objects.example.org")
    assert await store.stat("none") is None
    virtual = replace(record, settings={"bucket": "images", "style": "virtual"})
    assert URL(S3Store(virtual, seaweedfs.credential, http_session).sign_get("k", now + 60, now).url).host == "images.objects.example.org"


class EverythingIsHere(AbstractResolver):
    """Resolves any name to this machine."""

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        return [ResolveResult(hostname=host, host="127.0.0.1", port=port, family=socket.AF_INET, proto=0, flags=0)]

    async def close(self) -> None:
        return None


async def test_virtual_host_style(seaweedfs: S3Part) -> None:
    endpoint = f"http://{DOMAIN}:{URL(seaweedfs.endpoint).port}"
    record = replace(s3_record(seaweedfs, style="virtual"), endpoint=endpoint)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=EverythingIsHere())) as session:
        store = S3Store(record, seaweedfs.credential, session)
        await contract.check_single(session, store, ["sha256", "md5"])
        await contract.check_single(session, store.assuming(replace(SEAWEEDFS, refuses_overwrite=False)), ["sha256", "md5"])
        await contract.check_multipart(session, store)


async def test_a_url_never_outlives_the_credential(seaweedfs: S3Part, http_session: aiohttp.ClientSession) -> None:
    now = 1_800_000_000.0
    credential = {**seaweedfs.credential, "session_token": "t0ken", "expires_at": str(now + 30)}
    store = S3Store(s3_record(seaweedfs), credential, http_session)
    handle = store.sign_get("k", now + 600, now)
    assert handle.expires_at == now + 30
    assert URL(handle.url).query["X-Amz-Expires"] == "30"
    assert URL(handle.url).query["X-Amz-Security-Token"] == "t0ken"
    with pytest.raises(StoreUnavailable):
        store.sign_get("k", now + 600, now + 40)
    week = S3Store(s3_record(seaweedfs), seaweedfs.credential, http_session).sign_get("k", now + 1e7, now)
    assert week.expires_at == now + 7 * 86400


async def test_wrong_credential_and_bucket(seaweedfs: S3Part, http_session: aiohttp.ClientSession) -> None:
    wrong = S3Store(s3_record(seaweedfs), {**seaweedfs.credential, "secret_key": "not the secret"}, http_session)
    with pytest.raises(StoreUnavailable) as refused:
        await wrong.stat("k")
    assert "not the secret" not in str(refused.value)
    nowhere = S3Store(s3_record(seaweedfs, bucket="no-such-bucket"), seaweedfs.credential, http_session)
    with pytest.raises(NotFound):
        await nowhere.clock_skew()


async def test_clock(strong: S3Store) -> None:
    assert abs(await strong.clock_skew()) <= 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"settings": {}}, "settings.bucket"),
        ({"settings": {"bucket": "b", "style": "dns"}}, "settings.style"),
        ({"settings": {"bucket": "b", "buckets": "c"}}, "settings.buckets"),
        ({"endpoint": "ftp://x"}, "endpoint"),
        ({"endpoint": "http://user:password@x"}, "endpoint"),
    ],
)
async def test_bad_settings(change: dict[str, object], field: str, http_session: aiohttp.ClientSession) -> None:
    record = replace(Store(1, "s", "s3", "x", "http://h", settings={"bucket": "b"}), **change)  # type: ignore[arg-type]
    with pytest.raises(Invalid) as error:
        S3Store(record, {"access_key": "a", "secret_key": "very secret"}, http_session)
    assert error.value.field == field
    assert "password" not in str(error.value)


@pytest.mark.parametrize("missing", ["access_key", "secret_key"])
async def test_bad_credential(missing: str, http_session: aiohttp.ClientSession) -> None:
    credential = {"access_key": "a", "secret_key": "b"}
    del credential[missing]
    with pytest.raises(Invalid) as error:
        S3Store(Store(1, "s", "s3", "x", "http://h", settings={"bucket": "b"}), credential, http_session)
    assert error.value.field == "credential"
