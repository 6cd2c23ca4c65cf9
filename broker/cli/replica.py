"""`broker replica`: objects that lie at a store already become replicas; replicas are changed, looked at again, and forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import click

from broker.cli import exits
from broker.cli.connection import Connection, connected
from broker.cli.display import print_table, shown
from broker.cli.show import flattened
from broker.client.answers import Replica
from broker.client.api import Broker
from broker.client.observe import algorithms, key_below, observe
from broker.client.progress import Progress

_PURPOSE = click.option(
    "--purpose", type=click.Choice(["origin", "cache"]), help="One of the blob's own copies, or one that may be evicted."
)


@click.group()
def command() -> None:
    """Register objects as replicas, change and forget them."""


@command.command(short_help="Register an object, by what the broker sees.")
@click.argument("blob", type=click.UUID)
@click.option("--store", required=True, help="The store where it lies.")
@click.option("--key", required=True, help="Its key there.")
@_PURPOSE
@click.option("--deletable", is_flag=True, help="Delegate the right to delete these bytes to the broker.")
@connected
def add(connection: Connection, blob: UUID, store: str, key: str, purpose: str | None, deletable: bool) -> None:
    """Register the object KEY at STORE as a replica of BLOB. The broker looks at it before it counts."""
    body = {"store": store, "key": key, "deletable": deletable} | _chosen(purpose)
    _show(exits.run(connection.ask(lambda broker: broker.register_replica(blob, body))))


@command.command(short_help="Register a file, by what this machine sees.")
@click.argument("blob", type=click.UUID)
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--store", required=True, help="The store, of kind path or rbd, where it lies.")
@click.option("--key", help="Its key there; of a file on a mount that follows from its path.")
@_PURPOSE
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@connected
def register(connection: Connection, blob: UUID, file: Path, store: str, key: str | None, purpose: str | None, quiet: bool) -> None:
    """Register FILE as a replica of BLOB where the broker cannot look, by what this machine sees of it.

    FILE is read to its end and its digests are reported; - reads what is piped in, such as rbd export IMAGE@SNAPSHOT -. For the
    roles service and admin.
    """

    async def work(broker: Broker) -> Replica:
        place = key or key_below((await broker.store(store)).endpoint, file)
        observed = await _observe(broker, blob, file, quiet)
        return await broker.register_replica(blob, {"store": store, "key": place, "observed": observed} | _chosen(purpose))

    _show(exits.run(connection.ask(work)))


@command.command(short_help="Make an object one more format of an image.")
@click.argument("image", type=click.UUID)
@click.option("--format", required=True, help="Disk format of the object, one that the image does not have yet.")
@click.option("--store", required=True, help="The store where it lies.")
@click.option("--key", help="Its key there; of a file on a mount that follows from its path.")
@click.option(
    "--file", type=click.Path(path_type=Path, allow_dash=True), help="What this machine sees of it, where the broker cannot look."
)
@_PURPOSE
@click.option("--deletable", is_flag=True, help="Delegate the right to delete these bytes to the broker.")
@connected
def adopt(
    connection: Connection, image: UUID, format: str, store: str, key: str | None, file: Path | None, purpose: str | None, deletable: bool
) -> None:
    """Make the object KEY at STORE the bytes of IMAGE in one more format. That it is the same disk is your word."""
    if key is None and file is None:
        raise click.UsageError("name the object with --key, or the file that it is with --file")

    async def work(broker: Broker) -> Replica:
        place = key or key_below((await broker.store(store)).endpoint, file or Path())
        body = {"format": format, "store": store, "key": place, "deletable": deletable} | _chosen(purpose)
        if file is not None:
            body["observed"] = await _observe(broker, None, file, quiet=False)
        return await broker.adopt_object(image, body)

    _show(exits.run(connection.ask(work)))


async def _observe(broker: Broker, blob: UUID | None, file: Path, quiet: bool) -> dict[str, object]:
    progress = Progress()
    async with shown(progress, f"read {file}", json=False, quiet=quiet):
        names = algorithms((await broker.blob(blob)).digests if blob is not None else ())
        return (await observe(None if str(file) == "-" else file, names, progress)).document()


def _chosen(purpose: str | None) -> dict[str, str]:
    return {"purpose": purpose} if purpose else {}


@command.command("set")
@click.argument("replica", type=click.UUID)
@_PURPOSE
@click.option("--deletable/--not-deletable", default=None, help="Whether the broker may delete these bytes.")
@click.option("--look", is_flag=True, help="Look at it again: it is active if it is what it should be.")
@click.option(
    "--file", type=click.Path(path_type=Path, allow_dash=True), help="With --look, where the broker cannot: what this machine sees of it."
)
@click.option("--corrupt", is_flag=True, help="It is known to be wrong.")
@connected
def change(
    connection: Connection, replica: UUID, purpose: str | None, deletable: bool | None, look: bool, file: Path | None, corrupt: bool
) -> None:
    """Change REPLICA."""
    if look and corrupt:
        raise click.UsageError("--look and --corrupt exclude each other")
    if file is not None and not look:
        raise click.UsageError("--file comes with --look")
    body: dict[str, Any] = {key: value for key, value in (("purpose", purpose), ("deletable", deletable)) if value is not None}
    if look or corrupt:
        body["state"] = "active" if look else "corrupt"
    if not body:
        raise click.UsageError("nothing to change: give at least one option")

    async def work(broker: Broker) -> Replica:
        before = await broker.replica(replica)
        if file is not None:
            body["observed"] = await _observe(broker, before.blob, file, quiet=False)
        return await broker.change_replica(replica, body, before.etag or "")

    _show(exits.run(connection.ask(work)))


@command.command(short_help="Forget a replica.")
@click.argument("replica", type=click.UUID)
@connected
def remove(connection: Connection, replica: UUID) -> None:
    """Forget REPLICA, and delete its bytes where that right was delegated. The last good one of a blob stays."""

    async def work(broker: Broker) -> None:
        await broker.delete_replica(replica, (await broker.replica(replica)).etag or "")

    exits.run(connection.ask(work))


def _show(replica: Replica) -> None:
    print_table(("field", "value"), flattened(replica.document))
