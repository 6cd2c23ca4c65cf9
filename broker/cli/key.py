"""`broker key`: the keys that tokens are signed with."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from broker import app, config, log
from broker.catalog import connect, migrations
from broker.cli import exits
from broker.cli.connection import Connection, connected, print_json
from broker.cli.display import print_table
from broker.cli.main import fail
from broker.cli.serve import config_option, load
from broker.client.answers import SigningKey
from broker.embedded import EmbeddedError
from broker.errors import BrokerError
from broker.service import keys
from broker.service.keys import WrongPassphrase

_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")


@click.group()
def command() -> None:
    """List, rotate and revoke the keys that tokens are signed with."""


@command.command("list")
@_JSON
@connected
def list_all(connection: Connection, as_json: bool) -> None:
    """List every key; dead ones stay in the list for a month."""
    _show(exits.run(connection.ask(lambda broker: broker.keys())), as_json)


@command.command()
@click.option("--algorithm", type=click.Choice(["ES256", "RS256", "EdDSA"]), help="Of the next key; by default that of the present one.")
@_JSON
@connected
def rotate(connection: Connection, algorithm: str | None, as_json: bool) -> None:
    """Let the next key take over. A key that stands by does so at once, one of another algorithm after the overlap."""
    _show(exits.run(connection.ask(lambda broker: broker.rotate_keys(algorithm))), as_json)


@command.command()
@click.argument("kid")
@_JSON
@connected
def revoke(connection: Connection, kid: str, as_json: bool) -> None:
    """Revoke the key KID at once. Tokens that it signed are refused, this command's own too if it was among them."""
    _show(exits.run(connection.ask(lambda broker: broker.revoke_key(kid))), as_json)


@command.command()
@config_option
@click.option(
    "--new-passphrase-file", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=True, help="Holds the passphrase to be."
)
def rewrap(config_file: Path | None, new_passphrase_file: Path) -> None:
    """Encrypt the keys in the database with another passphrase. Running brokers go on; each needs the new one at its next start."""
    settings = load(config_file)
    log.configure("warning", settings.log.format)
    try:
        count = asyncio.run(_rewrap(settings, new_passphrase_file))
    except config.ConfigError as error:
        fail(str(error), 2)
    except (EmbeddedError, migrations.SchemaError, WrongPassphrase) as error:
        fail(str(error), 1)
    except BrokerError as error:
        fail(f"{error.detail or error.title} Is PostgreSQL running, and is database.url right?", 6)
    click.echo(f"{count} keys are encrypted with the new passphrase; give it to every broker and restart them one by one")


async def _rewrap(settings: config.Settings, new_passphrase_file: Path) -> int:
    old, new = app.passphrase(settings.keys.passphrase_file), app.passphrase_in(new_passphrase_file, "--new-passphrase-file")
    async with app.database_url(settings) as url:
        await app.prepare_schema(settings, url)
        connection = await connect.connect_one(url)
        try:
            return await keys.rewrap(connection, old, new)
        finally:
            await connection.close()


def _show(found: list[SigningKey], as_json: bool) -> None:
    if as_json:
        for key in found:
            print_json(key.document)
        return
    rows = [(key.id, key.algorithm, key.state, key.signs_from or "", key.signs_until or "", key.kept_until or "") for key in found]
    print_table(("key", "algorithm", "state", "signs from", "signs until", "kept until"), rows)
