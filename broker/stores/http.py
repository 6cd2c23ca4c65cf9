"""Stores that verify transfer tokens: ``broker-storeside``, or a web server in front of files that checks JWTs.

Settings: ``audience`` that the store expects in its tokens (the store's name); ``prefix`` put before every key.
There is no credential: the store trusts the broker's published keys.

Rules:

* Clients find the token in the URL (``?token=``), the broker sends its own in Authorization.
* A token says method, path, end, and for writes length and digest; the store enforces all of it, so what is known is bound.
* The store never overwrites, and renames into place: an object is sealed the moment it appears. One of that kind that does
  overwrite cannot be sealed.
* A GET with the upload claim lists parts, a POST joins them, a DELETE gives them up (broker.claims).
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from urllib.parse import quote, unquote, urlsplit

import aiohttp
import orjson

from broker import model
from broker.claims import TransferToken
from broker.errors import Conflict, Gone, Invalid, NotUploaded, StoreUnavailable
from broker.model import NO_HEADERS, Abilities, Digests, Handle, Observation, PartSeen
from broker.sign.token import NoSigningKey, TokenSigner
from broker.stores.base import Limits, PartWrite, Write
from broker.stores.exchange import LONG_SECONDS, Answer, Exchange, clock, skew
from broker.stores.settings import check_names

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30

_SUBJECT = "transfer"
"""Tokens name no person: whoever holds one may do just what it says."""

_LISTING, _LISTING_SUBJECT = "/.broker/objects", "broker:list"
"""Where ``broker-storeside`` lists what it holds, for tokens of this subject alone (`broker.storeside.listing`)."""

_META = "x-broker-meta-"
_OWN_SECONDS = 60.0
_ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512", "md5": "md5"}
"""Names of RFC 9530 and the registry it updates, to ours."""

_NO_ALGORITHM = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
_LATER_SECONDS = 3600.0

_REPR_DIGEST = re.compile(r"\s*([a-z0-9-]+)=:([A-Za-z0-9+/=]*):\s*\Z")


@dataclass(frozen=True, slots=True)
class _Place:
    """An endpoint, and the path under which it serves (percent-decoded, without a slash at the end)."""

    origin: str
    base: str


class HttpStore:
    """One tree of files behind tokens. Raises `Invalid` when a setting is unknown."""

    kind: ClassVar[str] = "http"
    schemes: ClassVar[tuple[str, ...]] = ("https", "http")
    limits = Limits(max_put=model.MAX_BLOB_SIZE, min_part=1, max_part=model.MAX_BLOB_SIZE, max_parts=10_000, max_object=model.MAX_BLOB_SIZE)

    def __init__(self, store: model.Store, signer: TokenSigner, session: aiohttp.ClientSession) -> None:
        check_names(store, {"audience", "prefix"})
        self._name = store.name
        self._audience = store.settings.get("audience") or store.name
        self._prefix = store.settings.get("prefix", "")
        self._for_clients = _place(store, store.endpoint)
        self._own = _place(store, store.internal_endpoint or store.endpoint)
        self._signer = signer
        self._abilities = store.abilities
        self._exchange = Exchange(session, store.name)

    def assuming(self, abilities: Abilities) -> Self:
        """This store as if it had been seen to have `abilities`: what a probe signs with."""
        other = copy(self)
        other._abilities = abilities
        return other

    # --- signing ---

    def sign_get(self, key: str, expires_at: float, now: float, filename: str | None = None) -> Handle:
        """As the Protocol says. The file name is left out: verifiers refuse a claim that they do not know, and a query beside the token."""
        return self._sign("GET", key, expires_at, now)

    def sign_put(self, write: Write, now: float) -> Handle:
        length = write.size if self._abilities.binds_length else None
        handle = self._sign("PUT", write.key, write.expires_at, now, length=length, digest=self._bound(write.digests))
        return handle._replace(headers={f"X-Broker-Meta-{name}": value for name, value in write.metadata.items()})

    def sign_part(self, key: str, upload: str, part: PartWrite, now: float) -> Handle:
        return self._sign(
            "PUT", key, part.expires_at, now,
            length=part.length, digest=self._bound(part.digests), upload=upload, offset=part.offset,
        )  # fmt: skip

    def forgeries(self, key: str, expires_at: float, now: float) -> Mapping[str, Handle]:
        """As `probe.Forging` says: tokens that are unsigned, for another store, for another path, and not valid yet."""
        honest = self.sign_get(key, expires_at, now)
        before, _, token = honest.url.rpartition("=")
        unsigned = f"{_NO_ALGORITHM}.{token.split('.')[1]}."
        elsewhere = copy(self)
        elsewhere._audience = f"{self._audience}-{secrets.token_hex(4)}"
        _, _, above = self.sign_get(key.rpartition("/")[0], expires_at, now).url.rpartition("=")
        return {
            "unsigned token": honest._replace(url=f"{before}={unsigned}"),
            "another store's": elsewhere.sign_get(key, expires_at, now),
            "another path's": honest._replace(url=f"{before}={above}"),
            "not valid yet": self.sign_get(key, expires_at + _LATER_SECONDS, now + _LATER_SECONDS),
        }

    def _bound(self, digests: Digests) -> str | None:
        """The strongest digest that the store enforces, as the claim says it."""
        for name, enforced in (("sha256", self._abilities.binds_sha256), ("md5", self._abilities.binds_md5)):
            if enforced and name in digests:
                return f"{name}:{digests[name]}"
        return None

    def _sign(
        self,
        method: str,
        key: str,
        expires_at: float,
        now: float,
        *,
        length: int | None = None,
        digest: str | None = None,
        upload: str | None = None,
        offset: int | None = None,
    ) -> Handle:
        path = f"{self._for_clients.base}/{self._prefix}{key}"
        token = self._token(method, path, expires_at, now, length=length, digest=digest, upload=upload, offset=offset)
        return Handle(method, f"{self._for_clients.origin}{quote(path)}?token={token}", NO_HEADERS, float(int(expires_at)))

    def _token(
        self,
        method: str,
        path: str,
        expires_at: float,
        now: float,
        *,
        length: int | None = None,
        digest: str | None = None,
        upload: str | None = None,
        offset: int | None = None,
        subject: str = _SUBJECT,
    ) -> str:
        token = TransferToken(
            self._signer.issuer, self._audience, subject, method, path, expires_at, now, secrets.token_urlsafe(12),
            length, digest, upload, offset,
        )  # fmt: skip
        try:
            return self._signer.sign(token, now)
        except NoSigningKey:
            raise StoreUnavailable(f"store {self._name}: the broker has no signing key that lives long enough") from None

    # --- looking, sealing, deleting ---

    async def stat(self, key: str) -> Observation | None:
        answer = await self._ask("HEAD", key, claim="GET", expect=(200, 404), repeatable=True)
        if answer.status == 404:
            return None
        try:
            size = int(answer.headers["Content-Length"])
        except (KeyError, ValueError):
            raise self._exchange.nonsense("HEAD without a length") from None
        told = _repr_digests(answer.headers.get("Repr-Digest", ""))
        seen = {name: told[name] for name in self._abilities.observes if name in told}
        metadata = {name.lower()[len(_META) :]: value for name, value in answer.headers.items() if name.lower().startswith(_META)}
        return Observation(size, clock(), "broker", seen, etag=answer.headers.get("ETag"), metadata=metadata)

    async def seal(self, staging: str, final: str, metadata: Mapping[str, str]) -> str:
        return staging

    async def delete(self, key: str) -> bool:
        answer = await self._ask("DELETE", key, expect=(200, 204, 404), repeatable=True)
        return answer.status != 404

    # --- listing ---

    async def objects(self) -> AsyncIterator[str]:
        """As `base.Lists` says, where ``broker-storeside`` is behind it. Raises `StoreUnavailable` when it lists nothing: a web server."""
        folder, after = f"{self._own.base}/{self._prefix}", ""
        while True:
            now = clock()
            token = self._token("GET", _LISTING, now + _OWN_SECONDS, now, subject=_LISTING_SUBJECT)
            headers = {"Authorization": f"Bearer {token}"} | ({"X-Broker-After": quote(after)} if after else {})
            answer = await self._exchange.ask(
                "GET", f"{self._own.origin}{_LISTING}", headers, expect=(200, 400, 404), seconds=LONG_SECONDS, repeatable=True
            )
            if answer.status != 200:
                raise StoreUnavailable(f"store {self._name} lists nothing: only broker-storeside can")
            try:
                page = orjson.loads(answer.body)
                paths, more = [str(path) for path in page["objects"]], bool(page["more"])
            except (orjson.JSONDecodeError, KeyError, TypeError):
                raise self._exchange.nonsense("no listing") from None
            for path in paths:
                if path.startswith(folder):
                    yield path[len(folder) :]
            if not more:
                return
            if not paths or paths[-1] == after:
                raise self._exchange.nonsense("a listing without end")
            after = paths[-1]

    async def recorded(self, key: str) -> Observation | None:
        return await self.stat(key)

    # --- multipart ---

    async def begin(self, key: str, size: int | None, part_size: int, metadata: Mapping[str, str]) -> str:
        """As the Protocol says. Nothing happens at the store: the first part opens the upload.

        The store knows offsets, the Protocol numbers; so the id begins with the size of a part.
        """
        return f"{part_size}-{secrets.token_urlsafe(24)}"

    async def parts(self, key: str, upload: str) -> Sequence[PartSeen]:
        """As the Protocol says. An upload that ended, or of which nothing has arrived yet, has no parts."""
        answer = await self._ask("GET", key, upload=upload, expect=(200, 404), repeatable=True)
        if answer.status == 404:
            return []
        try:
            items = orjson.loads(answer.body)["parts"]
            return sorted((self._told(upload, item) for item in items), key=lambda part: part.number)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            raise self._exchange.nonsense("no list of parts") from None

    def _told(self, upload: str, item: Mapping[str, Any]) -> PartSeen:
        number, rest = divmod(int(item["offset"]), int(upload.partition("-")[0]))
        if rest:
            raise ValueError("a part between parts")
        digests = {name: str(item[name]) for name in self._abilities.observes_parts if name in item}
        return PartSeen(number + 1, int(item["length"]), digests)

    async def finish(self, key: str, upload: str, parts: Sequence[PartSeen], metadata: Mapping[str, str]) -> str:
        """As the Protocol says. Raises `NotUploaded` when parts are missing or differ, `Gone` when the upload is unknown, `Conflict` when
        another object lies there."""
        offset, listed = 0, []
        for part in sorted(parts, key=lambda part: part.number):
            listed.append(
                {"offset": offset, "length": part.size, **{name: part.digests[name] for name in ("sha256", "md5") if name in part.digests}}
            )
            offset += part.size
        body = orjson.dumps({"parts": listed, "metadata": dict(metadata)})
        answer = await self._ask(
            "POST", key, upload=upload, length=offset, body=body, expect=(200, 201, 204, 400, 404, 409, 412, 422), seconds=LONG_SECONDS
        )
        if answer.status in (200, 201, 204):
            return key
        if answer.status == 404:
            raise Gone("the store does not know this upload")
        if answer.status == 412:
            raise Conflict("another object lies where this upload should be")
        raise NotUploaded("the store does not join these parts: some are missing or differ")

    async def abort(self, key: str, upload: str) -> None:
        await self._ask("DELETE", key, upload=upload, expect=(200, 204, 404), repeatable=True)

    async def clock_skew(self) -> float:
        """As the Protocol says, from a HEAD on a key that is not there."""
        now = clock()
        answer = await self._ask("HEAD", f"probe-{secrets.token_hex(8)}", claim="GET", expect=(404,), repeatable=True)
        return skew(answer, now) or 0.0

    # --- the broker's own requests ---

    async def _ask(
        self,
        method: str,
        key: str,
        *,
        expect: Collection[int],
        claim: str | None = None,
        upload: str | None = None,
        length: int | None = None,
        body: bytes | None = None,
        seconds: float | None = None,
        repeatable: bool = False,
    ) -> Answer:
        path = f"{self._own.base}/{self._prefix}{key}"
        now = clock()
        token = self._token(claim or method, path, now + _OWN_SECONDS, now, length=length, upload=upload)
        headers = {"Authorization": f"Bearer {token}"} | ({"Content-Type": "application/json"} if body else {})
        url = f"{self._own.origin}{quote(path)}"
        return await self._exchange.ask(method, url, headers, expect=expect, body=body, seconds=seconds, repeatable=repeatable)


def _place(store: model.Store, endpoint: str) -> _Place:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
        raise Invalid(f"store {store.name}: the endpoint is no plain URL", field="endpoint", expected="http(s)://host[:port][/prefix]")
    return _Place(f"{parts.scheme}://{parts.netloc}", unquote(parts.path).rstrip("/"))


def _repr_digests(text: str) -> dict[str, str]:
    """The Repr-Digest field (RFC 9530 section 3): a dictionary of byte sequences. What cannot be read is left out."""
    digests = {}
    for member in text.split(","):
        match = _REPR_DIGEST.match(member)
        if match is None or match[1] not in _ALGORITHMS:
            continue
        name = _ALGORITHMS[match[1]]
        try:
            value = base64.b64decode(match[2], validate=True).hex()
        except ValueError:
            continue
        if len(value) == model.DIGEST_HEX_LENGTH[name]:
            digests[name] = value
    return digests
