"""`broker serve --check-config`: what would be used, and everything that is wrong with it, without serving."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.parts.account import other_account
from tests.parts.authority import Authority
from tests.parts.broker import serve
from tests.parts.process import find_program, listens

SECRET = "hunter2-is-a-secret"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a configuration that is right."""
    (tmp_path / "data" / "credentials").mkdir(parents=True)
    write(tmp_path / "data/keys.passphrase", SECRET)
    write(tmp_path / "data/credentials/s3-a.json", json.dumps({"access_key": "A", "secret_key": SECRET}))
    write(tmp_path / "broker.toml", f'data_dir = "{tmp_path}/data"\n')
    return tmp_path


def write(file: Path, text: str, mode: int = 0o600) -> Path:
    file.touch()
    file.chmod(mode)
    file.write_text(text)
    return file


def check(file: Path, *more: str, command: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    program = find_program("broker", "pip install -e .")
    done = subprocess.run(
        [*command, program, "serve", "--check-config", "--config", str(file), *more], capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert SECRET not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_what_is_right_is_shown(place: Path) -> None:
    done = check(place / "broker.toml")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in done.stdout.splitlines()}
    assert rows["data_dir"] == [f"{place}/data", ""]
    assert rows["http.listen"][0] == "127.0.0.1:8080"
    assert rows["credentials_dir"] == [f"{place}/data/credentials", "1 files"]
    assert rows["keys.passphrase_file"] == [f"{place}/data/keys.passphrase", "read; whether it opens the keys shows at the start"]
    assert rows["database.url"] == ["none", "a PostgreSQL beside the broker"]
    assert not (place / "data/postgres").exists(), "nothing is made"


def test_no_database_is_asked_and_no_port_is_opened(place: Path) -> None:
    write(place / "broker.toml", f'data_dir = "{place}/data"\n[database]\nurl = "postgresql://broker:{SECRET}@127.0.0.1:1/broker"\n')
    done = check(place / "broker.toml")
    assert done.returncode == 0
    assert "postgresql://broker:[hidden]@127.0.0.1:1/broker\tnot asked" in done.stdout
    assert done.stderr.splitlines() == [
        "broker: warning: database.url holds a password; better in database.password_file, a passfile or a client certificate"
    ]
    assert not listens(1)


def test_everything_that_is_wrong_comes_at_once(place: Path) -> None:
    write(place / "data/keys.passphrase", "\n")
    write(place / "data/credentials/broken.json", "{" + SECRET)
    write(place / "data/credentials/list.json", "[]")
    write(
        place / "broker.toml",
        f'data_dir = "{place}/data"\n[http]\nlisen = "x"\n[database]\n'
        'url = "postgresql://broker@db/broker?sslmode=verify-full&sslrootcert=/nowhere/ca.crt&sslkey=/nowhere/key"\n'
        f'password_file = "missing"\n[policy.ranking]\nshrapness = 1\nsharpness = [1]\n',
    )
    done = check(place / "broker.toml")
    assert done.returncode == 2
    expected = (
        "unknown field http.lisen; did you mean listen?",
        "database.url: sslrootcert: /nowhere/ca.crt: No such file or directory",
        "database.url: sslkey: /nowhere/key: No such file or directory",
        f"database.password_file: {place}/missing: No such file or directory",
        f"keys.passphrase_file: {place}/data/keys.passphrase is empty",
        "credential broken holds no JSON",
        "credential list must be a JSON object of texts",
        "policy.ranking: unknown field shrapness; did you mean sharpness?",
        "policy.ranking.sharpness: must be like its default",
    )
    for words in expected:
        assert words in done.stderr
    assert len(done.stderr.splitlines()) == len(expected)


def test_secrets_that_everybody_can_read_are_warned_of(place: Path) -> None:
    pair = Authority(place / "ca").issue("broker")
    password = write(place / "password", SECRET, 0o644)
    for path in (place / "data/keys.passphrase", place / "data/credentials/s3-a.json", pair.key):
        path.chmod(0o644)
    write(
        place / "broker.toml",
        f'data_dir = "{place}/data"\n[database]\npassword_file = "password"\n'
        f'url = "postgresql://broker@db/broker?sslmode=verify-full&sslcert={pair.certificate}&sslkey={pair.key}"\n',
    )
    done = check(place / "broker.toml")
    assert done.returncode == 0
    for path in (place / "data/keys.passphrase", place / "data/credentials/s3-a.json", pair.key, password):
        assert f"broker: warning: everybody can read the secret in {path}: chmod 600 {path}" in done.stderr
    assert len(done.stderr.splitlines()) == 4


def test_what_is_there_twice_is_warned_of(place: Path) -> None:
    for name in ("two-x", "two_x", "Upper"):
        write(place / f"data/credentials/{name}.json", "{}")
    done = check(place / "broker.toml", BROKER_CREDENTIAL_S3_A="{}")
    assert done.returncode == 0
    assert "credential s3-a is there twice: the environment variable BROKER_CREDENTIAL_S3_A hides" in done.stderr
    assert "share the environment variable BROKER_CREDENTIAL_TWO_X" in done.stderr
    assert "Upper.json is never used" in done.stderr
    assert check(place / "broker.toml", BROKER_CREDENTIAL_S3_A=SECRET).returncode == 2


def test_what_strangers_can_reach_is_warned_of(place: Path) -> None:
    write(
        place / "broker.toml",
        f'data_dir = "{place}/data"\n[http]\nlisten = "0.0.0.0:80"\nmetrics_listen = "0.0.0.0:90"\npublic_url = "http://broker.example"\n'
        '[database]\nurl = "postgresql://broker@db/broker?sslmode=require"\n'
        '[[auth.issuers]]\nissuer = "http://id.example"\naudience = "broker"\n',
    )
    done = check(place / "broker.toml")
    assert done.returncode == 0
    for words in ("http.metrics_listen", "http.public_url is not https", "add sslmode=verify-full", "auth.issuers: http://id.example"):
        assert words in done.stderr


def test_files_that_cannot_be_read(place: Path) -> None:
    """Root reads everything, so it becomes somebody else for this, having read the passphrase."""
    secret = place / "data/keys.passphrase"
    credential = place / "data/credentials/s3-a.json"
    for path in (secret, credential):
        path.chmod(0)
    root = os.geteuid() == 0
    if root:
        for path in (place / "data/credentials", *(place / "data/credentials").parents):
            if not path.stat().st_mode & 0o001:
                path.chmod(path.stat().st_mode | 0o055)
    done = check(place / "broker.toml", *(("--user", "nobody") if root else ()))
    assert done.returncode == 2
    if root and other_account() is None:  # a checkout in root's home: nobody else could run it, and that is said
        assert "cannot read this installation" in done.stderr
        return
    assert f"credential s3-a: {credential} cannot be read: Permission denied" in done.stderr
    if root:
        assert f"keys.passphrase_file\t{secret}\tread as root" in done.stdout
    else:
        assert f"keys.passphrase_file: {secret}: Permission denied" in done.stderr


@pytest.mark.parametrize("name", ["no-such-account", "root", ""])
def test_an_account_that_is_none(place: Path, name: str) -> None:
    done = check(place / "broker.toml", "--user", name)
    assert done.returncode == 2
    assert done.stderr.startswith("broker: ")


def test_a_broken_credential_closes_one_store_and_not_the_broker(database: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "credentials").mkdir(parents=True)
    write(tmp_path / "data/credentials/broken.json", "{" + SECRET)
    with serve(database, tmp_path) as broker:
        assert check(broker.config).returncode == 2
        (line,) = [json.loads(line) for line in broker.log.read_text().splitlines() if "credential broken" in line]
        assert line["level"] == "error"
        assert SECRET not in broker.log.read_text()


def test_a_certificate_and_its_key(place: Path) -> None:
    authority = Authority(place / "ca")
    pair, other = authority.issue("broker", "localhost"), authority.issue("other")
    pair.key.chmod(0o644)
    for key, code, words in (
        (pair.key, 0, f"everybody can read the secret in {pair.key}"),
        (other.key, 2, "http.tls_"),
        (place / "missing", 2, f"{place}/missing"),
    ):
        tls = f'tls_certificate = "{pair.certificate}"\ntls_key = "{key}"\n'
        write(place / "broker.toml", f'data_dir = "{place}/data"\n[http]\n{tls}')
        done = check(place / "broker.toml")
        assert done.returncode == code
        assert words in done.stderr
