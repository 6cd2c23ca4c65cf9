"""The file server's HTTP: each request is verified first, then does the one thing that its token names.

======  ============  ========================================================================================================
method  token         does
======  ============  ========================================================================================================
GET     mth GET       the object; one range; If-Match, If-None-Match, If-Range by ETag
HEAD    mth GET       what GET would say of the whole object
PUT     mth PUT       a new object (201); 412 when one is there; `len` and `dig` are enforced
DELETE  mth DELETE    removes the object (204)
PUT     … upl off len writes one part (200); the first one begins the upload. Until the end it may be sent again
GET     … upl         ``{"parts": [{"offset", "length", "sha256", "md5"}]}``
POST    … upl         body ``{"parts": [{"offset", "length", "sha256"?, "md5"?}], "metadata"?: {}}``: makes the object (200), again with
                      the same answer. Answers after reading the object once: about a second per gigabyte
DELETE  … upl         gives the upload up (204)
GET     none          ``/healthz``
======  ============  ========================================================================================================

The token stands in ``?token=`` or ``Authorization: Bearer``, once. Errors are RFC 9457 objects. Metadata comes and goes as
``X-Broker-Meta-NAME``; it is what the writer said, no observation. An upload that is unknown, finished or given up is a 404.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import re
import string
import time
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import TypeVar

import orjson
from aiohttp import web

from broker.model import DIGEST_HEX_LENGTH, MAX_BLOB_SIZE
from broker.storeside.disk import MAX_METADATA_BYTES, Found, Record, Tree
from broker.storeside.jwks import KeySource
from broker.storeside.receive import receive
from broker.storeside.refused import Refused
from broker.storeside.target import read_target, read_token
from broker.storeside.uploads import Uploads, Wanted
from broker.storeside.verify import Grant, UnknownKey, verify

META = "x-broker-meta-"
MAX_BODY_BYTES = 4 << 20
"""Of the JSON that finishes an upload: 10,000 parts fit."""

_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{1,18})?|-([0-9]{1,18}))\Z")
_META_NAME = re.compile(r"[a-z0-9-]{1,64}\Z")
_PRINTABLE = frozenset(string.printable) - frozenset("\r\n\t\x0b\x0c")

_T = TypeVar("_T")

_log = logging.getLogger("broker.storeside")


class Application:
    """Answers requests on the objects of `tree` that carry a token of `issuer` for `audience`."""

    def __init__(self, tree: Tree, keys: KeySource, *, audience: str, issuer: str) -> None:
        self._tree = tree
        self._uploads = Uploads(tree)
        self._keys = keys
        self._audience = audience
        self._issuer = issuer
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is under way."""
        await self._idle.wait()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self._active += 1
        self._idle.clear()
        try:
            return await self._guarded(request)
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def _guarded(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request has an answer, and no answer or log line has a token."""
        try:
            return await self._answer(request)
        except Refused as refused:
            return _problem(refused)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            # The text of an unexpected error might quote the request, and that holds a token.
            _log.error("%s failed: %s", request.method, type(error).__name__)
            return _problem(Refused(500, "the store failed"))

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path, query = read_target(request.raw_path)
        if path == "/healthz" and request.method in ("GET", "HEAD"):
            return _plain(200, b"ok\n", {"Content-Type": "text/plain"})
        if request.method not in ("GET", "HEAD", "PUT", "POST", "DELETE"):
            raise Refused(405, "no such method", {"Allow": "GET, HEAD, PUT, POST, DELETE"})
        grant = await self._verify(request, path, read_token(query, request.headers))
        if grant.token.upload is not None:
            return await self._on_upload(request, grant, grant.token.upload)
        if request.method == "PUT":
            return await self._put(request, grant)
        if request.method == "DELETE":
            await asyncio.to_thread(self._tree.delete, path)
            return _plain(204)
        return await self._get(request, path)

    async def _verify(self, request: web.BaseRequest, path: str, token: str) -> Grant:
        try:
            return self._grant(request, path, token)
        except UnknownKey:
            await self._keys.refetch()
        return self._grant(request, path, token)

    def _grant(self, request: web.BaseRequest, path: str, token: str) -> Grant:
        return verify(
            token, request.method, path, request.headers, self._keys.keys(), time.time(), audience=self._audience, issuer=self._issuer
        )

    # --- objects ---

    async def _get(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        found = await asyncio.to_thread(self._tree.find, path)
        with os.fdopen(found.descriptor, "rb", buffering=0) as file:
            headers = _told(found) | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
            _check_match(request, found.etag)
            if _lists(request.headers.get("If-None-Match"), found.etag):
                return _plain(304, headers={"ETag": found.etag})
            # RFC 9110 section 14.2: Range is for GET alone, so HEAD tells of the whole.
            span = None if request.method == "HEAD" else _range(request, found)
            first, count = (0, found.size) if span is None else span
            if span is not None:
                headers["Content-Range"] = f"bytes {first}-{first + count - 1}/{found.size}"
            response = web.StreamResponse(status=200 if span is None else 206, headers=headers)
            response.content_length = count
            await response.prepare(request)
            # A client that goes away is no error of ours; aiohttp sees the closed connection by itself.
            with contextlib.suppress(ConnectionError):
                if request.method != "HEAD" and count and request.transport is not None:
                    await asyncio.get_running_loop().sendfile(request.transport, file, first, count)
                await response.write_eof()
            return response

    async def _put(self, request: web.BaseRequest, grant: Grant) -> web.StreamResponse:
        token, length = grant.token, grant.body_length
        metadata = _metadata(request.headers)
        if await asyncio.to_thread(self._tree.exists, token.path):
            raise Refused(412, "an object is there already; objects are never overwritten")
        async with _in_thread(self._tree.temporary()) as (descriptor, name):
            await _go_on(request)
            received = await receive(request.content, descriptor, 0, length)
            received.check(token.digest)
            record = Record(received.sha256, received.md5, metadata)
            await asyncio.to_thread(self._tree.place, self._tree.tmp, name, descriptor, token.path, record)
        return _plain(201, headers={"ETag": f'"{received.sha256}"', "Repr-Digest": _repr_digest(record)})

    # --- uploads ---

    async def _on_upload(self, request: web.BaseRequest, grant: Grant, upload: str) -> web.StreamResponse:
        if request.method == "PUT":
            return _json(await self._put_part(request, grant, upload))
        if request.method == "POST":
            return _json(await self._finish(request, grant, upload))
        if request.method == "DELETE":
            await asyncio.to_thread(self._uploads.abort, grant.token.path, upload)
            return _plain(204)
        if request.method == "GET":
            return _json({"parts": await asyncio.to_thread(self._uploads.parts, grant.token.path, upload)})
        raise Refused(405, "an upload has no HEAD", {"Allow": "GET, PUT, POST, DELETE"})

    async def _put_part(self, request: web.BaseRequest, grant: Grant, upload: str) -> object:
        token, length, offset = grant.token, grant.token.length, grant.token.offset
        if length is None or offset is None:
            raise Refused(403, "the token names no part")
        async with _in_thread(self._uploads.part(token.path, upload, offset, length)) as descriptor:
            await _go_on(request)
            received = await receive(request.content, descriptor, offset, length)
            received.check(token.digest)
            return await asyncio.to_thread(self._uploads.record, token.path, upload, offset, descriptor, received)

    async def _finish(self, request: web.BaseRequest, grant: Grant, upload: str) -> object:
        await _go_on(request)
        wanted, metadata = _finishing(await _read_json(request))
        token = grant.token
        return await asyncio.to_thread(self._uploads.finish, token.path, upload, wanted, metadata, token.length, token.digest)


class Server(web.Server):
    """aiohttp's server, whose own refusals (of what is no HTTP) repeat nothing of the request: it may hold a token."""

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        response = _problem(Refused(500, "the store failed") if status == 500 else Refused(400, "this is no HTTP that can be read"))
        response.force_close()
        return response


@contextlib.asynccontextmanager
async def _in_thread(block: contextlib.AbstractContextManager[_T]) -> AsyncIterator[_T]:
    """Enter and leave `block` off the loop: freeing a big file takes its time."""
    value = await asyncio.to_thread(block.__enter__)
    try:
        yield value
    finally:
        await asyncio.to_thread(block.__exit__, None, None, None)


# --- what was asked ---


def _metadata(headers: Mapping[str, str]) -> dict[str, str]:
    given = [(name.lower().removeprefix(META), value) for name, value in headers.items() if name.lower().startswith(META)]
    return _checked_metadata(given)


def _checked_metadata(given: list[tuple[str, str]]) -> dict[str, str]:
    metadata = dict(given)
    if len(metadata) != len(given) or sum(len(name) + len(value) for name, value in given) > MAX_METADATA_BYTES:
        raise Refused(400, "metadata is given twice or is too long")
    if not all(_META_NAME.match(name) and _PRINTABLE.issuperset(value) for name, value in given):
        raise Refused(400, "metadata has names of a-z, 0-9 and -, and printable ASCII values")
    return metadata


async def _go_on(request: web.BaseRequest) -> None:
    """Ask for the body, now that it will be taken (RFC 9110 section 10.1.1)."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request._payload_writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request._payload_writer.output_size = 0


async def _read_json(request: web.BaseRequest) -> object:
    body = b""
    while chunk := await request.content.readany():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Refused(413, "the list of parts is too long")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Refused(400, "the body is not JSON") from None


def _finishing(document: object) -> tuple[list[Wanted], dict[str, str]]:
    """The body that finishes an upload, checked."""
    if not isinstance(document, dict) or not document.keys() <= {"parts", "metadata"} or not isinstance(document.get("parts"), list):
        raise Refused(400, 'the body must be {"parts": [...], "metadata": {...}}')
    metadata = document.get("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused(400, "metadata must be text by name")
    wanted = [_wanted(item) for item in document["parts"]]
    if not wanted:
        raise Refused(400, "there must be a part")
    return wanted, _checked_metadata(list(metadata.items()))


def _wanted(item: object) -> Wanted:
    if isinstance(item, dict) and {"offset", "length"} <= item.keys() <= {"offset", "length", "sha256", "md5"}:
        numbers = all(type(item[name]) is int and 0 <= item[name] <= MAX_BLOB_SIZE for name in ("offset", "length"))
        texts = all(type(item[name]) is str and len(item[name]) == DIGEST_HEX_LENGTH[name] for name in item.keys() - {"offset", "length"})
        if numbers and texts:
            return Wanted(**item)
    raise Refused(400, 'a part must be {"offset", "length", "sha256"?, "md5"?}')


# --- conditions and ranges (RFC 9110 sections 13 and 14) ---


def _lists(field: str | None, etag: str) -> bool:
    """Whether an If-Match or If-None-Match field names `etag`."""
    return field is not None and (field.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in field.split(",")])


def _check_match(request: web.BaseRequest, etag: str) -> None:
    field = request.headers.get("If-Match")
    if field is not None and not _lists(field, etag):
        raise Refused(412, "the object is another one", {"ETag": etag})


def _range(request: web.BaseRequest, found: Found) -> tuple[int, int] | None:
    """First byte and count of a single range; nothing when the whole is to be sent, as for several ranges or a malformed one."""
    match = _RANGE.match(request.headers.get("Range", "").replace(" ", ""))
    if match is None or request.headers.get("If-Range", found.etag) != found.etag:
        return None
    if match[3] is not None:
        count = min(int(match[3]), found.size)
        first = found.size - count
    else:
        first = int(match[1])
        last = found.size - 1 if match[2] is None else min(int(match[2]), found.size - 1)
        if match[2] is not None and int(match[2]) < first:
            return None
        count = last - first + 1
    if count <= 0:
        raise Refused(416, "the range is beyond the object", {"Content-Range": f"bytes */{found.size}"})
    return first, count


# --- what is answered ---


def _told(found: Found) -> dict[str, str]:
    """What is known of an object, as headers."""
    headers = {"ETag": found.etag} | {f"X-Broker-Meta-{name}": value for name, value in found.record.metadata.items()}
    digests = _repr_digest(found.record)
    return headers | {"Repr-Digest": digests} if digests else headers


def _repr_digest(record: Record) -> str:
    """RFC 9530 section 3: digests of the whole object, whatever range is sent."""
    known = (("sha-256", record.sha256), ("md5", record.md5))
    return ", ".join(f"{name}=:{base64.b64encode(bytes.fromhex(value)).decode()}:" for name, value in known if value is not None)


def _plain(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(status=status, body=body or None, headers=headers)


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


def _problem(refused: Refused) -> web.Response:
    headers = refused.headers | {"Content-Type": "application/problem+json"}
    return web.Response(
        status=refused.status, reason=HTTPStatus(refused.status).phrase, body=orjson.dumps(refused.problem()), headers=headers
    )
