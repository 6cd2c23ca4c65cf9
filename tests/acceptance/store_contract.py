"""What every kind of store must do, whatever is behind it: checks that the tests of each kind run against the real thing.

The client here is a plain aiohttp client that knows only handles.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Mapping, Sequence

import aiohttp
import pytest
from aiohttp.multipart import parse_content_disposition
from yarl import URL

from broker.errors import Gone, NotUploaded
from broker.model import Handle, PartSeen
from broker.stores.base import PartWrite, Store, Write

LIFE_SECONDS = 600.0


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fresh_key(name: str = "blob") -> str:
    return f"{name}-{secrets.token_hex(8)}"


async def send(
    session: aiohttp.ClientSession, handle: Handle, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Open a handle as a client; a store that hangs up on a body that it refuses counts as status 0."""
    sent = {**handle.headers, **(headers or {})}
    sent.pop("Content-Length", None)
    try:
        async with session.request(
            handle.method, URL(handle.url, encoded=True), data=body, headers=sent, allow_redirects=False
        ) as response:
            return response.status, await response.read()
    except aiohttp.ClientOSError:
        return 0, b""


async def read(session: aiohttp.ClientSession, store: Store, key: str) -> bytes:
    now = time.time()
    status, body = await send(session, store.sign_get(key, now + LIFE_SECONDS, now))
    assert status == 200
    return body


async def check_single(session: aiohttp.ClientSession, store: Store, digests: Sequence[str], metadata: bool = True) -> None:
    """A blob goes up, is seen, sealed, cannot be changed by the URL that wrote it, and is deleted."""
    content, staging, final = secrets.token_bytes(70_000), fresh_key("staging"), fresh_key("final")
    right = {"md5": md5(content), "sha256": sha256(content)}
    now = time.time()
    handle = store.sign_put(Write(staging, now + LIFE_SECONDS, len(content), right, {"blob": "b-1"}), now)
    assert handle.method == "PUT"
    assert handle.expires_at <= now + LIFE_SECONDS
    assert await store.stat(staging) is None
    loose = store.sign_put(Write(staging, now + LIFE_SECONDS), now)
    status, _ = await send(session, handle, content)
    assert 200 <= status < 300

    seen = await store.stat(staging)
    assert seen is not None
    assert seen.size == len(content)
    assert seen.digests == {name: right[name] for name in digests}

    key = await store.seal(staging, final, {"blob": "b-1"})
    assert await store.seal(staging, final, {"blob": "b-1"}) == key
    # A dishonest uploader goes on with what it holds, the second time by a URL that binds nothing of the content.
    for replayed in (handle, loose):
        await send(session, replayed, b"x" * len(content))
    sealed = await store.stat(key)
    assert sealed is not None
    assert (sealed.size, dict(sealed.digests)) == (seen.size, dict(seen.digests))
    if metadata:
        assert sealed.metadata["blob"] == "b-1"
    assert await read(session, store, key) == content

    now = time.time()
    status, body = await send(session, store.sign_get(key, now + LIFE_SECONDS, now), headers={"Range": "bytes=100-199"})
    assert (status in (200, 206), body) == (True, content[100:200])
    assert await store.delete(key) is True
    assert await store.stat(key) is None
    assert await store.delete(key) is False
    await store.delete(staging)


async def check_octet_stream(session: aiohttp.ClientSession, store: Store) -> None:
    """Glance's clients fail unless a store says just this type."""
    key, now = fresh_key("typed.html"), time.time()
    status, _ = await send(session, store.sign_put(Write(key, now + LIFE_SECONDS, 4), now), b"text")
    assert 200 <= status < 300
    handle = store.sign_get(key, now + LIFE_SECONDS, now)
    async with session.get(URL(handle.url, encoded=True), headers=handle.headers) as response:
        assert response.headers["Content-Type"] == "application/octet-stream"
    await store.delete(key)


NAMES = ("debian 12.qcow2", 'a"; filename=b.html', "образ\r\nSet-Cookie: a=b.img")


async def check_filename(session: aiohttp.ClientSession, store: Store) -> None:
    """The store tells the name that its URL was signed with, as a client reads it, and no field more."""
    key, now = fresh_key("named"), time.time()
    status, _ = await send(session, store.sign_put(Write(key, now + LIFE_SECONDS, 4), now), b"text")
    assert 200 <= status < 300
    for name in NAMES:
        handle = store.sign_get(key, now + LIFE_SECONDS, now, name)
        async with session.get(URL(handle.url, encoded=True), headers=handle.headers) as response:
            assert response.status == 200 and "Set-Cookie" not in response.headers
            assert response.headers["Content-Type"] == "application/octet-stream"
            kind, parameters = parse_content_disposition(response.headers["Content-Disposition"])
            assert kind == "attachment" and parameters.get("filename*", parameters["filename"]) == name
    await store.delete(key)


async def begin_parts(session: aiohttp.ClientSession, store: Store, key: str, bodies: Sequence[bytes]) -> tuple[str, list[Handle]]:
    """Open an upload and sign a URL for each part; nothing is sent."""
    now = time.time()
    upload = await store.begin(key, sum(map(len, bodies)), len(bodies[0]), {"blob": "b-2"})
    handles, offset = [], 0
    for number, body in enumerate(bodies, 1):
        part = PartWrite(number, offset, len(body), now + LIFE_SECONDS, {"md5": md5(body), "sha256": sha256(body)})
        handles.append(store.sign_part(key, upload, part, now))
        offset += len(body)
    return upload, handles


