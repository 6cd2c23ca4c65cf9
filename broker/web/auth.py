"""Who asks: bearer JWTs (RFC 6750, RFC 7519) of the broker's own keys or of OIDC issuers.

Rules

- Clients of OpenStack give the token in X-Auth-Token. Where Keystone is asked too, it is a bearer token if it names an issuer of ours.
- Clients that know nothing but Basic authentication (RFC 7617) give the token as the password, with any name; they keep it from the
  hosts that they are redirected to.
- The issuer is looked up first and decides the keys; nothing of a token is believed before its signature was checked.
- Only asymmetric algorithms, and only the one that fits the key: ``none`` and HMAC with a public key have no door.
- ``exp`` is required; ``exp``, ``nbf`` and ``iat`` are stretched by `leeway_seconds` (30 by default) for clocks that differ.
- An issuer is named by the operator, so its host may be inside the network; where its discovery document points to another host
  than its own, only public addresses are opened.
- An issuer's keys are fetched (no redirects, bounded in time and size, nothing unpacked), again for an unknown ``kid``, but not
  within 10 s of the last attempt, so that tokens with invented ones cause no load. What the issuer says counts: a set without
  a key withdraws it. After an hour known keys are fetched anew while they serve on; if that cannot be done for a day, they no
  longer serve.
- Of an issuer's set the first 64 usable keys count, so that a token without a ``kid`` costs no more than their trial.
- Verified tokens are remembered until they end, at most 10,000 of them; the answer to a bad one never says what was wrong.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import jwt
import orjson
import structlog

from broker import config
from broker.errors import Forbidden, Unauthenticated, Unavailable
from broker.metrics import Metrics
from broker.model import Principal, Role, is_site
from broker.web.document import PLAIN_JSON, read_document

ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("EdDSA",),
}
"""By type of key (RFC 7518 section 6.1, RFC 8037)."""

MAX_REMEMBERED = 10_000
MAX_TOKEN_LENGTH = 8000
MAX_NAME_LENGTH = 255
MAX_KEYS = 64
KEYS_SECONDS = 3600.0
KEEP_SECONDS = 24 * 3600.0
REFETCH_SECONDS = 10.0
FETCH_SECONDS = 5.0
"""For the keys, discovery included."""

STRONGEST_FIRST = (Role.ADMIN, Role.SERVICE, Role.MEMBER, Role.READER)
_OWN_CLAIMS = config.ClaimNames()
_OWN_ROLES = {role.value: role for role in Role}
_log = structlog.get_logger(__name__)

Jwk = Mapping[str, Any]


class KeysUnavailable(Exception):
    """An issuer's keys cannot be fetched; the text says why, without the address."""


