"""What operators are given: the rules, alerts and dashboards of deploy/, and each expression in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "apt-get install prometheus"
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"


class Expression(NamedTuple):
    """`where` names the rule, alert or panel."""

    where: str
    text: str


def alerts() -> list[dict[str, Any]]:
    return _rules("alerts.yml")


def recorded() -> list[dict[str, Any]]:
    return _rules("rules.yml")


def _rules(name: str) -> list[dict[str, Any]]:
    document = yaml.safe_load((ROOT / "deploy" / "prometheus" / name).read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def dashboards() -> dict[str, dict[str, Any]]:
    """Each dashboard by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def expressions() -> Iterator[Expression]:
    """Each expression, as the files have it."""
    for rule in recorded():
        yield Expression(f"rule {rule['record']}", rule["expr"].strip())
    for alert in alerts():
        yield Expression(f"alert {alert['alert']}", alert["expr"].strip())
    for name, board in dashboards().items():
        for variable in board["templating"]["list"]:
            found = re.fullmatch(r"label_values\((.+), \w+\)", str(variable.get("query")))
            if found:
                yield Expression(f"{name}: ${variable['name']}", found[1])
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield Expression(f"{name}: {panel['title']} {target['refId']}", target["expr"])


def executable(expression: Expression, job: str) -> str:
    """The expression as Prometheus can be asked it. An alert's comparison tells 0 or 1 instead of nothing or something."""
    text = expression.text.replace("$__rate_interval", "1m").replace('"$job"', f'"{job}"')
    return re.sub(r" (==|>=|<=|<|>) ", r" \1 bool ", text) if expression.where.startswith("alert ") else text
