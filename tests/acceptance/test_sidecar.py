"""``broker-storeside-keys`` as a real process beside a real HAProxy: keys come, go and are forgotten without a restart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.sign.token import SigningKey, TokenSigner, generate_key, jwks
from tests.parts.condition import wait_for
from tests.parts.process import die_with_parent, find_program, free_ports, running

CONFIG = """
global
  stats socket {place}/haproxy.sock
  hard-stop-after 5s
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend store
  bind 127.0.0.1:{port}
  http-request set-var(txn.token) urlp(token)
  http-request set-var(txn.kid) var(txn.token),jwt_header_query('$.kid')
  http-request set-var(txn.pem) var(txn.kid),map_str({keys}/pem.map)
  http-request set-var(txn.alg) var(txn.kid),map_str({keys}/algorithm.map)
  http-request deny deny_status 401 unless {{ var(txn.pem) -m found }}
  http-request return status 200 if {{ var(txn.alg) -m str ES256 }} {{ var(txn.token),jwt_verify("ES256",txn.pem) 1 }}
  http-request return status 200 if {{ var(txn.alg) -m str RS256 }} {{ var(txn.token),jwt_verify("RS256",txn.pem) 1 }}
  http-request deny deny_status 403
"""


def publish(file: Path, *keys: SigningKey) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(jwks(keys)))
    new.replace(file)


@contextlib.contextmanager
def sidecar(*options: str, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "broker.storeside.sidecar", *options], preexec_fn=die_with_parent, env={**os.environ, **(environment or {})}
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def issuer(tmp_path: Path) -> Path:
    return tmp_path / "issuer.json"


@pytest.mark.parametrize("algorithm", ["ES256", "RS256"])
def test_haproxy_takes_new_keys_and_refuses_revoked_ones(tmp_path: Path, issuer: Path, algorithm: str) -> None:
    haproxy = find_program("haproxy", "apt-get install haproxy")
    first, second, foreign = (generate_key(algorithm, 0) for _ in range(3))  # type: ignore[arg-type]
    directory, pid_file = tmp_path / "keys", tmp_path / "haproxy.pid"
    (port,) = free_ports(1)
    (tmp_path / "haproxy.cfg").write_text(CONFIG.format(place=tmp_path, port=port, keys=directory))

    def answer(key: SigningKey) -> int:
        token = TokenSigner([key], "issuer").sign_claims({"exp": time.time() + 600}, time.time())
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/?token={token}", timeout=10) as response:
                status: int = response.status
                return status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    options = ["--jwks", str(issuer), "--directory", str(directory), "--pid-file", str(pid_file), "--signal", "USR2"]
    once = [sys.executable, "-m", "broker.storeside.sidecar", *options, "--once"]
    assert subprocess.run(once, timeout=60).returncode == 1  # nobody published anything yet; the front can start all the same
    arguments = [haproxy, "-W", "-db", "-p", str(pid_file), "-f", str(tmp_path / "haproxy.cfg"), "-f", str(directory / "haproxy.cfg")]
    with running(arguments, log=tmp_path / "haproxy.log", ready=lambda: answer(first) == 401):
        publish(issuer, first)
        with sidecar(*options, "--refresh", "1") as process:
            wait_for(lambda: answer(first) == 200)
            assert answer(foreign) == 401
            publish(issuer, first, second)
            wait_for(lambda: answer(second) == 200)
            assert answer(first) == 200
            publish(issuer, second)
            wait_for(lambda: answer(first) == 401)
            assert answer(second) == 200
            assert {path.stem for path in directory.glob("*.pem")} == {second.id}
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0


def test_without_the_issuer_the_keys_end(tmp_path: Path, issuer: Path) -> None:
    key = generate_key("ES256", 0)
    publish(issuer, key)
    directory = tmp_path / "keys"
    with sidecar("--jwks", str(issuer), "--directory", str(directory), "--refresh", "1", "--keep", "3"):
        wait_for((directory / f"{key.id}.pem").exists)
        wait_for((directory / "jwks.json").exists)
        issuer.unlink()
        wait_for(lambda: not (directory / f"{key.id}.pem").exists())
        wait_for(lambda: json.loads((directory / "jwks.json").read_text()) == {"keys": []})
        publish(issuer, key)
        wait_for((directory / f"{key.id}.pem").exists)


def test_systemd_is_told_and_a_hangup_reads_at_once(tmp_path: Path, issuer: Path) -> None:
    first, second = generate_key("ES256", 0), generate_key("ES256", 0)
    publish(issuer, first)
    directory = tmp_path / "keys"
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        options = ("--jwks", str(issuer), "--directory", str(directory), "--refresh", "3600")
        with sidecar(*options, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as process:
            assert systemd.recv(100) == b"READY=1"
            assert (directory / f"{first.id}.pem").exists()
            publish(issuer, second)
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: (directory / f"{second.id}.pem").exists() and not (directory / f"{first.id}.pem").exists())
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0
