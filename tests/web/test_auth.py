"""Who gets in: the broker's own tokens, OIDC issuers with keys that rotate, and nobody who tries a trick."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from broker import config, metrics
from broker.errors import BrokerError, Forbidden, Unauthenticated, Unavailable
from broker.model import Principal, Role
from broker.sign.token import generate_key, public_jwk
from broker.web import auth
from broker.web.auth import Authenticator
from tests.parts.broker import Api, RunningBroker

AUDIENCE = "images"


@dataclass
class Idp:
    """An OIDC issuer on the loopback."""

    keys: list[dict[str, Any]] = field(default_factory=list)
    private: dict[str, Any] = field(default_factory=dict)
    fetched: int = 0
    url: str = ""
    answer: str = "good"
    hold: asyncio.Event = field(default_factory=asyncio.Event)

    def rotate(self, kid: str, key: Any = None, *, keep: bool = False, **members: str) -> None:
        key = key or ec.generate_private_key(ec.SECP256R1())
        algorithm = jwt.algorithms.ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else jwt.algorithms.RSAAlgorithm
        public = json.loads(algorithm.to_jwk(key.public_key()))
        self.keys = [*(self.keys if keep else []), {**public, "kid": kid, "use": "sig", **members}]
        self.private[kid] = key

    def token(self, kid: str, algorithm: str = "ES256", **claims: Any) -> str:
        now = int(time.time())
        base = {"iss": self.url, "aud": AUDIENCE, "sub": "alice", "exp": now + 600, "nbf": now, "project": "demo", "role": "member"}
        return jwt.encode(
            {name: value for name, value in {**base, **claims}.items() if value is not None},
            self.private[kid],
            algorithm,
            headers={"kid": kid},
        )

    async def discovery(self, request: web.Request) -> web.Response:
        return web.json_response({"issuer": self.url if self.answer != "other" else "http://evil", "jwks_uri": f"{self.url}/keys"})

    async def jwks(self, request: web.Request) -> web.StreamResponse:
        self.fetched += 1
        match self.answer:
            case "down":
                return web.Response(status=500)
            case "redirect":
                return web.Response(status=302, headers={"Location": "/elsewhere"})
            case "huge":
                return web.Response(body=b" " * (10 << 20) + b'{"keys":[]}')
            case "hang":
                await self.hold.wait()
            case "drip":
                response = web.StreamResponse()
                await response.prepare(request)
                while not self.hold.is_set():
                    await response.write(b" ")
                    await asyncio.sleep(0.05)
                return response
            case "packed":
                return web.Response(body=gzip.compress(b" " * (10 << 20) + b'{"keys":[]}'), headers={"Content-Encoding": "gzip"})
            case "empty":
                return web.json_response({"keys": []})
            case "changing":
                self.rotate(f"k{self.fetched}")
            case "html":
                return web.Response(text="<html>")
        return web.json_response({"keys": self.keys})


@pytest.fixture
async def idp() -> AsyncIterator[Idp]:
    issuer = Idp()
    application = web.Application()
    application.router.add_get("/.well-known/openid-configuration", issuer.discovery)
    application.router.add_get("/keys", issuer.jwks)
    application.router.add_get("/elsewhere", issuer.jwks)
    server = TestServer(application)
    await server.start_server()
    issuer.url = str(server.make_url("")).rstrip("/")
    issuer.rotate("k1")
    yield issuer
    issuer.hold.set()
    await server.close()


OWN = generate_key("ES256", time.time() - 60)


def authenticator(session: aiohttp.ClientSession, idp: Idp | None = None, **issuer: Any) -> Authenticator:
    issuers = (config.Issuer(**{"issuer": idp.url, "audience": AUDIENCE, **issuer}),) if idp is not None else ()
    settings = config.Auth(issuers=issuers)
    return Authenticator(
        settings, "http://broker", lambda: {"keys": [public_jwk(OWN)]}, session, session, metrics.create(), refetch_seconds=0
    )


async def verify(session: aiohttp.ClientSession, idp: Idp, token: str, **issuer: Any) -> Principal:
    return await authenticator(session, idp, **issuer).authenticate(f"Bearer {token}")


async def test_a_good_token(session: aiohttp.ClientSession, idp: Idp) -> None:
    principal = await verify(session, idp, idp.token("k1", site="eu/az1"))
    assert (principal.subject, principal.project, principal.role, principal.site) == ("alice", "demo", Role.MEMBER, "eu/az1")


@pytest.mark.parametrize("algorithm", ["RS256", "PS256"])
async def test_rsa_keys(session: aiohttp.ClientSession, idp: Idp, algorithm: str) -> None:
    idp.rotate("r", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    assert (await verify(session, idp, idp.token("r", algorithm))).subject == "alice"


async def test_claims_may_have_other_names(session: aiohttp.ClientSession, idp: Idp) -> None:
    token = idp.token(
        "k1", role=None, project=None, realm_access={"roles": ["user", "image-admin", "reader"]}, **{"https://x/tenant": "t1"}
    )
    names = config.ClaimNames(project="https://x/tenant", role="realm_access.roles")
    principal = await verify(session, idp, token, claims=names, roles={"image-admin": Role.ADMIN, "reader": Role.READER})
    assert (principal.project, principal.role) == ("t1", Role.ADMIN)


async def test_keys_rotate(session: aiohttp.ClientSession, idp: Idp) -> None:
    checker = authenticator(session, idp)
    await checker.authenticate(f"Bearer {idp.token('k1')}")
    idp.rotate("k2", keep=True)
    await checker.authenticate(f"Bearer {idp.token('k2')}")
    await checker.authenticate(f"Bearer {idp.token('k1')}")
    assert idp.fetched == 2


async def test_unknown_kids_cause_no_load(session: aiohttp.ClientSession, idp: Idp) -> None:
    issuer = config.Issuer(idp.url, AUDIENCE)
    checker = Authenticator(config.Auth(issuers=(issuer,)), "http://broker", lambda: {"keys": []}, session, session, metrics.create())
    await checker.authenticate(f"Bearer {idp.token('k1')}")
    for number in range(20):
        idp.private[f"invented-{number}"] = idp.private["k1"]
        with pytest.raises(Unauthenticated):
            await checker.authenticate(f"Bearer {idp.token(f'invented-{number}')}")
    assert idp.fetched == 1


async def test_a_verified_token_is_remembered_until_it_ends(session: aiohttp.ClientSession, idp: Idp) -> None:
    checker = authenticator(session, idp)
    header = f"Bearer {idp.token('k1')}"
    principal = await checker.authenticate(header)
    assert checker.known(header) is principal
    checker._clock = lambda: principal.expires_at + 3600
    assert checker.known(header) is None
    checker.forget()


def forged(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def attacks(idp: Idp) -> dict[str, str]:
    now = int(time.time())
    good = jwt.decode(idp.token("k1"), options={"verify_signature": False})
    pem = idp.private["k1"].public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    head, body, signature = idp.token("k1").split(".")
    stranger = ec.generate_private_key(ec.SECP256R1())
    confused = forged({"alg": "HS256", "kid": "k1", "typ": "JWT"}, good).rpartition(".")[0]
    mac = base64.urlsafe_b64encode(hmac.new(pem, confused.encode(), hashlib.sha256).digest()).rstrip(b"=").decode()
    return {
        "alg none": forged({"alg": "none", "kid": "k1"}, good),
        "alg None": forged({"alg": "None", "kid": "k1"}, good),
        "HMAC with the public key": f"{confused}.{mac}",
        "another algorithm for the key": forged({"alg": "RS256", "kid": "k1"}, good, b"x" * 256),
        "another key": jwt.encode(good, stranger, "ES256", headers={"kid": "k1"}),
        "key in the header": jwt.encode(good, stranger, "ES256", headers={"kid": "k1", "jwk": public_jwk(OWN), "jku": "http://evil"}),
        "changed claims": f"{head}.{forged({}, {**good, 'role': 'admin'}).split('.')[1]}.{signature}",
        "no signature": f"{head}.{body}.",
        "wrong audience": idp.token("k1", aud="other"),
        "no audience": idp.token("k1", aud=None),
        "unknown issuer": idp.token("k1", iss="http://evil"),
        "our issuer": idp.token("k1", iss="http://broker"),
        "no issuer": idp.token("k1", iss=None),
        "list as issuer": idp.token("k1", iss=None, other=1),
        "expired": idp.token("k1", exp=now - 600),
        "no end": idp.token("k1", exp=None),
        "end that is no number": idp.token("k1", exp="later"),
        "not yet": idp.token("k1", nbf=now + 600),
        "subject with control characters": idp.token("k1", sub="a\nb"),
        "empty subject": idp.token("k1", sub=""),
        "unknown kid": jwt.encode(good, stranger, "ES256", headers={"kid": "who"}),
        "unknown critical header": jwt.encode(good, idp.private["k1"], "ES256", headers={"kid": "k1", "crit": ["x"], "x": 1}),
        "no JWT": "abc",
        "empty": "",
        "long": "a." * 6000,
        "not ASCII": "é.é.é",
        "JSON that is no object": forged({"alg": "ES256"}, [1]),  # type: ignore[arg-type]
    }  # fmt: skip


ATTACKS = sorted([
    "alg none", "alg None", "HMAC with the public key", "another algorithm for the key", "another key", "key in the header",
    "changed claims", "no signature", "wrong audience", "no audience", "unknown issuer", "our issuer", "no issuer", "list as issuer",
    "expired", "no end", "end that is no number", "not yet", "subject with control characters", "empty subject", "unknown kid",
    "unknown critical header", "no JWT", "empty", "long", "not ASCII", "JSON that is no object",
])  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
async def test_tricks_get_nobody_in(session: aiohttp.ClientSession, idp: Idp, name: str) -> None:
    tricks = attacks(idp)
    assert sorted(tricks) == ATTACKS
    checker = authenticator(session, idp)
    await checker.authenticate(f"Bearer {idp.token('k1')}")  # the keys are there
    with pytest.raises(Unauthenticated) as error:
        await checker.authenticate(f"Bearer {tricks[name]}")
    assert error.value.problem() == Unauthenticated().problem()


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic abc", "Token abc", "bearer  "])
async def test_no_bearer_no_entry(session: aiohttp.ClientSession, header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        await authenticator(session).authenticate(header)


@pytest.mark.parametrize("claims", [{"role": "god"}, {"role": None}, {"role": 5}, {"project": None}, {"project": ""}, {"project": "a\x00"}])
async def test_without_role_or_project_nothing_is_allowed(session: aiohttp.ClientSession, idp: Idp, claims: dict[str, Any]) -> None:
    with pytest.raises(Forbidden):
        await verify(session, idp, idp.token("k1", **claims))


@pytest.mark.parametrize("leeway", [-20, 20])
async def test_clocks_may_differ_a_little(session: aiohttp.ClientSession, idp: Idp, leeway: int) -> None:
    now = int(time.time())
    token = idp.token("k1", exp=now + leeway) if leeway < 0 else idp.token("k1", nbf=now + leeway)
    assert (await verify(session, idp, token)).subject == "alice"


@pytest.mark.parametrize("answer", ["down", "redirect", "huge", "packed", "html", "other", "hang", "drip"])
async def test_an_issuer_that_misbehaves(session: aiohttp.ClientSession, idp: Idp, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if answer in ("hang", "drip"):
        monkeypatch.setattr(auth, "FETCH_SECONDS", 0.3)
    idp.answer = answer
    with pytest.raises(Unavailable) as error:
        await verify(session, idp, idp.token("k1"))
    assert error.value.retry_after
    assert idp.url not in str(error.value.problem())


async def test_what_is_no_key_among_an_issuers_keys_is_passed_over(session: aiohttp.ClientSession, idp: Idp) -> None:
    idp.keys += [{"kty": ["EC"]}, {"kty": {}}, {"kty": "oct", "k": "AA", "kid": "k1"}, {"kty": "EC", "kid": "k2", "crv": []}, {}]
    assert (await verify(session, idp, idp.token("k1"))).subject == "alice"


async def test_known_keys_survive_an_outage(session: aiohttp.ClientSession, idp: Idp) -> None:
    checker = authenticator(session, idp)
    await checker.authenticate(f"Bearer {idp.token('k1')}")
    idp.answer = "down"
    await checker.authenticate(f"Bearer {idp.token('k1', jti='2')}")
    idp.rotate("k2")
    with pytest.raises(BrokerError):
        await checker.authenticate(f"Bearer {idp.token('k2')}")


class LaterKeys:
    """An authenticator whose issuer's keys grow old at will."""

    def __init__(self, session: aiohttp.ClientSession, idp: Idp) -> None:
        self.checker = authenticator(session, idp)
        self.ahead = 0.0
        (keys,) = self.checker._keys.values()
        keys._clock = lambda: time.monotonic() + self.ahead

    async def authenticate(self, token: str) -> Principal:
        return await self.checker.authenticate(f"Bearer {token}")


