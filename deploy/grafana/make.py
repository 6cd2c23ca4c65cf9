"""Writes dashboards/NAME.json from `deploy.grafana.boards`: ``python -m deploy.grafana.make``, by Grafana's own SDK.

The files are kept in the repository, so that nobody needs this program who does not change a dashboard; a test compares them.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode, TooltipDisplayMode, VisibilityMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DashboardLinkType, DataSourceRef, GridPos, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.boards import BOARDS, Board, Panel, Query

PLACE = Path(__file__).with_name("dashboards")
TAG = "transfer-broker"
SCHEMA_VERSION = 38
"""Of the JSON model; Grafana 10 and later read it, and bring it up to date by themselves."""

COLUMNS = 24
SIZES = {"timeseries": (12, 8), "heatmap": (12, 8), "stat": (4, 4)}
"""Width and height of each kind of panel, in Grafana's units."""

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


def documents() -> Iterator[tuple[Path, str]]:
    """Each file's path and content."""
    for board in BOARDS:
        yield PLACE / f"{board.uid}.json", json.dumps(_document(board), indent=1, sort_keys=True) + "\n"


def _document(board: Board) -> dict[str, Any]:
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .tags([TAG])
        .timezone("browser")
        .refresh("30s")
        .time("now-3h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(dashboard.DashboardLink("Transfer broker").type(DashboardLinkType.DASHBOARDS).tags([TAG]).include_vars(True).keep_time(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("job")
            .label("Installation")
            .datasource(_SOURCE)
            .query("label_values(broker_info, job)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        )
    )
    for panel in _placed(board.panels):
        made = made.with_panel(panel)
    document: dict[str, Any] = json.loads(JSONEncoder().encode(made.build()))
    return document | {"schemaVersion": SCHEMA_VERSION, "version": 1}


def _placed(panels: tuple[Panel, ...]) -> Iterator[Any]:
    """The panels from left to right, row by row."""
    x = y = below = 0
    for number, panel in enumerate(panels, 1):
        width, height = SIZES[panel.kind]
        if x + width > COLUMNS or (x and height != below - y):
            x, y = 0, below
        yield _panel(panel).id(number).grid_pos(GridPos(h=height, w=width, x=x, y=y))
        x, below = x + width, max(below, y + height)


def _panel(panel: Panel) -> Any:
    made: Any
    if panel.kind == "stat":
        made = stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    elif panel.kind == "heatmap":
        made = heatmap.Panel().calculate(False).y_axis(heatmap.YAxisConfig().unit(panel.unit)).show_legend()
    else:
        made = (
            timeseries.Panel()
            .min(0)
            .fill_opacity(20 if panel.stacked else 0)
            .show_points(VisibilityMode.NEVER)
            .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        )
        if panel.stacked:
            made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
        if panel.most is not None:
            made = made.max(panel.most)
    made = made.title(panel.title).unit(panel.unit).datasource(_SOURCE)
    if panel.text:
        made = made.description(panel.text)
    for name, query in zip(string.ascii_uppercase, panel.queries, strict=False):
        made = made.with_target(_target(name, query, panel.kind))
    return made


def _target(name: str, query: Query, kind: str) -> Any:
    target = prometheus.Dataquery().ref_id(name).expr(query.expr).range().datasource(_SOURCE)
    if query.legend:
        target = target.legend_format(query.legend)
    return target.format(PromQueryFormat.HEATMAP) if kind == "heatmap" else target


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    for left in PLACE.glob("*.json"):
        left.unlink()
    for path, text in documents():
        path.write_text(text)


if __name__ == "__main__":
    main()
