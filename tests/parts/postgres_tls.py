"""Debian's PostgreSQL 15 over TCP with TLS, for the connection to a server that is elsewhere.

Four databases, all for the user ``broker``, tell what they ask for by their names: ``certificate`` (a client certificate for
that name), ``both`` (that and a password), ``password`` (TLS and a password), ``plain`` (a password, no TLS).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from tests.parts.authority import Authority, Pair
from tests.parts.postgres import DEBIAN_15
from tests.parts.process import PartMissing, free_ports, listens, running

_ACCESS = """\
local all admin trust
hostssl certificate broker 127.0.0.0/8 cert
hostssl "both" broker 127.0.0.0/8 scram-sha-256 clientcert=verify-full
hostssl password broker 127.0.0.0/8 scram-sha-256
hostnossl plain broker 127.0.0.0/8 scram-sha-256
"""

DATABASES = ("certificate", "both", "password", "plain")


@dataclass(frozen=True)
class TlsPostgres:
    """A running server. `authority` signed its certificate (for localhost and 127.0.0.1) and `client`, whose name is ``broker``."""

    port: int
    password: str
    authority: Authority
    client: Pair
    sockets: Path

    def url(self, database: str, *, host: str = "localhost", password: str | None = None, **query: object) -> str:
        """A URL of one of the databases; what is None in the query is left out."""
        words = "&".join(f"{name}={value}" for name, value in query.items() if value is not None)
        secret = f":{password}" if password else ""
        return f"postgresql://broker{secret}@{host}:{self.port}/{database}?{words}"

    def certificates(self) -> dict[str, object]:
        """The query of a URL that checks the server and proves who the client is."""
        return {
            "sslmode": "verify-full",
            "sslrootcert": self.authority.certificate,
            "sslcert": self.client.certificate,
            "sslkey": self.client.key,
        }

    def fetch(self, sql: str) -> list[asyncpg.Record]:
        """Rows, as the server's administrator."""

        async def work() -> list[asyncpg.Record]:
            connection = await asyncpg.connect(f"postgresql://admin@/postgres?host={self.sockets}&port={self.port}")
            try:
                return await connection.fetch(sql)
            finally:
                await connection.close()

        return asyncio.run(work())


@contextlib.contextmanager
def start(place: Path) -> Iterator[TlsPostgres]:
    """Run the server with everything below `place`, which others must be able to pass through when this is root."""
    if not (DEBIAN_15 / "postgres").exists():
        raise PartMissing("PostgreSQL 15 is not installed; install it with: apt-get install postgresql-15")
    authority = Authority(place / "certificates")
    server = authority.issue("server", "localhost", "127.0.0.1")
    data, sockets, (port,) = place / "data", place / "sockets", free_ports(1)
    (place / "pg_hba.conf").write_text(_ACCESS)
    owned = (data, sockets)
    for directory in owned:
        directory.mkdir(mode=0o700)
    account = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
    as_account: list[str] = []
    if account is not None:
        as_account = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups", "--"]
        for path in (*owned, server.key):
            os.chown(path, account.pw_uid, account.pw_gid)
    made = subprocess.run(
        [*as_account, str(DEBIAN_15 / "initdb"), "-D", str(data), "-U", "admin", "-A", "trust", "--no-sync"], cwd=place,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    settings = {
        "listen_addresses": "127.0.0.1,127.0.0.2", "port": port, "unix_socket_directories": sockets, "hba_file": place / "pg_hba.conf",
        "ssl": "on", "ssl_cert_file": server.certificate, "ssl_key_file": server.key, "ssl_ca_file": authority.certificate, "fsync": "off",
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    with running(
        [*as_account, str(DEBIAN_15 / "postgres"), "-D", str(data), *words], log=place / "postgres.log", ready=lambda: listens(port)
    ):
        part = TlsPostgres(port, secrets.token_hex(12), authority, authority.issue("broker"), sockets)
        asyncio.run(_prepare(part))
        yield part


async def _prepare(part: TlsPostgres) -> None:
    connection = None
    while connection is None:
        with contextlib.suppress(asyncpg.CannotConnectNowError):
            connection = await asyncpg.connect(f"postgresql://admin@/postgres?host={part.sockets}&port={part.port}")
    await connection.execute(f"CREATE ROLE broker LOGIN PASSWORD '{part.password}'")
    for name in DATABASES:
        await connection.execute(f'CREATE DATABASE "{name}" OWNER broker')
    await connection.close()


@pytest.fixture(scope="module")
def tls_postgres() -> Iterator[TlsPostgres]:
    # pytest's own temporary directories let nobody else pass, and PostgreSQL may have to run as somebody else.
    place = Path(tempfile.mkdtemp(prefix="postgres-tls-"))
    place.chmod(0o711)
    try:
        with start(place) as part:
            yield part
    finally:
        shutil.rmtree(place)