async def test_old_keys_serve_while_new_ones_do_not_come(session: aiohttp.ClientSession, idp: Idp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for an issuer that hangs as long as the token's key is known, but not for more than a day."""
    later = LaterKeys(session, idp)
    await later.authenticate(idp.token("k1"))
    monkeypatch.setattr(auth, "FETCH_SECONDS", 0.3)
    idp.answer = "hang"
    later.ahead = auth.KEYS_SECONDS + 1
    for number in range(3):
        assert (await later.authenticate(idp.token("k1", jti=f"{number}"))).subject == "alice"
    later.ahead = auth.KEEP_SECONDS - 60
    assert (await later.authenticate(idp.token("k1", jti="day"))).subject == "alice"
    later.ahead = auth.KEEP_SECONDS + 60
    with pytest.raises(Unavailable):
        await later.authenticate(idp.token("k1", jti="more"))


async def test_keys_that_an_issuer_withdraws(session: aiohttp.ClientSession, idp: Idp) -> None:
    """An empty set is an answer too: the next look takes it over."""
    later = LaterKeys(session, idp)
    await later.authenticate(idp.token("k1"))
    idp.answer = "empty"
    later.ahead = auth.KEYS_SECONDS + 1
    await later.authenticate(idp.token("k1", jti="seen off"))
    (keys,) = later.checker._keys.values()
    while keys._keys:
        await asyncio.sleep(0.01)
    with pytest.raises(Unauthenticated):
        await later.authenticate(idp.token("k1", jti="later"))


async def test_an_empty_set_lets_nobody_in(session: aiohttp.ClientSession, idp: Idp) -> None:
    idp.answer = "empty"
    with pytest.raises(Unauthenticated):
        await verify(session, idp, idp.token("k1"))
    idp.answer = "good"
    assert (await verify(session, idp, idp.token("k1"))).subject == "alice"


async def test_keys_that_change_at_every_request(session: aiohttp.ClientSession, idp: Idp) -> None:
    """The newest set counts, and asking for it is bounded whatever the tokens say."""
    idp.answer = "changing"
    issuer = config.Issuer(idp.url, AUDIENCE)
    checker = Authenticator(config.Auth(issuers=(issuer,)), "http://broker", lambda: {"keys": []}, session, session, metrics.create())
    with pytest.raises(Unauthenticated):
        await checker.authenticate(f"Bearer {idp.token('k1')}")  # by the set before the one that this fetched
    for number in range(20):
        idp.private[f"invented-{number}"] = idp.private["k1"]
        with pytest.raises(Unauthenticated):
            await checker.authenticate(f"Bearer {idp.token(f'invented-{number}')}")
    assert (await checker.authenticate(f"Bearer {idp.token('k1', jti='2')}")).subject == "alice"
    assert idp.fetched == 1


async def test_an_issuer_that_hangs_is_asked_once_by_all_who_wait(
    session: aiohttp.ClientSession, idp: Idp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "FETCH_SECONDS", 2.0)
    idp.answer = "hang"
    issuer = config.Issuer(idp.url, AUDIENCE, f"{idp.url}/keys")
    checker = Authenticator(config.Auth(issuers=(issuer,)), "http://broker", lambda: {"keys": []}, session, session, metrics.create())
    ended = await asyncio.gather(
        *(checker.authenticate(f"Bearer {idp.token('k1', jti=str(number))}") for number in range(30)), return_exceptions=True
    )
    assert {type(error) for error in ended} == {Unavailable}
    assert idp.fetched == 1


async def test_a_set_of_too_many_keys(session: aiohttp.ClientSession, idp: Idp) -> None:
    """The last that counts, and the one after it."""
    for number in range(2, auth.MAX_KEYS + 2):
        idp.rotate(f"k{number}", idp.private["k1"], keep=True)
    assert (await verify(session, idp, idp.token(f"k{auth.MAX_KEYS}"))).subject == "alice"
    with pytest.raises(Unauthenticated):
        await verify(session, idp, idp.token(f"k{auth.MAX_KEYS + 1}"))


async def test_a_jwks_url_needs_no_discovery(session: aiohttp.ClientSession, idp: Idp) -> None:
    idp.answer = "other"
    assert (await verify(session, idp, idp.token("k1"), jwks_url=f"{idp.url}/keys")).subject == "alice"


async def test_refusals_over_http(api: Api, broker: RunningBroker) -> None:
    missing = await api.as_(None).get("/v1/images")
    assert (missing.status, missing.headers["WWW-Authenticate"]) == (401, 'Bearer realm="transfer-broker"')
    wrong = await api.as_("abc").get("/v1/images")
    assert (wrong.status, wrong.headers["WWW-Authenticate"]) == (401, 'Bearer realm="transfer-broker", error="invalid_token"')
    assert "detail" not in wrong.body
    assert (await api.as_(broker.token(ttl=-100)).get("/v1/images")).status == 401
    for role in ("service", "member", "reader"):
        forbidden = await api.as_(broker.token(role)).post("/v1/sites", {"path": "x"})
        assert (forbidden.status, forbidden.body["type"]) == (403, "/problems/forbidden")
        assert forbidden.body["detail"] == "This needs the role admin."  # as x-roles of the contract, which everyone may read
    agents = await api.as_(broker.token("reader")).post("/v1/copies:take", {})
    assert agents.body["detail"] == "This needs the role admin or service."


async def test_a_transfer_token_is_no_bearer_token(api: Api, broker: RunningBroker) -> None:
    now = time.time()
    claims = {"aud": "store-1", "sub": "alice", "exp": int(now + 60), "nbf": int(now), "jti": "1", "mth": "GET", "path": "/x"}
    for audience in ("store-1", "transfer-broker"):
        token = broker.context.keys.signer.sign_claims({**claims, "aud": audience}, now)
        assert (await api.as_(token).get("/v1/images")).status in (401, 403)


async def test_nobody_is_asked_for_a_body_before_who_he_is(api: Api) -> None:
    reply = await api.as_(None).send("POST", "/v1/images", raw=b"{" * 100)
    assert reply.status == 401


def test_own_files_are_private(broker: RunningBroker, tmp_path: Path) -> None:
    file = tmp_path / "data" / "keys.passphrase"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(file.read_text().strip()) >= 32
