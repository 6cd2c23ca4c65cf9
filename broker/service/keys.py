"""The broker's signing keys: kept encrypted in the catalogue, the same for every broker on it. Which one signs and what changes is
decided in `broker.sign.rotation`; this joins it with the catalogue.

Rules: one lock decides about changes, by the database's clock. A key is decrypted once and then kept in memory. When keys change
there is a new signer, and who holds the old one has to take it (`broker.service.memory`, from the change log).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import orjson
import structlog

from broker.catalog import keys
from broker.catalog.keys import KeyRow
from broker.catalog.transaction import transaction
from broker.sign import rotation, token
from broker.sign.record import Sealer
from broker.sign.rotation import Life, Plan, Terms
from broker.sign.token import Algorithm, SigningKey, TokenSigner

DEFAULT_TERMS = Terms()

_log = structlog.get_logger(__name__)


class WrongPassphrase(Exception):
    """The signing keys in the catalogue cannot be decrypted; the text says what to do."""


class KeySet(NamedTuple):
    """The published keys (RFC 7517): as a value, as it is served, and its ETag, the same at every broker."""

    document: dict[str, list[dict[str, str]]]
    body: bytes
    etag: str


class Keyring:
    """The keys as of the last `reload` or `change`; made by `load`."""

    def __init__(self, db: Any, passphrase: bytes, issuer: str, terms: Terms = DEFAULT_TERMS) -> None:
        self._db = db
        self._passphrase = passphrase
        self.issuer = issuer
        """The broker's name in tokens, and its address for everybody (``http.public_url``)."""
        self._keys: dict[str, SigningKey] = {}
        self._set: tuple[list[str], KeySet] | None = None
        self._reloading = asyncio.Lock()
        self.terms = terms
        self.lives: tuple[Life, ...] = ()
        """Those that are neither revoked nor past their end."""
        self.unreadable: set[str] = set()
        """Those of them that this broker's passphrase does not open."""
        self.signer = TokenSigner((), issuer)

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._keys)})"

    @cached_property
    def sealer(self) -> Sealer:
        """Seals what is kept with objects; its key comes from the passphrase. Made by `load`, since that takes its time."""
        return Sealer([self._passphrase])

    def published(self, now: float) -> KeySet:
        """The public halves of all keys that will sign, sign, or signed tokens that may still live."""
        ids = [life.id for life in rotation.published(self.lives, now) if life.id in self._keys]
        if self._set is None or self._set[0] != ids:
            document = token.jwks(self._keys[id] for id in ids)
            body = orjson.dumps(document)
            self._set = ids, KeySet(document, body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        return self._set[1]

    def jwks(self, now: float) -> dict[str, list[dict[str, str]]]:
        """The published keys as a value."""
        return self.published(now).document

    def states(self, now: float) -> Counter[str]:
        """How many keys are in which state; those that this broker cannot decrypt are ``unreadable``."""
        return Counter("unreadable" if life.id in self.unreadable else life.state(now).value for life in self.lives)

    async def reload(self) -> None:
        """Take over what the catalogue has now. Raises `Unavailable`; then nothing changes.

        A key that cannot be decrypted, since another broker was started with another passphrase, is logged and left out: that a
        key was revoked must reach this broker all the same.
        """
        async with self._reloading:  # else an older reading could overwrite a newer one
            known = self.unreadable
            self._take(await keys.load(self._db))
            for kid in self.unreadable - known:
                _log.error("a signing key cannot be decrypted: start every broker with the same passphrase", kid=kid)

    async def change(self, decide: Callable[[Sequence[Life], float], Plan]) -> Plan:
        """Carry out what `decide` makes of all keys at the database's time, and take over what is there then.

        Raises what `decide` raises, `WrongPassphrase` (then nothing was changed) and `Unavailable`.
        """
        async with self._reloading:
            async with transaction(self._db) as connection:
                await keys.lock(connection)
                rows = await keys.load(connection)
                lives = [row.life for row in rows]
                fresh: list[SigningKey] = []
                while True:
                    now = await keys.clock(connection)
                    plan = decide(lives, now)
                    if [new.algorithm for new in plan.made] == [key.algorithm for key in fresh]:
                        break
                    # To make an RSA key takes seconds; it is new when it is there.
                    fresh = [await asyncio.to_thread(_make, new.algorithm) for new in plan.made]
                for life in plan.changed:
                    await keys.update(connection, life)
                if plan.made:
                    revoked = {life.id for life in plan.changed if not math.isinf(life.revoked_at)}
                    await asyncio.to_thread(self._compare_passphrase, [row for row in rows if row.life.id not in revoked])
                for new, key in zip(plan.made, fresh, strict=True):
                    pem = await asyncio.to_thread(token.to_pem, key, self._passphrase)
                    await keys.insert(connection, KeyRow(Life(key.id, key.algorithm, now, new.signs_from), pem.decode()))
                rows = await keys.load(connection)
            self._take(rows)
        return plan

    async def promise(self, expires_at: float, now: float) -> None:
        """Let the key that signs now be kept until `expires_at` at least: it is about to sign a bearer token. Raises `Unavailable`."""
        current = rotation.signing(self.lives, now)
        if current is not None:
            await keys.keep_until(self._db, current.id, expires_at + rotation.MARGIN_SECONDS)
            await self.reload()

    def _take(self, rows: list[KeyRow]) -> None:
        opened: dict[str, SigningKey] = {}
        for row in rows:
            life = row.life
            try:
                key = self._keys.get(life.id) or token.from_pem(row.pem.encode(), self._passphrase)
            except ValueError:
                continue
            opened[life.id] = replace(key, activates_at=life.signs_from, retires_at=life.signs_until, expires_at=life.kept_until)
        self.lives = tuple(row.life for row in rows)
        self.unreadable = {life.id for life in self.lives} - opened.keys()
        self._keys = opened
        self.signer = TokenSigner(list(opened.values()), self.issuer)

    def _compare_passphrase(self, rows: Sequence[KeyRow]) -> None:
        """Raise `WrongPassphrase` unless the newest of `rows` can be decrypted: what this broker adds, the others have to read."""
        try:
            for row in rows[-1:]:
                token.from_pem(row.pem.encode(), self._passphrase)
        except ValueError:
            raise WrongPassphrase(_wrong(rows[-1].life.id)) from None


async def load(db: Any, passphrase: bytes, issuer: str, algorithm: Algorithm = "ES256", terms: Terms = DEFAULT_TERMS) -> Keyring:
    """The keys of the catalogue behind `db`; those that are missing are made, the first one of `algorithm`. `issuer` is what tokens
    name as ``iss``. Brokers that start at once agree.

    Raises `WrongPassphrase` when they were kept with another passphrase, and `Unavailable`.
    """
    keyring = Keyring(db, passphrase, issuer, terms)
    await keyring.change(lambda lives, now: rotation.complete(lives, now, algorithm))
    for kid in keyring.unreadable:
        raise WrongPassphrase(_wrong(kid))
    await asyncio.to_thread(lambda: keyring.sealer)
    return keyring


async def rewrap(db: Any, passphrase: bytes, new_passphrase: bytes) -> int:
    """Encrypt every key with another passphrase; how many there are. Raises `WrongPassphrase` and `Unavailable`; then nothing changed."""
    async with transaction(db) as connection:
        await keys.lock(connection)
        rows = await keys.load(connection)
        for row in rows:
            pem = await asyncio.to_thread(_rewrapped, row, passphrase, new_passphrase)
            await keys.replace_pem(connection, row.life.id, pem)
    return len(rows)


def _make(algorithm: Algorithm) -> SigningKey:
    while (key := token.generate_key(algorithm, 0.0)).id.startswith("-"):
        pass  # a name that no command takes for an option
    return key


def _rewrapped(row: KeyRow, passphrase: bytes, new_passphrase: bytes) -> str:
    try:
        return token.to_pem(token.from_pem(row.pem.encode(), passphrase), new_passphrase).decode()
    except ValueError:
        raise WrongPassphrase(_wrong(row.life.id)) from None


def _wrong(kid: str) -> str:
    return (
        f"The signing key {kid} cannot be decrypted with this broker's key passphrase. Start every broker with the passphrase that the "
        "first one had (keys.passphrase_file, or BROKER_KEYS_PASSPHRASE). If it is lost, set revoked_at of the rows of the table "
        "signing_keys to now(): the next start makes fresh keys, and tokens that the old ones signed are refused from then on."
    )
