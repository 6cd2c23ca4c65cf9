"""Tokens that we sign are what PyJWT verifies; keys live as they say."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any, get_args

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448

from broker.claims import TransferToken
from broker.sign.token import Algorithm, NoSigningKey, SigningKey, TokenSigner, from_pem, generate_key, jwks, public_jwk, to_pem

NOW = 1_795_365_748.0
TOKEN = TransferToken("https://broker", "disk-1", "alice", "GET", "/images/é", NOW + 600.9, NOW - 1, "id-1")
KEYS: dict[str, SigningKey] = {algorithm: generate_key(algorithm, NOW) for algorithm in get_args(Algorithm)}


@pytest.fixture(params=list(KEYS))
def key(request: pytest.FixtureRequest) -> SigningKey:
    return KEYS[request.param]


def decoded(token: str, key: SigningKey) -> dict[str, Any]:
    public = jwt.PyJWK(public_jwk(key)).key
    return jwt.decode(token, public, algorithms=[key.algorithm], options={"verify_exp": False, "verify_nbf": False, "verify_aud": False})


def test_pyjwt_verifies_what_we_sign(key: SigningKey) -> None:
    signer = TokenSigner([key], "https://broker")
    for _ in range(20 if key.algorithm == "ES256" else 2):  # r and s vary in length
        token = signer.sign(TOKEN, NOW)
        assert decoded(token, key) == TOKEN.to_claims()
    assert jwt.get_unverified_header(token) == {"alg": key.algorithm, "kid": key.id, "typ": "JWT"}


def test_the_kid_is_the_thumbprint(key: SigningKey) -> None:
    required = {name: value for name, value in public_jwk(key).items() if name in ("crv", "e", "kty", "n", "x", "y")}
    digest = hashlib.sha256(json.dumps(required, sort_keys=True, separators=(",", ":")).encode()).digest()
    assert base64.urlsafe_b64encode(digest).decode().rstrip("=") == key.id
    assert from_pem(to_pem(key, b"pass"), b"pass").id == key.id


def test_bearer_tokens_carry_the_issuer(key: SigningKey) -> None:
    token = TokenSigner([key], "https://broker").sign_claims({"sub": "bob", "exp": NOW + 60, "iss": "https://evil"}, NOW)
    assert decoded(token, key) == {"sub": "bob", "exp": NOW + 60, "iss": "https://broker"}


def test_keys_are_kept_encrypted(key: SigningKey) -> None:
    pem = to_pem(key, b"correct horse")
    assert pem.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    again = from_pem(pem, b"correct horse", activates_at=5, retires_at=6, expires_at=7)
    assert public_jwk(again) == public_jwk(key)
    assert (again.activates_at, again.retires_at, again.expires_at) == (5, 6, 7)
    with pytest.raises(ValueError, match="passphrase"):
        from_pem(pem, b"wrong")
    with pytest.raises(ValueError, match="PEM"):
        from_pem(b"nonsense", b"correct horse")


@pytest.mark.parametrize("private", [ec.generate_private_key(ec.SECP384R1()), ed448.Ed448PrivateKey.generate()])
def test_other_kinds_of_key_are_refused(private: Any) -> None:
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"p"))
    with pytest.raises(ValueError, match="P-256, RSA or Ed25519"):
        from_pem(pem, b"p")


def test_the_key_set_holds_no_private_part() -> None:
    published = json.dumps(jwks(KEYS.values()))
    members = {name for entry in json.loads(published)["keys"] for name in entry}
    assert members <= {"kty", "crv", "x", "y", "n", "e", "kid", "alg", "use"}
    assert all("private" not in repr(key) for key in KEYS.values())


def test_the_newest_active_key_signs_and_no_token_outlives_it() -> None:
    old = replace(KEYS["ES256"], retires_at=NOW + 100, expires_at=NOW + 700)
    new = replace(KEYS["EdDSA"], activates_at=NOW + 50)
    signer = TokenSigner([old, new], "https://broker")

    def signs(now: float, end: float) -> str:
        return str(jwt.get_unverified_header(signer.sign(replace(TOKEN, expires_at=end), now))["kid"])

    assert signs(NOW, NOW + 60) == old.id
    assert signs(NOW + 50, NOW + 60) == new.id
    with pytest.raises(NoSigningKey):
        signs(NOW, NOW + 701)
    with pytest.raises(NoSigningKey):
        TokenSigner([old], "https://broker").sign(TOKEN, NOW + 100)
    with pytest.raises(NoSigningKey):
        TokenSigner([], "https://broker").sign(TOKEN, NOW)


def test_another_issuer_is_not_signed_for() -> None:
    with pytest.raises(ValueError, match="issuer"):
        TokenSigner([KEYS["ES256"]], "https://other").sign(TOKEN, NOW)


def test_a_key_may_become_active_later() -> None:
    key = generate_key("ES256", NOW, activates_at=NOW + 60)
    with pytest.raises(NoSigningKey):
        TokenSigner([key], "https://broker").sign(TOKEN, NOW)
    assert TokenSigner([key], "https://broker").sign(TOKEN, NOW + 60)
