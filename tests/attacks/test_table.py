"""The attack table, one kind of store a test: nothing is accepted but what weak.py states, and the README says the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attacks import readme, weak
from tests.attacks.attack import ATTACKS
from tests.attacks.columns import COLUMNS
from tests.attacks.table import Result, column


@pytest.mark.parametrize("kind", COLUMNS)
def test_attacks(kind: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    result = asyncio.run(column(kind, tmp_path))
    record_property("attacks", [len(result.rows), result.tries, result.accepted])
    assert result.wrong == []
    assert _cells(kind, result) == readme.stated_column(kind)


def _cells(kind: str, result: Result) -> dict[str, str]:
    return {attack.name: readme.cell(kind, attack.name, result.rows.get(attack.name)) for attack in ATTACKS}


def test_readme_has_every_attack_and_kind() -> None:
    rows = readme.rows()
    assert rows.pop("Attack") == list(COLUMNS)
    assert list(rows) == [attack.name for attack in ATTACKS]
    notes = readme.written()
    for weakness in weak.STATED:
        assert f"| {weakness.why} | {weakness.broker}\n" in notes


def test_every_stated_weakness_is_about_something() -> None:
    names = {attack.name for attack in ATTACKS}
    for weakness in weak.STATED:
        assert weakness.attack in names
        assert set(weakness.kinds) <= set(COLUMNS)
        assert weakness.tries
