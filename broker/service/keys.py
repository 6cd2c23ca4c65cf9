"""The broker's signing keys: made at the first start, kept encrypted in the catalogue, the same for every broker on it.

Rules: one lock decides who makes the first key. A key is decrypted once and then kept in memory; when keys change, `reload`
makes a new signer, and who holds the old one has to take the new one.
"""

from __future__ import annotations

import math
from typing import Any

from broker.catalog import keys
from broker.catalog.keys import KeyRow
from broker.catalog.transaction import transaction
from broker.sign import token
from broker.sign.token import Algorithm, SigningKey, TokenSigner

_CLOCKS_SECONDS = 300.0
"""A fresh first key signs from this much before now, since the clocks of other brokers may be behind."""


class WrongPassphrase(Exception):
    """The signing keys in the catalogue cannot be decrypted; the text says what to do."""


class Keyring:
    """The keys as of the last `reload`; made by `load`."""

    def __init__(self, db: Any, passphrase: bytes, issuer: str) -> None:
        self._db = db
        self._passphrase = passphrase
        self._issuer = issuer
        self._keys: dict[str, SigningKey] = {}
        self.signer = TokenSigner((), issuer)

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._keys)})"

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """The public halves of all keys that are in use or may have signed tokens that still live (RFC 7517)."""
        return token.jwks(self._keys.values())

    async def reload(self) -> None:
        """Take over what the catalogue has now. Raises `WrongPassphrase` and `Unavailable`; then nothing changes."""
        self._take(await keys.load(self._db))

    def _take(self, rows: list[KeyRow]) -> None:
        self._keys = {row.id: self._open(row) for row in rows}
        self.signer = TokenSigner(list(self._keys.values()), self._issuer)

    def _open(self, row: KeyRow) -> SigningKey:
        retires_at = math.inf if row.signs_until is None else row.signs_until
        expires_at = math.inf if row.kept_until is None else row.kept_until
        known = self._keys.get(row.id)
        if known is not None and (known.activates_at, known.retires_at, known.expires_at) == (row.signs_from, retires_at, expires_at):
            return known
        try:
            return token.from_pem(
                row.pem.encode(), self._passphrase, activates_at=row.signs_from, retires_at=retires_at, expires_at=expires_at
            )
        except ValueError:
            raise WrongPassphrase(
                f"The signing key {row.id} cannot be decrypted with this broker's key passphrase. Start every broker with the passphrase "
                "that the first one had. If it is lost, set revoked_at of that row in the table signing_keys to now(): the next start "
                "makes a fresh key, and tokens that the old one signed are refused from then on."
            ) from None

    async def make_first(self, now: float, algorithm: Algorithm) -> None:
        """Make a key if there is none that signs now, and take over what is there. Brokers that start at once agree on one."""
        async with transaction(self._db) as connection:
            await keys.lock(connection)
            rows = await keys.load(connection)
            if not any(row.signs_until is None or row.signs_until > now for row in rows):
                key = token.generate_key(algorithm, now, activates_at=now - _CLOCKS_SECONDS)
                pem = token.to_pem(key, self._passphrase).decode()
                await keys.insert(connection, KeyRow(key.id, key.algorithm, pem, key.activates_at))
                rows = await keys.load(connection)
        self._take(rows)


async def load(db: Any, passphrase: bytes, now: float, issuer: str, algorithm: Algorithm = "ES256") -> Keyring:
    """The keys of the catalogue behind `db`, with a first one of `algorithm` made if need be. `issuer` is what tokens name as ``iss``.

    Raises `WrongPassphrase` when they were kept with another passphrase, and `Unavailable`.
    """
    keyring = Keyring(db, passphrase, issuer)
    await keyring.make_first(now, algorithm)
    return keyring
