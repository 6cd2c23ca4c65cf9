"""`broker serve --workers`: one broker to everyone outside, several processes that come back when they die and end together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from tests.parts.broker import BrokerProcess, serve
from tests.parts.condition import wait_for
from tests.parts.process import find_program

COUNTED = 'broker_http_requests_total{operation="getService",status="200"}'
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def fetch(url: str) -> str:
    with _open(url, timeout=10) as response:
        return str(response.read().decode())


def counted(broker: BrokerProcess) -> float:
    """How often ``GET /v1`` was answered, by all workers."""
    found = [line.rpartition(" ")[2] for line in fetch(f"{broker.metrics_url}/metrics").splitlines() if line.startswith(COUNTED)]
    return float(found[0]) if found else 0.0


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def health(broker: BrokerProcess) -> dict[str, int]:
    try:
        return dict(json.loads(fetch(f"{broker.metrics_url}/healthz")))
    except urllib.error.HTTPError as error:
        return dict(json.loads(error.read()))


def test_workers_answer_as_one_broker_and_come_back(database: str, tmp_path: Path) -> None:
    with serve(database, tmp_path, options=("--workers", "2")) as broker:
        assert health(broker) == {"workers": 2, "well": 2}
        before = counted(broker)
        for _ in range(40):  # a connection each: the kernel spreads them
            fetch(f"{broker.url}/v1")
        assert counted(broker) == before + 40
        assert fetch(f"{broker.metrics_url}/metrics").count("broker_info{") == 1
        first = children(broker.pid)
        os.kill(min(first), signal.SIGKILL)
        wait_for(lambda: health(broker)["well"] == 2 and len(children(broker.pid)) == 2 and children(broker.pid) != first)
        assert counted(broker) >= before + 40
        fetch(f"{broker.url}/v1")
        workers = children(broker.pid)
        os.kill(broker.pid, signal.SIGTERM)
        _, status = os.waitpid(broker.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert not any(map(lives, workers))


def test_workers_end_with_their_parent(database: str, tmp_path: Path) -> None:
    with serve(database, tmp_path, options=("--workers", "2")) as broker:
        workers = children(broker.pid)
        assert len(workers) == 2
        words = Path(f"/proc/{min(workers)}/cmdline").read_text().split("\0")
        sockets = Path(words[words.index("--worker-socket") + 1]).parent
        os.kill(broker.pid, signal.SIGKILL)
        wait_for(lambda: not any(map(lives, workers)))
    shutil.rmtree(sockets)  # who is killed clears nothing away


def test_workers_that_cannot_start_end_all(database: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        file = tmp_path / "broker.toml"
        file.write_text(
            f'data_dir = "{tmp_path}"\n[http]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\nmetrics_listen = ""\n'
            f'[database]\nurl = "{database}"\n'
        )
        file.chmod(0o600)
        program = find_program("broker", "pip install -e '.[test]'")
        ended = subprocess.run(
            [program, "serve", "--config", str(file), "--workers", "2"], capture_output=True, text=True, timeout=120, check=False
        )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "Address already in use; http.listen and http.metrics_listen choose others" in ended.stderr


def test_workers_do_not_do_the_background_work_alone() -> None:
    program = find_program("broker", "pip install -e '.[test]'")
    ended = subprocess.run([program, "serve", "--only", "jobs", "--workers", "2"], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2 and "--workers" in ended.stderr
