"""The composition root: builds everything once, hands it down, and takes it apart in the opposite order.

Order of a start: database, schema, keys, memory, jobs, metrics listener, API listener. A broker that listens is ready.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from random import Random
from secrets import token_urlsafe
from typing import Any, TypeVar

import aiohttp
import asyncpg
import stamina
import structlog
from aiohttp import web

from broker import __version__, admit, config, embedded, errors, metrics, rank, vet
from broker.buckets import Rate
from broker.catalog import address, connect, leases, migrations
from broker.catalog import reports as report_records
from broker.catalog.coalesce import Coalescer
from broker.config import Address, ConfigError, Settings
from broker.credentials import Credentials
from broker.fields import suggestion
from broker.model import Store
from broker.privileges import Opened
from broker.service import jobs, keys
from broker.service.context import Context, Policy
from broker.service.memory import Memory
from broker.service.pace import Pace
from broker.service.status import Overviews
from broker.sign.rotation import Terms
from broker.stores import base, exchange, probe, reach, registry
from broker.web import connections
from broker.web.auth import Authenticator
from broker.web.client import ClientFinder
from broker.web.cors import Cors
from broker.web.dialects import DIALECTS
from broker.web.keystone import Keystone
from broker.web.keystone_tokens import KeystoneTokens
from broker.web.listeners import STOP_SECONDS, listening
from broker.web.refusals import Refusals
from broker.web.routes import Api, ApiServer, Router
from broker.web.status.pages import Pages
from broker.web.status.session import Sessions
from broker.web.tls import Certificate

START_SECONDS = 10.0
"""A database that does not answer is waited for so long at the start."""

CREDENTIALS_SECONDS = 2.0
"""How often credentials are looked at for changes."""

PASSPHRASE_VARIABLE = "BROKER_KEYS_PASSPHRASE"

_log = structlog.get_logger(__name__)
_Numbers = TypeVar("_Numbers", rank.Policy, admit.Policy, Policy)


@dataclass(frozen=True, slots=True)
class Broker:
    """A running broker. `listens` and `metrics_listens` are ``None`` where it does not listen, `certificate` without TLS."""

    context: Context
    credentials: Credentials
    listens: Address | None
    metrics_listens: Address | None
    certificate: Certificate | None = None


@asynccontextmanager
async def running(
    settings: Settings,
    *,
    api: bool = True,
    with_jobs: bool = True,
    credentials: Credentials | None = None,
    opened: Opened | None = None,
    metrics_socket: Path | None = None,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[Broker]:
    """A broker for as long as the block lasts. `opened` is what was opened before rights were given up. `clock` is the machine's.

    A worker, which shares its port, tells its metrics on `metrics_socket` instead of the settings' address.

    Raises `ConfigError`, `embedded.EmbeddedError`, `migrations.SchemaError`, `keys.WrongPassphrase`, `errors.Unavailable` and
    `OSError` (an address in use) when it cannot start; the texts say what to do.
    """
    policy = build_policy(settings.policy)
    opened = opened or Opened()
    router = Router(DIALECTS) if api else None
    certificate = None
    if api and settings.http.tls_certificate is not None and settings.http.tls_key is not None:
        certificate = Certificate(settings.http.tls_certificate, settings.http.tls_key)
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(database_url(settings))
        await prepare_schema(settings, url)
        pool = await _open_pool(stack, settings, url)
        counted = metrics.create(__version__)
        keyring = await load_keys(settings, pool, policy, opened.passphrase)
        outside, inside = [await stack.enter_async_context(store_session(counted, internal=internal)) for internal in (False, True)]
        known = credentials or Credentials(settings.credentials_dir)
        own_keys = partial(_published_now, keyring, clock)
        authenticator = Authenticator(settings.auth, settings.http.public_url, own_keys, inside, outside, counted, clock)
        keystone = _keystone(stack, settings.auth.keystone, known, inside, counted, clock)

        async def try_store(store: Store) -> probe.Probed:
            session = inside if store.internal else outside
            return await probe.probe(registry.open_store(store, known, keyring.signer, session), store, session, clock())

        async def take_over_keys() -> None:
            await keyring.reload()
            authenticator.forget()

        memory = Memory(
            pool, _opener(known, keyring, inside, outside), counted, clock, hot_bytes=settings.hot_bytes, on_key_change=take_over_keys
        )
        await memory.start()
        stack.push_async_callback(memory.close)
        grants, reports = await _coalescers(stack, pool, policy, counted)
        context = Context(
            db=pool, grants=grants, reports=reports, memory=memory, keys=keyring, policy=policy, metrics=counted, clock=clock,
            rng=Random(), probe=try_store, grace_seconds=settings.database.grace_seconds, pace=Pace(policy.admit),
            issuers=(settings.http.public_url, *(issuer.issuer for issuer in settings.auth.issuers)),
        )  # fmt: skip
        _follow(counted, pool, memory)
        loops = [*(jobs.repeat(context, job) for job in jobs.GAUGES), _watch_credentials(known, memory)]
        if api:
            loops.append(jobs.repeat(context, jobs.REPEATS))
        if with_jobs:
            loops += [jobs.repeat(context, job) for job in (*jobs.JOBS, jobs.age(settings.database.keep_days))]
        stack.push_async_callback(_end, [asyncio.create_task(loop) for loop in loops])
        operator = metrics_socket or settings.http.metrics_listen
        metrics_listens = await stack.enter_async_context(
            listening(web.Server(_Health(context).handle, access_log=None), operator, bound=opened.metrics)
        )
        listens = None
        if router is not None:
            finder = ClientFinder(settings.http.trusted_proxies, memory.site_of)
            refusals = Refusals(counted, Rate(settings.auth.refusals_per_minute, settings.auth.refusals_per_minute / 60))
            bounds = connections.Bounds(connections.allow_files(settings.http.max_connections), settings.http.max_connections_per_address)
            answering = Api(
                context, router, authenticator, finder, refusals, body_limit_bytes=settings.http.body_limit_bytes, keystone=keystone,
                pages=_pages(context, settings), cors=Cors(settings.http.cors_origins) if settings.http.cors_origins else None,
            )  # fmt: skip
            server = ApiServer(answering, connections.Gate(bounds, counted, finder.is_trusted))
            if certificate is not None:
                stack.push_async_callback(_end, [asyncio.create_task(certificate.watch())])
            shared = settings.http.reuse_port or metrics_socket is not None
            api_listens = listening(server, settings.http.listen, bound=opened.api, reuse_port=shared, certificate=certificate)
            listens = await stack.enter_async_context(api_listens)
            stack.push_async_callback(context.waiting.close)  # else the end would wait for those who wait
        yield Broker(context, known, listens, metrics_listens, certificate)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What commands need that work on the catalogue and the stores without a broker."""

    db: asyncpg.Pool[asyncpg.Record]
    policy: Policy
    open_store: Callable[[Store], base.Store]
    """Raises `errors.StoreUnavailable`."""


