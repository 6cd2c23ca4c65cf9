"""The metrics of several workers as those of one broker. Pure: text expositions in, one out.

Rules: counters and histograms are added up, those of workers that have ended too, so that no sum ever falls; of gauges those
that every worker reads from the catalogue count once, the others are added up over the workers that live.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

SAME_FOR_ALL = frozenset(
    f"broker_{name}"
    for name in (
        "uploads", "replicas", "images", "leases", "slots", "signing_keys", "info", "bandwidth_bytes_per_second",
        "space_taken_bytes", "space_capacity_bytes", "project_leases", "project_waiting", "paths", "path_rate_bytes_per_second",
        "path_success_ratio", "deletions", "database_bytes", "memory_age_seconds", "suspicion", "failures",
    )
) | {"process_start_time_seconds"}  # fmt: skip
"""Gauges of which every worker tells the same, but for the moment at which it looked, and ages: the largest counts."""

Labels = tuple[tuple[str, str], ...]


class Family(NamedTuple):
    """One metric, with its samples by name and labels."""

    kind: str
    text: str
    samples: dict[tuple[str, Labels], float]


Families = dict[str, Family]


def read(exposition: str) -> Families:
    """The families of a text exposition. Raises `ValueError` when it is none."""
    return {
        family.name: Family(
            family.type,
            family.documentation,
            {(s.name, tuple(sorted(s.labels.items()))): s.value for s in family.samples if not s.name.endswith("_created")},
        )
        for family in text_string_to_metric_families(exposition)
    }


def add(sums: Families, more: Families) -> Families:
    """Both together, gauges as the rules say."""
    result = dict(sums)
    for name, family in more.items():
        before = result.get(name)
        if before is None:
            result[name] = family
            continue
        samples = dict(before.samples)
        for key, value in family.samples.items():
            known = samples.get(key, 0.0)
            samples[key] = max(known, value) if name in SAME_FOR_ALL else known + value
        result[name] = before._replace(samples=samples)
    return result


def without_gauges(families: Families) -> Families:
    """What stays of a worker that has ended."""
    return {name: family for name, family in families.items() if family.kind != "gauge"}


def render(families: Mapping[str, Family]) -> bytes:
    """The text exposition."""
    return generate_latest(_Collected(families))


class _Collected(Collector):
    def __init__(self, families: Mapping[str, Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for name, (kind, text, samples) in self._families.items():
            metric = Metric(name, text, kind)
            for (sample, labels), value in samples.items():
                metric.add_sample(sample, dict(labels), value)
            yield metric
