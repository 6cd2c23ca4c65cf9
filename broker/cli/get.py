"""`broker get`: download an image or a blob, verified."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from broker.cli import exits
from broker.cli.connection import Connection, connected, print_json, resolve
from broker.cli.display import shown
from broker.client.api import Broker
from broker.client.convert import CONVERTIBLE, RATE, fetch, qemu_img
from broker.client.download import STALL_SECONDS, Downloaded
from broker.client.progress import Progress
from broker.client.sources import Used, Wanted
from broker.client.trouble import LocalTrouble
from broker.units import seconds_text, size_text


class _Rate(click.ParamType[Any]):
    """FORMAT or FORMAT=RATE."""

    name = "format[=rate]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        format, _, rate = str(value).partition("=")
        if format not in CONVERTIBLE:
            self.fail("one of " + ", ".join(CONVERTIBLE), param, ctx)
        try:
            return format, max(1.0, float(rate or RATE))
        except ValueError:
            self.fail("FORMAT=RATE, the rate in bytes a second", param, ctx)


@click.command()
@click.argument("image")
@click.option("--output", "-o", help="Where to write; the image's name by default, - for stdout.")
@click.option("--format", "formats", multiple=True, help="A format that will do, best first; may be repeated.")
@click.option(
    "--convert",
    "rates",
    type=_Rate(),
    multiple=True,
    metavar="FORMAT[=RATE]",
    help="Take this format too when that is sooner, and convert it by qemu-img into the --format; RATE: bytes a second, else 200000000.",
)
@click.option("--from", "only", multiple=True, metavar="STORE", help="Read from this store only; may be repeated.")
@click.option("--prefer", multiple=True, metavar="STORE", help="Rather from this store; may be repeated.")
@click.option("--avoid", multiple=True, metavar="STORE", help="Not from this store; may be repeated.")
@click.option("--site", help="Where this machine is, for the ranking.")
@click.option("--parallel", type=click.IntRange(1, 16), help="Sources at once; by default as many as help, up to 4.")
@click.option(
    "--stall", type=click.FloatRange(0.1, 3600), default=STALL_SECONDS, show_default=True, help="Give up a source silent this long."
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Progress and result as JSON lines on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@connected
def command(
    connection: Connection,
    image: str,
    output: str | None,
    formats: tuple[str, ...],
    rates: tuple[tuple[str, float], ...],
    only: tuple[str, ...],
    prefer: tuple[str, ...],
    avoid: tuple[str, ...],
    site: str | None,
    parallel: int | None,
    stall: float,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Download IMAGE: an image's name or id, or a blob's id.

    The file gets its name only when its digest is right. Interrupted or killed, run the same command again: it resumes.
    Exit codes: see broker --help.
    """
    if output == "-" and as_json:
        raise click.UsageError("--json and -o - would both write to stdout")
    if rates and len(formats) != 1:
        raise click.UsageError("--convert needs one --format to convert into")
    wanted = Wanted(formats=formats, only=only, prefer=prefer, avoid=avoid, site=site, parallel=parallel, convert=dict(rates) or None)
    work = _get(connection, image, output, wanted, stall, force, as_json, quiet)
    done = exits.run(work, "run the same command again to go on")
    if as_json:
        print_json({"event": "done", **_document(done)})
    elif not quiet:
        click.echo(_summary(done, output), err=True)


async def _get(
    connection: Connection, image: str, output: str | None, wanted: Wanted, stall: float, force: bool, as_json: bool, quiet: bool
) -> Downloaded:
    progress = Progress()
    if wanted.convert:
        qemu_img()
    async with connection.open() as broker, shown(progress, f"get {image}", json=as_json, quiet=quiet):
        named = await resolve(broker, image)
        wanted = replace(wanted, image=named.image, blob=named.blob)
        if output == "-":
            return await _to_stdout(broker, wanted, progress, stall)
        return await fetch(broker, wanted, _path(output, named.name), replace=force, progress=progress, stall_seconds=stall)


async def _to_stdout(broker: Broker, wanted: Wanted, progress: Progress, stall: float) -> Downloaded:
    """Nothing leaves before it is verified, so a file in TMPDIR comes first."""
    with tempfile.TemporaryDirectory(prefix="broker-get-") as directory:
        done = await fetch(broker, wanted, Path(directory) / "blob", replace=False, progress=progress, stall_seconds=stall)
        with done.path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)
        sys.stdout.buffer.flush()
        return done


def _path(output: str | None, name: str) -> Path:
    if output is None:
        # An image's name is anybody's choice; as a file's name it must stay in this directory.
        if not name or "/" in name or "\0" in name or name.startswith(".") or len(os.fsencode(name)) > 240:
            raise LocalTrouble(f"the image's name {name!r} is no file name", "say where to write with -o")
        return Path(name)
    path = Path(output)
    return path / name if path.is_dir() and name and "/" not in name and not name.startswith(".") else path


def _document(done: Downloaded) -> dict[str, object]:
    return {
        "path": str(done.path), "image": done.image, "format": done.format, "blob": done.blob.id, "size": done.size,
        "seconds": done.seconds, "resumed": done.resumed, "verified_by": done.verified_by, "sources": list(done.sources),
        "converted_from": done.converted_from, "converting_seconds": done.converting_seconds,
    }  # fmt: skip


def _summary(done: Downloaded, output: str | None) -> str:
    fetching = done.seconds - done.converting_seconds
    rate = (done.size - done.resumed) / fetching if fetching > 0 else 0.0
    stores = ", ".join(_share(used) for used in done.sources) or "an earlier run"
    where = "stdout" if output == "-" else done.path
    resumed = f"; {size_text(done.resumed)} were there from an earlier run" if done.resumed else ""
    converted = f"; converted from {done.converted_from} in {seconds_text(done.converting_seconds)}" if done.converted_from else ""
    verified = "only its size is known" if done.verified_by == "size" else f"{done.verified_by} verified"
    return (
        f"{where}: {size_text(done.size)} in {seconds_text(fetching)} ({size_text(rate)}/s) from {stores}{resumed}; {verified}{converted}"
    )


def _share(used: Used) -> str:
    return f"{used.store} {size_text(used.bytes)}" + (f" ({used.outcome})" if used.outcome != "ok" else "")
