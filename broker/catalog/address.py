"""What the URL of a PostgreSQL server says besides where it is: TLS, certificate files, a password. asyncpg reads it as libpq does.

Rules: texts never quote the URL, which may hold a password; files are named. Paths in a URL are the process's, not the
configuration file's.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

from broker.config import ConfigError

_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl", "passfile")
SECRET_FILES = ("sslkey", "passfile")
"""Those that nobody else should be able to read."""

_LOCAL = ("", "localhost", "127.0.0.1", "::1")


def files(url: str) -> dict[str, Path]:
    """The files that `url` names, by parameter. Raises `ConfigError` for a URL that is none."""
    return {name: Path(value).expanduser() for name, value in _query(url).items() if name in _FILES}


def require_files(url: str) -> None:
    """Raise `ConfigError` that names every file of `url` that cannot be read, since TLS libraries say only that one could not."""
    if wrong := unreadable(url):
        raise ConfigError(*wrong)


def unreadable(url: str) -> list[str]:
    """A line for each file of `url` that cannot be read. Raises `ConfigError` for a URL that is none."""
    wrong = []
    for name, path in files(url).items():
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            wrong.append(f"database.url: {name}: {path}: {error.strerror}")
    return wrong


def is_verified(url: str) -> bool:
    """Whether nobody on the way can be taken for the server: it is on this machine, or its certificate and name are checked."""
    return _query(url).get("sslmode") == "verify-full" or all(host in _LOCAL or host.startswith("/") for host in _hosts(url))


def with_password(url: str, file: Path) -> str:
    """`url` with the password in `file`. Raises `ConfigError` when there is none."""
    try:
        password = file.read_text().strip("\r\n")
    except OSError as error:
        raise ConfigError(f"database.password_file: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"database.password_file: {file}: not UTF-8") from None
    if not password or "\n" in password:
        raise ConfigError(f"database.password_file: {file} must hold one line, the password")
    return f"{url}{'&' if '?' in url else '?'}password={quote(password, safe='')}"


def _query(url: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(urlsplit(url).query))
    except ValueError:
        raise ConfigError("database.url: no URL of a PostgreSQL server") from None


def _hosts(url: str) -> list[str]:
    """The names of the hosts: libpq takes several, each with its port."""
    places = urlsplit(url).netloc.rpartition("@")[2].split(",")
    named = _query(url).get("host")
    return named.split(",") if named else [urlsplit(f"//{place}").hostname or "" for place in places]
