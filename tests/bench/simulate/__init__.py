"""``python -m tests.bench simulate``: our ranking beside other policies, in simulated networks."""

from __future__ import annotations


def main() -> None:
    from tests.bench.simulate.report import main as report

    report(prog_name="python -m tests.bench simulate")