class IssuerKeys:
    """The published keys of one OIDC issuer."""

    def __init__(
        self,
        issuer: config.Issuer,
        session: aiohttp.ClientSession,
        outside: aiohttp.ClientSession,
        clock: Callable[[], float] = time.monotonic,
        *,
        refetch_seconds: float,
    ) -> None:
        self._issuer = issuer
        self._session = session
        self._outside = outside
        self._clock = clock
        self._refetch_seconds = refetch_seconds
        self._keys: list[Jwk] = []
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def find(self, kid: str | None) -> list[Jwk]:
        """The keys that a token with this ``kid`` may be signed by. Raises `KeysUnavailable` when there are none that may still serve."""
        age = self._clock() - self._fetched_at
        found = self._matching(kid) if age <= KEEP_SECONDS else []
        if found and age > KEYS_SECONDS:
            self._fetch_aside()
        elif not found:
            await self._fetch_again()
            found = self._matching(kid)
        return found

    def _matching(self, kid: str | None) -> list[Jwk]:
        return [key for key in self._keys if kid is None or key.get("kid", kid) == kid]

    def _fetch_aside(self) -> None:
        """Begin to fetch the keys anew; nobody waits for that."""
        if self._task is None and not self._is_too_soon():
            self._task = asyncio.create_task(self._fetch_again())
            self._task.add_done_callback(self._fetched_aside)

    def _fetched_aside(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled():
            task.exception()  # was logged

    def _is_too_soon(self) -> bool:
        return self._clock() - self._tried_at < self._refetch_seconds

    async def _fetch_again(self) -> None:
        async with self._lock:
            if not self._is_too_soon():
                try:
                    async with asyncio.timeout(FETCH_SECONDS):
                        self._keys = await self._fetch()
                    self._fetched_at = self._clock()
                except (aiohttp.ClientError, OSError, ValueError, KeysUnavailable) as error:
                    why = f"{type(error).__name__}: {error}"
                    _log.warning("keys of an issuer cannot be fetched", issuer=self._issuer.issuer, error=why)
                finally:  # the pause begins when the attempt ends: who waited for a slow one does not begin the next
                    self._tried_at = self._clock()
            if self._clock() - self._fetched_at > KEEP_SECONDS:
                raise KeysUnavailable("they could not be fetched")

    async def _fetch(self) -> list[Jwk]:
        url, session = self._issuer.jwks_url, self._session
        if url is None:
            discovered = await self._get(session, self._issuer.issuer.rstrip("/") + "/.well-known/openid-configuration")
            if discovered.get("issuer") != self._issuer.issuer:  # OpenID Connect Discovery 1.0, section 4.3
                raise KeysUnavailable("the discovery document names another issuer")
            url = discovered.get("jwks_uri")
            if not isinstance(url, str) or not url.startswith(("https://", "http://")):
                raise KeysUnavailable("the discovery document names no jwks_uri")
            if urlsplit(url).hostname != urlsplit(self._issuer.issuer).hostname:
                session = self._outside
        keys = (await self._get(session, url)).get("keys")
        if not isinstance(keys, list):
            raise KeysUnavailable("no JWK Set")
        usable: list[Jwk] = [key for key in keys if isinstance(key, dict) and _is_usable(key)]
        return usable[:MAX_KEYS]

    async def _get(self, session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
        async with session.get(url, allow_redirects=False, headers=PLAIN_JSON) as response:
            if response.status != 200:
                raise KeysUnavailable(f"status {response.status}")
            content = await read_document(response)
        document = orjson.loads(content)
        if not isinstance(document, dict):
            raise KeysUnavailable("no JSON object")
        return document


class Authenticator:
    """Turns the Authorization header into a `Principal`. `session` opens addresses inside the network too, `outside` public ones only."""

    def __init__(
        self,
        settings: config.Auth,
        own_issuer: str,
        own_jwks: Callable[[], Mapping[str, Any]],
        session: aiohttp.ClientSession,
        outside: aiohttp.ClientSession,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        *,
        refetch_seconds: float = REFETCH_SECONDS,
    ) -> None:
        self._settings = settings
        self._own_issuer = own_issuer
        self._own_jwks = own_jwks
        self._metrics = metrics
        self._clock = clock
        self._issuers = {issuer.issuer: issuer for issuer in settings.issuers}
        self._keys = {issuer.issuer: IssuerKeys(issuer, session, outside, refetch_seconds=refetch_seconds) for issuer in settings.issuers}
        self._remembered: OrderedDict[str, Principal] = OrderedDict()

    def forget(self) -> None:
        """Verify every token again: a key was revoked."""
        self._remembered.clear()

    def known(self, header: str) -> Principal | None:
        """The principal of a header that was verified before, if its token has not ended."""
        principal = self._remembered.get(header)
        if principal is None:
            return None
        if principal.expires_at + self._settings.leeway_seconds <= self._clock():
            del self._remembered[header]
            return None
        self._remembered.move_to_end(header)
        return principal

    async def authenticate(self, header: str | None) -> Principal:
        """The principal. Raises `Unauthenticated`, `Forbidden` (no role or no project), `Unavailable` (an issuer's keys)."""
        if header is None:
            raise self._refuse("missing")
        principal = self.known(header)
        if principal is None:
            principal = await self._verify(header)
            self._remembered[header] = principal
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return principal

    def has_issuer_of(self, token: str) -> bool:
        """Whether a token says that it is of the broker's own keys or of a known issuer: nothing of it is believed yet."""
        if len(token) > MAX_TOKEN_LENGTH:
            return False
        try:
            issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            return False
        return isinstance(issuer, str) and (issuer == self._own_issuer or issuer in self._issuers)

    async def _verify(self, header: str) -> Principal:
        token = _token_in(header)
        if not token or len(token) > MAX_TOKEN_LENGTH or not token.isascii():
            raise self._refuse("no-bearer")
        try:
            head = jwt.get_unverified_header(token)
            issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise self._refuse("malformed") from None
        kid, algorithm = head.get("kid"), head.get("alg")
        if not isinstance(issuer, str) or not isinstance(algorithm, str) or not isinstance(kid, str | None):
            raise self._refuse("malformed")
        if issuer == self._own_issuer:
            keys = [key for key in self._own_jwks()["keys"] if kid == key["kid"]]
            return self._principal(token, keys, algorithm, issuer, self._settings.audience, _OWN_CLAIMS, _OWN_ROLES)
        known = self._issuers.get(issuer)
        if known is None:
            raise self._refuse("unknown-issuer")
        try:
            keys = await self._keys[issuer].find(kid)
        except KeysUnavailable:
            self._metrics.auth_failures.inc("keys-unavailable")
            raise Unavailable("The token's issuer cannot be asked for its keys.", retry_after=5.0) from None
        return self._principal(token, keys, algorithm, issuer, known.audience, known.claims, known.roles)

    def _principal(
        self,
        token: str,
        keys: list[Jwk],
        algorithm: str,
        issuer: str,
        audience: str,
        names: config.ClaimNames,
        roles: Mapping[str, Role],
    ) -> Principal:
        for key in keys:
            if algorithm in ALGORITHMS.get(key["kty"], ()) and key.get("alg", algorithm) == algorithm:
                try:
                    claims = jwt.decode(
                        token,
                        jwt.PyJWK(dict(key), algorithm).key,
                        algorithms=[algorithm],
                        audience=audience,
                        issuer=issuer,
                        leeway=self._settings.leeway_seconds,
                        options={"require": ["exp", "iss", "aud"]},
                    )
                    return self._from_claims(claims, names, roles)
                except jwt.InvalidSignatureError:
                    continue
                except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
                    raise self._refuse(type(error).__name__) from None
        raise self._refuse("signature")

    def _from_claims(self, claims: Mapping[str, Any], names: config.ClaimNames, roles: Mapping[str, Role]) -> Principal:
        subject, project = _claim(claims, names.subject), _claim(claims, names.project)
        held = _claim(claims, names.role)
        values = held if isinstance(held, list) else [held]
        granted = {roles[value] for value in values if isinstance(value, str) and value in roles}
        if not is_name(subject):
            raise self._refuse("subject")
        if not is_name(project) or not granted:
            self._metrics.auth_failures.inc("role-or-project")
            raise Forbidden("The token names no project, or no role that counts here.")
        site = _claim(claims, names.site)
        return Principal(
            subject=str(subject),
            project=str(project),
            role=next(role for role in STRONGEST_FIRST if role in granted),
            expires_at=float(claims["exp"]),
            site=site if isinstance(site, str) and is_site(site) else None,
        )

    def _refuse(self, reason: str) -> Unauthenticated:
        self._metrics.auth_failures.inc(reason)
        return Unauthenticated()


def _token_in(header: str) -> str | None:
    """The token of an Authorization field; ``None`` when there is none."""
    scheme, _, credentials = header.partition(" ")
    credentials = credentials.strip(" ")
    match scheme.lower():
        case "bearer":
            return credentials
        case "basic" if len(credentials) <= 2 * MAX_TOKEN_LENGTH:
            try:
                return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
            except ValueError:
                return None
    return None


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """The claim of that name, or what a dotted name leads to."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for step in name.split("."):
        found = found.get(step) if isinstance(found, dict) else None
    return found


def _is_usable(key: Jwk) -> bool:
    return isinstance(key.get("kty"), str) and key["kty"] in ALGORITHMS and key.get("use", "sig") == "sig"


def is_name(value: Any) -> bool:
    """Whether `value` can name a subject or a project."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_LENGTH and value.isprintable()
