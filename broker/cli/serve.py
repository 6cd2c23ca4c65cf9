"""`broker serve`: run a broker until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pwd
import signal
import sys
from dataclasses import replace
from pathlib import Path

import click
import structlog
import uvloop

from broker import app, config, log, privileges, systemd
from broker.catalog import address
from broker.catalog.migrations import SchemaError
from broker.cli import inspection
from broker.cli import workers as workers_
from broker.cli.display import print_table
from broker.cli.main import fail
from broker.cli.workers import CannotStart
from broker.credentials import Credentials
from broker.embedded import EmbeddedError
from broker.errors import BrokerError
from broker.privileges import Opened, PrivilegeError
from broker.service.keys import WrongPassphrase

GC_THRESHOLDS = (100_000, 20, 1000)
"""Requests free what they make by reference counting; what stays is the memory of hot blobs, and walking through all of it again
and again to look for cycles took most of a processor. The young are looked through as often as 100,000 of them stay: batches
under way hold that many, and none of theirs is a cycle."""

_log = structlog.get_logger(__name__)

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file; by default transfer-broker/broker.toml in $XDG_CONFIG_HOME.",
)


def load(config_file: Path | None) -> config.Settings:
    """The settings, or the end of the program with exit code 2."""
    try:
        return config.load(config_file)
    except config.ConfigError as error:
        fail(str(error), 2)


@click.command()
@config_option
@click.option("--only", type=click.Choice(["api", "jobs"]), help="Answer requests only, or do the background work only.")
@click.option(
    "--user", metavar="NAME", help="Started as root: read the secrets and open the ports as root, then become this account for good."
)
@click.option(
    "--check-config", is_flag=True, help="Serve nothing: show every setting and all that is wrong. Ends with 2 when something is."
)
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes that share the port.")
@click.option("--worker-socket", type=click.Path(path_type=Path), hidden=True)
def command(
    config_file: Path | None, only: str | None, user: str | None, check_config: bool, workers: int, worker_socket: Path | None
) -> None:
    """Run the broker until SIGTERM or SIGINT.

    Without a configuration it keeps everything in the XDG data directory, a PostgreSQL of its own included, and listens
    on 127.0.0.1:8080; metrics and health are on 127.0.0.1:9180 (/metrics, /healthz).
    """
    try:
        if check_config:
            _check(config_file, user)
        else:
            _start(config_file, user, only, workers, worker_socket)
    except CannotStart as error:
        sys.exit(error.code if error.code > 0 else 1)
    except config.ConfigError as error:
        fail(str(error), 2)
    except PrivilegeError as error:
        fail(str(error), 2)
    except (EmbeddedError, SchemaError, WrongPassphrase) as error:
        fail(str(error), 1)
    except BrokerError as error:
        fail(f"{error.detail or error.title} Is PostgreSQL running, and is database.url right?", 6)
    except OSError as error:
        fail(log.scrub(error.strerror or str(error)), 1)


def _check(config_file: Path | None, user: str | None) -> None:
    """Show what would be used, then everything that is wrong. Raises `ConfigError` when something is."""
    become = _account(user)
    wrong: list[str] = []
    settings: config.Settings | None
    try:
        settings = config.load(config_file)
    except config.ConfigError as error:
        wrong, settings = list(error.problems), error.rest
    if settings is not None:
        log.configure("error", settings.log.format)
        try:
            _, secret = _read_secrets(settings, become)
        except config.ConfigError as error:
            wrong += error.problems
            secret = None
        if become is not None:
            privileges.drop(become)
            privileges.require_installation(become)
        found = inspection.inspect(settings, passphrase_known=secret is not None, password_known=become is not None)
        print_table(("field", "value", "remark"), found.rows)
        for warning in found.warnings:
            click.echo(f"broker: warning: {warning}", err=True)
        wrong += [problem for problem in (*found.problems, *found.useless) if problem not in wrong]
    if wrong:
        raise config.ConfigError(*wrong)


def _start(config_file: Path | None, user: str | None, only: str | None, workers: int, worker_socket: Path | None) -> None:
    if user is not None and workers > 1:
        raise config.ConfigError("--user: workers cannot share what was opened as root; start them as that account (systemd: User=)")
    if only == "jobs" and workers > 1:
        raise config.ConfigError("--workers: they answer requests, and --only jobs answers none")
    become = _account(user)
    settings = config.load(config_file)
    log.configure(settings.log.level, settings.log.format)
    with_password, secret = _read_secrets(settings, become)
    opened = Opened(passphrase=secret)
    if become is not None:
        http = settings.http
        opened = replace(
            opened,
            api=privileges.bind(http.listen.host, http.listen.port, reuse_port=http.reuse_port) if only != "jobs" else (),
            metrics=privileges.bind(http.metrics_listen.host, http.metrics_listen.port) if http.metrics_listen is not None else (),
        )
        privileges.drop(become)
        privileges.require_installation(become)
    credentials = Credentials(settings.credentials_dir)
    log.configure(settings.log.level, settings.log.format, secrets=credentials.secrets)
    found = inspection.inspect(settings, passphrase_known=secret is not None, password_known=become is not None)
    if found.problems:
        raise config.ConfigError(*found.problems)
    if os.geteuid() == 0:
        found.warnings.append("serving as root: name an account to become with --user")
    if worker_socket is None:  # the parent has said it for all workers
        for useless in found.useless:
            _log.error(useless)
        for warning in found.warnings:
            _log.warning(warning)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    if workers > 1:
        uvloop.run(_serve_together(settings, config_file, only, workers))
    else:
        uvloop.run(_serve(with_password, credentials, only, opened, worker_socket))


def _account(user: str | None) -> pwd.struct_passwd | None:
    """The account to become. Defaults below the home directory are those of that account from here on."""
    if user is None:
        return None
    become = privileges.account(user)
    os.environ.update({"HOME": become.pw_dir, "USER": become.pw_name, "LOGNAME": become.pw_name})
    return become


def _read_secrets(settings: config.Settings, become: pwd.struct_passwd | None) -> tuple[config.Settings, bytes | None]:
    """What only root may have to read, when rights are to be given up: the database's password is in the URL then."""
    if become is None:
        return settings, None
    database = settings.database
    if database.url is not None and database.password_file is not None:
        with_password = address.with_password(database.url, database.password_file)
        settings = replace(settings, database=replace(database, url=with_password, password_file=None))
    file = settings.keys.passphrase_file
    return settings, app.passphrase(file) if file.exists() or app.PASSPHRASE_VARIABLE in os.environ else None


