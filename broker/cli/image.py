"""`broker image`: what images are called, who may read them, and their end. Their bytes come by `broker put`."""

from __future__ import annotations

from typing import Any

import click

from broker.cli import exits
from broker.cli.connection import Connection, as_uuid, connected, print_json, resolve
from broker.cli.display import print_table
from broker.cli.show import flattened
from broker.client.answers import Document, Image
from broker.client.api import Broker
from broker.errors import NotFound

_VISIBILITY = click.Choice(["private", "community", "public"])


@click.group()
def command() -> None:
    """Name, change and delete images."""


@command.command()
@click.argument("name")
@click.option("--visibility", type=_VISIBILITY, help="Who may read it.")
@click.option("--property", "properties", multiple=True, metavar="NAME=VALUE", help="May be repeated.")
@click.option("--blob", "blobs", multiple=True, metavar="FORMAT=BLOB", help="Bytes that are known already; may be repeated.")
@connected
def create(connection: Connection, name: str, visibility: str | None, properties: tuple[str, ...], blobs: tuple[str, ...]) -> None:
    """Name an image NAME and print its id."""
    body: dict[str, Any] = {"name": name}
    if visibility:
        body["visibility"] = visibility
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
@click.option("--property", "properties", multiple=True, metavar="NAME=VALUE", help="May be repeated.")
@click.option("--unset", "removed", multiple=True, metavar="NAME", help="Remove a property; may be repeated.")
@connected
def change(
    connection: Connection,
    image: str,
    name: str | None,
    visibility: str | None,
    status: str | None,
    properties: tuple[str, ...],
    removed: tuple[str, ...],
) -> None:
    """Change IMAGE (a name or id)."""
    body: dict[str, Any] = {
        key: value for key, value in (("name", name), ("visibility", visibility), ("status", status)) if value is not None
    }
    if properties or removed:
        body["properties"] = {**_pairs(properties, "--property"), **dict.fromkeys(removed)}
    if not body:
        raise click.UsageError("nothing to change: give at least one option")

    async def work(broker: Broker) -> Image:
        found = await _image(broker, image)
        return await broker.change_image(found.id, body, found.etag or "")

    print_table(("field", "value"), flattened(exits.run(connection.ask(work)).document))


@command.command()
@click.argument("image")
@click.option("--json", "as_json", is_flag=True, help="What is deleted and what stays, as JSON.")
@connected
def delete(connection: Connection, image: str, as_json: bool) -> None:
    """Delete IMAGE (a name or id), and the replicas that no other image needs where that right was delegated."""

    async def work(broker: Broker) -> Document:
        found = await _image(broker, image)
        return await broker.delete_image(found.id, found.etag or "")

    answer = exits.run(connection.ask(work))
    if as_json:
        print_json(answer)
        return
    rows = [(item["store"], item["key"], "deleted") for item in answer["deleting"]]
    rows += [(item["store"], item["key"], f"stays: {item['reason']}") for item in answer["kept"]]
    print_table(("store", "key", "bytes"), rows)


async def _image(broker: Broker, text: str) -> Image:
    named = await resolve(broker, text)
    if named.image is None:
        raise NotFound(f"{as_uuid(text)} is a blob, no image")
    return await broker.image(named.image)


def _pairs(texts: tuple[str, ...], option: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if any(not key or not sign for key, sign, _ in pairs):
        raise click.UsageError(f"{option} takes NAME=VALUE")
    return {key: value for key, _, value in pairs}