@asynccontextmanager
async def workshop(settings: Settings) -> AsyncIterator[Workshop]:
    """For as long as the block lasts; other brokers may run beside it. Raises as `running` does."""
    policy = build_policy(settings.policy)
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(database_url(settings))
        await prepare_schema(settings, url)
        pool = await _open_pool(stack, settings, url)
        keyring = await load_keys(settings, pool, policy)
        counted = metrics.create(__version__)
        outside, inside = [await stack.enter_async_context(store_session(counted, internal=internal)) for internal in (False, True)]
        yield Workshop(pool, policy, _opener(Credentials(settings.credentials_dir), keyring, inside, outside))


def _opener(
    credentials: Credentials, keyring: keys.Keyring, inside: aiohttp.ClientSession, outside: aiohttp.ClientSession
) -> Callable[[Store], base.Store]:
    def open_store(store: Store) -> base.Store:
        try:
            return registry.open_store(store, credentials, keyring.signer, inside if store.internal else outside)
        except errors.Invalid as error:
            raise errors.StoreUnavailable(error.detail) from None

    return open_store


def _pages(context: Context, settings: Settings) -> Pages:
    url = settings.http.public_url
    sessions = Sessions(context.keys, settings.auth.audience, context.clock, secure=url.startswith("https://"))
    return Pages(Overviews(context), sessions, public_url=url, keystone=settings.auth.keystone is not None)


