"""The store's decision about a token: what is accepted, and every way in which it is not."""

from __future__ import annotations

import base64
import hmac
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any, get_args

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from broker.claims import LEEWAY_SECONDS, MAX_TOKEN_LENGTH, TransferToken
from broker.sign.token import Algorithm, SigningKey, TokenSigner, generate_key, jwks, public_jwk
from broker.storeside.refused import Refused
from broker.storeside.target import Headers
from broker.storeside.verify import MAX_KEYS, Grant, UnknownKey, keys_of, verify

NOW = 1_795_365_748.0
ISSUER, STORE, PATH = "https://broker", "disk-1", "/images/a b"
KEYS: dict[str, SigningKey] = {algorithm: generate_key(algorithm, NOW) for algorithm in get_args(Algorithm)}
PUBLISHED = keys_of(jwks(KEYS.values()))
TOKEN = TransferToken(ISSUER, STORE, "alice", "GET", PATH, NOW + 600, NOW, "id-1")
ES256 = KEYS["ES256"]


def signed(token: TransferToken = TOKEN, key: SigningKey = ES256) -> str:
    return TokenSigner([key], token.issuer).sign(token, NOW)


def check(token: str, method: str = "GET", path: str = PATH, now: float = NOW, headers: Headers = ()) -> TransferToken:
    return verify(token, method, path, headers, PUBLISHED, now, audience=STORE, issuer=ISSUER).token


def forged(header: dict[str, Any] | None = None, claims: Any = None, key: Any = ES256.private, algorithm: str = "ES256") -> str:
    """A token by PyJWT, with header fields added."""
    return jwt.encode(TOKEN.to_claims() if claims is None else claims, key, algorithm=algorithm, headers={"kid": ES256.id} | (header or {}))


GOOD = signed()