def sign_loosely(store: Store, key: str, upload: str, bodies: Sequence[bytes]) -> list[Handle]:
    """URLs for the same parts that bind no digest."""
    now = time.time()
    return [
        store.sign_part(key, upload, PartWrite(number, sum(map(len, bodies[: number - 1])), len(body), now + LIFE_SECONDS), now)
        for number, body in enumerate(bodies, 1)
    ]


def part_bodies(store: Store, count: int = 3) -> list[bytes]:
    """`count` parts of the smallest size, the last one short."""
    size = max(store.limits.min_part, 50_000)
    return [*(secrets.token_bytes(size) for _ in range(count - 1)), secrets.token_bytes(1234)]


async def check_multipart(session: aiohttp.ClientSession, store: Store, part_digest: str = "md5") -> str:
    """Three parts go up out of order, are listed and joined; nothing that the client still holds changes the result. Gives the key."""
    key, bodies = fresh_key("parts"), part_bodies(store)
    upload, handles = await begin_parts(session, store, key, bodies)
    loose = sign_loosely(store, key, upload, bodies)
    for number in (2, 0):
        status, _ = await send(session, handles[number], bodies[number])
        assert 200 <= status < 300
    seen = await store.parts(key, upload)
    digest = sha256 if part_digest == "sha256" else md5
    assert [(part.number, part.digests[part_digest]) for part in seen] == [(1, digest(bodies[0])), (3, digest(bodies[2]))]

    status, _ = await send(session, handles[1], bodies[1])
    assert 200 <= status < 300
    seen = await store.parts(key, upload)
    assert [(part.number, part.size, part.digests[part_digest]) for part in seen] == [
        (number, len(body), digest(body)) for number, body in enumerate(bodies, 1)
    ]
    final = await store.finish(key, upload, seen, {"blob": "b-2"})
    assert await store.finish(key, upload, seen, {"blob": "b-2"}) == final

    whole = b"".join(bodies)
    observed = await store.stat(final)
    assert observed is not None
    assert observed.size == len(whole)
    assert await read(session, store, final) == whole
    for replayed, body in zip([*handles, *loose], [*bodies, *bodies], strict=True):
        await send(session, replayed, secrets.token_bytes(len(body)))
    assert await read(session, store, final) == whole
    await store.abort(key, upload)
    assert await read(session, store, final) == whole
    return final


async def check_abort(session: aiohttp.ClientSession, store: Store) -> None:
    """Parts of an upload that was given up are gone, and giving it up again is no error."""
    key, bodies = fresh_key("abandoned"), part_bodies(store, 2)
    upload, handles = await begin_parts(session, store, key, bodies)
    status, _ = await send(session, handles[0], bodies[0])
    assert 200 <= status < 300
    await store.abort(key, upload)
    await store.abort(key, upload)
    with contextlib.suppress(Gone):
        assert list(await store.parts(key, upload)) == []
    assert await store.stat(key) is None
    with pytest.raises((NotUploaded, Gone)):
        await store.finish(key, upload, [PartSeen(1, len(bodies[0]), {"md5": md5(bodies[0])}, md5(bodies[0]))], {})


async def check_wrong_parts(session: aiohttp.ClientSession, store: Store) -> None:
    """Parts other than those that lie there are not joined."""
    key, bodies = fresh_key("wrong"), part_bodies(store, 2)
    upload, handles = await begin_parts(session, store, key, bodies)
    for handle, body in zip(handles, bodies, strict=True):
        status, _ = await send(session, handle, body)
        assert 200 <= status < 300
    seen = list(await store.parts(key, upload))
    lie = md5(b"something else")
    seen[0] = PartSeen(1, seen[0].size, {"md5": lie, "sha256": sha256(b"something else")}, f'"{lie}"')
    with pytest.raises(NotUploaded):
        await store.finish(key, upload, seen, {})
    assert await store.stat(key) is None
    await store.abort(key, upload)


async def check_swapped_part(session: aiohttp.ClientSession, store: Store) -> None:
    """A part that is replaced between looking and joining never gets into the object."""
    key, bodies = fresh_key("swapped"), part_bodies(store, 2)
    upload, handles = await begin_parts(session, store, key, bodies)
    loose = sign_loosely(store, key, upload, bodies)
    for handle, body in zip(handles, bodies, strict=True):
        await send(session, handle, body)
    seen = await store.parts(key, upload)
    status, _ = await send(session, loose[1], secrets.token_bytes(len(bodies[1])))
    assert 200 <= status < 300
    try:
        final = await store.finish(key, upload, seen, {})
    except NotUploaded:
        await store.abort(key, upload)
        assert await store.stat(key) is None
    else:
        assert await read(session, store, final) == b"".join(bodies)


async def check_missing(store: Store) -> None:
    """What was never uploaded can be neither sealed nor joined."""
    with pytest.raises(NotUploaded):
        await store.seal(fresh_key(), fresh_key(), {})
