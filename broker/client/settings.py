"""Where the broker is and who we are: from arguments, else the environment, else files.

====================  =========================================================================
BROKER_URL            the broker; http://127.0.0.1:8080 when unset
BROKER_TOKEN          the bearer token
OS_TOKEN              a token of OpenStack Keystone, when there is no BROKER_TOKEN; after both comes a bearer token in the
                      file ``~/.config/transfer-broker/token``
BROKER_INSTANCE       names this machine to the broker; the host name when unset
BROKER_CA_FILE        certificates of authorities to be believed besides the system's, for broker and stores
====================  =========================================================================
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from broker.client.trouble import WrongSetting

DEFAULT_URL = "http://127.0.0.1:8080"


def token_path() -> Path:
    """The file that holds the token: below XDG_CONFIG_HOME."""
    return _base("XDG_CONFIG_HOME", ".config") / "transfer-broker" / "token"


def state_directory() -> Path:
    """Where unfinished uploads are remembered: below XDG_STATE_HOME."""
    return _base("XDG_STATE_HOME", ".local/state") / "transfer-broker" / "uploads"


def _base(variable: str, fallback: str) -> Path:
    found = os.environ.get(variable, "")
    return Path(found) if found.startswith("/") else Path.home() / fallback


def find_url(given: str | None = None) -> str:
    """The broker's URL without a slash at the end. Raises `WrongSetting` when it is none."""
    url = given or os.environ.get("BROKER_URL") or DEFAULT_URL
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise WrongSetting("the broker's address is no http(s) URL", "set --url or BROKER_URL, for instance to http://127.0.0.1:8080")
    return url.rstrip("/")


def find_authorization(token: str | None = None, file: Path | None = None) -> dict[str, str]:
    """The header that says who we are, if anything does: `token` and `file` are bearer tokens. Raises `WrongSetting`."""
    keystone = os.environ.get("OS_TOKEN")
    if keystone and not (token or file or os.environ.get("BROKER_TOKEN")):
        return {"X-Auth-Token": _checked(keystone, "OS_TOKEN", "openstack token issue")}
    token = token or find_token(file)
    return {"Authorization": f"Bearer {token}"} if token else {}


def find_token(file: Path | None = None) -> str | None:
    """The bearer token: from `file` when given, else BROKER_TOKEN, else the token file; ``None`` when there is none."""
    if file is None:
        token = os.environ.get("BROKER_TOKEN")
        if token:
            return _checked(token, "BROKER_TOKEN")
        file = token_path()
        if not file.exists():
            return None
    try:
        return _checked(file.read_text("ascii"), str(file))
    except (OSError, ValueError) as error:
        raise WrongSetting(f"cannot read the token file {file}: {type(error).__name__}", "make one with: broker token create") from None


def _checked(token: str, where: str, maker: str = "broker token create") -> str:
    token = token.strip()
    if re.fullmatch(r"[!-~]+", token) is None:
        raise WrongSetting(f"{where} holds no bearer token", f"make one with: {maker}")
    return token


def trouble_with(authorization: Mapping[str, str]) -> str:
    """What can be said of a refused `find_authorization` from here: what was sent, or that it has ended; a token itself is never shown."""
    if not authorization:
        return "No token was sent."
    if "X-Auth-Token" in authorization:
        return "Keystone's token in OS_TOKEN is not good, or not any more: openstack token issue makes another."
    try:
        payload = authorization.get("Authorization", "").split(".")[1]
        end = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"]
        if end < time.time():
            return f"The token ended at {datetime.fromtimestamp(end, UTC):%Y-%m-%dT%H:%M:%SZ}."
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, OSError):
        pass  # whatever it is, the broker has refused it
    return ""


def trust() -> ssl.SSLContext:
    """Whose certificates are believed, those of the broker and of stores. Raises `WrongSetting` when BROKER_CA_FILE cannot be used."""
    return _trust(os.environ.get("BROKER_CA_FILE", ""))


@lru_cache(maxsize=4)
def _trust(file: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if file:
        try:
            context.load_verify_locations(file)
        except OSError as error:
            trouble = "no PEM of certificates" if isinstance(error, ssl.SSLError) else error.strerror
            raise WrongSetting(f"BROKER_CA_FILE: {file}: {trouble}", "name a PEM file of certificates") from None
    return context


def instance() -> str:
    """What tells this machine from others of the same principal."""
    name = os.environ.get("BROKER_INSTANCE") or socket.gethostname()
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:64] or "client"
