"""Runs attacks on columns, compares what was accepted with what is stated, and writes the table of the README."""

from __future__ import annotations

import asyncio
import importlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.attacks import readme, weak
from tests.attacks.attack import ATTACKS, Attack, Cell, ControlFailed, run
from tests.attacks.columns import COLUMNS

for _family in ("tampering", "s3", "swift", "uploads", "tokens", "smuggling", "tenants"):
    importlib.import_module(f"tests.attacks.{_family}")

_AT_ONCE = 4
"""Columns: servers wait for each other and for time-outs, so more than there are cores."""


@dataclass
class Result:
    """One column: what each attack that applies came to, and everything that is wrong with it."""

    kind: str
    rows: dict[str, Cell] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def tries(self) -> int:
        return sum(len(cell.accepted) for cell in self.rows.values())

    @property
    def accepted(self) -> int:
        return sum(sum(cell.accepted.values()) for cell in self.rows.values())


async def column(kind: str, place: Path, only: Iterable[Attack] = ()) -> Result:
    """Carry out every attack that applies (or `only` some) on one kind of store."""
    result = Result(kind)
    chosen = list(only) or ATTACKS
    async with COLUMNS[kind](place) as target:
        await target.prepare()
        for attack in chosen:
            if attack.applies(target):
                try:
                    result.rows[attack.name] = await run(attack, target)
                except ControlFailed as failed:
                    result.wrong.append(f"{attack.name}: the honest request does not work: {failed}")
                else:
                    result.wrong += _wrong(kind, attack.name, result.rows[attack.name], target.own)
    return result


def _wrong(kind: str, attack: str, cell: Cell, own: bool) -> list[str]:
    accepted = {name for name, taken in cell.accepted.items() if taken}
    stated = weak.stated(kind, attack)
    found = [f"{attack}: {name}: accepted ({cell.notes.get(name, '')}), and not stated in weak.py" for name in sorted(accepted - stated)]
    found += [f"{attack}: {name}: stated as a weakness, but refused ({cell.notes.get(name, '')})" for name in sorted(stated - accepted)]
    if own:
        found += [f"{attack}: {name}: answered with 5xx" for name in cell.failures]
    return found


def table(kinds: Sequence[str], place: Path, attacks: Sequence[str] = ()) -> dict[str, Result]:
    """Several columns, each in a process of its own; `attacks` are parts of names."""
    with ProcessPoolExecutor(max_workers=_AT_ONCE) as processes:
        results = [processes.submit(_column, kind, place / kind.replace(" ", "-"), tuple(attacks)) for kind in kinds]
        return {result.result().kind: result.result() for result in results}


def _column(kind: str, place: Path, attacks: Sequence[str]) -> Result:
    place.mkdir()
    only = [attack for attack in ATTACKS if any(text in attack.name for text in attacks)]
    return asyncio.run(column(kind, place, only))


def counts(results: Mapping[str, Result]) -> str:
    """The line that is printed: attacks, stores, tries, accepted."""
    rows = {name for result in results.values() for name in result.rows}
    cells = sum(len(result.rows) for result in results.values())
    tries = sum(result.tries for result in results.values())
    accepted = sum(result.accepted for result in results.values())
    wrong = sum(len(result.wrong) for result in results.values())
    return (
        f"attack table: {len(rows)} attacks x {len(results)} kinds of stores = {cells} cells that apply, {tries} tries; "
        f"accepted {accepted}, all of them stated: {'yes' if not wrong else f'no, {wrong} surprises'}"
    )


def main(kinds: Sequence[str], attacks: Sequence[str], *, verbose: bool, write: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="attacks-") as place:
        began = time.monotonic()
        results = table(kinds, Path(place), attacks)
    for kind, result in results.items():
        for name, cell in result.rows.items() if verbose else ():
            taken = {what: cell.notes[what] for what, accepted in cell.accepted.items() if accepted}
            print(f"{kind} | {name} | {len(cell.accepted)} | {taken or 'refused'}")
        for line in result.wrong:
            print(f"{kind}: {line}")
    if write:
        assert set(kinds) == set(COLUMNS) and not attacks, "only the whole table can be written"
        readme.write({kind: result.rows for kind, result in results.items()})
    print(counts(results), f"in {time.monotonic() - began:.0f} s")
    return int(any(result.wrong for result in results.values()))
