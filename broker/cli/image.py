"""`broker image`: what images are called, who may read them, and their end. Their bytes come by `broker put`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from broker.cli import exits, image_members, image_vetting
from broker.cli.connection import Connection, connected, image_named, print_json
from broker.cli.display import print_table
from broker.cli.show import flattened
from broker.client.answers import Document, Image
from broker.client.api import Broker

_VISIBILITY = click.Choice(["private", "shared", "community", "public"])


_DESCRIBED = (
    click.option("--tag", "tags", multiple=True, help="May be repeated; those given take the place of all others."),
    click.option("--protected/--unprotected", default=None, help="Nobody deletes a protected image."),
    click.option("--hidden/--listed", default=None, help="OpenStack's clients list a hidden image only when they ask for it."),
    click.option("--min-disk", type=click.IntRange(0), metavar="GIB", help="Disk that a machine needs; told, not enforced."),
    click.option("--min-ram", type=click.IntRange(0), metavar="MIB", help="Memory that a machine needs; told, not enforced."),
)


def _described(function: Any) -> Any:
    """Adds what an image can be described with; `_given` makes fields of it."""
    for option in reversed(_DESCRIBED):
        function = option(function)
    return function


def _given(described: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if value is not None and value != ()}


@click.group()
def command() -> None:
    """Name, change, share, approve and delete images."""


for _each in (*image_vetting.COMMANDS, *image_members.COMMANDS):
    command.add_command(_each)


@command.command()
@click.argument("name")
@click.option("--visibility", type=_VISIBILITY, help="Who may read it.")
@_described
@click.option("--property", "properties", multiple=True, metavar="NAME=VALUE", help="May be repeated.")
@click.option("--blob", "blobs", multiple=True, metavar="FORMAT=BLOB", help="Bytes that are known already; may be repeated.")
@connected
def create(connection: Connection, name: str, properties: tuple[str, ...], blobs: tuple[str, ...], **described: Any) -> None:
    """Name an image NAME and print its id."""
    body: dict[str, Any] = {"name": name, **_given(described)}
    if properties:
        body["properties"] = _pairs(properties, "--property")
    if blobs:
        body["blobs"] = _pairs(blobs, "--blob")
    image = exits.run(connection.ask(lambda broker: broker.create_image(body)))
    click.echo(str(image.id))


@command.command("set")
@click.argument("image")
@click.option("--name", help="Its new name.")
@click.option("--visibility", type=_VISIBILITY, help="Who may read it.")
@click.option("--status", type=click.Choice(["active", "deactivated"]), help="A deactivated image gives no tickets.")
@_described
@click.option("--property", "properties", multiple=True, metavar="NAME=VALUE", help="May be repeated.")
@click.option("--unset", "removed", multiple=True, metavar="NAME", help="Remove a property; may be repeated.")
@connected
def change(connection: Connection, image: str, properties: tuple[str, ...], removed: tuple[str, ...], **described: Any) -> None:
    """Change IMAGE (a name or id)."""
    body = _given(described)
    if properties or removed:
        body["properties"] = {**_pairs(properties, "--property"), **dict.fromkeys(removed)}
    if not body:
        raise click.UsageError("nothing to change: give at least one option")

    async def work(broker: Broker) -> Image:
        found = await image_named(broker, image)
        return await broker.change_image(found.id, body, found.etag or "")

    print_table(("field", "value"), flattened(exits.run(connection.ask(work)).document))


@command.command(short_help="Delete an image and what only it needs.")
@click.argument("image")
@click.option("--json", "as_json", is_flag=True, help="What is deleted and what stays, as JSON.")
@connected
def delete(connection: Connection, image: str, as_json: bool) -> None:
    """Delete IMAGE (a name or id), and the replicas that no other image needs where that right was delegated."""

    async def work(broker: Broker) -> Document:
        found = await image_named(broker, image)
        return await broker.delete_image(found.id, found.etag or "")

    answer = exits.run(connection.ask(work))
    if as_json:
        print_json(answer)
        return
    rows = [(item["store"], item["key"], "deleted") for item in answer["deleting"]]
    rows += [(item["store"], item["key"], f"stays: {item['reason']}") for item in answer["kept"]]
    print_table(("store", "key", "bytes"), rows)


def _pairs(texts: tuple[str, ...], option: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if any(not key or not sign for key, sign, _ in pairs):
        raise click.UsageError(f"{option} takes NAME=VALUE")
    return {key: value for key, _, value in pairs}
