"""`broker check`: whether the catalogue's counts are those of its rows."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

import click

from broker import app, config, log
from broker.catalog import connect, consistency, migrations
from broker.catalog.consistency import Finding
from broker.cli.connection import print_json
from broker.cli.display import print_table
from broker.cli.main import fail
from broker.cli.serve import config_option, load
from broker.embedded import EmbeddedError
from broker.errors import BrokerError


@click.command()
@config_option
@click.option("--apply", is_flag=True, help="Put right what can be. Without this nothing is changed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")
def command(config_file: Path | None, apply: bool, as_json: bool) -> None:
    """Compare what the catalogue counts (leases, space) with what it holds, for instance after a restore.

    Safe while brokers run. Ends with 1 when something is not as it should be, and was not put right.
    """
    settings = load(config_file)
    log.configure("error", settings.log.format)
    try:
        found = asyncio.run(_check(settings, apply))
    except config.ConfigError as error:
        fail(str(error), 2)
    except (EmbeddedError, migrations.SchemaError) as error:
        fail(str(error), 1)
    except BrokerError as error:
        fail(f"{error.detail or error.title} Is PostgreSQL running, and is database.url right?", 6)
    _show(found, apply, as_json)
    if any(not (apply and finding.mends) for finding in found):
        raise SystemExit(1)


async def _check(settings: config.Settings, apply: bool) -> list[Finding]:
    async with app.database_url(settings) as url:
        connection = await connect.connect_one(url)
        try:
            await migrations.require(connection)
            found = await consistency.findings(connection)
            if apply and any(finding.mends for finding in found):
                await consistency.mend(connection)
        finally:
            await connection.close()
    return found


def _show(found: list[Finding], apply: bool, as_json: bool) -> None:
    if as_json:
        for finding in found:
            print_json(asdict(finding) | {"mended": apply and finding.mends})
        return
    if not found:
        click.echo("every count is right")
        return
    rows = [
        (
            each.what,
            each.subject,
            str(each.is_now),
            str(each.should_be),
            "mended" if apply and each.mends else "--apply" if each.mends else "",
        )
        for each in found
    ]
    print_table(("what", "of", "is", "should be", "mend"), rows)
