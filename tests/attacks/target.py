"""A kind of store under attack: how honest tickets for it are made (by the broker's own drivers), and how to look at the truth."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from broker.claims import TransferToken
from broker.model import Digests, Handle
from broker.sign.token import SigningKey, TokenSigner
from broker.stores.base import PartWrite, Store, Write
from tests.attacks import forge
from tests.attacks.wire import Reply, Shot, fire

LIFE_SECONDS = 600.0


@dataclass(frozen=True)
class Thing:
    """An object and its bytes; `marker` stands in them many times over."""

    key: str
    marker: bytes

    @property
    def content(self) -> bytes:
        return self.marker * 64


def thing(name: str, key: str | None = None) -> Thing:
    return Thing(key or fresh_key(name), f"{name}-{secrets.token_hex(16)}.".encode())


def fresh_key(name: str) -> str:
    """A key as the broker makes them: the blob's, then something that nobody can guess."""
    return f"{name}-{secrets.token_hex(4)}/{secrets.token_urlsafe(16)}"


def digests(content: bytes) -> Digests:
    return {"md5": hashlib.md5(content).hexdigest(), "sha256": hashlib.sha256(content).hexdigest()}


@dataclass(kw_only=True)
class Target:
    """One column of the table. `mine` is the object that the attacker may read, `victim` another's, for which he never had a ticket."""

    kind: str
    scheme: str
    """How it verifies: ``s3``, ``tempurl``, ``token``, or ``bearer`` (the broker's own API)."""
    origin: str
    store: Store
    elsewhere: Store | None = None
    """Another store that the same server serves: another bucket, container or audience."""
    elsewhere_key: str = ""
    """The TempURL key of another account."""
    writes: bool = True
    parts: bool = True
    own: bool = False
    """Whether it is our code: then a 5xx is a failure."""
    front: bool = False
    """Whether something stands before the server that has the bytes."""
    behind: Path | None = None
    """The access log of the server that has the bytes, where it is not the one that verifies."""
    mine: Thing = field(default_factory=lambda: thing("mine"))
    victim: Thing = field(default_factory=lambda: thing("victim"))

    # --- honest tickets ---

    def get(self, key: str, *, life: float = LIFE_SECONDS, now: float | None = None) -> Shot:
        """A ticket to read, as a request."""
        now = time.time() if now is None else now
        return Shot.of(self.store.sign_get(key, now + life, now))

    def put(self, key: str, content: bytes, *, life: float = LIFE_SECONDS, now: float | None = None, bound: bool = True) -> Shot:
        """A ticket to write just these bytes, as a request."""
        return Shot.of(self.put_handle(key, content, life=life, now=now, bound=bound), content)

    def put_handle(self, key: str, content: bytes, *, life: float = LIFE_SECONDS, now: float | None = None, bound: bool = True) -> Handle:
        now = time.time() if now is None else now
        return self.store.sign_put(Write(key, now + life, len(content) if bound else None, digests(content) if bound else {}), now)

    def part(self, key: str, upload: str, number: int, bodies: Sequence[bytes], *, bound: bool = True) -> Shot:
        """A ticket to write one part of an upload."""
        now, body = time.time(), bodies[number - 1]
        offset = sum(map(len, bodies[: number - 1]))
        write = PartWrite(number, offset, len(body), now + LIFE_SECONDS, digests(body) if bound else {})
        return Shot.of(self.store.sign_part(key, upload, write, now), body)

    # --- the world ---

    async def fire(self, shot: Shot) -> Reply:
        return await fire(self.origin, shot)

    async def truth(self, key: str) -> bytes | None:
        """The bytes under `key`, by the operator's own means; what can no longer be read has other bytes than any object."""
        reply = await self.fire(self.get(key))
        if reply.status == 404:
            return None
        return reply.body if reply.status == 200 else b"unreadable: %d" % reply.status

    async def plant(self, key: str, content: bytes) -> None:
        """Put an object there, as its owner does."""
        if await self.truth(key) is not None:
            await self.store.delete(key)
        reply = await self.fire(self.put(key, content))
        assert reply.ok, f"{self.kind}: planting answers {reply.status}: {reply.body[:300]!r}"

    def seen_behind(self) -> int:
        """How many requests for the victim's object came to the server behind."""
        return 0 if self.behind is None else self.behind.read_text().count(self.victim.key)

    async def is_honest(self) -> bool:
        """Whether an honest reader gets just what his ticket says, and nobody gets anything without one."""
        reply = await self.fire(self.get(self.mine.key))
        bare = await self.fire(Shot("GET", self.get(self.victim.key).path))
        return reply.status == 200 and reply.body == self.mine.content and not bare.ok

    async def prepare(self) -> None:
        """Put both objects there."""
        for item in (self.mine, self.victim):
            await self.plant(item.key, item.content)


@dataclass(kw_only=True)
class TokenTarget(Target):
    """A store that verifies JWTs. `keys`: the first signs, the second is published too and can be revoked."""

    keys: tuple[SigningKey, ...]
    issuer: str
    audience: str
    base: str = ""
    """The path under which it serves."""

    def claims(self, method: str, key: str, **claims: object) -> TransferToken:
        now = time.time()
        fields: dict[str, object] = {
            "issuer": self.issuer,
            "audience": self.audience,
            "subject": "transfer",
            "method": method,
            "path": f"{self.base}/{key}",
            "expires_at": now + LIFE_SECONDS,
            "not_before": now,
            "id": secrets.token_urlsafe(12),
        }
        return TransferToken(**{**fields, **claims})  # type: ignore[arg-type]

    def token(self, method: str, key: str, **claims: object) -> str:
        """An honest token, whatever it says."""
        wanted = self.claims(method, key, **claims)
        return TokenSigner(self.keys[:1], wanted.issuer).sign(wanted, time.time())

    def honest(self, key: str, **claims: object) -> str:
        """A rightly signed token to read `key`; `claims` are JWT claims to replace, ``...`` leaves one out."""
        signer, payload = self.keys[0], self.payload(key)
        merged = {name: value for name, value in {**payload, **claims}.items() if value is not ...}
        return forge.signed({"alg": signer.algorithm, "kid": signer.id, "typ": "JWT"}, merged, signer.private)

    def payload(self, key: str) -> dict[str, object]:
        """The claims of a token to read `key`."""
        return dict(self.claims("GET", key).to_claims())

    def carrying(self, token: str, key: str, method: str = "GET", body: bytes | None = None) -> Shot:
        """A request with `token` in its query, as clients send it."""
        return Shot(method, f"{self.base}/{key}?token={token}", (), body)

    async def revoke(self) -> None:
        """Take the second key out of what is published, and return when the store has to know."""
        await self.publish(self.keys[:1])

    async def restore(self) -> None:
        await self.publish(self.keys)

    async def publish(self, keys: Sequence[SigningKey]) -> None:
        """Of each kind of store its own way."""
        raise NotImplementedError
