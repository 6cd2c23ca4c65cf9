"""Settings: one TOML file, described by schemas/config.json, read once at the start.

Rules: every field has a default, so that no file is needed; unknown fields are refused by name; whatever is wrong is said at
once; nothing here is secret but the database's URL, which `repr` hides.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from broker import fields
from broker.model import Role, Visibility

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Numbers = Mapping[str, float | bool | tuple[float, ...]]

PASSWORD = re.compile(r"://[^/@:]*:[^@]+@|[?&]password=")
"""Finds a password in the URL of a database."""


_Section = TypeVar("_Section")


class ConfigError(Exception):
    """The configuration cannot be used; each of `problems` names the field, and the file where it is known. The text has a line for each.

    `rest` are the settings with the defaults in place of what is wrong, to look for more problems; nothing may run with them.
    """

    def __init__(self, *problems: str, rest: Settings | None = None) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.rest = rest


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
    cors_origins: tuple[str, ...] = ()
    reuse_port: bool = False
    max_connections: int = 8192
    max_connections_per_address: int = 1024
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    """Set if, and only if, the certificate is."""


@dataclass(frozen=True, slots=True)
class Database:
    """`url` is ``None`` for the embedded PostgreSQL."""

    url: str | None = field(default=None, repr=False)
    password_file: Path | None = None
    min_connections: int = 2
    max_connections: int = 16
    migrate: Literal["auto", "require"] = "auto"
    keep_days: int = 30
    grace_seconds: float = 30.0


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
    refusals_per_minute: int = 120


@dataclass(frozen=True, slots=True)
class Log:
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


@dataclass(frozen=True, slots=True)
class Vetting:
    """Which images need approval, by visibility, and whether that needs a signature which an agent found good."""

    visibilities: tuple[Visibility, ...] = ()
    signatures: bool = False


@dataclass(frozen=True, slots=True)
class PolicyNumbers:
    """What the file says on policy; names of numbers are checked where policy is built (`broker.app`)."""

    ranking: Numbers = field(default_factory=dict)
    admission: Numbers = field(default_factory=dict)
    uploads: Numbers = field(default_factory=dict)
    vetting: Vetting = Vetting()


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
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: no TOML: not UTF-8 (at line {line})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: no TOML: {error}") from None
    warnings = []
    if not document:
        warnings.append(f"{path} sets nothing: every field has its default")
    if mode & stat.S_IWOTH:
        warnings.append(f"everybody can change {path}: chmod o-w {path}")
    if mode & stat.S_IROTH and PASSWORD.search(str(document.get("database", {}).get("url", ""))):
        warnings.append(f"{path} holds a database password and everybody can read it: chmod 600 {path}")
    try:
        return parse(document, base=path.parent, warnings=tuple(warnings))
    except ConfigError as error:
        raise ConfigError(*(f"{path}: {problem}" for problem in error.problems), rest=error.rest) from None


def parse(document: dict[str, Any], *, base: Path | None = None, warnings: tuple[str, ...] = ()) -> Settings:
    """Settings from a parsed TOML document; relative paths begin at `base`. Raises `ConfigError` with everything that is wrong."""
    found = fields.problems(document)
    wrong = [problem.text for problem in found]
    while found:  # so that the rest is looked at as well, without what lacks a part now
        for problem in found:
            document = fields.without(document, problem.path)
        found = fields.problems(document)

    def place(text: str) -> Path:
        return (base or Path.cwd()) / Path(text).expanduser()

    def read(section: Callable[[dict[str, Any]], _Section], name: str) -> _Section:
        try:
            return section(document.get(name, {}))
        except ConfigError as error:
            wrong.extend(error.problems)
            return section({})

    data_dir = place(document["data_dir"]) if "data_dir" in document else _xdg("XDG_DATA_HOME", ".local/share")
    keys = document.get("keys", {})
    passphrase = place(keys["passphrase_file"]) if "passphrase_file" in keys else data_dir / "keys.passphrase"
    settings = Settings(
        data_dir=data_dir,
        credentials_dir=place(document["credentials_dir"]) if "credentials_dir" in document else data_dir / "credentials",
        postgres_dir=data_dir / "postgres" if "data_dir" in document else None,
        http=read(lambda section: _http(section, place), "http"),
        database=read(lambda section: _database(section, place), "database"),
        keys=read(lambda section: _keys({**section, "passphrase_file": passphrase}), "keys"),
        auth=read(lambda section: _auth(section, place), "auth"),
        hot_bytes=document.get("memory", {}).get("hot_bytes", Settings.__dataclass_fields__["hot_bytes"].default),
        log=Log(**document.get("log", {})),
        policy=_policy(document.get("policy", {})),
        warnings=warnings,
    )
    if wrong:
        raise ConfigError(*wrong, rest=settings)
    return settings


def _http(section: dict[str, Any], place: Callable[[str], Path]) -> Http:
    wrong: list[str] = []
    listen = _address(section.get("listen", "127.0.0.1:8080"), "http.listen", wrong)
    host = "127.0.0.1" if listen.host in ("0.0.0.0", "::") else listen.host
    metrics = section.get("metrics_listen", "127.0.0.1:9180")
    metrics_listen = _address(metrics, "http.metrics_listen", wrong) if metrics else None
    if metrics_listen == listen and listen.port:
        wrong.append("http.metrics_listen: the same as http.listen; metrics have a listener of their own")
    networks = []
    for index, text in enumerate(section.get("trusted_proxies", ())):
        try:
            networks.append(ipaddress.ip_network(text))
        except ValueError as error:
            wrong.append(f"http.trusted_proxies.{index}: {error}")
    certificate, key = (place(section[name]) if name in section else None for name in ("tls_certificate", "tls_key"))
    if certificate is not None and key is None:
        wrong.append("http.tls_key: needed with http.tls_certificate")
    elif certificate is None and key is not None:
        wrong.append("http.tls_certificate: needed with http.tls_key")
    public_url = section.get("public_url", f"{'http' if certificate is None else 'https'}://{Address(host, listen.port)}")
    if certificate is not None and not public_url.startswith("https://"):
        wrong.append("http.public_url: must begin with https:// when http.tls_certificate is set")
    _refuse(wrong)
    return Http(
        listen=listen,
        public_url=public_url,
        metrics_listen=metrics_listen,
        body_limit_bytes=section.get("body_limit_bytes", 8 << 20),
        trusted_proxies=tuple(networks),
        cors_origins=tuple(section.get("cors_origins", ())),
        reuse_port=section.get("reuse_port", False),
        max_connections=section.get("max_connections", 8192),
        max_connections_per_address=section.get("max_connections_per_address", 1024),
        tls_certificate=certificate,
        tls_key=key,
    )


def _address(text: str, name: str, wrong: list[str]) -> Address:
    host, _, port = text.rpartition(":")
    if int(port) > 65535:
        wrong.append(f"{name}: no port {port}")
    return Address(host.strip("[]"), int(port))


def _database(section: dict[str, Any], place: Callable[[str], Path]) -> Database:
    # Nobody else uses the embedded database; a server's administrator may want to choose the moment.
    given = {"migrate": "require" if "url" in section else "auto", **section}
    if "password_file" in section:
        given["password_file"] = place(section["password_file"])
    settings = Database(**given)
    wrong = []
    if settings.min_connections > settings.max_connections:
        wrong.append("database.min_connections: more than database.max_connections")
    if settings.password_file is not None:
        if settings.url is None:
            wrong.append("database.password_file: without database.url there is no server that asks for a password")
        elif PASSWORD.search(settings.url):
            wrong.append("database.password_file: database.url holds a password already")
    _refuse(wrong)
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
    _refuse(f"auth.issuers: {name} is there more than once" for name in _repeated(issuer.issuer for issuer in issuers))
    keystone = _keystone(section["keystone"], place) if "keystone" in section else None
    return Auth(
        section.get("audience", "transfer-broker"),
        section.get("leeway_seconds", 30.0),
        issuers,
        keystone,
        section.get("refusals_per_minute", 120),
    )


def _keystone(section: dict[str, Any], place: Callable[[str], Path]) -> Keystone:
    given = {name: section[name] for name in ("credential", "recheck_seconds") if name in section}
    return Keystone(section["url"], **given, **_roles(section), ca_file=place(section["ca_file"]) if "ca_file" in section else None)


def _roles(section: dict[str, Any]) -> dict[str, Any]:
    return {"roles": {value: Role(role) for value, role in section["roles"].items()}} if "roles" in section else {}


def _repeated(names: Iterable[str]) -> list[str]:
    counted = Counter(names)
    return [name for name, times in counted.items() if times > 1]


def _refuse(wrong: Iterable[str]) -> None:
    if problems := tuple(wrong):
        raise ConfigError(*problems)


def _policy(section: dict[str, Any]) -> PolicyNumbers:
    told = section.get("vetting", {})
    vetting = Vetting(tuple(map(Visibility, told.get("visibilities", ()))), told.get("signatures", False))
    return PolicyNumbers(**{name: _numbers(numbers) for name, numbers in section.items() if name != "vetting"}, vetting=vetting)


def _numbers(section: dict[str, Any]) -> Numbers:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}


def _xdg(variable: str, below_home: str) -> Path:
    """The XDG base directory specification: a relative path in the variable is ignored."""
    base = os.environ.get(variable, "")
    return (Path(base) if os.path.isabs(base) else Path.home() / below_home) / "transfer-broker"
