"""Stores that speak Swift: TempURLs for clients, the broker's own token for whatever seals, joins and deletes.

Settings: ``account`` (for instance ``AUTH_x``), ``container``; ``segments_container`` (the container with ``_segments``);
``digest`` ``sha256`` or ``sha512`` of the signatures (sha256); ``prefix`` put before every key. Both containers must exist.
Credential: ``temp_url_key``, ``temp_url_key2`` while keys are changed (the first signs until the
broker, logging in, sees that the account only has the other); ``auth_url``, ``user``, ``key`` for tempauth (v1).

Rules:

* A TempURL binds nothing of the content and can be used again until it expires. So clients only ever write to staging keys;
  what a commit accepts is a copy that the store made under a key that no URL was ever signed for (invariant 14).
* A copy takes the metadata that the broker names and no other: an uploader's ``X-Delete-At`` would end the sealed copy too.
* A large object is an SLO manifest over sealed copies of its segments, each named with size and ETag, which Swift checks.
* The ETag is the MD5 of a plain object only; of an SLO it is the one of its segments' ETags.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, cast
from urllib.parse import quote, urlencode

import aiohttp
import orjson

from broker import model
from broker.errors import Invalid, NotFound, NotUploaded, StoreUnavailable
from broker.model import NO_HEADERS, Abilities, Handle, Observation, PartSeen
from broker.sign.tempurl import temp_url
from broker.stores.base import Limits, PartWrite, Write
from broker.stores.exchange import LONG_SECONDS, Answer, Exchange, clock, skew
from broker.stores.settings import check_names, required

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30

_CONTENT_TYPE = "application/octet-stream"
_LISTING_PAGE = 1000
_COPIES_AT_ONCE = 4
_META = "x-object-meta-"
_TOKEN_MARGIN_SECONDS = 60.0


class SwiftStore:
    """One container, or one prefix of it. Raises `Invalid` when a setting or a part of the credential is missing or wrong."""

    kind: ClassVar[str] = "swift"
    schemes: ClassVar[tuple[str, ...]] = ("https", "http")
    # 1,000 segments is what clusters allow by default (middleware slo, max_manifest_segments).
    limits = Limits(max_put=5 * GIBIBYTE, min_part=MEBIBYTE, max_part=5 * GIBIBYTE, max_parts=1000, max_object=5000 * GIBIBYTE)

    def __init__(self, store: model.Store, credential: Mapping[str, str], session: aiohttp.ClientSession) -> None:
        settings = store.settings
        check_names(store, {"account", "container", "segments_container", "digest", "prefix"})
        digest = settings.get("digest", "sha256")
        if digest not in ("sha256", "sha512"):
            raise Invalid(f"store {store.name}: unknown digest", field="settings.digest", expected="sha256 or sha512")
        self._digest = cast(Literal["sha256", "sha512"], digest)
        self._name = store.name
        self._endpoint = store.endpoint.rstrip("/")
        self._internal = (store.internal_endpoint or store.endpoint).rstrip("/")
        self._account = required(settings, "account", f"store {store.name}", "settings.account")
        self._container = required(settings, "container", f"store {store.name}", "settings.container")
        self._segments = settings.get("segments_container") or f"{self._container}_segments"
        self._prefix = settings.get("prefix", "")
        first, second = (
            required(credential, "temp_url_key", f"store {store.name}: the credential", "credential"),
            credential.get("temp_url_key2"),
        )
        self._keys = _Keys((first, second) if second else (first,), first)
        self._abilities = store.abilities
        self._exchange = Exchange(session, store.name)
        self._login = _Login(credential, self._exchange, store.name)

    def assuming(self, abilities: Abilities) -> Self:
        """This store as if it had been seen to have `abilities`: what a probe signs with."""
        other = copy(self)
        other._abilities = abilities
        return other

    # --- signing ---

    @property
    def reads_by(self) -> int:
        return self._keys.all.index(self._keys.signing)

    def sign_get(self, key: str, expires_at: float, now: float, filename: str | None = None) -> Handle:
        """As the Protocol says. TempURL does not sign the file name: who holds the URL can change it, for himself."""
        return self._sign("GET", self._container, self._prefix + key, expires_at, NO_HEADERS, filename)

    def sign_put(self, write: Write, now: float) -> Handle:
        headers = {"Content-Type": _CONTENT_TYPE}
        headers.update((f"X-Object-Meta-{name}", value) for name, value in write.metadata.items())
        return self._sign("PUT", self._container, self._prefix + write.key, write.expires_at, headers | _checked(write.digests))

    def sign_part(self, key: str, upload: str, part: PartWrite, now: float) -> Handle:
        return self._sign("PUT", self._segments, f"{_staging(upload)}{part.number:08d}", part.expires_at, _checked(part.digests))

    def _sign(
        self, method: str, container: str, name: str, expires_at: float, headers: Mapping[str, str], filename: str | None = None
    ) -> Handle:
        path = f"/v1/{self._account}/{container}/{name}"
        url = temp_url(method, self._endpoint, path, self._keys.signing, expires_at, digest=self._digest, filename=filename)
        return Handle(method, url, headers, float(int(expires_at)))

    # --- looking, sealing, deleting ---

    async def stat(self, key: str) -> Observation | None:
        answer = await self._head(self._container, self._prefix + key)
        if answer is None:
            return None
        parts: tuple[PartSeen, ...] = ()
        if _is_slo(answer):
            parts = await self._manifest(key)
        digests = {}
        if not _is_slo(answer) and "X-Object-Manifest" not in answer.headers and "md5" in self._abilities.observes:
            digests["md5"] = _md5(answer, self._exchange)
        return Observation(
            _size(answer, self._exchange), clock(), "broker", digests, parts, answer.headers.get("ETag"), _metadata_of(answer)
        )

    async def _manifest(self, key: str) -> tuple[PartSeen, ...]:
        """The segments of an SLO, as Swift keeps them; it compared each with its segment when the manifest was written."""
        answer = await self._ask(
            "GET", self._container, self._prefix + key, query={"multipart-manifest": "get"}, expect=(200,), repeatable=True
        )
        return tuple(self._told(number, item) for number, item in enumerate(self._list_in(answer), 1))

    def _told(self, number: int, item: Mapping[str, Any]) -> PartSeen:
        """One segment of a manifest or of a listing."""
        size, md5 = item.get("bytes"), item.get("hash")
        if not isinstance(size, int) or not isinstance(md5, str):
            raise self._exchange.nonsense("a segment without size or hash")
        return PartSeen(number, size, {"md5": md5} if "md5" in self._abilities.observes_parts else {}, md5)

    async def seal(self, staging: str, final: str, metadata: Mapping[str, str]) -> str:
        source = await self._head(self._container, self._prefix + staging)
        if source is None:
            # Sealed by an earlier call whose answer got lost, or never uploaded.
            if await self._head(self._container, self._prefix + final) is None:
                raise NotUploaded("the object to seal is not there")
            return final
        places = ((self._container, self._prefix + staging), (self._container, self._prefix + final))
        await self._copy(*places, etag=_md5(source, self._exchange), metadata=metadata)
        await self._ask("DELETE", self._container, self._prefix + staging, expect=(204, 404), repeatable=True)
        return final

    async def _copy(self, source: tuple[str, str], target: tuple[str, str], *, etag: str, metadata: Mapping[str, str]) -> None:
        """Server-side COPY of just the bytes that `etag` names. Raises `NotUploaded` when they are not (or no longer) there."""
        headers = {
            "Destination": quote("/".join(target)),
            "Content-Type": _CONTENT_TYPE,
            "X-Fresh-Metadata": "true",
            "If-Match": f'"{etag}"',
            **{f"X-Object-Meta-{name}": value for name, value in metadata.items()},
        }
        answer = await self._ask("COPY", *source, headers=headers, expect=(201, 404, 412), seconds=LONG_SECONDS, repeatable=True)
        if answer.status != 201:
            raise NotUploaded("the bytes to seal are not there, or were replaced meanwhile")
        if answer.headers.get("ETag", "").strip('"') != etag:
            raise self._exchange.nonsense("a copy that differs from its source")

    async def delete(self, key: str) -> bool:
        found = await self._head(self._container, self._prefix + key)
        if found is None:
            return False
        if not _is_slo(found):
            answer = await self._ask("DELETE", self._container, self._prefix + key, expect=(204, 404), repeatable=True)
            return answer.status == 204
        query = {"multipart-manifest": "delete"}
        headers = {"Accept": "application/json"}
        answer = await self._ask(
            "DELETE", self._container, self._prefix + key, query=query, headers=headers, expect=(200, 404), seconds=LONG_SECONDS
        )
        if answer.status == 200 and self._json(answer).get("Errors"):
            raise StoreUnavailable(f"store {self._name} did not delete every segment")
        return answer.status == 200

    # --- large objects ---

    async def begin(self, key: str, size: int | None, part_size: int, metadata: Mapping[str, str]) -> str:
        """As the Protocol says. Nothing happens at the store: the id names a prefix for the segments."""
        return secrets.token_urlsafe(24)

    async def parts(self, key: str, upload: str) -> Sequence[PartSeen]:
        """As the Protocol says, from the container's listing, which may lag behind; an upload that never was has no parts."""
        prefix = _staging(upload)
        seen: dict[int, PartSeen] = {}
        marker = ""
        while True:
            query = {"format": "json", "limit": str(_LISTING_PAGE), "prefix": prefix, "marker": marker}
            answer = await self._ask("GET", self._segments, "", query=query, expect=(200, 204), repeatable=True)
            page = self._list_in(answer) if answer.body else []
            for item in page:
                name = item.get("name")
                if not isinstance(name, str) or not name.startswith(prefix) or name <= marker:
                    raise self._exchange.nonsense("a listing of other names")
                marker = name
                if name[len(prefix) :].isdecimal():
                    number = int(name[len(prefix) :])
                    seen[number] = self._told(number, item)
            if len(page) < _LISTING_PAGE:
                return [seen[number] for number in sorted(seen)]

    async def finish(self, key: str, upload: str, parts: Sequence[PartSeen], metadata: Mapping[str, str]) -> str:
        """As the Protocol says. Raises `NotUploaded` when a segment is not there or has other bytes than `parts` say."""
        name = self._prefix + key
        found = await self._head(self._container, name)
        if found is None or _metadata_of(found).get("upload") != upload:
            slots = asyncio.Semaphore(_COPIES_AT_ONCE)
            # A task group, so that the first failure stops the others.
            try:
                async with asyncio.TaskGroup() as group:
                    for part in parts:
                        group.create_task(self._seal_segment(slots, upload, part))
            except ExceptionGroup as failures:  # what `except*` raises would be a group again
                raise failures.exceptions[0] from None
            await self._write_manifest(name, upload, parts, metadata)
        await self.abort(key, upload)
        return key

    async def _seal_segment(self, slots: asyncio.Semaphore, upload: str, part: PartSeen) -> None:
        async with slots:
            source, target = f"{_staging(upload)}{part.number:08d}", f"{_sealed(upload)}{part.number:08d}"
            await self._copy((self._segments, source), (self._segments, target), etag=_etag(part), metadata={})

    async def _write_manifest(self, name: str, upload: str, parts: Sequence[PartSeen], metadata: Mapping[str, str]) -> None:
        manifest = [
            {"path": f"/{self._segments}/{_sealed(upload)}{part.number:08d}", "etag": _etag(part), "size_bytes": part.size}
            for part in sorted(parts, key=lambda part: part.number)
        ]
        headers = {"Content-Type": _CONTENT_TYPE, "X-Object-Meta-Upload": upload}
        headers.update((f"X-Object-Meta-{item}", value) for item, value in metadata.items())
        answer = await self._ask(
            "PUT", self._container, name, query={"multipart-manifest": "put"}, headers=headers, body=orjson.dumps(manifest),
            expect=(201, 400), seconds=LONG_SECONDS, repeatable=True,
        )  # fmt: skip
        if answer.status == 400:
            raise NotUploaded("the store does not join these parts: a size or digest differs")

    async def abort(self, key: str, upload: str) -> None:
        """As the Protocol says: deletes the staged segments. A part URL that still lives can make new ones; call again after its end."""
        for part in await self.parts(key, upload):
            await self._ask("DELETE", self._segments, f"{_staging(upload)}{part.number:08d}", expect=(204, 404), repeatable=True)

    async def objects(self) -> AsyncIterator[str]:
        marker = ""
        while True:
            query = {"format": "json", "limit": str(_LISTING_PAGE), "prefix": self._prefix, "marker": marker}
            answer = await self._ask("GET", self._container, "", query=query, expect=(200, 204), repeatable=True)
            page = self._list_in(answer) if answer.body else []
            for item in page:
                name = item.get("name")
                if not isinstance(name, str) or not name.startswith(self._prefix) or name <= marker:
                    raise self._exchange.nonsense("a listing of other names")
                marker = name
                yield name[len(self._prefix) :]
            if not page:
                return

    async def recorded(self, key: str) -> Observation | None:
        return await self.stat(key)

    async def clock_skew(self) -> float:
        """As the Protocol says, from a HEAD on the container. Raises `NotFound` when it, or that for segments, does not exist."""
        for container in (self._container, self._segments):
            now = clock()
            answer = await self._ask("HEAD", container, "", expect=(200, 204, 404), repeatable=True)
            if answer.status == 404:
                raise NotFound(f"store {self._name}: there is no container {container}")
        return skew(answer, now) or 0.0

    # --- the broker's own requests ---

    async def _head(self, container: str, name: str) -> Answer | None:
        answer = await self._ask("HEAD", container, name, expect=(200, 404), repeatable=True)
        return None if answer.status == 404 else answer

    async def _ask(
        self,
        method: str,
        container: str,
        name: str,
        *,
        expect: Collection[int],
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        seconds: float | None = None,
        repeatable: bool = False,
    ) -> Answer:
        """One request with the broker's token; a refused token is renewed once."""
        path = quote(f"/v1/{self._account}/{container}" + (f"/{name}" if name else ""))
        url = f"{self._internal}{path}" + (f"?{urlencode(query)}" if query else "")
        for fresh in (False, True):
            token = await self._login.token(fresh)
            await self._choose_key(token)
            sent = {"X-Auth-Token": token, **(headers or {})}
            answer = await self._exchange.ask(method, url, sent, expect=(*expect, 401), body=body, seconds=seconds, repeatable=repeatable)
            if answer.status != 401:
                return answer
        raise self._exchange.unexpected(401)

    async def _choose_key(self, token: str) -> None:
        """Once per token: sign with that of our keys which the account has now, so that keys can be changed without a break."""
        if len(self._keys.all) == 1 or self._keys.chosen_with == token:
            return
        self._keys.chosen_with = token
        answer = await self._exchange.ask(
            "HEAD", f"{self._internal}/v1/{quote(self._account)}", {"X-Auth-Token": token}, expect=(200, 204, 401, 403), repeatable=True
        )
        known = [answer.headers.get(f"X-Account-Meta-Temp-Url-Key{suffix}", "") for suffix in ("", "-2")]
        for key in self._keys.all:
            if any(hmac.compare_digest(key, other) for other in known):
                self._keys.signing = key
                return

    def _json(self, answer: Answer) -> dict[str, Any]:
        with suppress(orjson.JSONDecodeError):
            document = orjson.loads(answer.body)
            if isinstance(document, dict):
                return document
        raise self._exchange.nonsense("no JSON object")

    def _list_in(self, answer: Answer) -> list[dict[str, Any]]:
        with suppress(orjson.JSONDecodeError):
            document = orjson.loads(answer.body)
            if isinstance(document, list) and all(isinstance(item, dict) for item in document):
                return document
        raise self._exchange.nonsense("no JSON list")


