"""`broker ticket`: ask where an image can be had, and show the ranking with its reasons."""

from __future__ import annotations

import click

from broker.cli import exits
from broker.cli.connection import Connection, connected, print_json, resolve
from broker.cli.display import print_table
from broker.client.answers import Ticket
from broker.client.api import SCHEMES
from broker.units import seconds_text, size_text


@click.command()
@click.argument("image")
@click.option("--count", type=click.IntRange(1, 16), default=3, show_default=True, help="Sources at most.")
@click.option("--parallel", type=click.IntRange(1, 16), default=1, show_default=True, help="Sources to lease.")
@click.option("--format", "formats", multiple=True, help="A format that will do, best first; may be repeated.")
@click.option("--prefer", multiple=True, metavar="STORE", help="Rather this store; may be repeated.")
@click.option("--avoid", multiple=True, metavar="STORE", help="Not this store; may be repeated.")
@click.option("--only", multiple=True, metavar="STORE", help="This store only; may be repeated.")
@click.option("--site", help="Where this machine is, for the ranking.")
@click.option("--keep", is_flag=True, help="Keep the leases until they expire; else they are given back at once.")
@click.option("--json", "as_json", is_flag=True, help="The whole ticket as JSON, with its signed URLs: treat it as a secret.")
@connected
def command(
    connection: Connection,
    image: str,
    count: int,
    parallel: int,
    formats: tuple[str, ...],
    prefer: tuple[str, ...],
    avoid: tuple[str, ...],
    only: tuple[str, ...],
    site: str | None,
    keep: bool,
    as_json: bool,
) -> None:
    """Show the ranked sources of IMAGE (a name or id, or a blob's id), and why others are excluded."""
    options = {"count": count, "parallel": parallel, "formats": formats, "prefer": prefer, "avoid": avoid, "only": only, "site": site}
    ticket = exits.run(_ask(connection, image, keep, as_json, options))
    if as_json:
        print_json(ticket.document)
    else:
        _show(ticket)


async def _ask(connection: Connection, image: str, keep: bool, as_json: bool, options: dict[str, object]) -> Ticket:
    async with connection.open() as broker:
        named = await resolve(broker, image)
        ticket = await broker.download_ticket(image=named.image, blob=named.blob, schemes=SCHEMES, **options)  # type: ignore[arg-type]
        if not keep and not as_json:
            await broker.release(ticket.id)
        return ticket


def _show(ticket: Ticket) -> None:
    columns = ("rank", "store", "site", "state", "estimate", "rate", "success", "weight", "basis")
    rows = [
        (
            source.rank, source.store, source.site, source.state, seconds_text(source.estimate.seconds),
            f"{size_text(source.estimate.rate)}/s", f"{source.estimate.success:.0%}", f"{source.weight:.3g}", source.estimate.basis,
        )
        for source in ticket.sources
    ]  # fmt: skip
    size = size_text(ticket.blob.size) if ticket.blob.size is not None else "?"
    stale = ", from what the broker knew before it lost its catalogue" if ticket.stale else ""
    print_table(columns, rows, f"blob {ticket.blob.id} ({size}){stale}")
    if ticket.excluded:
        print_table(("excluded", "reason"), [(excluded.store, excluded.reason) for excluded in ticket.excluded])
