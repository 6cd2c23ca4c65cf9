"""The connection to a PostgreSQL server elsewhere: TLS both ways, a password from a file, and what is said when one is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker import app, config, errors
from broker.catalog import address, connect
from tests.parts.authority import Authority, Pair
from tests.parts.broker import serve
from tests.parts.postgres_tls import TlsPostgres

SESSIONS = """
SELECT a.datname, s.ssl, s.client_dn FROM pg_stat_activity a JOIN pg_stat_ssl s USING (pid)
WHERE a.usename = 'broker' AND a.application_name = 'transfer-broker'
"""


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Pair]:
    """Another authority, and its certificate for the same name."""
    authority = Authority(tmp_path_factory.mktemp("strange"), "stranger")
    return authority, authority.issue("broker")


def test_a_broker_proves_who_it_is_and_checks_the_server(tls_postgres: TlsPostgres, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text(tls_postgres.password + "\n")
    url = tls_postgres.url("both", **tls_postgres.certificates())
    with serve(url, tmp_path, settings=f'password_file = "{password}"\n') as broker:
        sessions = tls_postgres.fetch(SESSIONS)
        assert sessions
        assert {(row["datname"], row["ssl"], row["client_dn"]) for row in sessions} == {("both", True, "/CN=broker")}
        assert tls_postgres.password not in broker.log.read_text()
        assert tls_postgres.password not in Path(f"/proc/{broker.pid}/cmdline").read_text()


def test_a_certificate_alone_is_enough_where_the_server_says_so(tls_postgres: TlsPostgres, tmp_path: Path) -> None:
    with serve(tls_postgres.url("certificate", **tls_postgres.certificates()), tmp_path):
        assert {row["client_dn"] for row in tls_postgres.fetch(SESSIONS)} == {"/CN=broker"}


@pytest.mark.parametrize("variable", ["PGPASSWORD", "PGPASSFILE"])
async def test_the_password_may_be_in_the_environment(
    tls_postgres: TlsPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    file = tmp_path / "pgpass"
    file.touch(mode=0o600)
    file.write_text(f"localhost:{tls_postgres.port}:password:broker:{tls_postgres.password}\n")
    monkeypatch.setenv(variable, tls_postgres.password if variable == "PGPASSWORD" else str(file))
    url = tls_postgres.url("password", sslmode="verify-full", sslrootcert=tls_postgres.authority.certificate)
    connection = await connect.connect_one(url)
    assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    await connection.close()


Url = Callable[[TlsPostgres, Authority, Pair], str]


def _with(database: str, **changed: Any) -> Url:
    """A URL that is right but for `changed`; a callable there is asked with the strange authority and its certificate."""

    def build(server: TlsPostgres, authority: Authority, pair: Pair) -> str:
        values = {name: value(authority, pair) if callable(value) else value for name, value in changed.items()}
        query = {name: value for name, value in values.items() if name not in ("host", "password")}
        host, password = values.get("host", "localhost"), values.get("password", server.password)
        return server.url(database, host=host, password=password, **{**server.certificates(), **query})

    return build


REFUSED: dict[str, tuple[Url, str]] = {
    "no client certificate": (_with("certificate", sslcert=None, sslkey=None), "requires a valid client certificate"),
    "a password but no client certificate": (_with("both", sslcert=None, sslkey=None), "requires a valid client certificate"),
    "another authority for the server": (_with("both", sslrootcert=lambda a, _: a.certificate), "the server's certificate is refused"),
    "another name of the server": (_with("both", host="127.0.0.2"), "not valid for '127.0.0.2'"),
    "no TLS": (_with("password", sslmode="disable"), "no encryption"),
    "a wrong password": (_with("both", password="hunter2-wrong"), "password authentication failed"),
    "no password": (_with("both", password=None), "password authentication failed"),
    "another client's key": (_with("both", sslkey=lambda _, pair: pair.key), "key values mismatch"),
    "a file that is missing": (_with("both", sslcert="/nowhere/client.crt"), "sslcert: /nowhere/client.crt: No such file"),
    "authorities in a file of something else": (_with("both", sslrootcert="/etc/passwd"), "no certificate or crl found"),
    "a mode that is none": (_with("both", sslmode="verify-all"), "must be one of"),
    "a parameter that is none": (_with("both", ssl_mode="require"), "ssl_mode"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_refused_is_said(tls_postgres: TlsPostgres, strange: tuple[Authority, Pair], case: str) -> None:
    build, words = REFUSED[case]
    for attempt in (connect.connect_one, connect.connect):
        with pytest.raises(config.ConfigError) as raised:
            await attempt(build(tls_postgres, *strange))
        assert words in str(raised.value)
        assert str(raised.value).startswith("database.url: ")
        assert tls_postgres.password not in str(raised.value)
        assert "hunter2" not in str(raised.value)


async def test_a_client_certificate_that_the_server_does_not_trust(tls_postgres: TlsPostgres, strange: tuple[Authority, Pair]) -> None:
    authority, pair = strange
    url = _with("certificate", sslcert=pair.certificate, sslkey=pair.key)(tls_postgres, authority, pair)
    with pytest.raises(errors.Unavailable, match="client certificate"):
        await connect.connect_one(url)


async def test_a_server_without_tls_is_not_spoken_to_in_the_clear() -> None:
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readexactly(8))  # SSLRequest
        writer.write(b"N")
        heard.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(config.ConfigError, match="does not offer TLS"):
            await connect.connect_one(f"postgresql://broker:hunter2@localhost:{port}/broker?sslmode=require")
        while len(heard) < 2:
            await asyncio.sleep(0.01)
    assert heard[1] == b""


async def test_the_password_file_is_named_when_it_is_no_good(tmp_path: Path) -> None:
    file = tmp_path / "password"
    settings = config.parse({"database": {"url": "postgresql://broker@db/broker?sslmode=verify-full", "password_file": str(file)}})

    async def attempt() -> str:
        async with app.database_url(settings) as url:
            return url

    for content, words in ((None, "No such file"), (b"", "one line"), (b"a\nb\n", "one line"), (b"\xff", "UTF-8")):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(config.ConfigError, match=words) as raised:
            await attempt()
        assert str(raised.value).startswith(f"database.password_file: {file}")
    file.write_text("p&=%? ö\n")
    assert (await attempt()).endswith("&password=p%26%3D%25%3F%20%C3%B6")


@pytest.mark.parametrize(
    ("url", "verified"),
    [
        ("postgresql:///broker", True),
        ("postgresql://broker@localhost/broker", True),
        ("postgresql://broker@/broker?host=/run/postgresql", True),
        ("postgresql://broker@[::1]:5432/broker", True),
        ("postgresql://broker@db/broker", False),
        ("postgresql://broker@db/broker?sslmode=require", False),
        ("postgresql://broker@db/broker?sslmode=verify-ca", False),
        ("postgresql://broker@db/broker?sslmode=verify-full", True),
        ("postgresql://broker@localhost:5432,db:5432/broker", False),
        ("postgresql://broker@db1:5432,db2:5433/broker?sslmode=verify-full", True),
    ],
)
def test_who_could_be_taken_for_the_server(url: str, verified: bool) -> None:
    assert address.is_verified(url) is verified
