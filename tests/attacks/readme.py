"""The attack table as it stands in the README's reference, between two comments: made from results, and read back cell by cell."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path

from tests.attacks import weak
from tests.attacks.attack import ATTACKS, Cell

README = Path(__file__).resolve().parents[2] / "README.rst"
BEGIN = "\n.. attack table: written by python -m tests.attacks --write\n"
END = "\n.. end of the attack table\n"


def letter(weakness: weak.Weakness) -> str:
    return string.ascii_lowercase[weak.STATED.index(weakness)]


def cell(kind: str, attack: str, tried: Cell | None) -> str:
    """How many tries were refused; of those accepted, how many and the letters of the notes; nothing where the attack has no meaning."""
    if tried is None:
        return ""
    accepted = sum(tried.accepted.values())
    if not accepted:
        return str(len(tried.accepted))
    notes = "".join(letter(weakness) for weakness in weak.STATED if kind in weakness.kinds and weakness.attack == attack)
    return f"{len(tried.accepted) - accepted} (not {accepted}: {notes})"


def render(columns: Mapping[str, Mapping[str, Cell]]) -> str:
    """The table and its notes."""
    kinds = list(columns)
    lines = [
        ".. csv-table::",
        "   :delim: |",
        f"   :widths: 34 {' '.join(['11'] * len(kinds))}",
        "   :header-rows: 1",
        "",
        f"   Attack | {' | '.join(kinds)}",
    ]
    lines += [
        f"   {attack.name} | {' | '.join(cell(kind, attack.name, columns[kind].get(attack.name)) for kind in kinds)}" for attack in ATTACKS
    ]
    lines += [
        "",
        "What is accepted, and what the broker does about it:",
        "",
        ".. csv-table::",
        "   :delim: |",
        "   :widths: 4 20 38 38",
        "",
    ]
    for weakness in weak.STATED:
        whose = ", ".join(kind for kind in kinds if kind in weakness.kinds)
        lines.append(f"   {letter(weakness)} | {whose}: {weakness.attack} | {weakness.why} | {weakness.broker}")
    return "\n" + "\n".join(lines) + "\n"


def written() -> str:
    """What stands in the README now."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0]


def write(columns: Mapping[str, Mapping[str, Cell]]) -> None:
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, "README has no place for the attack table"
    assert end, "README has no end of the attack table"
    README.write_text(before + begin + render(columns) + end + after)


def rows() -> dict[str, list[str]]:
    """The cells of the README's table by attack; the header under ``Attack``."""
    table = written().split("\nWhat is accepted")[0]
    split = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if "|" in line and ":delim:" not in line]
    return {cells[0]: cells[1:] for cells in split}


def stated_column(kind: str) -> dict[str, str]:
    """One column of the README's table."""
    header = rows()["Attack"]
    return {name: cells[header.index(kind)] for name, cells in rows().items() if name != "Attack"}
