"""`broker migrate`: bring the database's schema up to date, or say what is missing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from broker import app, config, log
from broker.catalog import connect, migrations
from broker.cli.main import fail
from broker.cli.serve import config_option, load
from broker.embedded import EmbeddedError
from broker.errors import BrokerError


@click.command()
@config_option
@click.option("--check", is_flag=True, help="Change nothing; end with 1 when steps are missing.")
def command(config_file: Path | None, check: bool) -> None:
    """Apply the schema's missing steps. Safe at any time, and while other brokers run: each step works with the code before it."""
    settings = load(config_file)
    log.configure("warning", settings.log.format)
    try:
        asyncio.run(_check(settings) if check else _migrate(settings))
    except config.ConfigError as error:
        fail(str(error), 2)
    except (EmbeddedError, migrations.SchemaError) as error:
        fail(str(error), 1)
    except BrokerError as error:
        fail(f"{error.detail or error.title} Is PostgreSQL running, and is database.url right?", 6)


async def _migrate(settings: config.Settings) -> None:
    async with app.database_url(settings) as url:
        connection = await connect.connect_one(url)
        try:
            applied = await migrations.migrate(connection)
        finally:
            await connection.close()
    for step in applied:
        click.echo(f"applied {step}")
    click.echo("the schema is up to date")


async def _check(settings: config.Settings) -> None:
    async with app.database_url(settings) as url:
        connection = await connect.connect_one(url)
        try:
            await migrations.require(connection)
        finally:
            await connection.close()
    click.echo("the schema is up to date")
