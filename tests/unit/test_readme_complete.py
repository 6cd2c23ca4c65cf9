"""The README's tables are complete: whatever the code has of these names, the README explains."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from broker import admit, config, errors, metrics, rank
from broker.accept import Reason
from broker.model import Abilities, Role
from broker.service import context
from broker.storeside import counted
from broker.storeside import server as storeside
from broker.storeside.jwks import KeySource
from broker.storeside.refused import WHY
from broker.web.handlers.about import FEATURES
from tests.parts.records import RCLONE, SEAWEEDFS, STORESIDE, SWIFT

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.rst").read_text()


def schema(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "schemas" / name).read_text())
    return document


def row(*cells: str) -> str:
    """How a row of a table begins."""
    return "\n   " + " | ".join(cells) + " | "


def fields_of(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of all fields of a configuration schema that hold a value."""
    for name, field in section["properties"].items():
        inner = field.get("items", field)
        if "properties" in inner:
            yield from fields_of(inner, f"{prefix}{name}.")
        elif not name == prefix == "policy.":
            yield prefix + name


CONFIG_FIELDS = [name for name in fields_of(schema("config.json")) if not name.startswith("policy.")]
PLAIN_DEFAULTS = {
    "http.listen": str(config.Http().listen), "http.metrics_listen": str(config.Http().metrics_listen),
    "http.body_limit_bytes": config.Http().body_limit_bytes, "http.reuse_port": "false",
    "http.max_connections": config.Http().max_connections, "http.max_connections_per_address": config.Http().max_connections_per_address,
    "auth.refusals_per_minute": config.Auth().refusals_per_minute,
    "database.min_connections": config.Database().min_connections, "database.max_connections": config.Database().max_connections,
    "auth.audience": config.Auth().audience, "auth.leeway_seconds": f"{config.Auth().leeway_seconds:g}",
    "auth.keystone.credential": config.Keystone("").credential,
    "auth.keystone.recheck_seconds": f"{config.Keystone('').recheck_seconds:g}",
    "memory.hot_bytes": config.parse({}).hot_bytes, "keys.algorithm": config.parse({}).keys.algorithm,
    "log.level": config.Log().level, "log.format": config.Log().format,
}  # fmt: skip
POLICIES: dict[str, Any] = {"ranking": rank.Policy(), "admission": admit.Policy(), "uploads": context.Policy()}


GLANCE = [f"{method.upper()} {path}" for path, item in schema("glance.json")["paths"].items() for method in item if method != "parameters"]


@pytest.mark.parametrize("operation", GLANCE)
def test_operations_of_glance(operation: str) -> None:
    assert f"``{operation}``" in README


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    told = README.split("So ``features`` of")[1].partition(".\n")[0]
    assert f"``{name}``" in told


@pytest.mark.parametrize("name", CONFIG_FIELDS)
def test_configuration(name: str) -> None:
    assert row(f"``{name}``") in README


@pytest.mark.parametrize("name", PLAIN_DEFAULTS)
def test_defaults(name: str) -> None:
    assert row(f"``{name}``", str(PLAIN_DEFAULTS[name])) in README


@pytest.mark.parametrize("section", POLICIES)
def test_policy(section: str) -> None:
    policy = POLICIES[section]
    for field in fields(policy):
        value = getattr(policy, field.name)
        if isinstance(value, int | float | tuple):
            assert row(f"``policy.{section}.{field.name}``", shown(value)) in README


def shown(value: float | tuple[float, ...]) -> str:
    """A default, as the tables write it."""
    if isinstance(value, tuple):
        return ", ".join(f"{number:g}" for number in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def metric_names() -> list[str]:
    return [family.name + ("_total" if family.type == "counter" else "") for family in metrics.create().registry.collect()]


@pytest.mark.parametrize("name", metric_names())
def test_metrics(name: str) -> None:
    assert row(f"``{name}``") in README


def test_no_metric_is_described_that_there_is_not() -> None:
    assert set(re.findall(r"``(broker_[a-z_]+)``", README)) <= set(metric_names())


def storeside_metric_names() -> list[str]:
    registry = counted.Counted(KeySource("keys.json"), os.open("/", os.O_RDONLY)).registry
    return [family.name + ("_total" if family.type == "counter" else "") for family in registry.collect()]


@pytest.mark.parametrize("name", storeside_metric_names())
def test_metrics_of_the_file_server(name: str) -> None:
    assert row(f"``{name}``") in README


def test_no_metric_of_the_file_server_is_described_that_there_is_not() -> None:
    assert set(re.findall(r"``(storeside_[a-z_]+)``", README)) == set(storeside_metric_names())
    assert f"{', '.join(WHY)}." in README


@pytest.mark.parametrize("option", [parameter.opts[-1] for parameter in storeside.main.params])
def test_options_of_the_file_server(option: str) -> None:
    assert re.search(rf"\n   ``{option} [A-Za-z:-]+`` \| ", README)


@pytest.mark.parametrize("name", errors.problem_types())
def test_problem_types(name: str) -> None:
    kind = errors.problem_types()[name]
    assert row(f"``{name}``", str(kind.status)) in README


def operations() -> list[str]:
    methods = ("get", "post", "put", "patch", "delete")
    return [f"{method.upper()} {path}" for path, item in schema("openapi.json")["paths"].items() for method in methods if method in item]


@pytest.mark.parametrize("operation", operations())
def test_operations(operation: str) -> None:
    assert row(f"``{operation}``") in README


def test_claims() -> None:
    for name in schema("claims.json")["properties"]:
        assert row(f"``{name}``") in README


def test_roles_and_reasons() -> None:
    for role in Role:
        assert row(f"``{role}``") in README
    for reason in Reason:
        assert f"``{reason}``" in README


def cell(value: object) -> str:
    """An ability, as the table writes it."""
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return "yes" if value else "no"


@pytest.mark.parametrize("name", [field.name for field in fields(Abilities) if field.name != "clock_skew_seconds"])
def test_abilities_as_the_probe_sees_them(name: str) -> None:
    assert row(f"``{name}``", *(cell(getattr(store, name)) for store in (SEAWEEDFS, SWIFT, STORESIDE, RCLONE))) in README


def test_files_that_are_named_are_there() -> None:
    named = set(re.findall(r"\b((?:tests|schemas|deploy)/[\w./]+\.(?:py|sh|json))\b", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
