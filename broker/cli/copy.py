"""`broker copy`: one more replica of an image, its bytes moved by this machine.

The image is downloaded to a temporary file first (from several sources if that helps, verified), then uploaded to the other
store as the same blob: nothing unverified is ever sent, and either half can fail over by itself. The file lies in TMPDIR.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from broker.cli import exits
from broker.cli.connection import Connection, connected, print_json, resolve
from broker.cli.display import shown
from broker.client.download import download
from broker.client.progress import Progress
from broker.client.sources import Wanted
from broker.client.upload import Offer, Uploaded, upload
from broker.units import seconds_text, size_text


@click.command()
@click.argument("image")
@click.option("--to", "store", required=True, metavar="STORE", help="The store that gets a replica.")
@click.option("--format", "formats", multiple=True, help="Which format, when the image has several.")
@click.option("--cache", is_flag=True, help="The new replica is a cached copy that may be evicted.")
@click.option("--from", "only", multiple=True, metavar="STORE", help="Read from this store only; may be repeated.")
@click.option("--site", help="Where this machine is, for the ranking.")
@click.option("--json", "as_json", is_flag=True, help="Progress and result as JSON lines on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@connected
def command(
    connection: Connection,
    image: str,
    store: str,
    formats: tuple[str, ...],
    cache: bool,
    only: tuple[str, ...],
    site: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Copy IMAGE (a name or id, or a blob's id) to one more store, through this machine.

    It needs as much space in TMPDIR as the image is large.
    """
    wanted = Wanted(formats=formats, only=only, site=site)
    done = exits.run(_copy(connection, image, store, wanted, cache, as_json, quiet), "nothing of the copy is kept")
    if as_json:
        print_json({"event": "done", "blob": done.blob, "size": done.size, "store": done.store, "seconds": done.seconds})
    elif not quiet:
        click.echo(f"{size_text(done.size)} to {done.store} in {seconds_text(done.seconds)}, verified by the broker", err=True)


async def _copy(connection: Connection, image: str, store: str, wanted: Wanted, cache: bool, as_json: bool, quiet: bool) -> Uploaded:
    async with connection.open() as broker:
        named = await resolve(broker, image)
        with tempfile.TemporaryDirectory(prefix="broker-copy-") as directory:
            path = Path(directory) / "blob"
            progress = Progress()
            async with shown(progress, f"fetch {image}", json=as_json, quiet=quiet):
                source = Wanted(named.image, named.blob, wanted.formats, wanted.only, site=wanted.site)
                fetched = await download(broker, source, path, progress=progress)
            progress = Progress()
            offer = Offer(blob=fetched.blob.id, only=[store], site=wanted.site, purpose="cache" if cache else None)
            async with shown(progress, f"send to {store}", json=as_json, quiet=quiet):
                return await upload(broker, path, offer, progress=progress)
