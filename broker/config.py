"""Settings: one TOML file, described by schemas/config.json, read once at the start.

Rules: every field has a default, so that no file is needed; unknown fields are refused by name; nothing here is secret but
the database's URL, which `repr` hides.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jsonschema_rs
import orjson

from broker.model import Role

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Numbers = Mapping[str, float | bool | tuple[float, ...]]

_MAY_HOLD_PASSWORDS = {
    "database.url": "must begin with postgresql://",
    "auth.keystone.url": "must be an http(s) URL without a user, a query and a fragment",
}
"""Fields whose wrong values are not repeated, and what is expected of them."""
_PASSWORD = re.compile(r"://[^/@:]*:[^@]+@|[?&]password=")


class ConfigError(Exception):
    """The configuration cannot be used; the text names the file and the field."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Http:
    listen: Address = Address("127.0.0.1", 8080)
    public_url: str = "http://127.0.0.1:8080"
    metrics_listen: Address | None = Address("127.0.0.1", 9180)
    body_limit_bytes: int = 8 << 20
    trusted_proxies: tuple[Network, ...] = ()
    reuse_port: bool = False


@dataclass(frozen=True, slots=True)
class Database:
    """`url` is ``None`` for the embedded PostgreSQL."""

    url: str | None = field(default=None, repr=False)
    min_connections: int = 2
    max_connections: int = 16
    migrate: Literal["auto", "require"] = "auto"
    keep_days: int = 30


@dataclass(frozen=True, slots=True)
class Keys:
    passphrase_file: Path
    algorithm: Literal["ES256", "RS256", "EdDSA"] = "ES256"
    overlap_seconds: float = 900.0
    rotate_after_seconds: float = 90 * 86400.0


@dataclass(frozen=True, slots=True)
class ClaimNames:
    """Which claim of an issuer's tokens says what."""

    subject: str = "sub"
    project: str = "project"
    role: str = "role"
    site: str = "site"


def _roles_by_name() -> Mapping[str, Role]:
    return {role.value: role for role in Role}


@dataclass(frozen=True, slots=True)
class Issuer:
    """An OIDC issuer whose tokens are accepted."""

    issuer: str
    audience: str
    jwks_url: str | None = None
    claims: ClaimNames = ClaimNames()
    roles: Mapping[str, Role] = field(default_factory=_roles_by_name)


@dataclass(frozen=True, slots=True)
class Keystone:
    """An OpenStack Keystone whose tokens are accepted; `credential` names what the broker logs in with."""

    url: str
    credential: str = "keystone"
    roles: Mapping[str, Role] = field(default_factory=_roles_by_name)
    recheck_seconds: float = 60.0
    ca_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Auth:
    audience: str = "transfer-broker"
    leeway_seconds: float = 30.0
    issuers: tuple[Issuer, ...] = ()
    keystone: Keystone | None = None


@dataclass(frozen=True, slots=True)
class Log:
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


@dataclass(frozen=True, slots=True)
class PolicyNumbers:
    """What the file says on policy; names are checked where policy is built (`broker.app`)."""

    ranking: Numbers = field(default_factory=dict)
    admission: Numbers = field(default_factory=dict)
    uploads: Numbers = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    data_dir: Path
    credentials_dir: Path
    keys: Keys
    postgres_dir: Path | None = None
    """Where the embedded PostgreSQL keeps its data; ``None`` lets it choose (root's home may be out of its reach)."""
    http: Http = Http()
    database: Database = Database()
    auth: Auth = Auth()
    hot_bytes: int = 64 << 20
    log: Log = Log()
    policy: PolicyNumbers = PolicyNumbers()
    warnings: tuple[str, ...] = ()
    """What is allowed but unwise, to be logged at the start."""


def load(path: Path | None = None) -> Settings:
    """The settings of `path`; by default of broker.toml in the XDG configuration directory, if there is one.

    Raises `ConfigError`.
    """
    if path is None:
        path = _xdg("XDG_CONFIG_HOME", ".config") / "broker.toml"
        if not path.exists():
            return parse({})
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
            readable = os.fstat(file.fileno()).st_mode & stat.S_IROTH
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no TOML: {error}") from None
    warnings = []
    if readable and _PASSWORD.search(str(document.get("database", {}).get("url", ""))):
        warnings.append(f"{path} holds a database password and everybody can read it: chmod 600 {path}")
    try:
        return parse(document, base=path.parent, warnings=tuple(warnings))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(document: dict[str, Any], *, base: Path | None = None, warnings: tuple[str, ...] = ()) -> Settings:
    """Settings from a parsed TOML document; relative paths begin at `base`. Raises `ConfigError`."""
    _check(document)

    def place(text: str) -> Path:
        return (base or Path.cwd()) / Path(text).expanduser()

    data_dir = place(document["data_dir"]) if "data_dir" in document else _xdg("XDG_DATA_HOME", ".local/share")
    keys = document.get("keys", {})
    passphrase = place(keys["passphrase_file"]) if "passphrase_file" in keys else data_dir / "keys.passphrase"
    return Settings(
        data_dir=data_dir,
        credentials_dir=place(document["credentials_dir"]) if "credentials_dir" in document else data_dir / "credentials",
        postgres_dir=data_dir / "postgres" if "data_dir" in document else None,
        http=_http(document.get("http", {})),
        database=_database(document.get("database", {})),
        keys=_keys({**keys, "passphrase_file": passphrase}),
        auth=_auth(document.get("auth", {}), place),
        hot_bytes=document.get("memory", {}).get("hot_bytes", Settings.__dataclass_fields__["hot_bytes"].default),
        log=Log(**document.get("log", {})),
        policy=PolicyNumbers(**{name: _numbers(section) for name, section in document.get("policy", {}).items()}),
        warnings=warnings,
    )