@dataclass(slots=True)
class _Keys:
    """The TempURL keys that the broker was given, the one that signs, and the token with which it was chosen."""

    all: tuple[str, ...] = field(repr=False)
    signing: str = field(repr=False)
    chosen_with: str = field(default="", repr=False)


class _Login:
    """The broker's token, by tempauth's protocol (v1): asked for when first needed, kept until it ends or is refused."""

    def __init__(self, credential: Mapping[str, str], exchange: Exchange, store: str) -> None:
        whose = f"store {store}: the credential"
        self._url = required(credential, "auth_url", whose, "credential")
        self._headers = {
            "X-Auth-User": required(credential, "user", whose, "credential"),
            "X-Auth-Key": required(credential, "key", whose, "credential"),
        }
        self._exchange = exchange
        self._token = ""
        self._ends_at = 0.0
        self._lock = asyncio.Lock()

    async def token(self, fresh: bool) -> str:
        """A token; a new one when `fresh`. The storage URL that comes with it is ignored: administrators name endpoints, stores do not."""
        refused = self._token
        async with self._lock:
            if self._ends_at <= clock() or (fresh and self._token == refused):
                headers = self._headers | ({"X-Auth-New-Token": "true"} if fresh else {})
                answer = await self._exchange.ask("GET", self._url, headers, expect=(200, 204), repeatable=True)
                token = answer.headers.get("X-Auth-Token", "")
                if not token:
                    raise self._exchange.nonsense("a login without a token")
                self._token = token
                self._ends_at = clock() + _lifetime(answer) - _TOKEN_MARGIN_SECONDS
            return self._token


