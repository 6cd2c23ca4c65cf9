"""`broker serve`: run a broker until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import signal
from pathlib import Path

import click
import structlog
import uvloop

from broker import app, config, log
from broker.catalog.migrations import SchemaError
from broker.cli.main import fail
from broker.credentials import Credentials
from broker.embedded import EmbeddedError
from broker.errors import BrokerError
from broker.service.keys import WrongPassphrase

GC_THRESHOLDS = (10_000, 20, 1000)
"""Requests free what they make by reference counting; what stays is the memory of hot blobs, and walking through all of it again
and again to look for cycles took most of a processor. Young objects are still looked through as often as 10,000 of them stay."""

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
def command(config_file: Path | None, only: str | None) -> None:
    """Run the broker until SIGTERM or SIGINT.

    Without a configuration it keeps everything in the XDG data directory, a PostgreSQL of its own included, and listens
    on 127.0.0.1:8080; metrics and health are on 127.0.0.1:9180 (/metrics, /healthz).
    """
    settings = load(config_file)
    credentials = Credentials(settings.credentials_dir)
    log.configure(settings.log.level, settings.log.format, secrets=credentials.secrets)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        uvloop.run(_serve(settings, credentials, only))
    except config.ConfigError as error:
        fail(str(error), 2)
    except (EmbeddedError, SchemaError, WrongPassphrase) as error:
        fail(str(error), 1)
    except BrokerError as error:
        fail(f"{error.detail or error.title} Is PostgreSQL running, and is database.url right?", 6)
    except OSError as error:
        fail(log.scrub(error.strerror or str(error)), 1)


async def _serve(settings: config.Settings, credentials: Credentials, only: str | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for warning in settings.warnings:
        _log.warning(warning)
    async with app.running(settings, api=only != "jobs", with_jobs=only != "api", credentials=credentials) as broker:
        _log.info(
            "ready", api=str(broker.listens or "none"), metrics=str(broker.metrics_listens or "none"), issuer=settings.http.public_url
        )
        await stop.wait()
        _log.info("stopping")
