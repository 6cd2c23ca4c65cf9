"""Load by wrk against one server process, and what that process used: requests a second, latency, CPU, memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.parts.process import PartMissing

SERVER_CPU, LOAD_CPU = 0, 1
"""The server has one core, wrk the other one; PostgreSQL shares that with wrk."""

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Request:
    """One request of the mix: all are POSTs of JSON to `path` with a bearer token."""

    path: str
    body: str
    token: str


@dataclass(frozen=True)
class Run:
    """What one run of wrk saw. CPU is the server's, per request."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    rss_mb: float
    failures: int


_LUA = """
local requests, next_one = {}, 0
function init(args)
  for line in io.lines(args[1]) do
    local path, token, body = line:match("^(%S+) (%S+) (.*)$")
    requests[#requests + 1] = wrk.format("POST", path, {["Content-Type"] = "application/json", ["Authorization"] = "Bearer " .. token,
                                                       ["Host"] = "127.0.0.1"}, body)
  end
  math.randomseed(7)
  next_one = math.random(#requests)
end
function request()
  next_one = next_one % #requests + 1
  return requests[next_one]
end
function done(summary, latency, requests)
  local bad = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  print(string.format("FIGURES %d %d %d %d %d", summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), bad))
end
"""


class Mix:
    """Requests on disk in the form that wrk's script reads; a context manager."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="bench-"))
        self.script = self._place / "mix.lua"
        self.script.write_text(_LUA)
        self.requests = self._place / "requests"
        self.requests.write_text("".join(f"{r.path} {r.token} {r.body}\n" for r in requests))

    def __enter__(self) -> Mix:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._place)

    def run(self, port: int, pid: int, seconds: float, connections: int = 32) -> Run:
        """Send the mix for so long."""
        wrk = shutil.which("wrk")
        if wrk is None:
            raise PartMissing("wrk is not installed; install it with: apt-get install wrk")
        before = _cpu_seconds(pid)
        out = subprocess.run(
            ["taskset", "-c", str(LOAD_CPU), wrk, "-t1", "--timeout", "10s", f"-c{connections}",
             f"-d{seconds:g}s", "-s", str(self.script), f"http://127.0.0.1:{port}/", "--", str(self.requests)],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        used = _cpu_seconds(pid) - before
        found = re.search(r"FIGURES (\d+) (\d+) (\d+) (\d+) (\d+)", out)
        assert found, out
        count, microseconds, p50, p99, bad = map(int, found.groups())
        return Run(count / microseconds * 1e6, p50 / 1000, p99 / 1000, used / max(count, 1) * 1e6, _rss_mb(pid), bad)


def median(runs: Sequence[Run]) -> Run:
    """The median of each figure."""
    return Run(
        *(
            statistics.median(getattr(run, name) for run in runs)
            for name in ("requests_per_second", "p50_ms", "p99_ms", "cpu_us", "rss_mb")
        ),
        failures=sum(run.failures for run in runs),
    )


def line(bench: str, case: str, run: Run, bare: Run, blobs: int = 1) -> None:
    """Print one figure. With `blobs` a request, value and ratio are of blobs."""
    if run.failures:
        raise SystemExit(f"{bench} {case}: {run.failures} requests failed")
    value = run.requests_per_second * blobs
    print(
        json.dumps(
            {
                "bench": bench,
                "case": case,
                "value": round(value, 1),
                "unit": "requests/s" if blobs == 1 else "blobs/s",
                "ratio": round(value / bare.requests_per_second, 3),
                "comparator": "bare aiohttp",
                "comparator_value": round(bare.requests_per_second, 1),
                "cpu_us": round(run.cpu_us, 1),
                "p50_ms": round(run.p50_ms, 2),
                "p99_ms": round(run.p99_ms, 2),
                "rss_mb": round(run.rss_mb, 1),
            }
        ),
        flush=True,
    )


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _rss_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found.group(1)) / 1024
