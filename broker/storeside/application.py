"""The file server's HTTP: each request is verified first, then does the one thing that its token names.

======  ============  ========================================================================================================
method  token         does
======  ============  ========================================================================================================
GET     mth GET       the object; one range; conditions (`broker.storeside.conditional`)
HEAD    mth GET       what GET would say of the whole object
PUT     mth PUT       a new object (201); 412 when one is there; `len` and `dig` are enforced; once per token
DELETE  mth DELETE    removes the object (204); once per token
PUT     … upl off len writes one part (200); the first one begins the upload. Until the end it may be sent again
GET     … upl         ``{"parts": [{"offset", "length", "sha256", "md5"}]}``
POST    … upl         body ``{"parts": [{"offset", "length", "sha256"?, "md5"?}], "metadata"?: {}}``: makes the object (200), again with
                      the same answer. Answers after reading the object once: about a second per gigabyte
DELETE  … upl         gives the upload up (204)
GET     sub …:list    ``/.broker/objects``: the objects' paths (`broker.storeside.listing`)
GET     none          ``/healthz``
OPTIONS none          where the operator names origins: whether a page of one may go on (`broker.storeside.cors`)
======  ============  ========================================================================================================

The token stands in ``?token=`` or ``Authorization: Bearer``, once. Errors are RFC 9457 objects. Metadata comes and goes as
``X-Broker-Meta-NAME``; it is what the writer said, no observation. An upload that is unknown, finished or given up is a 404. What is
used up, see `broker.storeside.used`; how slow and how many, `broker.storeside.limits`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import logging
import os
import re
import string
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from io import FileIO
from typing import Any, TypeVar
from urllib.parse import unquote

import orjson
from aiohttp import web

from broker.claims import TransferToken
from broker.model import DIGEST_HEX_LENGTH, MAX_BLOB_SIZE
from broker.storeside import listing
from broker.storeside.conditional import Conditions, http_date
from broker.storeside.cors import Cors
from broker.storeside.counted import Counted
from broker.storeside.disk import MAX_METADATA_BYTES, Found, Record, Tree
from broker.storeside.gate import Gate
from broker.storeside.limits import Limits, PerToken, bytes_acked
from broker.storeside.receive import Received, receive
from broker.storeside.refused import Refused
from broker.storeside.target import read_target
from broker.storeside.uploads import Uploads, Wanted
from broker.storeside.used import Used
from broker.storeside.verify import Grant

META = "x-broker-meta-"
MAX_BODY_BYTES = 4 << 20
"""Of the JSON that finishes an upload: 10,000 parts fit."""

SERVER = "storeside"
"""What the server says of itself: no name or version of what it is made of."""

_LAST = (400, 408, 411)
_META_NAME = re.compile(r"[a-z0-9-]{1,64}\Z")
_PRINTABLE = frozenset(string.printable) - frozenset("\r\n\t\x0b\x0c")

_T = TypeVar("_T")

_log = logging.getLogger("broker.storeside")


class Application:
    """Answers requests on the objects of `tree` that `gate` lets in."""

    def __init__(self, tree: Tree, gate: Gate, limits: Limits, counted: Counted, cors: Cors | None = None) -> None:
        self._tree = tree
        self._cors = cors or Cors()
        self._uploads = Uploads(tree)
        self._used = Used(tree.used)
        self._gate = gate
        self._limits = limits
        self._per_token = PerToken(limits)
        self._counted = counted
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def forget(self, now: float) -> None:
        """Drop what no living token can ask for any more, and what a crash left. Blocks; call it in a thread, at the start and then
        every hour."""
        self._tree.sweep()
        self._used.forget(now)
        self._uploads.forget()

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
            response = await self._answer(request)
        except Refused as error:
            refused = error
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            # The text of an unexpected error might quote the request, and that holds a token.
            _log.error("%s failed: %s", request.method, type(error).__name__)
            refused = Refused(500, "the store failed")
        else:
            self._counted.answered(request.method, response.status)
            return self._readable(request, response)
        self._counted.answered(request.method, refused.status, refused)
        return self._readable(request, problem(refused))

    def _readable(self, request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
        """The answer, for the page that asked to read it; an object's has begun already."""
        if not response.prepared:
            response.headers.update(self._cors.fields(request.headers))
        return response

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        allowed = self._cors.preflight(request.method, request.headers)
        if allowed is not None:
            response = plain(204, headers=allowed)
            if request.body_exists:
                response.force_close()
            return response
        if request.method not in ("GET", "HEAD", "PUT", "POST", "DELETE"):
            raise Refused(405, "no such method", {"Allow": "GET, HEAD, PUT, POST, DELETE"})
        path, query = read_target(request.raw_path)
        if path == "/healthz" and request.method in ("GET", "HEAD"):
            return plain(200, b"ok\n", {"Content-Type": "text/plain"})
        grant = await self._gate.admit(request.method, path, query, request.headers)
        with self._per_token.entered(grant.token):
            if path == listing.PATH:
                return await self._list(request, grant)
            if grant.token.upload is not None:
                return await self._on_upload(request, grant, grant.token.upload)
            if request.method == "PUT":
                return await self._put(request, grant)
            if request.method == "DELETE":
                return await self._delete(request, grant)
            return await self._get(request, path)

    # --- objects ---

    async def _list(self, request: web.BaseRequest, grant: Grant) -> web.StreamResponse:
        if request.method != "GET" or grant.token.subject != listing.SUBJECT or grant.token.upload is not None:
            raise Refused(404, "no such object")
        after = unquote(request.headers.get(listing.AFTER, ""))
        paths, more = await asyncio.to_thread(listing.page, self._tree.root, after)
        return _json({"objects": paths, "more": more})

    async def _get(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        conditions = Conditions(request.headers)
        found = await asyncio.to_thread(self._tree.find, path)
        with os.fdopen(found.descriptor, "rb", buffering=0) as file:
            if not conditions.check(request.method, found.etag, found.modified_at):
                return plain(304, headers={"ETag": found.etag, "Last-Modified": http_date(found.modified_at)})
            headers = _told(found) | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", "Server": SERVER}
            headers |= self._cors.fields(request.headers)
            # RFC 9110 section 14.2: Range is for GET alone, so HEAD tells of the whole.
            span = None if request.method == "HEAD" else conditions.span(found.etag, found.size)
            first, count = (0, found.size) if span is None else span
            if span is not None:
                headers["Content-Range"] = f"bytes {first}-{first + count - 1}/{found.size}"
            response = web.StreamResponse(status=200 if span is None else 206, headers=headers)
            response.content_length = count
            await response.prepare(request)
            # A client that goes away is no error of ours; aiohttp sees the closed connection by itself.
            with contextlib.suppress(ConnectionError):
                if request.method != "HEAD" and count and request.transport is not None:
                    await self._send(request.transport, file, first, count)
                await response.write_eof()
            return response

    async def _send(self, transport: asyncio.WriteTransport, file: FileIO, first: int, count: int) -> None:
        """By sendfile, as long as the client takes enough of it. Raises `ConnectionError` when it does not."""
        sending = asyncio.ensure_future(asyncio.get_running_loop().sendfile(transport, file, first, count))
        acked = bytes_acked(transport)
        try:
            with self._counted.under_way("out").track_inprogress():
                while not (await asyncio.wait({sending}, timeout=self._limits.slow_seconds))[0]:
                    before, acked = acked, bytes_acked(transport)
                    if acked - before < self._limits.slow_bytes:
                        self._counted.slow("out")
                        raise ConnectionAbortedError
                sending.result()
        except BaseException:
            # The answer is cut short: nothing else may follow it on this connection.
            sending.cancel()
            await asyncio.wait({sending})
            transport.abort()
            raise
        finally:
            # sendfile leaves the file where it came to.
            self._counted.moved("out", max(0, file.tell() - first))

    async def _put(self, request: web.BaseRequest, grant: Grant) -> web.StreamResponse:
        token, length = grant.token, grant.body_length
        metadata = _metadata(request.headers)
        if Conditions(request.headers).want_an_object:
            raise Refused(412, "objects are never overwritten")
        await asyncio.to_thread(self._check_new, token, length)
        async with _in_thread(self._tree.temporary()) as (descriptor, name):
            await _go_on(request)
            received = await self._receive(request, descriptor, 0, length)
            received.check(token.digest)
            record = Record(received.sha256, received.md5, metadata)
            await _to_the_end(self._place, token, name, descriptor, record)
        return plain(201, headers={"ETag": f'"{received.sha256}"', "Repr-Digest": _repr_digest(record)})

    def _check_new(self, token: TransferToken, length: int | None) -> None:
        """Whatever can be known before the body is taken."""
        if self._tree.exists(token.path):
            raise Refused(412, "an object is there already; objects are never overwritten")
        self._used.check(token)
        self._tree.check_room(length)

    def _place(self, token: TransferToken, name: str, descriptor: int, record: Record) -> None:
        with self._used.once(token):
            self._tree.place(self._tree.tmp, name, descriptor, token.path, record)

    async def _delete(self, request: web.BaseRequest, grant: Grant) -> web.StreamResponse:
        await asyncio.to_thread(self._remove, grant.token, Conditions(request.headers))
        return plain(204)

    def _remove(self, token: TransferToken, conditions: Conditions) -> None:
        found = self._tree.find(token.path)
        os.close(found.descriptor)
        conditions.check("DELETE", found.etag, found.modified_at)
        with self._used.once(token):
            self._tree.delete(token.path)

    async def _receive(self, request: web.BaseRequest, descriptor: int, offset: int, length: int | None) -> Received:
        try:
            with self._counted.under_way("in").track_inprogress():
                return await receive(
                    request.content, descriptor, offset, length, self._limits, functools.partial(self._counted.moved, "in")
                )
        except Refused as refused:
            if refused.status == 408:
                self._counted.slow("in")
            raise

    # --- uploads ---

    async def _on_upload(self, request: web.BaseRequest, grant: Grant, upload: str) -> web.StreamResponse:
        if request.method == "PUT":
            return _json(await self._put_part(request, grant, upload))
        if request.method == "POST":
            return _json(await self._finish(request, grant, upload))
        if request.method == "DELETE":
            await asyncio.to_thread(self._uploads.abort, grant.token.path, upload)
            return plain(204)
        if request.method == "GET":
            return _json({"parts": await asyncio.to_thread(self._uploads.parts, grant.token.path, upload)})
        raise Refused(405, "an upload has no HEAD", {"Allow": "GET, PUT, POST, DELETE"})

    async def _put_part(self, request: web.BaseRequest, grant: Grant, upload: str) -> object:
        token, length, offset = grant.token, grant.token.length, grant.token.offset
        if length is None or offset is None:
            raise Refused(403, "the token names no part")
        await asyncio.to_thread(self._tree.check_room, length)
        async with _in_thread(self._uploads.part(token.path, upload, offset, length)) as descriptor:
            await _go_on(request)
            received = await self._receive(request, descriptor, offset, length)
            received.check(token.digest)
            return await _to_the_end(self._uploads.record, token.path, upload, offset, descriptor, received)

    async def _finish(self, request: web.BaseRequest, grant: Grant, upload: str) -> object:
        await _go_on(request)
        wanted, metadata = _finishing(await _read_json(request))
        token = grant.token
        return await asyncio.to_thread(self._uploads.finish, token.path, upload, wanted, metadata, token.length, token.digest)


@contextlib.asynccontextmanager
async def _in_thread(block: contextlib.AbstractContextManager[_T]) -> AsyncIterator[_T]:
    """Enter and leave `block` off the loop: freeing a big file takes its time."""
    value = await asyncio.to_thread(block.__enter__)
    try:
        yield value
    except BaseException as error:
        await _to_the_end(block.__exit__, type(error), error, error.__traceback__)
        raise
    await _to_the_end(block.__exit__, None, None, None)


async def _to_the_end(function: Callable[..., _T], *arguments: Any) -> _T:
    """Run it in a thread, and wait for it even when we are cancelled: it uses what is closed next."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


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


# --- what is answered ---


def _told(found: Found) -> dict[str, str]:
    """What is known of an object, as headers."""
    headers = {"ETag": found.etag, "Last-Modified": http_date(found.modified_at)}
    headers |= {f"X-Broker-Meta-{name}": value for name, value in found.record.metadata.items()}
    digests = _repr_digest(found.record)
    return headers | {"Repr-Digest": digests} if digests else headers


def _repr_digest(record: Record) -> str:
    """RFC 9530 section 3: digests of the whole object, whatever range is sent."""
    known = (("sha-256", record.sha256), ("md5", record.md5))
    return ", ".join(f"{name}=:{base64.b64encode(bytes.fromhex(value)).decode()}:" for name, value in known if value is not None)


def plain(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(status=status, body=body or None, headers={"Server": SERVER, **(headers or {})})


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json", headers={"Server": SERVER})


def problem(refused: Refused) -> web.Response:
    """A refusal as an RFC 9457 answer. After one of a request that may have been misread, nothing more is read of its connection."""
    headers = {"Server": SERVER, **refused.headers, "Content-Type": "application/problem+json"}
    response = web.Response(
        status=refused.status, reason=HTTPStatus(refused.status).phrase, body=orjson.dumps(refused.problem()), headers=headers
    )
    if refused.status in _LAST:
        response.force_close()
    return response
