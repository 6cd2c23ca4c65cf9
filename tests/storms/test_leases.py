"""Invariant 3 in short: what ``python -m tests.storms leases`` does for minutes."""

from __future__ import annotations

from pathlib import Path

from tests.parts.postgres import Postgres
from tests.storms import leases


async def test_leases_stay_within_slots_while_brokers_are_killed_and_stopped(postgres: Postgres, tmp_path: Path) -> None:
    plan = leases.Plan(5.0, brokers=3, worst=2, stores=2, clients=16, lease_seconds=3.0)
    outcome = await leases.run(postgres, tmp_path, plan)
    for figure in leases.figures(outcome):
        print(figure)
    assert outcome.broken == []
    assert outcome.kills + outcome.stops >= 2
    assert outcome.looks.looks > 10
    assert outcome.history.full > 0, "no store was ever full: nothing was proved"
    assert outcome.history.transfers > 0