def segment(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.mark.parametrize("algorithm", list(KEYS))
def test_a_good_token_grants_what_it_says(algorithm: str) -> None:
    assert check(signed(key=KEYS[algorithm])) == TOKEN
    assert check(signed(key=KEYS[algorithm]), "HEAD") == TOKEN


@pytest.mark.parametrize(
    ("change", "now", "status"),
    [
        ({"issuer": "https://other"}, NOW, 401),
        ({"audience": "disk-2"}, NOW, 401),
        ({"audience": "DISK-1"}, NOW, 401),
        ({"method": "PUT"}, NOW, 403),
        ({"method": "DELETE"}, NOW, 403),
        ({"path": "/images/a%20b"}, NOW, 403),
        ({"path": "/images/A b"}, NOW, 403),
        ({"path": "/images/a b/"}, NOW, 403),
        ({"path": "/images"}, NOW, 403),
        ({"not_before": NOW + LEEWAY_SECONDS}, NOW, None),
        ({"not_before": NOW + LEEWAY_SECONDS + 1}, NOW, 401),
        ({}, NOW + 599.5, None),
        ({}, NOW + 600, 401),
        ({}, NOW + 601, 401),
    ],
)
def test_claims_must_fit_exactly(change: dict[str, Any], now: float, status: int | None) -> None:
    token = signed(replace(TOKEN, **change))
    if status is None:
        assert check(token, now=now).id == TOKEN.id
    else:
        with pytest.raises(Refused) as refused:
            check(token, now=now)
        assert refused.value.status == status


@pytest.mark.parametrize(
    ("granted", "asked"), [("GET", "PUT"), ("GET", "DELETE"), ("PUT", "GET"), ("PUT", "HEAD"), ("DELETE", "GET"), ("GET", "get")]
)
def test_a_token_is_for_one_method(granted: str, asked: str) -> None:
    with pytest.raises(Refused) as refused:
        check(signed(replace(TOKEN, method=granted)), asked)
    assert refused.value.status == 403


@pytest.mark.parametrize("leeway", [0.0, LEEWAY_SECONDS, 600.0])
def test_only_the_begin_is_stretched(leeway: float) -> None:
    def at(now: float) -> bool:
        try:
            verify(GOOD, "GET", PATH, (), PUBLISHED, now, audience=STORE, issuer=ISSUER, leeway=leeway)
        except Refused:
            return False
        return True

    assert [at(NOW - leeway + seconds) for seconds in (-1, 0)] == [False, True]
    assert [at(NOW + 600 + seconds) for seconds in (-1, 0, 1)] == [True, False, False]


@pytest.mark.parametrize("seconds", [-600, 600])
def test_a_clock_ten_minutes_off(seconds: float) -> None:
    """Behind: tokens are not valid yet. Ahead: those of ten minutes have ended, longer ones end early. Never the other way round."""
    with pytest.raises(Refused, match="not valid yet" if seconds < 0 else "expired"):
        check(GOOD, now=NOW + seconds)
    longer = signed(replace(TOKEN, expires_at=NOW + 1300))
    if seconds > 0:
        assert check(longer, now=NOW + seconds).expires_at == NOW + 1300


def test_the_grant_tells_the_key_and_the_length() -> None:
    token = replace(TOKEN, method="PUT", length=5)
    assert verify(signed(token), "PUT", PATH, {"Content-Length": "5"}, PUBLISHED, NOW, audience=STORE, issuer=ISSUER) == Grant(
        token, ES256.id, 5
    )


def test_keys_may_come_as_a_document() -> None:
    document = jwks(KEYS.values())
    assert verify(GOOD, "GET", PATH, (), document, NOW, audience=STORE, issuer=ISSUER).token == TOKEN
    for useless in ({}, {"keys": []}, {"keys": [{"kty": "oct"}]}, {"keys": [1] * (MAX_KEYS + 1)}):
        with pytest.raises(Refused) as refused:
            verify(GOOD, "GET", PATH, (), useless, NOW, audience=STORE, issuer=ISSUER)
        assert refused.value.status == 503


LENGTH_FIVE = {"Content-Length": "5"}
CHUNKED = {"Transfer-Encoding": "chunked"}


@pytest.mark.parametrize(
    ("method", "headers", "bound", "status"),
    [
        ("GET", {}, None, None),
        ("GET", {"content-length": "0"}, None, None),
        ("GET", LENGTH_FIVE, None, 400),
        ("GET", CHUNKED, None, 400),
        ("HEAD", LENGTH_FIVE, None, 400),
        ("DELETE", LENGTH_FIVE, None, 400),
        ("GET", [("Range", "bytes=0-1"), ("range", "bytes=2-3")], None, 400),
        ("GET", [("Authorization", "Bearer x"), ("AUTHORIZATION", "Basic x")], None, 400),
        ("GET", [("Host", "a"), ("Host", "b")], None, 400),
        ("GET", [("Accept", "a"), ("Accept", "b")], None, None),
        ("GET", {"X-HTTP-Method-Override": "DELETE"}, None, 400),
        ("GET", {"X-Original-URL": "/other"}, None, 400),
        ("PUT", LENGTH_FIVE, 5, None),
        ("PUT", {"Content-Length": "6"}, 5, 400),
        ("PUT", {"Content-Length": "4"}, 5, 400),
        ("PUT", {"Content-Length": "5 "}, 5, 400),
        ("PUT", {"Content-Length": "+5"}, 5, 400),
        ("PUT", {"Content-Length": "5, 5"}, 5, 400),
        ("PUT", {"Content-Length": "٥"}, 5, 400),
        ("PUT", {"Content-Length": "0x5"}, None, 400),
        ("PUT", {"Content-Length": "9" * 19}, None, 400),
        ("PUT", [("Content-Length", "5"), ("Content-Length", "5")], 5, 400),
        ("PUT", {}, 5, 411),
        ("PUT", {}, 0, 411),
        ("PUT", {}, None, None),
        ("PUT", CHUNKED, 5, 411),
        ("PUT", CHUNKED, None, None),
        ("PUT", CHUNKED | LENGTH_FIVE, None, 400),
        ("PUT", {"Transfer-Encoding": "gzip, chunked"}, None, 400),
        ("PUT", {"Transfer-Encoding": "identity"}, None, 400),
        ("PUT", {"Transfer-Encoding": "chunked\x0b"}, None, 400),
        ("PUT", {"Content-Range": "bytes 0-4/9"} | LENGTH_FIVE, 5, 400),
        ("PUT", {"Content-Encoding": "gzip"} | LENGTH_FIVE, 5, 415),
        ("PUT", {"Content-Encoding": "Identity"} | LENGTH_FIVE, 5, None),
        ("POST", {"Content-Length": "90"}, 5, None),
        ("POST", {"Content-Encoding": "br"}, 5, 415),
    ],
)
def test_what_the_fields_of_a_request_may_say(method: str, headers: Headers, bound: int | None, status: int | None) -> None:
    token = replace(TOKEN, method="GET" if method == "HEAD" else method, length=bound, upload="u" if method == "POST" else None)
    if status is None:
        assert check(signed(token), method, headers=headers) == token
    else:
        with pytest.raises(Refused) as refused:
            check(signed(token), method, headers=headers)
        assert refused.value.status == status


PUBLIC_PEM = ES256.private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
HEAD, BODY, SIGNATURE = GOOD.split(".")


def hs256() -> str:
    """The classic confusion: the public key, which everybody has, taken for a shared secret."""
    unsigned = f"{segment({'alg': 'HS256', 'kid': ES256.id})}.{BODY}"
    mac = hmac.digest(PUBLIC_PEM, unsigned.encode(), "sha256")
    return f"{unsigned}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


ATTACKS = {
    "alg none": f"{segment({'alg': 'none', 'kid': ES256.id})}.{BODY}.",
    "alg none, signature kept": f"{segment({'alg': 'none', 'kid': ES256.id})}.{BODY}.{SIGNATURE}",
    "alg None": f"{segment({'alg': None, 'kid': ES256.id})}.{BODY}.{SIGNATURE}",
    "HS256 with the public key": hs256(),
    "another algorithm than the key's": forged({"kid": KEYS["EdDSA"].id}),
    "key confusion with RSA": forged({"kid": KEYS["RS256"].id}),
    "signed by a stranger": forged(key=generate_key("ES256", NOW).private),
    "stranger's key in jwk": forged({"jwk": public_jwk(stranger := generate_key("ES256", NOW))}, key=stranger.private),
    "stranger's key by jku": forged({"jku": "https://evil/jwks.json"}, key=stranger.private),
    "stranger's key by x5u": forged({"x5u": "https://evil/cert.pem"}, key=stranger.private),
    "kid is a path": forged({"kid": "../../dev/null"}),
    "kid is a URL": forged({"kid": "https://evil/key"}),
    "no kid": f"{segment({'alg': 'ES256'})}.{BODY}.{SIGNATURE}",
    "kid is a list": f"{segment({'alg': 'ES256', 'kid': [ES256.id]})}.{BODY}.{SIGNATURE}",
    "crit": forged({"crit": ["exp"]}),
    "unencoded payload": f"{segment({'alg': 'ES256', 'kid': ES256.id, 'b64': False})}.{BODY}.{SIGNATURE}",
    "signature stripped": f"{HEAD}.{BODY}.",
    "two segments": f"{HEAD}.{BODY}",
    "four segments": f"{GOOD}.{SIGNATURE}",
    "padding": GOOD + "==",
    "white space": f" {GOOD}",
    "newline": f"{GOOD}\n",
    "signature with rubbish between": f"{HEAD}.{BODY}.{SIGNATURE[:10]}!{SIGNATURE[10:]}",
    "signature as DER": f"{HEAD}.{BODY}.{base64.urlsafe_b64encode(b'0' + b'1' * 70).decode().rstrip('=')}",
    "payload of another token": f"{HEAD}.{segment(TOKEN.to_claims() | {'path': '/other'})}.{SIGNATURE}",
    "header is a list": f"{segment([1])}.{BODY}.{SIGNATURE}",
    "header is no JSON": f"{base64.urlsafe_b64encode(b'{alg:').decode().rstrip('=')}.{BODY}.{SIGNATURE}",
    "claims are a list": jwt.api_jws.encode(b"[]", ES256.private, algorithm="ES256", headers={"kid": ES256.id}),
    "unknown claim": forged(claims=TOKEN.to_claims() | {"scope": "admin"}),
    "audience is a list": forged(claims=TOKEN.to_claims() | {"aud": [STORE, "disk-2"]}),
    "no expiry": forged(claims={name: value for name, value in TOKEN.to_claims().items() if name != "exp"}),
    "oversized": forged({"pad": "x" * MAX_TOKEN_LENGTH}),
    "empty": "",
}  # fmt: skip


@pytest.mark.parametrize("token", ATTACKS.values(), ids=ATTACKS.keys())
def test_attacks_are_refused(token: str) -> None:
    with pytest.raises(Refused) as refused:
        check(token)
    assert refused.value.status == 401
    assert refused.value.headers["WWW-Authenticate"] == "Bearer"
    assert token == "" or token not in refused.value.reason


def test_headers_that_name_keys_are_ignored_in_a_good_token() -> None:
    assert check(forged({"jku": "https://evil", "jwk": {}, "x5u": "https://evil"})) == TOKEN


@pytest.mark.parametrize("last", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
def test_a_signature_has_one_spelling(last: str) -> None:
    other = GOOD[:-1] + last
    if other == GOOD:
        assert check(other) == TOKEN
    else:
        with pytest.raises(Refused):
            check(other)


@given(
    st.text(max_size=60)
    | st.binary(max_size=60).map(lambda raw: base64.urlsafe_b64encode(raw).decode().rstrip("=") + "." + BODY + "." + SIGNATURE)
)
def test_rubbish_is_refused_and_never_crashes(token: str) -> None:
    with pytest.raises(Refused):
        check(token)


@given(st.integers(0, len(GOOD) - 1), st.characters())
def test_no_changed_character_passes(place: int, character: str) -> None:
    changed = GOOD[:place] + character + GOOD[place + 1 :]
    if changed != GOOD:
        with pytest.raises(Refused):
            check(changed)


def test_an_unknown_key_is_told_apart() -> None:
    with pytest.raises(UnknownKey):
        check(signed(key=generate_key("ES256", NOW)))


def weak_rsa() -> dict[str, Any]:
    private = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    members: dict[str, Any] = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(private.public_key()))
    return members | {"kid": "weak"}


@pytest.mark.parametrize(
    "entry",
    [
        "text",
        {"kty": "oct", "k": "AAAA", "kid": "symmetric", "alg": "HS256"},
        {name: value for name, value in public_jwk(ES256).items() if name != "kid"},
        public_jwk(ES256) | {"kid": 5},
        public_jwk(ES256) | {"use": "enc"},
        public_jwk(ES256) | {"alg": "RS256"},
        public_jwk(ES256) | {"alg": "HS256"},
        public_jwk(ES256) | {"crv": "P-384"},
        public_jwk(ES256) | {"x": "AAAA"},
        {"kty": "EC", "crv": "P-256", "kid": "half"},
        weak_rsa(),
    ],
)
def test_unusable_keys_are_left_out(entry: Any) -> None:
    good = public_jwk(KEYS["EdDSA"])
    assert set(keys_of({"keys": [entry, good]})) == {good["kid"]}
    assert keys_of({"keys": [entry]}) == {}


@pytest.mark.parametrize("document", [None, [], {}, {"keys": {}}, {"keys": None}, "keys"])
def test_what_is_no_key_set_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match="JWKS"):
        keys_of(document)


def test_a_set_of_too_many_keys_is_no_set() -> None:
    assert keys_of({"keys": [public_jwk(ES256)] * MAX_KEYS}).keys() == {ES256.id}
    with pytest.raises(ValueError, match="too many"):
        keys_of({"keys": [public_jwk(ES256)] * (MAX_KEYS + 1)})


def test_importing_the_verifier_loads_no_server() -> None:
    program = "import sys; from broker.storeside import verify, Grant, Refused, keys_of, read_target; print(callable(verify), *sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert loaded[0] == "True"
    assert {"aiohttp", "click", "asyncio", "prometheus_client", "broker.storeside.server", "broker.storeside.application"}.isdisjoint(
        loaded
    )
