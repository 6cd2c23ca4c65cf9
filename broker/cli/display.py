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
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from broker.client.progress import Progress
from broker.units import seconds_text, size_text

_LINE_SECONDS = 5.0
_DRAW_SECONDS = 0.2
_WINDOW_SECONDS = 10.0
_ANY_WIDTH = 10_000
_FOLDED = 24
"""Characters that a table's last column gets at least before it is folded between words; the others are never folded."""


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


class _Rate(ProgressColumn):
    """Bytes per second in the units that everything else is shown in."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{size_text(speed)}/s", style="progress.data.speed")


async def _bar(progress: Progress, title: str, console: Console) -> None:
    label = TextColumn("{task.description}")
    columns = (label, BarColumn(), DownloadColumn(binary_units=True), _Rate(), TimeRemainingColumn())
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
    """A table on a terminal; columns parted by tabs off it, so that other programs can read them.

    Nothing is cut off and no word is broken, for ids are there to be copied: a narrow terminal gets no frame, and long lines.
    """
    console = Console()
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        for row in texts:
            click.echo("\t".join(row))
        return
    last = len(columns) - 1
    lengths = [max(map(cell_len, column)) for column in zip(columns, *texts, strict=True)]
    longest_word = max(cell_len(word) for row in (columns, *texts) for word in [*row[last].split(), ""])
    lengths[last] = max(longest_word, min(lengths[last], _FOLDED))
    framed = sum(lengths) + 3 * len(columns) + 1 <= console.width
    table = Table(title=title, title_justify="left", box=box.HEAVY_HEAD if framed else None, pad_edge=framed)
    for number, name in enumerate(columns):
        table.add_column(name, no_wrap=number < last)
    for row in texts:
        table.add_row(*(text.replace("[", "\\[") for text in row))
    if framed:
        console.print(table)
    else:
        table.padding, console.width = (0, 1, 0, 0), _ANY_WIDTH
        console.print(table)
