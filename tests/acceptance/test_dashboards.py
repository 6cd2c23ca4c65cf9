"""No expression of rules, alerts and dashboards is empty on a Prometheus that looks at a busy broker: the short form of the storm
``python -m tests.storms dashboards``, with file servers for stores and a Keystone that is not there."""

from __future__ import annotations

from pathlib import Path

from tests.parts import prometheus
from tests.parts.postgres import Postgres
from tests.storms import busy, dashboards


async def test_every_expression_tells_something(postgres: Postgres, tmp_path: Path) -> None:
    with busy.house(postgres, tmp_path / "house") as house, prometheus.start(tmp_path / "prometheus", house.broker.metrics_url) as watch:
        found = await dashboards.see(house, watch)
        faults = dashboards.check_metrics(house)
    assert [seen.expression.where for seen in found if not seen.samples] == []
    assert faults == ""
