"""Stores that speak S3: presigned URLs for clients, signed requests for the broker.

Settings: ``bucket``; ``region`` (us-east-1); ``style`` ``path`` or ``virtual`` (path); ``prefix`` put before every key.
Credential: ``access_key``, ``secret_key``, and for temporary ones ``session_token`` and ``expires_at`` (POSIX seconds).

Rules:

* URLs are made for the endpoint that clients use, the broker's own requests go to the internal one.
* A PUT binds what the store was seen to enforce, nothing else: a store that repeats an unchecked claim is worse than one that
  knows of none.
* Parts bind MD5 rather than SHA-256: every store checks Content-MD5, while a SHA-256 needs an algorithm declared when the
  upload begins, and then in every part (Amazon S3 user guide, "Checking object integrity").
* A GET asks for ``application/octet-stream``, which Glance's clients insist on, and for the file's name where one was asked for.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from typing import ClassVar, Self
from urllib.parse import quote

import aiohttp

from broker import model
from broker.errors import Conflict, Gone, Invalid, NotFound, NotUploaded, StoreUnavailable
from broker.model import NO_HEADERS, Abilities, Digests, Handle, Observation, PartSeen
from broker.sign.disposition import attachment
from broker.sign.record import pieces
from broker.sign.sigv4 import MAX_EXPIRES_SECONDS, Presigner, S3Credential, S3Signer
from broker.stores import s3_documents as documents
from broker.stores.base import Limits, PartWrite, Write
from broker.stores.exchange import LONG_SECONDS, Answer, Exchange, clock, skew
from broker.stores.settings import check_names, number, required

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30

_CONTENT_TYPE = "application/octet-stream"
_PARTS_PAGE = 1000
_OBJECTS_PAGE = 1000


class S3Store:
    """One bucket, or one prefix of it. Raises `Invalid` when a setting or a part of the credential is missing or wrong."""

    kind: ClassVar[str] = "s3"
    schemes: ClassVar[tuple[str, ...]] = ("https", "http")
    limits = Limits(max_put=5 * GIBIBYTE, min_part=5 * MEBIBYTE, max_part=5 * GIBIBYTE, max_parts=10_000, max_object=5 * 1024 * GIBIBYTE)

    def __init__(self, store: model.Store, credential: Mapping[str, str], session: aiohttp.ClientSession) -> None:
        settings = store.settings
        check_names(store, {"bucket", "region", "style", "prefix"})
        style = settings.get("style", "path")
        if style not in ("path", "virtual"):
            raise Invalid(f"store {store.name}: style is neither path nor virtual", field="settings.style", expected="path or virtual")
        secret = S3Credential(
            required(credential, "access_key", f"store {store.name}: the credential", "credential"),
            required(credential, "secret_key", f"store {store.name}: the credential", "credential"),
            credential.get("session_token") or None,
            number(credential, "expires_at", f"store {store.name}: the credential"),
        )
        self._name = store.name
        self._bucket = required(settings, "bucket", f"store {store.name}", "settings.bucket")
        self._prefix = settings.get("prefix", "")
        self._ends_at = secret.expires_at
        self._abilities = store.abilities
        self._exchange = Exchange(session, store.name)
        region = settings.get("region") or "us-east-1"
        try:
            self._for_clients = S3Signer(secret, region=region, endpoint=store.endpoint, bucket=self._bucket, path_style=style == "path")
            self._own = S3Signer(
                secret, region=region, endpoint=store.internal_endpoint or store.endpoint, bucket=self._bucket, path_style=style == "path"
            )
        except ValueError as error:
            raise Invalid(f"store {store.name}: {error}", field="endpoint", expected="http(s)://host[:port][/prefix]") from None
        self._reads = self._for_clients.presigner("GET", {"response-content-type": _CONTENT_TYPE})

    def assuming(self, abilities: Abilities) -> Self:
        """This store as if it had been seen to have `abilities`: what a probe signs with."""
        other = copy(self)
        other._abilities = abilities
        return other

    # --- signing ---

    reads_by: ClassVar[int] = 0

    def sign_get(self, key: str, expires_at: float, now: float, filename: str | None = None) -> Handle:
        reads = self._reads
        if filename is not None:
            asked = {"response-content-disposition": attachment(filename), "response-content-type": _CONTENT_TYPE}
            reads = self._for_clients.presigner("GET", asked)
        return self._sign(reads, key, expires_at, now, NO_HEADERS)

    def sign_put(self, write: Write, now: float) -> Handle:
        headers = {"Content-Type": _CONTENT_TYPE, **_metadata_headers(write.metadata), **self._binding(write.size, write.digests)}
        if self._abilities.binds_sha256 and "sha256" in write.digests:
            headers["x-amz-checksum-sha256"] = _base64(write.digests["sha256"])
        if self._abilities.refuses_overwrite:
            headers["If-None-Match"] = "*"
        return self._sign(self._for_clients.presigner("PUT", {}, headers), write.key, write.expires_at, now, headers)

    def sign_part(self, key: str, upload: str, part: PartWrite, now: float) -> Handle:
        headers = self._binding(part.length, part.digests)
        query = {"partNumber": str(part.number), "uploadId": upload}
        return self._sign(self._for_clients.presigner("PUT", query, headers), key, part.expires_at, now, headers)

    def _binding(self, size: int | None, digests: Digests) -> dict[str, str]:
        headers = {}
        if self._abilities.binds_length and size is not None:
            headers["Content-Length"] = str(size)
        if self._abilities.binds_md5 and "md5" in digests:
            headers["Content-MD5"] = _base64(digests["md5"])
        return headers

    def _sign(self, presigner: Presigner, key: str, expires_at: float, now: float, headers: Mapping[str, str]) -> Handle:
        end = min(expires_at, now + MAX_EXPIRES_SECONDS)
        if self._ends_at is not None:
            end = min(end, self._ends_at)
        try:
            url = presigner.url(self._prefix + key, end, now)
        except ValueError:
            raise StoreUnavailable(f"store {self._name}: a URL would have expired before it is used") from None
        return Handle(presigner.method, url, headers, float(int(end)))

    # --- looking, sealing, deleting ---

    async def stat(self, key: str) -> Observation | None:
        headers = {"x-amz-checksum-mode": "ENABLED"} if "sha256" in self._abilities.observes else {}
        answer = await self._ask("HEAD", key, headers=headers, expect=(200, 404), repeatable=True)
        return None if answer.status == 404 else self._observation(answer)

    def _observation(self, answer: Answer) -> Observation:
        etag = answer.headers.get("ETag")
        try:
            size = int(answer.headers["Content-Length"])
        except (KeyError, ValueError):
            raise self._exchange.nonsense("HEAD without a length") from None
        digests = {}
        sha256 = _hex(answer.headers.get("x-amz-checksum-sha256", ""), 32)
        if sha256 is not None and answer.headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT":
            digests["sha256"] = sha256
        md5 = documents.md5_of_etag(etag)
        # With KMS or customer keys the ETag is no MD5 (Amazon S3 API reference, "Object").
        if md5 is not None and answer.headers.get("x-amz-server-side-encryption", "AES256") == "AES256":
            digests["md5"] = md5
        seen = {name: value for name, value in digests.items() if name in self._abilities.observes}
        # Headers that are not signed may come with a PUT; what is read through a content coding is not what the digest is of.
        if answer.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            seen = {}
        return Observation(size, clock(), "broker", seen, etag=etag, metadata=_metadata_of(answer.headers))

    async def seal(self, staging: str, final: str, metadata: Mapping[str, str]) -> str:
        if self._abilities.refuses_overwrite:
            return staging
        if not await self._copy(staging, final, metadata):
            # Sealed by an earlier call whose answer got lost, or never uploaded.
            if await self.stat(final) is None:
                raise NotUploaded("the object to seal is not there")
            return final
        await self._ask("DELETE", staging, expect=(200, 204, 404), repeatable=True)
        return final

    async def _copy(self, source: str, target: str, metadata: Mapping[str, str]) -> bool:
        """Copy at the store, whole (5 GiB at most); ``False`` when there is no `source`."""
        headers = {
            "x-amz-copy-source": quote(f"/{self._bucket}/{self._prefix}{source}", safe="/~"),
            "x-amz-metadata-directive": "REPLACE",
            "Content-Type": _CONTENT_TYPE,
            **_metadata_headers(metadata),
        }
        answer = await self._ask("PUT", target, headers=headers, expect=(200, 404), seconds=LONG_SECONDS, repeatable=True)
        if answer.status == 404:
            return False
        # A copy that fails half-way is an Error document under status 200.
        self._parsed(answer, "CopyObjectResult")
        return True

    async def delete(self, key: str) -> bool:
        if await self.stat(key) is None:
            return False
        await self._ask("DELETE", key, expect=(200, 204, 404), repeatable=True)
        return True

    # --- multipart ---

    async def begin(self, key: str, size: int | None, part_size: int, metadata: Mapping[str, str]) -> str:
        headers = {"Content-Type": _CONTENT_TYPE, **_metadata_headers(metadata)}
        answer = await self._ask("POST", key, query={"uploads": ""}, headers=headers, expect=(200,))
        try:
            upload = documents.upload_id(answer.body)
        except documents.BadDocument as error:
            raise self._exchange.nonsense(str(error)) from None
        if len(upload) > 200 or not upload.isascii() or not upload.isprintable():
            raise self._exchange.nonsense("an unusable upload id")
        return upload

    async def parts(self, key: str, upload: str) -> Sequence[PartSeen]:
        """As the Protocol says; raises `Gone` when the store does not know the upload (never begun, finished, or aborted)."""
        seen: dict[int, PartSeen] = {}
        after: int | None = 0
        while after is not None:
            query = {"uploadId": upload, "max-parts": str(_PARTS_PAGE), "part-number-marker": str(after)}
            answer = await self._ask("GET", key, query=query, expect=(200, 404), repeatable=True)
            if answer.status == 404:
                raise Gone("the store does not know this upload")
            try:
                page = documents.parts_page(answer.body)
            except documents.BadDocument as error:
                raise self._exchange.nonsense(str(error)) from None
            if page.last is not None and page.last <= after:
                raise self._exchange.nonsense("a list of parts without end")
            # A part sent twice may be listed twice: the last counts, and its ETag is what joining names.
            seen.update((part.number, self._told(part)) for part in page.parts)
            after = page.last
        return [seen[number] for number in sorted(seen)]

    def _told(self, part: PartSeen) -> PartSeen:
        """`part` with only the digests that this store was seen to compute."""
        return replace(part, digests={name: value for name, value in part.digests.items() if name in self._abilities.observes_parts})

    async def finish(self, key: str, upload: str, parts: Sequence[PartSeen], metadata: Mapping[str, str]) -> str:
        """As the Protocol says; sealed where the store was seen to seal parts (`Abilities.seals_parts`).

        Metadata are given when an upload begins; S3 takes none here. What was not known then, the digests, is kept as tags where the
        store has some. Raises `NotUploaded` when the store lacks a part or has another than named, `Gone` when it knows neither upload
        nor object, `Conflict` when another object lies at `key`.
        """
        if await self._join(key, upload, parts):
            await self._tag(key, pieces(metadata))
            return key
        # Joined by an earlier call whose answer got lost: then the object is there, made of just these parts.
        found = await self.stat(key)
        if found is None:
            raise Gone("the store knows neither the upload nor its object")
        if not _made_of(found, parts):
            raise Conflict("another object lies where this upload should be")
        await self._tag(key, pieces(metadata))
        return key

    async def _tag(self, key: str, tags: Mapping[str, str]) -> None:
        """Keep `tags` with the object. Not every store and not every credential can; the object is as good without them."""
        if tags:
            body = documents.tagging(tags)
            with suppress(StoreUnavailable):
                md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
                headers = {"Content-Type": "application/xml", "Content-MD5": md5}
                await self._ask("PUT", key, query={"tagging": ""}, headers=headers, body=body, expect=(200, 204), repeatable=True)

    async def recorded(self, key: str) -> Observation | None:
        """As `base.Lists` says; what a multipart object is tagged with comes before what its upload began with."""
        found = await self.stat(key)
        if found is None or "-" not in (found.etag or ""):
            return found
        with suppress(StoreUnavailable, documents.BadDocument):
            answer = await self._ask("GET", key, query={"tagging": ""}, expect=(200,), repeatable=True)
            tags = pieces(documents.tags(answer.body))
            if tags:
                rest = {name: value for name, value in found.metadata.items() if name not in pieces(found.metadata)}
                return replace(found, metadata={**rest, **tags})
        return found

    async def objects(self) -> AsyncIterator[str]:
        """As `base.Lists` says, by ListObjectsV2."""
        query = {"list-type": "2", "max-keys": str(_OBJECTS_PAGE), "encoding-type": "url", "prefix": self._prefix}
        while True:
            signed = self._own.authorize("GET", "", now=clock(), query=query)
            answer = await self._exchange.ask("GET", self._own.url("", query), signed, expect=(200,), repeatable=True)
            try:
                page = documents.objects_page(answer.body)
            except documents.BadDocument as error:
                raise self._exchange.nonsense(str(error)) from None
            for name in page.keys:
                if not name.startswith(self._prefix):
                    raise self._exchange.nonsense("a listing of other names")
                yield name[len(self._prefix) :]
            if page.next is None:
                return
            if page.next == query.get("continuation-token"):
                raise self._exchange.nonsense("a listing without end")
            query["continuation-token"] = page.next

    async def _join(self, key: str, upload: str, parts: Sequence[PartSeen]) -> bool:
        """CompleteMultipartUpload; ``False`` when the upload is gone or an object lies at `key` already."""
        headers = {"Content-Type": "application/xml"} | ({"If-None-Match": "*"} if self._abilities.refuses_overwrite else {})
        answer = await self._ask(
            "POST", key, query={"uploadId": upload}, headers=headers, body=documents.complete_request(parts),
            expect=(200, 400, 404, 412), seconds=LONG_SECONDS,
        )  # fmt: skip
        if answer.status in (404, 412):
            return False
        code = documents.error_code(answer.body)
        if answer.status == 400:
            raise NotUploaded(f"the store does not join these parts ({code or 'no reason given'})")
        if code == "NoSuchUpload":
            return False
        # Amazon answers 200 before it joins: what follows may be an Error document.
        self._parsed(answer, "CompleteMultipartUploadResult")
        return True

    async def abort(self, key: str, upload: str) -> None:
        await self._ask("DELETE", key, query={"uploadId": upload}, expect=(200, 204, 404), repeatable=True)

    async def multiparts(self, key: str) -> Sequence[str]:
        """As `base.FindsMultipart` says, by ListMultipartUploads."""
        query = {"uploads": "", "prefix": self._prefix + key, "max-uploads": "1000"}
        signed = self._own.authorize("GET", "", now=clock(), query=query)
        answer = await self._exchange.ask("GET", self._own.url("", query), signed, expect=(200,), repeatable=True)
        try:
            return documents.open_uploads(answer.body, self._prefix + key)
        except documents.BadDocument as error:
            raise self._exchange.nonsense(str(error)) from None

    async def clock_skew(self) -> float:
        """As the Protocol says, from a HEAD on the bucket. Raises `NotFound` when there is no such bucket."""
        now = clock()
        answer = await self._exchange.ask(
            "HEAD", self._own.url(""), self._own.authorize("HEAD", "", now=now), expect=(200, 403, 404), repeatable=True
        )
        if answer.status == 404:
            raise NotFound(f"store {self._name}: there is no such bucket")
        if answer.status == 403:
            raise self._exchange.unexpected(403)
        return skew(answer, now) or 0.0

    # --- the broker's own requests ---

    async def _ask(
        self,
        method: str,
        key: str,
        *,
        expect: Iterable[int],
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        seconds: float | None = None,
        repeatable: bool = False,
    ) -> Answer:
        query = query or {}
        signed = self._own.authorize(
            method, self._prefix + key, now=clock(), query=query, headers=headers or {}, payload_sha256=hashlib.sha256(body).hexdigest()
        )
        url = self._own.url(self._prefix + key, query)
        return await self._exchange.ask(
            method, url, signed, expect=tuple(expect), body=body or None, seconds=seconds, repeatable=repeatable
        )

    def _parsed(self, answer: Answer, root: str) -> None:
        try:
            documents.parse(answer.body, root)
        except documents.BadDocument as error:
            raise self._exchange.nonsense(str(error)) from None


def _made_of(found: Observation, parts: Sequence[PartSeen]) -> bool:
    """Whether `found` can be the object made of `parts`: by size, and by the ETag where it is that of parts."""
    if found.size != sum(part.size for part in parts):
        return False
    etag = (found.etag or "").strip('"')
    md5s = [documents.md5_of_etag(part.etag) for part in parts]
    if "-" not in etag or None in md5s:
        return True
    joined = hashlib.md5(b"".join(bytes.fromhex(md5) for md5 in md5s if md5 is not None), usedforsecurity=False).hexdigest()
    return etag == f"{joined}-{len(parts)}"


def _metadata_headers(metadata: Mapping[str, str]) -> dict[str, str]:
    return {f"x-amz-meta-{name}": value for name, value in metadata.items()}


def _metadata_of(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower()[11:]: value for name, value in headers.items() if name.lower().startswith("x-amz-meta-")}


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()


def _hex(text: str, length: int) -> str | None:
    """Base64 of `length` bytes as hex; ``None`` for anything else, for instance a composite checksum's ``…-N``."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return raw.hex() if len(raw) == length else None
