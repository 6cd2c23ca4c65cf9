"""A real Prometheus with the project's example configuration, rules and alerts, looking at brokers every second."""

from __future__ import annotations

import contextlib
import json
import math
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.parts.process import answers, find_program, free_ports, running
from tests.parts.rules import INSTALL, ROOT

JOB = "transfer-broker"

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@dataclass(frozen=True)
class Sample:
    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class PrometheusPart:
    url: str

    def ask(self, expression: str) -> list[Sample]:
        """What an expression gives now, without what is not a number."""
        query = urllib.parse.urlencode({"query": expression})
        with _open(f"{self.url}/api/v1/query?{query}", timeout=30) as response:
            result = json.load(response)["data"]["result"]
        found = [Sample(entry["metric"], float(entry["value"][1])) for entry in result]
        return [sample for sample in found if not math.isnan(sample.value)]


@contextlib.contextmanager
def start(directory: Path, *metrics_urls: str) -> Iterator[PrometheusPart]:
    """Run Prometheus with its data in `directory` until the block ends."""
    program = find_program("prometheus", INSTALL)
    (port,) = free_ports(1)
    example = ROOT / "deploy" / "prometheus"
    document = yaml.safe_load((example / "prometheus.yml").read_text())
    document["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    document["rule_files"] = [str(example / name) for name in document["rule_files"]]
    (job,) = document["scrape_configs"]
    assert job["job_name"] == JOB
    job["static_configs"] = [{"targets": [url.removeprefix("http://") for url in metrics_urls]}]
    directory.mkdir(exist_ok=True)
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(document))
    url = f"http://127.0.0.1:{port}"
    arguments = [program, f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with running(arguments, log=directory / "prometheus.log", ready=lambda: answers(f"{url}/-/ready")):
        yield PrometheusPart(url)
