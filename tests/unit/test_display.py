"""Tables on terminals of any width show every word whole; off a terminal they are columns between tabs."""

from __future__ import annotations

import pytest
from rich.console import Console

from broker.cli import display

ID = "01a20471-9cea-7c3b-99e3-ec7e03417dc7"
COLUMNS = ("id", "name", "status", "visibility", "formats")
ROWS = [(ID, "my-image", "active", "private", "raw 28.6 MiB, qcow2 1.1 GiB, vmdk 2.2 GiB"), (ID, "[x]", None, "public", "raw")]


def _printed(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(display, "Console", lambda: Console(width=width, force_terminal=True, color_system=None))
    display.print_table(COLUMNS, ROWS)
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [20, 40, 60, 80, 93, 95, 98, 110, 200])
def test_no_word_is_cut_or_broken(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = _printed(width, monkeypatch, capsys).split()
    for text in (COLUMNS, *ROWS):
        assert {word for cell in text if cell is not None for word in cell.split()} <= set(words)


def test_a_frame_only_where_it_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    framed = _printed(110, monkeypatch, capsys)
    assert "┃" in framed
    assert max(map(len, framed.splitlines())) <= 110
    assert "┃" not in _printed(80, monkeypatch, capsys)


def test_tabs_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    display.print_table(COLUMNS, ROWS)
    assert capsys.readouterr().out.splitlines()[1] == f"{ID}\t[x]\t\tpublic\traw"
