"""deploy/grafana: the files are those that the program makes, and what Grafana's own SDK reads; no metric is forgotten."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from broker import metrics
from deploy.grafana import make
from tests.parts import rules

BOARDS = rules.dashboards()
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"]]

LEFT_OUT = {
    "process_virtual_memory_bytes": "says nothing on a 64-bit machine",
}
"""Metrics that are shown nowhere on purpose, and why."""


def test_the_files_are_those_that_the_program_makes() -> None:
    made = dict(make.documents())
    assert {path.name for path in made} == {f"{name}.json" for name in BOARDS}
    for path, text in made.items():
        assert path.read_text() == text, "run: python -m deploy.grafana.make"


@pytest.mark.parametrize("name", BOARDS)
def test_grafana_reads_the_whole_of_it(name: str) -> None:
    """By the types of Grafana's SDK: no field is unknown to them, none is of another kind."""
    board = BOARDS[name]
    read = Dashboard.from_json(board)
    assert {"annotations", "panels", "templating", "time", "uid", "title", "schemaVersion"} <= board.keys()
    assert board["uid"] == name and len(name) <= 40 and board["schemaVersion"] >= 38
    assert set(board) <= set(read.to_json()) | {"id"}
    source, job = board["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert job["type"] == "query" and job["datasource"]["uid"] == "${datasource}"


def test_uids_and_titles_are_unlike() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len({board["title"] for board in BOARDS.values()}) == len(BOARDS) == 8


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_places_of_their_own(name: str) -> None:
    panels = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24 and at["y"] >= 0 and at["h"] > 0
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = [one[x] + one[w] <= other[x] or other[x] + other[w] <= one[x] for x, w in (("x", "w"), ("y", "h"))]
        assert any(apart), (name, one, other)


KNOWN_UNITS = {value for value in vars(units).values() if isinstance(value, str)}


@pytest.mark.parametrize(("name", "panel"), [pytest.param(*each, id=f"{each[0]}-{each[1]['id']}") for each in PANELS])
def test_panels_are_whole(name: str, panel: dict[str, Any]) -> None:
    assert panel["type"] in ("timeseries", "stat", "heatmap") and panel["title"]
    assert panel["fieldConfig"]["defaults"]["unit"] in KNOWN_UNITS
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    references = [target["refId"] for target in panel["targets"]]
    assert references and len(set(references)) == len(references)
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        assert 'job="$job"' in target["expr"]
        by = re.search(r"by \(([\w, ]*)\)", target["expr"])
        for label in re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")):
            assert by is None or label in by[1] or ":" in target["expr"], target["expr"]


def test_every_metric_is_used() -> None:
    text = "\n".join(expression.text for expression in rules.expressions())
    names = {
        family.name + {"counter": "_total"}.get(family.type, "")
        for family in metrics.create().registry.collect()
        if not re.search(rf"\b{family.name}(_total|_bucket|_sum|_count)?\b", text)
    }
    assert names == set(LEFT_OUT)


def test_expressions_name_no_metric_that_there_is_not() -> None:
    known = {family.name for family in metrics.create().registry.collect()} | {rule["record"] for rule in rules.recorded()}
    for expression in rules.expressions():
        for name in re.findall(r"(?<![\w:])(?:broker_|process_)\w+", expression.text):
            assert re.sub(r"_(total|bucket|sum|count)$", "", name) in known or name in known, expression


def test_rules_are_named_by_their_labels() -> None:
    """LEVEL:METRIC:OPERATIONS, where LEVEL are the labels that are left."""
    for rule in rules.recorded():
        level, metric, operations = rule["record"].split(":")
        assert metric.startswith("broker_") and operations
        by = re.search(r"by \(([\w, ]*)\)", rule["expr"])
        assert by is None or set(level.split("_")) == set(by[1].replace(", ", "_").split("_")) - {"le"}, rule


def test_grafana_is_told_where_they_are() -> None:
    place = rules.ROOT / "deploy" / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((place / "dashboards" / "transfer-broker.yml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"] in (rules.ROOT / "README.rst").read_text()
    (source,) = yaml.safe_load((place / "datasources" / "transfer-broker.yml").read_text())["datasources"]
    assert (source["type"], source["access"]) == ("prometheus", "proxy")
