"""Connections to the catalogue, and what it means when there is none.

Rules: a query that takes over 30 s is cut, a transaction that idles for 10 s too, so that a stuck broker holds no locks
over others. Code that borrows a connection from the pool leaves no session state behind (no SET, LISTEN or session-wide
advisory lock), since giving one back does not spend a round trip on a reset. `jsonb` and `json` are Python values.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import orjson

from broker import errors
from broker.catalog import address
from broker.config import ConfigError

SERVER_SETTINGS = {
    "application_name": "transfer-broker",
    "timezone": "UTC",
    "statement_timeout": "30s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "10s",
}

# What goes away by itself, by SQLSTATE class or condition (PostgreSQL, appendix A).
_TRANSIENT: tuple[type[Exception], ...] = (
    OSError,  # TimeoutError is one
    asyncpg.PostgresConnectionError,  # 08
    asyncpg.InsufficientResourcesError,  # 53: too many connections, disk full
    asyncpg.OperatorInterventionError,  # 57: shutdown, starting up, statement timeout
    asyncpg.PostgresSystemError,  # 58: I/O error
    asyncpg.TransactionRollbackError,  # 40: serialization failure, deadlock
    asyncpg.LockNotAvailableError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby, in a failover
)
_RETRY_SECONDS = 1.0
_TLS_PASSING = ("UNEXPECTED_EOF_WHILE_READING", "APPLICATION_DATA_AFTER_CLOSE_NOTIFY")  # a server that is going down

# asyncpg raises plain InterfaceErrors for a lost connection and for mistakes of ours; the text tells them apart.
# A borrowed connection that the server ended counts as released.
_LOST = ("closed", "closing", "has been released back to the pool")


def is_transient(error: BaseException) -> bool:
    """Whether `error` says that the database cannot serve now, not that the query is wrong."""
    if isinstance(error, asyncpg.InternalClientError):  # asyncpg was told of the end of the connection in the middle of a call
        return True
    if isinstance(error, asyncpg.InterfaceError):
        return any(word in str(error) for word in _LOST)
    return isinstance(error, _TRANSIENT)


@contextmanager
def reachable() -> Iterator[None]:
    """Turn a database that is away, overloaded or gave up on a lock into `errors.Unavailable`; everything else passes.

    The detail says nothing of the database: addresses, queries and names are for the log, where the cause is chained.
    """
    try:
        yield
    except Exception as error:
        if is_transient(error):
            raise errors.Unavailable("The catalogue cannot be reached.", retry_after=_RETRY_SECONDS) from error
        raise


@contextmanager
def _let_in(url: str) -> Iterator[None]:
    """Turn a URL that is none, that PostgreSQL refuses, or TLS that cannot be had into a `ConfigError`.

    The server's text names user and database, TLS's the host; no password is in either.
    """
    address.require_files(url)
    try:
        yield
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError, asyncpg.UndefinedObjectError) as error:
        raise ConfigError(f"database.url: {error}") from None
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"database.url: the server's certificate is refused: {error.verify_message}") from None
    except ssl.SSLError as error:
        if error.reason in _TLS_PASSING:
            raise
        raise ConfigError(f"database.url: TLS: {str(error.reason).replace('_', ' ').lower()}") from None
    except ConnectionError as error:
        if "SSL upgrade" in str(error):  # asyncpg's words; not a subclass of its own
            raise ConfigError("database.url: the server does not offer TLS, which sslmode asks for") from None
        raise
    except asyncpg.ConnectionDoesNotExistError as error:
        if "sslcert=" in url:  # TLS 1.3 refuses a client after the handshake has succeeded for it
            raise errors.Unavailable(
                "The database closed the connection; its log says whether it refused the client certificate."
            ) from error
        raise
    except ValueError as error:
        if str(error).startswith("`ssl"):  # names the parameter and the values that it may have
            raise ConfigError(f"database.url: {error}") from None
        raise ConfigError("database.url: no URL of a PostgreSQL server") from None  # others may quote a part of the URL


async def connect(database_url: str, *, min_size: int = 2, max_size: int = 10) -> asyncpg.Pool[asyncpg.Record]:
    """A pool of `min_size` to `max_size` connections to `database_url`. Raises `errors.Unavailable`, or `ConfigError` for a wrong URL."""
    with reachable(), _let_in(database_url):
        pool = await asyncpg.create_pool(
            database_url,
            min_size=min_size,
            max_size=max_size,
            init=prepare,
            reset=_keep_session,
            server_settings=SERVER_SETTINGS,
            timeout=10,
            command_timeout=35,  # for a server that is gone without a word; a live one ends the statement before
        )
    assert pool is not None
    return pool


async def connect_one(database_url: str) -> asyncpg.Connection[asyncpg.Record]:
    """A connection of one's own, for LISTEN or session-wide locks. Raises as `connect` does."""
    with reachable(), _let_in(database_url):
        connection = await asyncpg.connect(database_url, server_settings=SERVER_SETTINGS, timeout=10)
        await prepare(connection)
    return connection


async def prepare(connection: Any) -> None:
    """Make JSON columns Python values. Both ways orjson's bytes go over the wire as they are."""
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", format="binary", encoder=_encode_jsonb, decoder=lambda data: orjson.loads(data[1:])
    )
    await connection.set_type_codec("json", schema="pg_catalog", format="binary", encoder=orjson.dumps, decoder=orjson.loads)


def _encode_jsonb(value: Any) -> bytes:
    return b"\x01" + orjson.dumps(value)  # the version of the binary format comes first


async def _keep_session(_: Any) -> None:
    """Instead of asyncpg's reset, whose round trip costs more than most queries. An open transaction is rolled back all the same."""
