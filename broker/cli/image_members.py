"""`broker image …`: the projects that an image is shared with, and what they say to it."""

from __future__ import annotations

import click

from broker.cli import exits
from broker.cli.connection import Connection, connected, image_named, print_json
from broker.cli.display import print_table
from broker.client.answers import Document
from broker.client.api import Broker
from broker.errors import Conflict


@click.command(short_help="List whom an image is shared with.")
@click.argument("image")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@connected
def members(connection: Connection, image: str, as_json: bool) -> None:
    """List the projects that IMAGE (a name or id) is shared with."""

    async def work(broker: Broker) -> list[Document]:
        return await broker.members((await image_named(broker, image)).id)

    found = exits.run(connection.ask(work))
    if as_json:
        print_json({"members": found})
        return
    print_table(("project", "status", "since"), [(member["member"], member["status"], member["created_at"]) for member in found])


@click.command(short_help="Share an image with projects.")
@click.argument("image")
@click.argument("projects", nargs=-1, required=True)
@connected
def share(connection: Connection, image: str, projects: tuple[str, ...]) -> None:
    """Share IMAGE (a name or id) with PROJECTS; it becomes shared if it is private."""

    async def work(broker: Broker) -> None:
        found = await image_named(broker, image)
        if found.visibility == "private":
            await broker.change_image(found.id, {"visibility": "shared"}, found.etag or "")
        for project in projects:
            try:
                await broker.add_member(found.id, project)
            except Conflict as error:
                click.echo(f"{project}: {error.detail}", err=True)

    exits.run(connection.ask(work))


@click.command(short_help="Share an image with projects no more.")
@click.argument("image")
@click.argument("projects", nargs=-1, required=True)
@connected
def unshare(connection: Connection, image: str, projects: tuple[str, ...]) -> None:
    """Share IMAGE (a name or id) with PROJECTS no more."""

    async def work(broker: Broker) -> None:
        found = await image_named(broker, image)
        for project in projects:
            await broker.remove_member(found.id, project)

    exits.run(connection.ask(work))


@click.command(short_help="Take a shared image into your lists.")
@click.argument("image")
@click.argument("project")
@connected
def accept(connection: Connection, image: str, project: str) -> None:
    """Take IMAGE (an id), which is shared with your PROJECT, into its lists."""
    _answer(connection, image, project, "accepted")


@click.command(short_help="Keep a shared image out of your lists.")
@click.argument("image")
@click.argument("project")
@connected
def decline(connection: Connection, image: str, project: str) -> None:
    """Keep IMAGE (an id), which is shared with your PROJECT, out of its lists."""
    _answer(connection, image, project, "rejected")


def _answer(connection: Connection, name: str, project: str, status: str) -> None:
    async def work(broker: Broker) -> Document:
        return await broker.answer_member((await image_named(broker, name)).id, project, status)

    exits.run(connection.ask(work))


COMMANDS = (members, share, unshare, accept, decline)
