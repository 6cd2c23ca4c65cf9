"""`broker show`: everything about one image, blob, replica or ticket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import click

from broker.cli import exits
from broker.cli.connection import Connection, as_uuid, connected, print_json, resolve
from broker.cli.display import print_table
from broker.client.answers import Replica
from broker.client.api import Broker
from broker.errors import NotFound


@click.command()
@click.argument("id")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@connected
def command(connection: Connection, id: str, as_json: bool) -> None:
    """Show what ID is: an image (by id or name) with its blobs and where they lie, a blob, a replica, or a ticket."""
    document, replicas = exits.run(_find(connection, id))
    if as_json:
        print_json({**document, "replicas": [replica.document for replica in replicas]} if replicas else document)
        return
    print_table(("field", "value"), flattened(document))
    if replicas:
        rows = [(item.id, item.blob, item.store, item.site, item.purpose, item.state, _seen(item)) for item in replicas]
        print_table(("replica", "blob", "store", "site", "purpose", "state", "observed"), rows)


async def _find(connection: Connection, text: str) -> tuple[Mapping[str, Any], list[Replica]]:
    async with connection.open() as broker:
        try:
            named = await resolve(broker, text)
        except NotFound:
            return await _other(broker, text), []
        if named.image is not None:
            image = await broker.image(named.image)
            return image.document, [replica for blob in image.blobs.values() for replica in await _replicas(broker, blob.id)]
        assert named.blob is not None
        blob = await broker.blob(named.blob)
        shown = {key: value for key, value in blob.document.items() if key != "pieces"}
        if blob.pieces is not None:
            shown["pieces"] = f"{len(blob.pieces.digests)} of {blob.pieces.length} bytes"
        return shown, [replica async for replica in broker.blob_replicas(blob.id)]


async def _replicas(broker: Broker, blob: UUID) -> list[Replica]:
    """Those of one blob of an image; none where the image is seen but its bytes are withheld (deactivated, waiting for approval)."""
    try:
        return [replica async for replica in broker.blob_replicas(blob)]
    except NotFound:
        return []


async def _other(broker: Broker, text: str) -> Mapping[str, Any]:
    id = as_uuid(text)
    if id is None:
        raise NotFound(f"nothing is named {text!r}")
    try:
        return (await broker.replica(id)).document
    except NotFound:
        return (await broker.ticket(id)).document


def _seen(replica: Replica) -> str:
    observed = replica.document.get("observed")
    return f"{observed['strength']} by {observed['by']}" if observed else ""


def flattened(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested objects as dotted names."""
    rows: list[tuple[str, object]] = []
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            rows += flattened(value, f"{prefix}{key}.")
        elif isinstance(value, list) and not any(isinstance(item, Mapping | list) for item in value):
            rows.append((f"{prefix}{key}", " ".join(map(str, value))))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                rows += flattened(item, f"{prefix}{key}.{index}.") if isinstance(item, Mapping) else [(f"{prefix}{key}.{index}", item)]
        else:
            rows.append((f"{prefix}{key}", value))
    return rows
