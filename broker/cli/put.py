"""`broker put`: upload a file, or what comes through a pipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from broker.cli import exits
from broker.cli.connection import Connection, as_uuid, connected, print_json
from broker.cli.display import shown
from broker.client.progress import Progress
from broker.client.upload import PARALLEL, Offer, Uploaded, upload, upload_stream
from broker.units import seconds_text, size_text


@click.command()
@click.argument("file")
@click.option("--name", help="Name of the new image; the file's name by default.")
@click.option("--image", "image", help="Id of an existing image that gets these bytes in a further format.")
@click.option("--format", "format", help="Disk format, such as qcow2 or raw; the broker's default when not given.")
@click.option("--visibility", type=click.Choice(["private", "shared", "community", "public"]), help="Who may read the new image.")
@click.option("--property", "properties", multiple=True, metavar="NAME=VALUE", help="A property of the new image; may be repeated.")
@click.option("--to", "only", multiple=True, metavar="STORE", help="Write to this store only; may be repeated.")
@click.option("--site", help="Where this machine is, for the ranking.")
@click.option("--digest", "digest_first", is_flag=True, help="Hash first: stores then bind the digest; known content is not sent.")
@click.option("--parallel", type=click.IntRange(1, 16), default=PARALLEL, show_default=True, help="Parts at once.")
@click.option("--json", "as_json", is_flag=True, help="Progress and result as JSON lines on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@connected
def command(
    connection: Connection,
    file: str,
    name: str | None,
    image: str | None,
    format: str | None,
    visibility: str | None,
    properties: tuple[str, ...],
    only: tuple[str, ...],
    site: str | None,
    digest_first: bool,
    parallel: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Upload FILE as an image, or - for what comes through a pipe.

    Prints the image's id. Interrupted or killed, run the same command again: parts that have arrived are not sent again.
    Exit codes: see broker --help.
    """
    if image is not None and (name or visibility or properties):
        raise click.UsageError("--name, --visibility and --property are for a new image; --image names an existing one")
    if file == "-" and image is None and not name:
        raise click.UsageError("a pipe has no name: give --name")
    if file == "-" and digest_first:
        raise click.UsageError("a pipe passes once and cannot be hashed first")
    offer = Offer(image=_target(file, name, image, visibility, properties), format=format, only=only, site=site)
    again = "a pipe cannot be resumed" if file == "-" else "run the same command again to go on"
    done = exits.run(_put(connection, file, offer, digest_first, parallel, as_json, quiet), again)
    if as_json:
        print_json({"event": "done", **_document(done)})
        return
    click.echo(str(done.image or done.blob))
    if not quiet:
        click.echo(_summary(done), err=True)


def _target(file: str, name: str | None, image: str | None, visibility: str | None, properties: tuple[str, ...]) -> UUID | dict[str, Any]:
    if image is not None:
        id = as_uuid(image)
        if id is None:
            raise click.UsageError("--image takes an image's id")
        return id
    new: dict[str, Any] = {"name": name or Path(file).name}
    if visibility:
        new["visibility"] = visibility
    for pair in properties:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise click.UsageError("--property takes NAME=VALUE")
        new.setdefault("properties", {})[key] = value
    return new


async def _put(connection: Connection, file: str, offer: Offer, digest_first: bool, parallel: int, as_json: bool, quiet: bool) -> Uploaded:
    progress = Progress()
    async with connection.open() as broker, shown(progress, f"put {file}", json=as_json, quiet=quiet):
        if file == "-":
            return await upload_stream(broker, sys.stdin.buffer, offer, parallel=min(parallel, 4), progress=progress)
        return await upload(broker, Path(file), offer, digest_first=digest_first, parallel=parallel, progress=progress)


def _summary(done: Uploaded) -> str:
    if done.store is None:
        return f"{size_text(done.size)} known already; nothing was sent"
    rate = (done.size - done.resumed) / done.seconds if done.seconds else 0.0
    resumed = f", {size_text(done.resumed)} of it by an earlier run" if done.resumed else ""
    return f"{size_text(done.size)} to {done.store} in {seconds_text(done.seconds)} ({size_text(rate)}/s{resumed}), verified by the broker"


def _document(done: Uploaded) -> dict[str, Any]:
    return {
        "image": done.image, "format": done.format, "blob": done.blob, "size": done.size, "digests": dict(done.digests),
        "store": done.store, "seconds": done.seconds, "resumed": done.resumed, "destinations": list(done.destinations),
    }  # fmt: skip
