"""How transfers and lists look: a bar with rate and time left on a terminal, plain lines every few seconds off it, or JSON lines."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence

import click
import orjson
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from broker.client.progress import Progress

_LINE_SECONDS = 5.0
_DRAW_SECONDS = 0.2
_WINDOW_SECONDS = 10.0


def size_text(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes all")


def seconds_text(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Pace:
    """The rate of the last seconds, and the time left by it."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def rate(self, now: float, done: int) -> float:
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW_SECONDS:
            self._seen.popleft()
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return max(0.0, (after - before) / (last - first)) if last > first else 0.0


def left_seconds(progress: Progress, rate: float) -> float | None:
    """Seconds until the end at this rate; ``None`` when unknown."""
    return (progress.total - progress.done) / rate if progress.total is not None and rate > 0 else None


@contextlib.asynccontextmanager
async def shown(progress: Progress, title: str, *, json: bool, quiet: bool = False) -> AsyncIterator[None]:
    """Show `progress` on stderr (JSON lines on stdout) while the block runs."""
    console = Console(stderr=True)
    if quiet:
        yield
        return
    drawing = _json_lines(progress) if json else _bar(progress, title, console) if console.is_terminal else _lines(progress, title)
    task = asyncio.create_task(drawing)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _notes(progress: Progress) -> Iterable[str]:
    while progress.notes:
        yield progress.notes.popleft()


async def _bar(progress: Progress, title: str, console: Console) -> None:
    label = TextColumn("{task.description}")
    columns = (label, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=progress.total)
        try:
            while True:
                for note in _notes(progress):
                    bar.console.print(note, markup=False, highlight=False)
                text = f"{title} ({progress.stage})" if progress.stage not in ("fetching", "sending") else title
                bar.update(task, total=progress.total, completed=progress.done, description=text.replace("[", "\\["))
                await asyncio.sleep(_DRAW_SECONDS)
        finally:
            for note in _notes(progress):
                bar.console.print(note, markup=False, highlight=False)


async def _lines(progress: Progress, title: str) -> None:
    pace, printed = Pace(), time.monotonic()
    try:
        while True:
            now = time.monotonic()
            rate = pace.rate(now, progress.done)
            for note in _notes(progress):
                click.echo(note, err=True)
            if now - printed >= _LINE_SECONDS:
                printed = now
                total = size_text(progress.total) if progress.total is not None else "?"
                left = seconds_text(left_seconds(progress, rate))
                click.echo(f"{title}: {progress.stage}, {size_text(progress.done)} of {total}, {size_text(rate)}/s, {left} left", err=True)
            await asyncio.sleep(_DRAW_SECONDS)
    finally:
        for note in _notes(progress):
            click.echo(note, err=True)


async def _json_lines(progress: Progress) -> None:
    pace, printed = Pace(), 0.0
    while True:
        now = time.monotonic()
        rate = pace.rate(now, progress.done)
        if now - printed >= 1.0:
            printed = now
            line = {
                "event": "progress", "stage": progress.stage, "done": progress.done, "total": progress.total, "resumed": progress.resumed,
                "rate": round(rate), "left_seconds": left_seconds(progress, rate), "stores": progress.stores,
                "notes": list(_notes(progress)),
            }  # fmt: skip
            sys.stdout.write(orjson.dumps(line).decode() + "\n")
            sys.stdout.flush()
        await asyncio.sleep(_DRAW_SECONDS)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """A table on a terminal; columns parted by tabs off it, so that other programs can read them."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            click.echo("\t".join("" if cell is None else str(cell) for cell in row))
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell).replace("[", "\\[") for cell in row))
    console.print(table)