def _stop_signal() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


async def _serve_together(settings: config.Settings, config_file: Path | None, only: str | None, count: int) -> None:
    arguments = [*(() if config_file is None else ("--config", str(config_file))), *(() if only is None else ("--only", only))]
    await workers_.serve(settings, arguments, count, _stop_signal())


async def _end_with_parent(stop: asyncio.Event) -> None:
    """Set `stop` at the end of standard input, which a worker's parent holds open as long as it lives."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    stop.set()


async def _serve(settings: config.Settings, credentials: Credentials, only: str | None, opened: Opened, worker_socket: Path | None) -> None:
    stop = _stop_signal()
    async with contextlib.AsyncExitStack() as stack:
        if worker_socket is not None:
            stack.callback(asyncio.create_task(_end_with_parent(stop)).cancel)
        broker = await stack.enter_async_context(
            app.running(
                settings, api=only != "jobs", with_jobs=only != "api", credentials=credentials, opened=opened, metrics_socket=worker_socket
            )
        )
        if broker.certificate is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, broker.certificate.reload)
        _log.info(
            "ready", api=str(broker.listens or "none"), metrics=str(broker.metrics_listens or "none"), issuer=settings.http.public_url
        )
        systemd.notify("READY=1")
        await stop.wait()
        systemd.notify("STOPPING=1")
        _log.info("stopping")
