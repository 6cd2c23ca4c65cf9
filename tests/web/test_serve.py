"""The commands that run a broker: they come up, stop when told, survive a kill, and say plainly what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.parts.broker import serve
from tests.parts.process import find_program


def broker_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = find_program("broker", "pip install -e '.[test]'")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


def get(url: str, token: str) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
        return int(response.status)


def test_a_token_from_the_command_line_opens_the_door_even_after_a_kill(database: str, tmp_path: Path) -> None:
    with serve(database, tmp_path) as broker:
        made = broker_command("token", "create", "--config", str(broker.config), "--role", "reader", "--project", "demo", "--ttl", "10m")
        assert (made.returncode, made.stderr) == (0, "")
        token = made.stdout.strip()
        assert get(f"{broker.url}/v1/images", token) == 200
        assert token not in broker.log.read_text()
        os.kill(broker.pid, signal.SIGKILL)
        port = int(broker.url.rpartition(":")[2])
    with serve(database, tmp_path, port=port) as again:
        assert get(f"{again.url}/v1/images", token) == 200


def test_it_stops_when_told_and_logs_json(database: str, tmp_path: Path) -> None:
    with serve(database, tmp_path) as broker:
        os.kill(broker.pid, signal.SIGTERM)
        _, status = os.waitpid(broker.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        events = [json.loads(line)["event"] for line in broker.log.read_text().splitlines()]
    assert "ready" in events and events[-1] == "stopping"


def test_jobs_alone_listen_for_the_operator_only(database: str, tmp_path: Path) -> None:
    with serve(database, tmp_path, only="jobs") as broker, pytest.raises(OSError, match="refused"):
        get(f"{broker.url}/v1", "x")


@pytest.mark.parametrize(
    ("toml", "code", "words"),
    [
        ("[http]\nport = 1\n", 2, "unknown field http.port"),
        ("[policy.ranking]\nshrapness = 1\n", 2, "policy.ranking: unknown field shrapness"),
        ('[policy.uploads]\nfirst_parts = "many"\n', 2, "policy.uploads.first_parts"),
        ('[database]\nurl = "postgresql://u:hunter2@127.0.0.1:1/x"\n', 6, "cannot be reached"),
    ],
)
def test_a_start_that_fails_says_why_in_one_line(tmp_path: Path, toml: str, code: int, words: str) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(f'data_dir = "{tmp_path}"\n{toml}')
    file.chmod(0o600)
    ended = broker_command("serve", "--config", str(file))
    assert ended.returncode == code
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "hunter2" not in ended.stderr


def test_migrate_checks_and_applies(empty_postgres: str, tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(f'data_dir = "{tmp_path}"\n[database]\nurl = "{empty_postgres}"\n')
    file.chmod(0o600)
    before = broker_command("migrate", "--config", str(file), "--check")
    assert (before.returncode, "0001" in before.stderr) == (1, True)
    refused = broker_command("serve", "--config", str(file))
    assert (refused.returncode, "0001" in refused.stderr) == (1, True)
    assert "applied 0001" in broker_command("migrate", "--config", str(file)).stdout
    assert broker_command("migrate", "--config", str(file), "--check").returncode == 0


def test_help_teaches() -> None:
    shown = broker_command("--help")
    assert shown.returncode == 0
    for words in ("First steps", "Exit codes", "serve", "migrate", "token"):
        assert words in shown.stdout
    for command in ("serve", "migrate", "token"):
        assert broker_command(command, "--help").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [("--role", "god", "--project", "x"), ("--role", "admin", "--project", "a\x07"), ("--role", "admin", "--project", "x", "--ttl", "0")],
)
def test_tokens_for_nonsense_are_not_made(arguments: tuple[str, ...]) -> None:
    assert broker_command("token", "create", *arguments).returncode == 2


def test_another_passphrase_opens_no_keys_and_says_so(database: str, tmp_path: Path) -> None:
    with serve(database, tmp_path) as broker:
        configuration = broker.config
    secret = tmp_path / "data" / "keys.passphrase"
    right = secret.read_text()
    secret.write_text("hunter2 is another passphrase\n")
    for command in (("serve",), ("token", "create", "--role", "admin", "--project", "demo")):
        refused = broker_command(*command, "--config", str(configuration))
        assert refused.returncode == 1
        assert "cannot be decrypted with this broker's key passphrase" in refused.stderr
        for text in ("hunter2", right.strip(), "Traceback"):
            assert text not in refused.stdout + refused.stderr
    secret.write_text(right)
    with serve(database, tmp_path):
        pass