def _check(document: dict[str, Any]) -> None:
    schema = orjson.loads((resources.files("broker.schemas") / "config.json").read_bytes())
    # TOML's dates are no JSON; as text they fail by the type that the field wants.
    plain = orjson.loads(orjson.dumps(document, default=str))
    for error in jsonschema_rs.Draft202012Validator(schema).iter_errors(plain):
        field_name = ".".join(str(step) for step in error.instance_path)
        if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.AdditionalProperties):
            unknown = sorted(error.kind.unexpected)[0]
            raise ConfigError(f"unknown field {'.'.join(filter(None, (field_name, unknown)))}")
        if field_name in _MAY_HOLD_PASSWORDS:
            raise ConfigError(f"{field_name}: {_MAY_HOLD_PASSWORDS[field_name]}")
        raise ConfigError(f"{field_name or 'the document'}: {error.message}")


def _http(section: dict[str, Any]) -> Http:
    listen = _address(section.get("listen", "127.0.0.1:8080"), "http.listen")
    host = "127.0.0.1" if listen.host in ("0.0.0.0", "::") else listen.host
    metrics = section.get("metrics_listen", "127.0.0.1:9180")
    networks = []
    for index, text in enumerate(section.get("trusted_proxies", ())):
        try:
            networks.append(ipaddress.ip_network(text))
        except ValueError as error:
            raise ConfigError(f"http.trusted_proxies.{index}: {error}") from None
    return Http(
        listen=listen,
        public_url=section.get("public_url", f"http://{Address(host, listen.port)}"),
        metrics_listen=_address(metrics, "http.metrics_listen") if metrics else None,
        body_limit_bytes=section.get("body_limit_bytes", 8 << 20),
        trusted_proxies=tuple(networks),
        reuse_port=section.get("reuse_port", False),
    )


def _address(text: str, name: str) -> Address:
    host, _, port = text.rpartition(":")
    if int(port) > 65535:
        raise ConfigError(f"{name}: no port {port}")
    return Address(host.strip("[]"), int(port))


def _database(section: dict[str, Any]) -> Database:
    # Nobody else uses the embedded database; a server's administrator may want to choose the moment.
    settings = Database(**{"migrate": "require" if "url" in section else "auto", **section})
    if settings.min_connections > settings.max_connections:
        raise ConfigError("database.min_connections: more than database.max_connections")
    return settings


def _keys(section: dict[str, Any]) -> Keys:
    settings = Keys(**section)
    if 0 < settings.rotate_after_seconds < settings.overlap_seconds:
        raise ConfigError("keys.rotate_after_seconds: 0 for never, or not less than keys.overlap_seconds")
    return settings


def _auth(section: dict[str, Any], place: Callable[[str], Path]) -> Auth:
    issuers = tuple(
        Issuer(
            issuer=entry["issuer"],
            audience=entry["audience"],
            jwks_url=entry.get("jwks_url"),
            claims=ClaimNames(**entry.get("claims", {})),
            **_roles(entry),
        )
        for entry in section.get("issuers", ())
    )
    if len({issuer.issuer for issuer in issuers}) < len(issuers):
        raise ConfigError("auth.issuers: one issuer twice")
    keystone = _keystone(section["keystone"], place) if "keystone" in section else None
    return Auth(section.get("audience", "transfer-broker"), section.get("leeway_seconds", 30.0), issuers, keystone)


def _keystone(section: dict[str, Any], place: Callable[[str], Path]) -> Keystone:
    given = {name: section[name] for name in ("credential", "recheck_seconds") if name in section}
    return Keystone(section["url"], **given, **_roles(section), ca_file=place(section["ca_file"]) if "ca_file" in section else None)


def _roles(section: dict[str, Any]) -> dict[str, Any]:
    return {"roles": {value: Role(role) for value, role in section["roles"].items()}} if "roles" in section else {}


def _numbers(section: dict[str, Any]) -> Numbers:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}


def _xdg(variable: str, below_home: str) -> Path:
    """The XDG base directory specification: a relative path in the variable is ignored."""
    base = os.environ.get(variable, "")
    return (Path(base) if os.path.isabs(base) else Path.home() / below_home) / "transfer-broker"
