"""`broker why`: what a ticket would name for clients at a site, with the numbers behind it; nothing is leased."""

from __future__ import annotations

import click

from broker.cli import exits
from broker.cli.connection import Connection, connected, print_json, resolve
from broker.cli.display import print_table
from broker.client.answers import Explanation
from broker.units import seconds_text, size_text


@click.command()
@click.argument("image", metavar="BLOB|IMAGE")
@click.option("--site", help="For clients there; administrators may name any site, others only where they are.")
@click.option("--format", "formats", multiple=True, help="A format that will do, best first; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Every number, as JSON.")
@connected
def command(connection: Connection, image: str, site: str | None, formats: tuple[str, ...], as_json: bool) -> None:
    """Show where BLOB or IMAGE (a name or id) would be had from, and why others are excluded."""
    found = exits.run(_ask(connection, image, site, formats))
    if as_json:
        print_json(found.document)
    else:
        _show(found)


async def _ask(connection: Connection, image: str, site: str | None, formats: tuple[str, ...]) -> Explanation:
    async with connection.open() as broker:
        named = await resolve(broker, image)
        return await broker.explain(image=named.image, blob=named.blob, site=site, formats=formats)


def _show(found: Explanation) -> None:
    columns = ("store", "site", "share", "estimate", "rate", "setup", "success", "doubt", "leases", "evidence", "basis")
    rows = [
        (
            each.store, each.site, f"{each.weight:.1%}", seconds_text(each.estimate.seconds), f"{size_text(each.estimate.rate)}/s",
            seconds_text(each.estimate.setup_seconds), f"{each.estimate.success:.0%}", f"{each.doubt:.0%}",
            f"{each.active} of {each.slots}" if each.slots is not None else "any", f"{each.evidence:.1f}", each.estimate.basis,
        )
        for each in found.candidates
    ]  # fmt: skip
    size = size_text(found.blob.size) if found.blob.size is not None else "?"
    print_table(columns, rows, f"blob {found.blob.id} ({size}) for {found.site or 'clients of an unknown site'}")
    if found.excluded:
        print_table(("excluded", "reason"), [(excluded.store, excluded.reason) for excluded in found.excluded])
