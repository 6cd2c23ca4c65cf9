"""`broker key` and the passphrase, as an operator uses them: real commands, a real broker."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import orjson
import pytest

from tests.parts.broker import BrokerProcess, serve
from tests.parts.process import PartFailed, find_program


@pytest.fixture
def broker(database: str, tmp_path: Path) -> Iterator[BrokerProcess]:
    with serve(database, tmp_path, settings="[keys]\noverlap_seconds = 2\n") as process:
        yield process


def run(broker: BrokerProcess, *arguments: str, token: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "BROKER_URL": broker.url, "BROKER_TOKEN": token, **environment}
    return subprocess.run(
        [find_program("broker", "pip install -e '.[test]'"), *arguments],
        capture_output=True,
        text=True,
        env=variables,
        timeout=120,
        check=False,
    )


def created(broker: BrokerProcess, *options: str, **environment: str) -> str:
    """What `broker token create` prints."""
    made = run(broker, "token", "create", "--config", str(broker.config), "--role", "admin", "--project", "p", *options, **environment)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def listed(broker: BrokerProcess, token: str) -> dict[str, dict[str, str]]:
    """The keys by what they are doing."""
    done = run(broker, "key", "list", "--json", token=token)
    assert done.returncode == 0, done.stderr
    return {key["state"]: key for key in map(orjson.loads, done.stdout.splitlines())}


def test_from_list_to_revocation(broker: BrokerProcess) -> None:
    token = created(broker, "--ttl", "30d")
    first = listed(broker, token)
    assert first.keys() == {"signing", "standby"}
    table = run(broker, "key", "list", token=token).stdout
    assert first["signing"]["id"] in table and "standby" in table

    assert run(broker, "key", "rotate", token=token).returncode == 0
    second = listed(broker, token)
    while "scheduled" in second:
        second = listed(broker, token)
    assert second["signing"]["id"] == first["standby"]["id"]
    # The retired key signed a token for a month, so it is kept for a month.
    days = (seconds(second["retired"]["kept_until"]) - seconds(second["retired"]["signs_until"])) / 86_400
    assert 29.9 < days < 30.1

    unknown = run(broker, "key", "revoke", "nobody", token=token)
    assert (unknown.returncode, unknown.stdout) == (4, "")
    assert "No such key" in unknown.stderr
    wrong = run(broker, "key", "rotate", "--algorithm", "HS256", token=token)
    assert wrong.returncode == 2
    assert run(broker, "key", "list", token="").returncode == 3

    # The key that signed the token in use: the answer still comes, then it is dead, and a new one needs no old one.
    done = run(broker, "key", "revoke", first["signing"]["id"], "--json", token=token)
    assert done.returncode == 0, done.stderr
    assert "revoked" in [orjson.loads(line)["state"] for line in done.stdout.splitlines()]
    assert run(broker, "key", "list", token=token).returncode == 3
    assert listed(broker, created(broker))["revoked"]["id"] == first["signing"]["id"]


def seconds(instant: str) -> float:
    return datetime.fromisoformat(instant).timestamp()


def test_another_passphrase(broker: BrokerProcess, tmp_path: Path) -> None:
    before = listed(broker, created(broker))
    new = tmp_path / "new"
    new.write_text("a better passphrase\n")
    new.chmod(0o600)
    empty = tmp_path / "empty"
    empty.touch()
    refused = run(broker, "key", "rewrap", "--config", str(broker.config), "--new-passphrase-file", str(empty))
    assert (refused.returncode, "--new-passphrase-file" in refused.stderr) == (2, True)
    done = run(broker, "key", "rewrap", "--config", str(broker.config), "--new-passphrase-file", str(new))
    assert done.returncode == 0, done.stderr
    assert "2 keys" in done.stdout
    again = run(broker, "key", "rewrap", "--config", str(broker.config), "--new-passphrase-file", str(new))
    assert again.returncode == 1
    assert "keys.passphrase_file" in again.stderr and "better" not in again.stderr

    old = run(broker, "token", "create", "--config", str(broker.config), "--role", "admin", "--project", "p")
    assert old.returncode == 1
    assert "cannot be decrypted" in old.stderr and "Traceback" not in old.stderr
    # The running broker goes on, and the new passphrase opens the same keys, from the environment too.
    token = created(broker, BROKER_KEYS_PASSPHRASE="a better passphrase")
    assert listed(broker, token) == before
    held = run(broker, "key", "rotate", token=token)
    assert held.returncode == 1
    assert "another key passphrase" in held.stderr


def test_a_broker_with_the_wrong_passphrase_does_not_start(broker: BrokerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_KEYS_PASSPHRASE", "guessed-passphrase")
    with pytest.raises(PartFailed) as caught, serve(broker.database, tmp_path / "second"):
        pass
    said = str(caught.value)
    assert "cannot be decrypted" in said and "BROKER_KEYS_PASSPHRASE" in said and "revoked_at" in said
    assert "guessed-passphrase" not in said and "Traceback" not in said
    monkeypatch.setenv("BROKER_KEYS_PASSPHRASE", " ")
    with pytest.raises(PartFailed, match="BROKER_KEYS_PASSPHRASE is empty"), serve(broker.database, tmp_path / "third"):
        pass
