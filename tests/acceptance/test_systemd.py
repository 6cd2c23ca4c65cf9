"""The units of deploy/systemd: systemd finds nothing wrong with them, and what they start runs under what they forbid."""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.parts import sandbox
from tests.parts.account import other_account
from tests.parts.process import PartMissing, answers, find_program, free_ports, running

UNITS = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
INSTALLED = "/opt/transfer-broker/bin"
EXPOSURE = 1.2
"""Of 10, by systemd's own count; what is left is the network, the host's files to read, and sockets."""


@pytest.fixture
def place() -> Iterator[Path]:
    """Stands for the root of a machine. pytest's own temporary directories let nobody else pass."""
    place = Path(tempfile.mkdtemp(prefix="systemd-"))
    place.chmod(0o711)
    yield place
    shutil.rmtree(place, ignore_errors=True)  # a PostgreSQL whose broker was killed may be about to remove its own files


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = find_program("systemd-analyze", "apt-get install systemd")
    return subprocess.run([program, "--no-pager", *map(str, arguments)], capture_output=True, text=True, check=False)


def installed_here(unit: Path, place: Path, paths: Mapping[str, str]) -> Path:
    """The unit as it would be with the program of this interpreter, and other paths."""
    text = unit.read_text()
    for before, after in {INSTALLED: str(Path(find_program("broker", "pip install -e .")).parent), **paths}.items():
        text = text.replace(before, after)
    copy = place / unit.name
    copy.write_text(text)
    return copy


def test_there_are_units() -> None:
    assert {"broker.service", "broker-storeside.service"} <= {unit.name for unit in SERVICES}


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_systemd_finds_nothing_wrong(unit: Path, place: Path) -> None:
    done = analyze("verify", "--man=no", installed_here(unit, place, {}))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_little_is_exposed(unit: Path) -> None:
    done = analyze("security", "--offline=yes", f"--threshold={int(EXPOSURE * 10)}", unit)
    assert done.returncode == 0, done.stdout + done.stderr
    (level,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert float(level) <= EXPOSURE


def test_the_account_is_one_that_systemd_makes() -> None:
    made = set(re.findall(r"^u (\S+) - ", (UNITS / "transfer-broker.sysusers.conf").read_text(), re.MULTILINE))
    wanted = {name for unit in SERVICES for name in sandbox.settings(unit).get("User", [])}
    assert wanted == made
    for unit in SERVICES:
        said = sandbox.settings(unit)
        assert ("User" in said) != ("DynamicUser" in said), "nothing runs as root"


def command_of(unit: Path, environment: Mapping[str, str]) -> list[str]:
    """ExecStart as systemd would run it."""
    (line,) = sandbox.settings(unit)["ExecStart"]
    return [
        re.sub(r"\$\{(\w+)\}", lambda name: environment[name[1]], word) for word in shlex.split(line.replace("%S", environment["STATE"]))
    ]


def sandboxed(unit: Path, command: list[str], account: str | None) -> list[str]:
    """A command that runs `command` under the filters of `unit`."""
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise PartMissing("libseccomp is not installed; install it with: apt-get install libseccomp2") from None
    user = ["--user", account] if account is not None else []
    return [sys.executable, "-I", sandbox.__file__, *user, str(unit), *command]


def test_a_broker_serves_under_the_filters(place: Path, database: str) -> None:
    """With a PostgreSQL of its own beside it, under the same filters, where somebody can be found to run that."""
    account = other_account()
    api, metrics = free_ports(2)
    for name in ("state", "etc", "credentials"):
        (place / name).mkdir(mode=0o755)
    (place / "credentials" / "keys.passphrase").write_text("a passphrase of the test")
    if account is not None:
        os.chown(place / "state", pwd.getpwnam(account).pw_uid, -1)
    paths = {"/etc/transfer-broker": f"{place}/etc", "/run/credentials/broker.service": f"{place}/credentials"}
    settings = (UNITS / "broker.toml").read_text()
    for before, after in {**paths, "/var/lib/transfer-broker": f"{place}/state", "8080": str(api), "9180": str(metrics)}.items():
        assert before in settings
        settings = settings.replace(before, after)
    if account is None and os.geteuid() == 0:
        settings += f'\n[database]\nurl = "{database}"\n'
    (place / "etc" / "broker.toml").write_text(settings)
    unit = installed_here(UNITS / "broker.service", place, paths)
    command = sandboxed(unit, command_of(unit, {"STATE": f"{place}/state"}), account)
    log = place / "broker.log"
    # Asked to end: a PostgreSQL that is left alone would clear away its files at the same time as this test.
    with running(command, log=log, ready=lambda: answers(f"http://127.0.0.1:{metrics}/healthz"), end=signal.SIGTERM) as process:
        assert answers(f"http://127.0.0.1:{api}/.well-known/jwks.json")
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^NoNewPrivs:\s1$", status, re.MULTILINE)
        assert re.search(r"^Seccomp_filters:\s3$", status, re.MULTILINE)
    assert "Traceback" not in log.read_text()


def test_a_file_server_serves_under_the_filters(place: Path) -> None:
    account = other_account()
    (port,) = free_ports(1)
    objects = place / "transfer-broker-objects"
    objects.mkdir(mode=0o700)
    keys = place / "jwks.json"
    keys.write_text('{"keys": []}')
    if account is not None:
        os.chown(objects, pwd.getpwnam(account).pw_uid, -1)
    environment = dict(line.split("=", 1) for line in (UNITS / "storeside.env").read_text().splitlines())
    assert set(environment) == {"LISTEN", "AUDIENCE", "ISSUER", "JWKS"}
    environment |= {"LISTEN": f"127.0.0.1:{port}", "JWKS": str(keys), "STATE": str(place)}
    unit = installed_here(UNITS / "broker-storeside.service", place, {})
    log = place / "storeside.log"
    command = sandboxed(unit, command_of(unit, environment), account)
    with running(command, log=log, ready=lambda: answers(f"http://127.0.0.1:{port}/healthz")):
        assert answers(f"http://127.0.0.1:{port}/some/key", (401,))
    assert "Traceback" not in log.read_text()


def test_keys_are_kept_under_the_filters(place: Path) -> None:
    account = other_account()
    keys = place / "transfer-keys"
    keys.mkdir()
    if account is not None:
        os.chown(keys, pwd.getpwnam(account).pw_uid, -1)
    jwks = place / "jwks.json"
    jwks.write_text('{"keys": []}')
    unit = installed_here(UNITS / "broker-storeside-keys.service", place, {})
    command = [*command_of(unit, {"JWKS": str(jwks), "STATE": str(place)}), "--once"]
    done = subprocess.run(sandboxed(unit, command, account), capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr
    assert (keys / "jwks.json").read_text()
    assert (keys / "jwks.json").stat().st_mode & 0o004, "the front's account has to read it"


@pytest.mark.parametrize(
    ("attempt", "refused"),
    [
        ("import socket; socket.socket(socket.AF_NETLINK)", "[Errno 97]"),
        ("import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)", "PermissionError"),
        ("import os; os.chroot('/')", "PermissionError"),
        ("import os; os.setuid(0)", "PermissionError"),
        ("import socket; socket.socket(socket.AF_INET).close(); print('allowed')", ""),
    ],
)
def test_the_filters_are_there(attempt: str, refused: str) -> None:
    done = subprocess.run(
        sandboxed(UNITS / "broker.service", [sys.executable, "-c", attempt], None), capture_output=True, text=True, check=False
    )
    if refused:
        assert refused in done.stderr.splitlines()[-1]
    else:
        assert done.stdout == "allowed\n"