def build_policy(numbers: config.PolicyNumbers) -> Policy:
    """The policy with what the settings say of it. Raises `ConfigError` with all names and values that do not fit."""
    default = Policy()
    wrong: list[str] = []
    ranking = _with_numbers(default.rank, numbers.ranking, "policy.ranking", wrong)
    policy = replace(
        _with_numbers(default, numbers.uploads, "policy.uploads", wrong),
        rank=ranking,
        paths=replace(default.paths, half_life_seconds=ranking.half_life_seconds),
        admit=_with_numbers(default.admit, numbers.admission, "policy.admission", wrong),
        vetting=vet.Policy(frozenset(numbers.vetting.visibilities), numbers.vetting.signatures),
    )
    for kind in ("lease", "ticket", "retry"):
        least, most = (getattr(policy.admit, f"{end}_{kind}_seconds") for end in ("min", "max"))
        if least > most:
            wrong.append(f"policy.admission.min_{kind}_seconds: {least:g} is more than policy.admission.max_{kind}_seconds, {most:g}")
    if wrong:
        raise ConfigError(*wrong)
    return policy


@asynccontextmanager
async def database_url(settings: Settings) -> AsyncIterator[str]:
    """The URL of the database, with the embedded PostgreSQL running where there is no other."""
    if settings.database.url is not None:
        file = settings.database.password_file
        yield settings.database.url if file is None else address.with_password(settings.database.url, file)
        return
    server = await embedded.start(settings.postgres_dir)
    try:
        yield server.dsn
    finally:
        await server.stop()


async def load_keys(settings: Settings, pool: Any, policy: Policy, secret: bytes | None = None) -> keys.Keyring:
    """The signing keys; `secret` is the passphrase where it was read already.

    Raises `ConfigError`, `keys.WrongPassphrase` and `errors.Unavailable`.
    """
    wanted = settings.keys
    terms = Terms(wanted.overlap_seconds, wanted.rotate_after_seconds, policy.longest_url_seconds)
    return await keys.load(pool, secret or passphrase(wanted.passphrase_file), settings.http.public_url, wanted.algorithm, terms)


def passphrase(path: Path) -> bytes:
    """What the signing keys are encrypted with: `PASSPHRASE_VARIABLE`, else the file's content; made on first use, readable to nobody
    else. Raises `ConfigError`."""
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given is not None:
        if not given.strip():
            raise ConfigError(f"{PASSPHRASE_VARIABLE} is empty; unset it to use keys.passphrase_file")
        return given.strip().encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(descriptor, "w") as file:
                file.write(token_urlsafe(32) + "\n")
    except OSError as error:
        raise ConfigError(f"keys.passphrase_file: {path}: {error.strerror}") from None
    return passphrase_in(path, "keys.passphrase_file")


def passphrase_in(path: Path, name: str) -> bytes:
    """The passphrase in a file that is there; `name` is what asked for it. Raises `ConfigError`."""
    try:
        if path.stat().st_mode & stat.S_IROTH:
            _log.warning("everybody can read the passphrase of the signing keys", path=str(path), run=f"chmod 600 {path}")
        content = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{name}: {path}: {error.strerror}") from None
    if not content:
        raise ConfigError(f"{name}: {path} is empty; if this broker is new, delete it to have one made")
    return content


def _published_now(keyring: keys.Keyring, clock: Callable[[], float]) -> dict[str, list[dict[str, str]]]:
    return keyring.jwks(clock())


def _with_numbers(policy: _Numbers, numbers: config.Numbers, section: str, wrong: list[str]) -> _Numbers:
    known: dict[str, Any] = {
        each.name: getattr(policy, each.name) for each in fields(policy) if isinstance(getattr(policy, each.name), int | float | tuple)
    }
    changed: dict[str, Any] = {}
    for name, value in numbers.items():
        default = known.get(name)
        if default is None:
            wrong.append(f"{section}: unknown field {name}{suggestion(name, list(known)) or '; known: ' + ', '.join(known)}")
        elif isinstance(default, tuple) != isinstance(value, tuple) or isinstance(default, bool) != isinstance(value, bool):
            wrong.append(f"{section}.{name}: must be like its default, {default}")
        elif isinstance(default, int) and not isinstance(default, bool) and isinstance(value, float):
            wrong.append(f"{section}.{name}: must be a whole number")
        else:
            changed[name] = value
    return replace(policy, **changed)


