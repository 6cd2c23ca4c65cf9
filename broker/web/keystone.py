"""Asks OpenStack Keystone about tokens: GET /v3/auth/tokens (Identity API v3, "Validate and show information for token").

Rules

- The broker asks as a user of its own, whose token it renews before it ends, or when Keystone no longer takes it. What it logs
  in with is a credential (`broker.credentials`), read at each login. A refused login is not repeated for half a minute with
  the same credential, so that the account is not locked.
- Keystone's word counts, never the token's form. An answer must be about the token that was asked about: a cache in front of
  Keystone that mixes them up lets nobody in.
- Redirects are not followed; answers are bounded in time and size. Tokens of application credentials with access rules are
  refused (Keystone refuses them to whoever does not send ``OpenStack-Identity-Access-Rules``).
- Roles come by name through `roles`; the strongest counts. ``admin`` on a project is none where Keystone says that this is not
  its admin project. A token must be scoped to a project, or to the system by an administrator, whose project is ``system``.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import aiohttp
import orjson

from broker import config
from broker.credentials import Credential, CredentialError, Credentials
from broker.metrics import Metrics
from broker.model import Principal, Role
from broker.web.auth import STRONGEST_FIRST, is_name
from broker.web.document import PLAIN_JSON, read_document

LOGIN_PAUSE_SECONDS = 30.0
SYSTEM_PROJECT = "system"


class KeystoneAway(Exception):
    """Keystone cannot be asked; the text says why, without addresses or tokens. `unreachable`: it is no use to ask again at once."""

    def __init__(self, why: str, *, unreachable: bool = False) -> None:
        super().__init__(why)
        self.unreachable = unreachable


@dataclass(frozen=True, slots=True)
class Validated:
    """A token that Keystone accepts. Without a `principal` it allows nothing here, and `why_not` says why."""

    principal: Principal | None
    why_not: str
    is_service: bool
    expires_at: float


class Keystone:
    """One Keystone, asked by one user."""

    def __init__(self, settings: config.Keystone, credentials: Credentials, session: aiohttp.ClientSession, metrics: Metrics) -> None:
        """Raises `ConfigError` when `ca_file` cannot be read."""
        self._tokens_url = f"{settings.url.rstrip('/').removesuffix('/v3')}/v3/auth/tokens"
        self._settings = settings
        self._credentials = credentials
        self._session = session
        self._metrics = metrics
        self._tls: ssl.SSLContext | bool = True
        if settings.ca_file is not None:
            try:
                self._tls = ssl.create_default_context(cafile=str(settings.ca_file))
            except OSError as error:
                raise config.ConfigError(f"auth.keystone.ca_file: {settings.ca_file}: {error.strerror or type(error).__name__}") from None
        self._own: tuple[str, float] | None = None  # the broker's token, and when to renew it (monotonic)
        self._login = asyncio.Lock()
        self._refused: tuple[Credential, float] | None = None  # what was refused, and until when it is not tried again

    async def validate(self, token: str, *, allow_expired: bool) -> Validated | None:
        """What Keystone says of `token`; ``None`` when it refuses it. Raises `KeystoneAway`.

        `allow_expired` accepts a token that ended at most Keystone's ``[token] allow_expired_window`` ago.
        """
        path = "?nocatalog&allow_expired=1" if allow_expired else "?nocatalog"
        for first in (True, False):
            own = await self._own_token()
            status, headers, document = await self._send(
                "validate", "GET", self._tokens_url + path, {"X-Auth-Token": own, "X-Subject-Token": token}
            )
            if status == 200:
                if headers.get("X-Subject-Token") != token:
                    raise KeystoneAway("it answered about another token")
                return read(document, self._settings.roles)
            if status == 404:
                return None
            if status == 401 and first:
                self._own = None if self._own is not None and self._own[0] == own else self._own
                continue
            break
        raise KeystoneAway(f"it answered {status} to whether a token is valid")

    async def _own_token(self) -> str:
        async with self._login:
            if self._own is None or time.monotonic() >= self._own[1]:
                self._own = await self._log_in()
            return self._own[0]

    async def _log_in(self) -> tuple[str, float]:
        asked_at = time.monotonic()
        try:
            credential = self._credentials.read(self._settings.credential)
            body = login(credential)
        except CredentialError as error:
            raise KeystoneAway(str(error), unreachable=True) from None
        if self._refused is not None and self._refused[0] == credential and asked_at < self._refused[1]:
            raise KeystoneAway("it refused the broker's own login", unreachable=True)
        status, headers, document = await self._send("login", "POST", self._tokens_url, {}, body)
        if status != 201:
            if status < 500:
                self._refused = (credential, asked_at + LOGIN_PAUSE_SECONDS)
            raise KeystoneAway(f"it answered {status} to the broker's own login", unreachable=True)
        token = headers.get("X-Subject-Token", "")
        if not is_token(token):
            raise KeystoneAway("it gave the broker no token")
        lifetime = _instant(document, "expires_at") - _instant(document, "issued_at")
        return token, asked_at + 0.9 * lifetime

    async def _send(
        self, what: str, method: str, url: str, headers: Mapping[str, str], body: Any = None
    ) -> tuple[int, Mapping[str, str], dict[str, Any]]:
        """One exchange: status, headers, and the member ``token`` of what was answered with success."""
        try:
            with self._metrics.keystone_seconds.time(what):
                async with self._session.request(
                    method, url, headers={**PLAIN_JSON, **headers}, json=body, allow_redirects=False, ssl=self._tls
                ) as response:
                    if response.status not in (200, 201):
                        return response.status, response.headers, {}
                    return response.status, response.headers, _member(await read_document(response))
        except (aiohttp.ClientError, OSError) as error:
            raise KeystoneAway(type(error).__name__, unreachable=True) from None
        except ValueError as error:
            raise KeystoneAway(f"its answer is of no use: {error}") from None


def _member(content: bytes) -> dict[str, Any]:
    document = orjson.loads(content)
    token = document.get("token") if isinstance(document, dict) else None
    if not isinstance(token, dict):
        raise KeystoneAway("its answer describes no token")
    return token


def login(credential: Mapping[str, str]) -> dict[str, Any]:
    """The body that logs in with a credential (README, "Keystone"). Raises `CredentialError`, naming entries only."""
    if "application_credential_id" in credential:
        _require(credential, "application_credential_secret")
        secret = {"id": credential["application_credential_id"], "secret": credential["application_credential_secret"]}
        return {"auth": {"identity": {"methods": ["application_credential"], "application_credential": secret}}}
    _require(credential, "username", "password", "project_name")
    user = {
        "name": credential["username"],
        "domain": {"name": credential.get("user_domain_name", "Default")},
        "password": credential["password"],
    }
    project = {"name": credential["project_name"], "domain": {"name": credential.get("project_domain_name", "Default")}}
    return {"auth": {"identity": {"methods": ["password"], "password": {"user": user}}, "scope": {"project": project}}}


def _require(credential: Mapping[str, str], *names: str) -> None:
    for name in names:
        if not credential.get(name):
            raise CredentialError(f"the broker's credential at Keystone has no {name}")


def is_token(text: str) -> bool:
    """Whether `text` may be sent as a token: Fernet and JWS tokens are base64url with dots."""
    return 0 < len(text) <= 8000 and text.isascii() and text.replace("-", "").replace("_", "").replace(".", "").replace("=", "").isalnum()


def read(token: Mapping[str, Any], roles: Mapping[str, Role]) -> Validated:
    """What a validated token allows. Raises `KeystoneAway` for what is no description of a token."""
    expires_at = _instant(token, "expires_at")
    user = token.get("user")
    subject = user.get("id") if isinstance(user, dict) else None
    held = token.get("roles", [])
    if not is_name(subject) or not isinstance(held, list):
        raise KeystoneAway("its answer describes no token")
    names = [role.get("name") for role in held if isinstance(role, dict)]
    granted = {roles[name] for name in names if isinstance(name, str) and name in roles}
    project, why_not = _project(token, granted)
    if project is not None and token.get("is_admin_project") is False:
        granted.discard(Role.ADMIN)
    is_service = Role.SERVICE in granted
    application = token.get("application_credential")
    if isinstance(application, dict) and application.get("access_rules") is not None:
        return Validated(None, "Application credentials with access rules are not accepted.", False, expires_at)
    if project is None or not granted:
        return Validated(None, why_not or "The token has no role that is known here.", is_service, expires_at)
    role = next(role for role in STRONGEST_FIRST if role in granted)
    return Validated(Principal(str(subject), project, role, expires_at), "", is_service, expires_at)


def _project(token: Mapping[str, Any], granted: set[Role]) -> tuple[str | None, str]:
    """The project that the token is for, or why it is for none."""
    project = token.get("project")
    if isinstance(project, dict):
        if not is_name(project.get("id")):
            raise KeystoneAway("its answer describes no token")
        return project["id"], ""
    if "system" in token and Role.ADMIN in granted:
        return SYSTEM_PROJECT, ""
    return None, "The token is not scoped to a project."


def _instant(token: Mapping[str, Any], name: str) -> float:
    try:
        found = datetime.fromisoformat(token[name])
    except (KeyError, TypeError, ValueError):
        raise KeystoneAway(f"its answer has no {name}") from None
    if found.tzinfo is None:
        raise KeystoneAway(f"its answer has no {name} with a time zone")
    return found.timestamp()
