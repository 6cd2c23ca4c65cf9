"""A broker that was started with rights gives them up: before it serves, and for good. As an ordinary user it stays who it is."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker import privileges
from tests.parts.account import other_account
from tests.parts.broker import serve
from tests.parts.postgres_tls import TlsPostgres
from tests.parts.process import PartFailed, answers, find_program, free_ports

ROOT = os.geteuid() == 0
ACCOUNT = pwd.getpwnam("nobody") if ROOT else pwd.getpwuid(os.geteuid())


def status(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    return {
        name: value.strip() for name, _, value in (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    }


def low_port() -> int:
    """A port that only root may open; any free one for others."""
    if not ROOT:
        return free_ports(1)[0]
    for port in range(700, 1024):
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port below 1024")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the account may pass through, with its own `data` and secrets that only root can read, if this is root."""
    place = Path(tempfile.mkdtemp(prefix="privileges-"))
    place.chmod(0o711)
    (place / "data").mkdir(mode=0o700)
    os.chown(place / "data", ACCOUNT.pw_uid, ACCOUNT.pw_gid)
    (place / "secrets").mkdir(mode=0o700)
    yield place
    shutil.rmtree(place)


def test_root_opens_what_it_must_and_is_gone(tls_postgres: TlsPostgres, place: Path) -> None:
    secrets = place / "secrets"
    (secrets / "password").write_text(tls_postgres.password)
    (secrets / "passphrase").write_text("a passphrase that only root may read")
    url = tls_postgres.url("password", sslmode="verify-full", sslrootcert=tls_postgres.authority.certificate)
    settings = f'password_file = "{secrets}/password"\n[keys]\npassphrase_file = "{secrets}/passphrase"\n'
    if ROOT and other_account() is None:  # a checkout in root's home: nobody else could run it, and that is said
        with pytest.raises(PartFailed, match="cannot read this installation"), serve(url, place, options=["--user", ACCOUNT.pw_name]):
            pass
        return
    with serve(url, place, settings=settings, port=low_port(), options=["--user", ACCOUNT.pw_name]) as broker:
        seen = status(broker.pid)
        assert seen["Uid"].split() == [str(ACCOUNT.pw_uid)] * 4
        assert seen["Gid"].split() == [str(ACCOUNT.pw_gid)] * 4
        if ROOT:
            assert sorted(map(int, seen["Groups"].split())) == sorted(os.getgrouplist(ACCOUNT.pw_name, ACCOUNT.pw_gid))
        assert seen["NoNewPrivs"] == "1"
        assert {int(seen[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        program = find_program("broker", "pip install -e .")
        made = subprocess.run(
            [program, "token", "create", "--config", str(broker.config), "--role=admin", "--project=demo"],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        assert answers(f"{broker.url}/v1/images", (200,), headers={"Authorization": f"Bearer {made.stdout.strip()}"})
        for words in ("serving as root", "database.url holds a password"):
            assert words not in broker.log.read_text()


def test_serving_as_root_is_warned_of(database: str, tmp_path: Path) -> None:
    with serve(database, tmp_path) as broker:
        assert ("serving as root" in broker.log.read_text()) is ROOT


def test_there_is_no_way_back() -> None:
    """In a process of its own: what is given up stays given up, also for programs that it starts."""
    program = f"""
import os, subprocess
from broker import privileges
privileges.drop(privileges.account({ACCOUNT.pw_name!r}))
for attempt in (os.setuid, os.seteuid, os.setgid):
    try:
        attempt(0)
    except PermissionError:
        print("refused")
try:
    os.setgroups([0])
except PermissionError:
    print("refused")
print(privileges.rights(), *[line.split()[1] for line in open("/proc/self/status") if line.startswith("NoNewPrivs")])
print(subprocess.run(["id", "-u"], capture_output=True, text=True).stdout)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * 4 + ["[]", "1", str(ACCOUNT.pw_uid)]


def test_only_root_can_become_somebody_else(tmp_path: Path) -> None:
    """Root becomes nobody first, and then is somebody who cannot become the other."""
    other = "daemon"
    program = f"""
from broker import privileges
privileges.drop(privileges.account({ACCOUNT.pw_name!r}))
try:
    privileges.account({other!r})
except privileges.PrivilegeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"only root can become {other}; leave --user out, or start as root"


@pytest.mark.parametrize(
    ("name", "words"), [("root", "root itself"), ("no-such-account", "useradd"), ("a\0b", "no account"), ("", "no account")]
)
def test_accounts_that_will_not_do(name: str, words: str) -> None:
    with pytest.raises(privileges.PrivilegeError, match=words):
        privileges.account(name)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1 port {port}"):
            privileges.bind("127.0.0.1", port)
        file = tmp_path / "broker.toml"
        file.write_text(f'data_dir = "{tmp_path}"\n[http]\nlisten = "127.0.0.1:{port}"\n')
        program = find_program("broker", "pip install -e .")
        done = subprocess.run(
            [program, "serve", "--config", str(file), "--user", ACCOUNT.pw_name], capture_output=True, text=True, check=False, timeout=120
        )
    assert done.returncode == 1
    assert done.stderr == f"broker: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


def test_every_address_of_a_host_is_bound() -> None:
    bound = privileges.bind("localhost", 0, reuse_port=True)
    try:
        assert {listener.getsockname()[0] for listener in bound} <= {"127.0.0.1", "::1"}
        assert all(listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for listener in bound)
    finally:
        for listener in bound:
            listener.close()


def test_systemd_is_told(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sd_notify(3): one datagram when the broker answers, one when it ends."""
    place = tmp_path / "notify"
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(place))
        manager.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(place))
        with serve(database, tmp_path) as broker:
            assert manager.recv(100) == b"READY=1"
            os.kill(broker.pid, 15)
            assert manager.recv(100) == b"STOPPING=1"
