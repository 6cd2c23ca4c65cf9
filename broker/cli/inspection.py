"""Looks at everything that a broker would use, before it uses it: the settings, and every file that they name.

Rules: nothing is changed, no server is asked, no value that is secret is shown. A warning is allowed but unwise, and says
what to do.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from broker import app, embedded, log
from broker.catalog import address
from broker.config import PASSWORD, ConfigError, Settings
from broker.credentials import VARIABLE, CredentialError, Credentials, is_name, variable_of
from broker.web.tls import Certificate

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass
class Findings:
    """What there is, what is wrong with it, and what is unwise."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """Field, value, remark."""
    problems: list[str] = field(default_factory=list)
    """What the broker would not start with."""
    useless: list[str] = field(default_factory=list)
    """What it starts with, but cannot use: a credential that is broken closes one store."""
    warnings: list[str] = field(default_factory=list)


def inspect(settings: Settings, *, passphrase_known: bool = False, password_known: bool = False) -> Findings:
    """Everything that can be seen without serving. What is known was read already, with rights that are gone."""
    found = Findings(warnings=list(settings.warnings))
    remarks = {
        "database.url": _database(settings, found, password_known),
        "keys.passphrase_file": _passphrase(settings.keys.passphrase_file, found, passphrase_known),
        "credentials_dir": _credentials(settings.credentials_dir, found),
        "auth.keystone.credential": _keystone(settings, found),
        "data_dir": _data_dir(settings, found),
        "http.tls_certificate": _certificate(settings, found),
    }
    _policy(settings, found)
    _openness(settings, found)
    found.rows = [(name, value, remarks.get(name, "")) for name, value in _values(settings)]
    return found


def _database(settings: Settings, found: Findings, password_known: bool) -> str:
    url, password_file = settings.database.url, settings.database.password_file
    if url is None:
        try:
            embedded.wheel_binaries()
        except embedded.EmbeddedError as error:
            found.problems.append(f"database.url: {error}")
        return "a PostgreSQL beside the broker"
    try:
        found.problems += address.unreadable(url)
        named = address.files(url)
        verified = address.is_verified(url)
        if password_file is not None and not password_known:
            address.with_password(url, password_file)
    except ConfigError as error:
        found.problems += error.problems
        return ""
    secret = [named[name] for name in address.SECRET_FILES if name in named]
    for path in (*secret, *([password_file] if password_file is not None else [])):
        _warn_if_open(path, found)
    if not verified:
        found.warnings.append("database.url: nobody checks that it is the right server, or that nobody listens; add sslmode=verify-full")
    if PASSWORD.search(url):
        found.warnings.append("database.url holds a password; better in database.password_file, a passfile or a client certificate")
    return "not asked; files readable" if named else "not asked"


def _passphrase(path: Path, found: Findings, known: bool) -> str:
    if app.PASSPHRASE_VARIABLE in os.environ:
        if not os.environ[app.PASSPHRASE_VARIABLE].strip():
            found.problems.append(f"{app.PASSPHRASE_VARIABLE} is empty; unset it to use keys.passphrase_file")
        return f"not read: {app.PASSPHRASE_VARIABLE} is set"
    if known:
        _warn_if_open(path, found)
        return "read as root"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        parent = next(directory for directory in path.parents if directory.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            found.problems.append(f"keys.passphrase_file: {path} is not there, and cannot be made in {parent}")
        return "made at the start"
    except OSError as error:
        found.problems.append(f"keys.passphrase_file: {path}: {error.strerror}")
        return ""
    if not content.strip():
        found.problems.append(f"keys.passphrase_file: {path} is empty; if this broker is new, delete it to have one made")
    _warn_if_open(path, found)
    return "read; whether it opens the keys shows at the start"


def _credentials(directory: Path, found: Findings) -> str:
    if directory.exists() and not os.access(directory, os.R_OK | os.X_OK):
        found.problems.append(f"credentials_dir: {directory} cannot be read")
        return ""
    credentials = Credentials(directory)
    names = list(credentials)
    variables = {variable_of(name): name for name in names if is_name(name)}
    for name in names:
        path = directory / f"{name}.json"
        if not is_name(name):
            found.warnings.append(f"credentials_dir: {path} is never used: names are lower-case letters, digits, - and _")
            continue
        if variables[variable_of(name)] != name:
            found.warnings.append(
                f"credentials {name} and {variables[variable_of(name)]} share the environment variable {variable_of(name)}"
            )
        if variable_of(name) in os.environ:
            found.warnings.append(f"credential {name} is there twice: the environment variable {variable_of(name)} hides {path}")
        try:
            credentials.parse_file(name)
        except CredentialError as error:
            found.useless.append(str(error))
        else:
            _warn_if_open(path, found)
    from_environment = [name for name in os.environ if name.startswith(VARIABLE)]
    for name in from_environment:
        try:
            credentials.read(name.removeprefix(VARIABLE).lower())
        except CredentialError as error:
            found.useless.append(str(error))
    return f"{len(names)} files" + (f", {len(from_environment)} in the environment" if from_environment else "")


def _keystone(settings: Settings, found: Findings) -> str:
    keystone = settings.auth.keystone
    if keystone is None:
        return ""
    if keystone.ca_file is not None and (wrong := _why_unreadable(keystone.ca_file)):
        found.problems.append(f"auth.keystone.ca_file: {keystone.ca_file}: {wrong}")
    if keystone.url.startswith("http://") and urlsplit(keystone.url).hostname not in _LOOPBACK:
        found.warnings.append("auth.keystone.url is not https: passwords and tokens can be read on the way")
    try:
        Credentials(settings.credentials_dir).read(keystone.credential)
    except CredentialError as error:
        found.useless.append(f"auth.keystone.credential: {error}")
        return ""
    return "read"


def _why_unreadable(path: Path) -> str:
    try:
        with path.open("rb"):
            return ""
    except OSError as error:
        return error.strerror or "cannot be read"


def _data_dir(settings: Settings, found: Findings) -> str:
    parent = next(directory for directory in (settings.data_dir, *settings.data_dir.parents) if directory.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        if settings.database.url is None:
            found.problems.append(f"data_dir: {parent} cannot be written")
        return "cannot be written"
    return "" if parent == settings.data_dir else "made at the start"


def _policy(settings: Settings, found: Findings) -> None:
    try:
        app.build_policy(settings.policy)
    except ConfigError as error:
        found.problems += error.problems


def _certificate(settings: Settings, found: Findings) -> str:
    certificate, key = settings.http.tls_certificate, settings.http.tls_key
    if certificate is None or key is None:
        return ""
    try:
        Certificate(certificate, key)
    except ConfigError as error:
        found.problems += error.problems
        return ""
    _warn_if_open(key, found)
    return "read; fits its key"


def _openness(settings: Settings, found: Findings) -> None:
    """What listens to more than this machine."""
    metrics = settings.http.metrics_listen
    if metrics is not None and metrics.host not in _LOOPBACK:
        found.warnings.append(f"http.metrics_listen: whoever reaches {metrics} can read metrics, store names among them")
    if settings.http.public_url.startswith("http://") and urlsplit(settings.http.public_url).hostname not in _LOOPBACK:
        found.warnings.append("http.public_url is not https: bearer tokens and signed URLs can be read on the way")
    for issuer in settings.auth.issuers:
        if (issuer.jwks_url or issuer.issuer).startswith("http://"):
            found.warnings.append(f"auth.issuers: {issuer.issuer} is not https: whoever is on the way can be anybody")


def _warn_if_open(path: Path, found: Findings) -> None:
    try:
        mode = path.stat().st_mode
    except OSError:  # behind a door that this user may not pass
        return
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        doing = "read" if mode & stat.S_IROTH else "change"
        found.warnings.append(f"everybody can {doing} the secret in {path}: chmod 600 {path}")


def _values(part: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its name in the file, as it will be used."""
    for each in fields(part):
        value, name = getattr(part, each.name), prefix + ("memory.hot_bytes" if each.name == "hot_bytes" else each.name)
        if name in ("warnings", "postgres_dir"):
            continue
        if name.startswith("policy.") and isinstance(value, Mapping):
            yield from ((f"{name}.{key}", str(number)) for key, number in value.items())
        elif is_dataclass(value) and type(value).__str__ is object.__str__:
            yield from _values(value, f"{name}.")
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from _values(item, f"{name}.{index}.")
        elif value is not None and not each.repr and name != "database.url":
            yield name, log.HIDDEN
        else:
            yield name, _shown(value)


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_shown(inner)}" for key, inner in value.items())
    return log.scrub(str(value))
