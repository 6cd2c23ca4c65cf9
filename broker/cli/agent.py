"""`broker agent`: makes the copies that were asked for (Glance's copy-image and cache queue, ``POST /v1/copies``), one by one."""

from __future__ import annotations

import click

from broker import errors
from broker.cli import exits
from broker.cli.connection import Connection, connected
from broker.client import copies
from broker.client.answers import Copy
from broker.client.api import Broker
from broker.client.trouble import BrokerUnreachable, ClientError
from broker.units import seconds_text, size_text


@click.command()
@click.option("--to", "stores", multiple=True, metavar="STORE", help="Copies to this store only; may be repeated.")
@click.option("--site", help="Where this machine is, for the ranking.")
@click.option("--pause", type=click.FloatRange(0.1, 3600), default=10.0, show_default=True, help="Seconds between looks while none waits.")
@click.option("--once", is_flag=True, help="End when none waits.")
@connected
def command(connection: Connection, stores: tuple[str, ...], site: str | None, pause: float, once: bool) -> None:
    """Make copies as they are asked for, through this machine, until it is ended.

    It needs a token of the role service or admin, and as much space in TMPDIR as the largest image. Run as many as shall work at
    once, each near the stores that it copies to.
    """
    if exits.run(_work(connection, stores, site, pause, once), "an unfinished copy goes to another agent") > 0 and once:
        raise SystemExit(exits.FAILED)


async def _work(connection: Connection, stores: tuple[str, ...], site: str | None, pause: float, once: bool) -> int:
    """Returns how many failed."""
    failed = 0
    async with connection.open() as broker:
        for name in stores:
            await broker.store(name)  # a name that is wrong would be waited for without an end
        async for copy in copies.take(broker, stores, None if once else pause):
            failed += not await _make(broker, copy, site)
    return failed


async def _make(broker: Broker, copy: Copy, site: str | None) -> bool:
    what = f"image {copy.image} to {copy.store}"
    try:
        done = await copies.make(broker, copy, site=site)
    except BrokerUnreachable:
        raise
    except (errors.BrokerError, ClientError, OSError) as error:
        click.echo(f"{what}: {type(error).__name__}: {error}", err=True)
        return False
    click.echo(f"{what}: {size_text(done.size)} in {seconds_text(done.seconds)}, verified by the broker", err=True)
    return True
