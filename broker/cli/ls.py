"""`broker ls`: images, stores, replicas, copies that were asked for, sites, and what was observed between them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import click

from broker.cli import exits
from broker.cli.connection import Connection, connected, print_json
from broker.cli.display import print_table
from broker.client.answers import Copy, Image, Path, Replica, Site, Store
from broker.client.api import Broker
from broker.units import seconds_text, size_text

_FILTERS = {
    "images": ("name", "visibility", "status", "project", "format", "member_status"),
    "stores": ("site", "kind"),
    "replicas": ("store", "purpose", "state"),
    "copies": ("purpose", "state"),
    "sites": (),
    "paths": ("site", "store"),
}


@click.command()
@click.argument("what", type=click.Choice(list(_FILTERS)), default="images")
@click.option("--name", help="Images of this name.")
@click.option("--visibility", type=click.Choice(["private", "shared", "community", "public"]), help="Images that these may read.")
@click.option("--status", type=click.Choice(["queued", "pending", "active", "deactivated"]), help="Images in this status.")
@click.option("--project", help="Images of this project.")
@click.option("--format", help="Images that have this format.")
@click.option(
    "--member-status", type=click.Choice(["pending", "accepted", "rejected", "all"]),
    help="Images that are shared with your project: by its answer; accepted ones by default.",
)  # fmt: skip
@click.option("--site", help="Stores or paths at this site.")
@click.option("--kind", help="Stores of this kind.")
@click.option("--store", help="Replicas or paths of this store.")
@click.option("--purpose", type=click.Choice(["origin", "cache"]), help="Replicas or copies for this purpose.")
@click.option("--state", help="Replicas or copies in this state.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line, whole.")
@connected
def command(connection: Connection, what: str, as_json: bool, **filters: str | None) -> None:
    """List WHAT: images (the default), stores, replicas, copies, sites or paths. Off a terminal, columns are parted by tabs."""
    given = {name: value for name, value in filters.items() if value is not None}
    for name in given.keys() - set(_FILTERS[what]):
        raise click.UsageError(f"--{name.replace('_', '-')} is no filter for {what}")
    exits.run(_list(connection, what, given, as_json))


async def _list(connection: Connection, what: str, filters: Mapping[str, str], as_json: bool) -> None:
    async with connection.open() as broker:
        items = _items(broker, what, filters)
        if as_json:
            async for item in items:
                print_json(item.document)
            return
        columns, row = _TABLES[what]
        print_table(columns, [row(item) async for item in items])


def _items(broker: Broker, what: str, filters: Mapping[str, str]) -> AsyncIterator[Any]:
    match what:
        case "stores":
            return broker.stores(**filters)
        case "replicas":
            return broker.replicas(**filters)
        case "copies":
            return broker.copies(**filters)
        case "sites":
            return broker.sites()
        case "paths":
            return broker.paths(**filters)
        case _:
            return broker.images(**filters)


def _image(image: Image) -> tuple[object, ...]:
    blobs = ", ".join(f"{name} {size_text(blob.size)}" if blob.size else name for name, blob in image.blobs.items())
    return image.id, image.name, image.status, image.visibility, image.project, blobs


def store_row(store: Store) -> tuple[object, ...]:
    use = "off" if not store.enabled else "read and write" if store.writable else "read"
    return store.name, store.kind, store.site, store.endpoint, store.exposure, use


def _replica(replica: Replica) -> tuple[object, ...]:
    return replica.id, replica.blob, replica.store, replica.site, replica.purpose, replica.state, "yes" if replica.deletable else "no"


def _copy(copy: Copy) -> tuple[object, ...]:
    done = f"{size_text(copy.bytes)} of {size_text(copy.size)}" if copy.size else ""
    return copy.id, copy.image, copy.store, copy.purpose, copy.state, copy.problem or done


def _site(site: Site) -> tuple[object, ...]:
    return site.path, site.description, " ".join(site.networks)


def _path(path: Path) -> tuple[object, ...]:
    rate = f"{size_text(path.rate)}/s" if path.rate is not None else "unknown"
    setup = seconds_text(path.setup_seconds) if path.setup_seconds is not None else "unknown"
    return path.site or "(all)", path.store, path.direction, rate, setup, f"{path.success:.0%}", f"{path.weight:.1f}"


_TABLES: Mapping[str, tuple[tuple[str, ...], Callable[[Any], tuple[object, ...]]]] = {
    "images": (("id", "name", "status", "visibility", "project", "formats"), _image),
    "stores": (("name", "kind", "site", "endpoint", "exposure", "use"), store_row),
    "replicas": (("id", "blob", "store", "site", "purpose", "state", "deletable"), _replica),
    "copies": (("id", "image", "store", "purpose", "state", "progress"), _copy),
    "sites": (("path", "description", "networks"), _site),
    "paths": (("site", "store", "direction", "rate", "setup", "success", "weight"), _path),
}
