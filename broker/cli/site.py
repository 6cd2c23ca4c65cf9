"""`broker site`: places in the network, and which addresses are there."""

from __future__ import annotations

from typing import Any

import click

from broker.cli import exits
from broker.cli.connection import Connection, connected, print_json
from broker.cli.display import print_table
from broker.client.answers import Site
from broker.client.api import Broker


@click.group()
def command() -> None:
    """Register, change and list sites."""


@command.command("add")
@click.argument("path")
@click.option("--description", help="For people.")
@click.option("--network", "networks", multiple=True, metavar="CIDR", help="Clients with these addresses are there; may be repeated.")
@connected
def add(connection: Connection, path: str, description: str | None, networks: tuple[str, ...]) -> None:
    """Add the site PATH, widest part first, such as eu/az1/rack3."""
    body = {"path": path} | ({"description": description} if description else {}) | ({"networks": networks} if networks else {})
    _show([exits.run(connection.ask(lambda broker: broker.create_site(body)))])


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")
@connected
def list_all(connection: Connection, as_json: bool) -> None:
    """List sites."""

    async def work(broker: Broker) -> list[Site]:
        return [site async for site in broker.sites()]

    sites = exits.run(connection.ask(work))
    if as_json:
        for site in sites:
            print_json(site.document)
    else:
        _show(sites)


@command.command("set")
@click.argument("path")
@click.option("--description", help="For people.")
@click.option("--network", "networks", multiple=True, metavar="CIDR", help="All networks of the site; may be repeated.")
@click.option("--no-networks", is_flag=True, help="The site has no networks any more.")
@connected
def change(connection: Connection, path: str, description: str | None, networks: tuple[str, ...], no_networks: bool) -> None:
    """Change the site PATH."""
    body: dict[str, Any] = {}
    if description is not None:
        body["description"] = description
    if networks or no_networks:
        body["networks"] = list(networks)
    if not body:
        raise click.UsageError("nothing to change: give at least one option")

    async def work(broker: Broker) -> Site:
        return await broker.change_site(path, body, (await broker.site(path)).etag or "")

    _show([exits.run(connection.ask(work))])


@command.command()
@click.argument("path")
@connected
def remove(connection: Connection, path: str) -> None:
    """Forget the site PATH; no store may be there."""

    async def work(broker: Broker) -> None:
        await broker.delete_site(path, (await broker.site(path)).etag or "")

    exits.run(connection.ask(work))


def _show(sites: list[Site]) -> None:
    print_table(("path", "description", "networks"), [(site.path, site.description, " ".join(site.networks)) for site in sites])
