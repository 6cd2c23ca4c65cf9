"""Every expression of rules, alerts and dashboards, executed on a real Prometheus that scrapes a busy broker: none is empty.

An alert's comparison is asked with ``bool``, so that it tells 0 (would not fire) or 1 instead of nothing or something.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from tests.parts import keystone, prometheus, rules, seaweedfs, swift
from tests.parts.condition import until
from tests.parts.postgres import Postgres
from tests.parts.process import find_program
from tests.parts.prometheus import JOB, PrometheusPart, Sample
from tests.parts.rules import Expression
from tests.storms import busy

ROUNDS = 2
"""A counter that appears has no rate yet: what is counted in the first round is seen to grow in the second."""


LATEST_SECONDS = 120.0
"""So long after the last round an expression may tell nothing yet: gauges are set every ten seconds."""


ASK_SECONDS = 0.5
"""Between two times that what tells nothing yet is asked again."""


@dataclass(frozen=True)
class Seen:
    expression: Expression
    samples: list[Sample]


async def see(house: busy.House, watch: PrometheusPart) -> list[Seen]:
    """What every expression gives, after two rounds of everything; those that give nothing are asked again for a while."""
    await busy.settle_in(house)
    await busy.lose_the_database(house)
    for number in range(ROUNDS):
        image = await busy.keep_busy(house, number)
        scraped = _scrapes(watch)
        await until(lambda before=scraped: _scrapes(watch) > before + 2, "Prometheus does not look at the broker")
    waiter = asyncio.create_task(busy.stand_in_line(house, image))
    busy.kill_a_worker(house)
    found = {expression: Seen(expression, []) for expression in rules.expressions()}

    def ask() -> bool:
        for expression, seen in found.items():
            if not seen.samples:
                found[expression] = Seen(expression, watch.ask(rules.executable(expression, JOB)))
        return all(seen.samples for seen in found.values())

    async def ask_again() -> bool:
        if await asyncio.to_thread(ask):
            return True
        await asyncio.sleep(ASK_SECONDS)
        return False

    with contextlib.suppress(AssertionError):
        await until(ask_again, seconds=LATEST_SECONDS)
    waiter.cancel()
    return list(found.values())


def _scrapes(watch: PrometheusPart) -> float:
    return sum(sample.value for sample in watch.ask(f'count_over_time(up{{job="{JOB}"}}[1h])'))


def check_metrics(house: busy.House) -> str:
    """What promtool says against the metrics as they are now; nothing when they are well."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{house.broker.metrics_url}/metrics", timeout=30) as answer:
        text = answer.read()
    promtool = find_program("promtool", rules.INSTALL)
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False, timeout=60)
    return (checked.stdout + checked.stderr).decode()


def lines(found: list[Seen]) -> Iterator[str]:
    """A JSON line for each expression, with one of its samples: the one of most labels, not zero if possible."""
    for seen in found:
        shown = max(seen.samples, key=lambda sample: (sample.value != 0, len(sample.labels)), default=None)
        labels = {name: value for name, value in shown.labels.items() if name not in ("job", "__name__")} if shown else {}
        value = f"{shown.value:.4g}" if shown else None
        yield json.dumps(
            {
                "where": seen.expression.where,
                "series": len(seen.samples),
                "value": value,
                "labels": labels,
                "expression": seen.expression.text,
            }
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
def main() -> None:
    with tempfile.TemporaryDirectory(prefix="storm-") as made, contextlib.ExitStack() as stack:
        place = Path(made)
        place.chmod(0o711)  # PostgreSQL runs as another account
        for name in ("weed", "swift", "keystone"):
            (place / name).mkdir()
        house = stack.enter_context(
            busy.house(
                stack.enter_context(Postgres(None)),
                place / "house",
                seaweed=stack.enter_context(seaweedfs.start(place / "weed")),
                swift=stack.enter_context(swift.start(place / "swift")),
                keystone=stack.enter_context(keystone.start(place / "keystone")),
            )
        )
        watch = stack.enter_context(prometheus.start(place / "prometheus", house.broker.metrics_url))
        found = asyncio.run(see(house, watch))
        faults = check_metrics(house)
    for line in lines(found):
        print(line)
    empty = [seen.expression.where for seen in found if not seen.samples]
    print(f"{len(found)} expressions, {len(empty)} of them empty; promtool check metrics: {faults or 'nothing to mend'}")
    if empty or faults:
        raise SystemExit(1)