def _lifetime(answer: Answer) -> float:
    try:
        return float(answer.headers.get("X-Auth-Token-Expires", "3600"))
    except ValueError:
        return 3600.0


def _staging(upload: str) -> str:
    """Where clients put segments."""
    return f"staging/{upload}/"


def _sealed(upload: str) -> str:
    """Where the copies of segments lie that a manifest names. No URL is ever signed for these."""
    return f"sealed/{upload}/"


def _checked(digests: model.Digests) -> dict[str, str]:
    """Swift compares a PUT with its ETag header. Nothing binds it, but it guards an honest client against a broken line."""
    return {"ETag": digests["md5"]} if "md5" in digests else {}


def _etag(part: PartSeen) -> str:
    return part.digests.get("md5") or (part.etag or "").strip('"')


def _is_slo(answer: Answer) -> bool:
    return answer.headers.get("X-Static-Large-Object", "").lower() == "true"


def _md5(answer: Answer, exchange: Exchange) -> str:
    etag = answer.headers.get("ETag", "").strip('"')
    if len(etag) != 32:
        raise exchange.nonsense("an object without an ETag")
    return etag


def _size(answer: Answer, exchange: Exchange) -> int:
    try:
        return int(answer.headers["Content-Length"])
    except (KeyError, ValueError):
        raise exchange.nonsense("HEAD without a length") from None


def _metadata_of(answer: Answer) -> dict[str, str]:
    return {name.lower()[len(_META) :]: value for name, value in answer.headers.items() if name.lower().startswith(_META)}
