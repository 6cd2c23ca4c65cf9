"""`broker quota`: what projects may hold at once, and their shares where slots are short."""

from __future__ import annotations

from typing import Any

import click

from broker.cli import exits
from broker.cli.connection import Connection, connected, print_json
from broker.cli.display import print_table
from broker.client.answers import Quota
from broker.client.api import Broker
from broker.units import size_text

_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")


@click.group()
def command() -> None:
    """Set, show and remove the quotas of projects. What a project has not been given is as the broker's configuration says."""


@command.command("list")
@_JSON
@connected
def list_all(connection: Connection, as_json: bool) -> None:
    """List projects that have quotas of their own."""

    async def work(broker: Broker) -> list[Quota]:
        return [quota async for quota in broker.quotas()]

    _show(exits.run(connection.ask(work)), as_json)


@command.command()
@click.argument("project")
@_JSON
@connected
def show(connection: Connection, project: str, as_json: bool) -> None:
    """Show what PROJECT, which has a quota of its own, may hold and holds."""
    _show([exits.run(connection.ask(lambda broker: broker.quota(project)))], as_json)


@command.command("set")
@click.argument("project")
@click.option("--max-leases", type=click.IntRange(0), help="Leases at once; 0 allows none.")
@click.option("--max-bytes", type=click.IntRange(0), help="Bytes that they may be for together; a larger image is never granted.")
@click.option("--weight", type=click.FloatRange(0.01, 1000), help="Its share, where slots are short; 1 by default.")
@_JSON
@connected
def change(
    connection: Connection, project: str, max_leases: int | None, max_bytes: int | None, weight: float | None, as_json: bool
) -> None:
    """Set the quota of PROJECT as a whole: what is not given becomes as configured."""
    given = {"max_leases": max_leases, "max_bytes": max_bytes, "weight": weight}
    limits: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not limits:
        raise click.UsageError("nothing to set: give at least one option")
    _show([exits.run(connection.ask(lambda broker: broker.set_quota(project, limits)))], as_json)


@command.command()
@click.argument("project")
@connected
def remove(connection: Connection, project: str) -> None:
    """Let the configuration alone hold for PROJECT."""
    exits.run(connection.ask(lambda broker: broker.delete_quota(project)))


def _show(quotas: list[Quota], as_json: bool) -> None:
    if as_json:
        for quota in quotas:
            print_json(quota.document)
        return
    rows = [(q.project, _said(q.max_leases), _size(q.max_bytes), _said(q.weight), q.leases, size_text(q.bytes)) for q in quotas]
    print_table(("project", "max leases", "max bytes", "weight", "leases", "bytes"), rows)


def _said(value: float | None) -> str:
    return "as configured" if value is None else f"{value:g}"


def _size(value: int | None) -> str:
    return "as configured" if value is None else size_text(value)