async def _first_connection(url: str) -> Any:
    """The first connection. An embedded PostgreSQL that another process began ends with that one and starts again here: wait for it."""
    async for attempt in stamina.retry_context(on=errors.Unavailable, attempts=None, timeout=START_SECONDS, wait_max=1.0):
        with attempt:
            return await connect.connect_one(url)


async def prepare_schema(settings: Settings, url: str) -> None:
    """Bring the schema up to date where the settings want that, and refuse one that this broker cannot serve."""
    connection = await _first_connection(url)
    try:
        if settings.database.migrate == "auto":
            for step in await migrations.migrate(connection):
                _log.info("schema step applied", step=str(step))
        await migrations.require(connection)
    finally:
        await connection.close()


async def _open_pool(stack: AsyncExitStack, settings: Settings, url: str) -> asyncpg.Pool[asyncpg.Record]:
    pool = await connect.connect(url, min_size=settings.database.min_connections, max_size=settings.database.max_connections)

    async def close() -> None:
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await pool.close()
        except TimeoutError:
            pool.terminate()

    stack.push_async_callback(close)
    return pool


async def _coalescers(
    stack: AsyncExitStack, pool: asyncpg.Pool[asyncpg.Record], policy: Policy, counted: metrics.Metrics
) -> tuple[Any, Any]:
    half_life = policy.paths.half_life_seconds

    async def report(connection: Any, rows: Any) -> list[report_records.Noted]:
        return await report_records.record(connection, rows, half_life)

    grants: Coalescer[Any, Any] = Coalescer(pool, leases.grant, "grant", counted)
    reports: Coalescer[Any, Any] = Coalescer(pool, report, "report", counted)
    stack.push_async_callback(grants.close)
    stack.push_async_callback(reports.close)
    return grants, reports


def _keystone(
    stack: AsyncExitStack,
    settings: config.Keystone | None,
    credentials: Credentials,
    session: aiohttp.ClientSession,
    counted: metrics.Metrics,
    clock: Callable[[], float],
) -> KeystoneTokens | None:
    if settings is None:
        return None
    tokens = KeystoneTokens(Keystone(settings, credentials, session, counted), settings.recheck_seconds, counted, clock=clock)
    stack.push_async_callback(tokens.close)
    return tokens


def store_session(counted: metrics.Metrics, *, internal: bool) -> aiohttp.ClientSession:
    """For stores, issuers and Keystone. No cookies, no proxies of the environment: the broker talks to registered endpoints only.

    Nothing is unpacked, so that a small answer cannot become a large one; heads of answers are bounded by the library.
    """
    return aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        connector=reach.connector(internal=internal),
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,
        trace_configs=[exchange.tracing(counted)],
    )


def _follow(counted: metrics.Metrics, pool: asyncpg.Pool[asyncpg.Record], memory: Memory) -> None:
    """Let the metrics ask how the database's connections and memory are whenever they are read."""
    counted.database_connections.follow(pool.get_idle_size, "idle")
    counted.database_connections.follow(lambda: pool.get_size() - pool.get_idle_size(), "busy")
    counted.database_connections.follow(pool.get_max_size, "limit")
    counted.memory_age.set_function(memory.unread_seconds)


async def _watch_credentials(credentials: Credentials, memory: Memory) -> None:
    while True:
        await asyncio.sleep(CREDENTIALS_SECONDS)
        if credentials.changed():
            memory.forget_drivers()
            credentials.forget()


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Health:
    """The operator's listener: /metrics, and /healthz, which is 200 as long as the database answers."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def handle(self, request: web.BaseRequest) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, headers={"Allow": "GET, HEAD"})
        if request.path == "/metrics":
            return web.Response(body=self._context.metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})
        if request.path == "/healthz":
            reached = await self._database_answers()
            return web.json_response({"database": "ok" if reached else "unreachable"}, status=200 if reached else 503)
        return web.Response(status=404)

    async def _database_answers(self) -> bool:
        try:
            async with asyncio.timeout(2):
                await self._context.db.fetchval("SELECT 1")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        return True
