"""`broker rebuild`: make a lost catalogue again from what was kept with the objects at the stores."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from broker import app, config, log
from broker.catalog import migrations, stores
from broker.cli.connection import print_json
from broker.cli.display import print_table
from broker.cli.main import fail
from broker.cli.serve import config_option, load
from broker.embedded import EmbeddedError
from broker.errors import BrokerError
from broker.model import Store
from broker.service import rebuild
from broker.service.keys import WrongPassphrase
from broker.service.rebuild import Done, Survey, Tally, Wanted
from broker.sign.record import Sealer

_COLUMNS = ("listed", "known", "busy", "foreign", "forged", "recovered", "corrupt", "missing")


@dataclass(frozen=True, slots=True)
class _Asked:
    apply: bool
    restored: bool
    as_json: bool
    only: tuple[str, ...]
    passphrases: tuple[Path, ...]
    wanted: Wanted


@click.command()
@config_option
@click.option("--apply", is_flag=True, help="Write it. Without this nothing is changed anywhere.")
@click.option("--restored", is_flag=True, help="After a restore, before any broker starts: what uploads under way then have written since.")
@click.option("--store", "only", metavar="NAME", multiple=True, help="Only this store (again for more). By default all.")
@click.option(
    "--old-passphrase-file",
    "passphrases",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True,
    help="A passphrase from before a rewrap: records that were sealed by it are believed too.",
)
@click.option("--recorded-visibility", is_flag=True, help="Images get the visibility that they had when they were uploaded, not private.")
@click.option("--deactivated", is_flag=True, help="Images come back deactivated: only administrators get tickets for them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line: each store, each conflict, the total.")
def command(
    config_file: Path | None,
    apply: bool,
    restored: bool,
    only: tuple[str, ...],
    passphrases: tuple[Path, ...],
    recorded_visibility: bool,
    deactivated: bool,
    as_json: bool,
) -> None:
    """Make a lost catalogue again from the objects at the registered stores, or add what a restored one lacks.

    Brokers keep a sealed record with every object that is uploaded through them. This lists all stores, believes only such
    records, looks at the bytes' digests as the stores tell them, and shows what it would do; with --apply it does that. It may
    run beside brokers, and again: what is there stays. Ends with 1 when a store could not be read.
    """
    asked = _Asked(apply, restored, as_json, only, passphrases, Wanted(recorded_visibility, deactivated))
    settings = load(config_file)
    log.configure("error", settings.log.format)
    try:
        seen, done = asyncio.run(_rebuild(settings, asked))
    except config.ConfigError as error:
        fail(str(error), 2)
    except (EmbeddedError, migrations.SchemaError, WrongPassphrase) as error:
        fail(str(error), 1)
    except BrokerError as error:
        fail(f"{error.detail or error.title} Is PostgreSQL running, and is database.url right?", 6)
    _show(seen, done, asked)
    if any(tally.problem for tally in seen.tallies.values()):
        raise SystemExit(1)


async def _rebuild(settings: config.Settings, asked: _Asked) -> tuple[Survey, Done]:
    current = app.passphrase(settings.keys.passphrase_file)
    sealer = Sealer([current, *(app.passphrase_in(path, "--old-passphrase-file") for path in asked.passphrases)])
    async with app.workshop(settings) as shop:
        chosen = _chosen(await stores.load(shop.db), asked.only)
        async with _telling(chosen, quiet=asked.as_json) as tell:
            seen = await rebuild.survey(shop.db, chosen, shop.open_store, sealer, tell, restored=asked.restored)
        planned = await rebuild.decide(shop.db, seen, shop.policy.verify)
        wanted = asked.wanted._replace(vetted=shop.policy.vetting.visibilities)
        done = await rebuild.carry_out(shop.db, planned, seen, chosen, wanted, apply=asked.apply)
    return seen, done


def _chosen(registered: list[Store], only: tuple[str, ...]) -> list[Store]:
    """The stores to read. Raises `ConfigError`."""
    names = {store.name for store in registered}
    unknown = [name for name in only if name not in names]
    if unknown:
        raise config.ConfigError(f"--store: no store is called {unknown[0]}; registered: {', '.join(sorted(names)) or 'none'}")
    if not registered:
        raise config.ConfigError("no store is registered: register the stores first (broker site add, broker store add), then rebuild")
    return [store for store in registered if not only or store.name in only]


@contextlib.asynccontextmanager
async def _telling(chosen: list[Store], *, quiet: bool) -> AsyncIterator[rebuild.Tell]:
    """Show on stderr how far each store is. How many objects there are is known at the end only."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        tasks = {store.name: bar.add_task(store.name, told="", start=False) for store in chosen}

        def tell(tally: Tally) -> None:
            bar.start_task(tasks[tally.store])
            bar.update(tasks[tally.store], told=tally.problem or f"{tally.listed} objects, {tally.known} known")

        yield tell


def _show(seen: Survey, done: Done, asked: _Asked) -> None:
    total = {"images": done.images, "blobs": done.blobs, "replicas": done.replicas, "missing": len(seen.missing)}
    if asked.as_json:
        for tally in seen.tallies.values():
            print_json({"store": tally.store, **{name: getattr(tally, name) for name in _COLUMNS}, "problem": tally.problem})
        for conflict in done.conflicts:
            print_json({"conflict": {**asdict(conflict), "id": str(conflict.id)}})
        print_json({"total": {**total, "conflicts": len(done.conflicts), "applied": asked.apply}})
        return
    rows = [(tally.store, *(str(getattr(tally, name)) for name in _COLUMNS), tally.problem or "") for tally in seen.tallies.values()]
    print_table(("store", *_COLUMNS, "problem"), rows)
    for conflict in done.conflicts:
        click.echo(f"left out: {conflict.what} {conflict.id}: {conflict.reason} ({', '.join(conflict.places)})")
    made = f"{done.images} images, {done.blobs} blobs, {done.replicas} replicas"
    gone = f", {len(seen.missing)} replicas missing" if seen.missing else ""
    click.echo(f"made again: {made}{gone}" if asked.apply else f"would make again: {made}{gone}; nothing was changed, see --apply")
