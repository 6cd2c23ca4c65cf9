"""The benchmarks and storms of ``python -m tests.bench`` and ``python -m tests.storms``: each has a help, and says what is wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.bench.options import at_least
from tests.bench.simulate.report import main
from tests.storms import million, private


@pytest.mark.parametrize("program", [million, private])
@pytest.mark.parametrize(("given", "code", "says"), [("--help", 0, "usage:"), ("many", 2, "whole number"), ("0", 2, "at least")])
def test_storms_take_a_number(  # type: ignore[no-untyped-def]
    program, given: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["storms", given])
    with pytest.raises(SystemExit) as ended:
        program.main()
    seen = capsys.readouterr()
    assert ended.value.code == code
    assert says in seen.out + seen.err


def test_at_least() -> None:
    assert at_least(2)("2") == 2
    for wrong in ("1", "-3", "2.5", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 2"):
            at_least(2)(wrong)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (None, "no workload"),
        ("x = 1", "lacks 'stores'"),
        ("x = ", "is no workload"),
        ('stores = [{name = "a", speed = 1}]', "is no workload"),
    ],
)
def test_a_wrong_workload_is_told_before_anything_runs(written: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    if written is not None:
        path.write_text(written)
    answer = CliRunner().invoke(main, ["--workload", str(path)])
    assert answer.exit_code == 2
    assert says in answer.output.replace("\n", " ")


def test_an_unknown_workload_is_answered_with_the_known_ones() -> None:
    answer = CliRunner().invoke(main, ["--workload", "nosuch"])
    assert answer.exit_code == 2 and "boot_storm" in answer.output
