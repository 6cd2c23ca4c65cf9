"""``broker-storeside-keys``: the issuer's keys as files, for fronts that read keys only when they start or reload (nginx, HAProxy).

Reads the keys as the file server does (`broker.storeside.jwks`), writes them into a directory of its own, and lets the front
reload when they have changed. Rules:

* Each file is replaced in one step. A key's file is there before anything names it, and goes after nothing names it any more.
* What was not read for `keep_seconds` counts no longer: an empty set takes its place (fail closed). The age is that of
  ``jwks.json``, so a restart does not begin to count anew.
* A reload that failed, or that was prevented by a crash, is due (``.reload``) and tried again.
* Nothing is written, and nothing reloaded, when the keys are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shlex
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import click
import jwt
import orjson
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.storeside.jwks import RETRY_SECONDS, KeySource
from broker.storeside.refused import Refused
from broker.storeside.verify import Keys

JWKS = "jwks.json"
RELOAD_SECONDS = 30.0
"""A command to reload has so long to end."""

_CLOCK_SECONDS = 300.0
"""Files from further in the future than this have no age that could be believed."""

_KID = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
_PLACE = re.compile(r"[A-Za-z0-9_./-]+\Z")
_PUBLIC = b"-----BEGIN PUBLIC KEY-----"
_HAPROXY = ("ES256", "RS256")
_log = logging.getLogger("broker.storeside")

Reload = Callable[[], Awaitable[bool]]
"""Makes the front read the files; whether that worked."""


def files_of(keys: Keys, directory: Path) -> dict[str, bytes]:
    """What lies in `directory` (absolute) when these are the keys, in the order in which it is to be written."""
    named = {kid: key for kid, key in sorted(keys.items()) if _KID.match(kid)}
    files = {f"{kid}.pem": _pem(key) for kid, key in named.items()}
    spoken = {kid: key.algorithm_name for kid, key in named.items() if key.algorithm_name in _HAPROXY}
    rules = [f'    http-request deny unless {{ str(),jwt_verify("{alg}","{directory}/{kid}.pem") 1 }}' for kid, alg in spoken.items()]
    preload = [
        "# Never used: HAProxy loads, at start, the keys that a configuration names.",
        "backend transfer_token_keys",
        "    mode http",
    ]
    return files | {
        "haproxy.cfg": _lines([*preload, *rules]),
        "pem.map": _lines(f"{kid} {directory}/{kid}.pem" for kid in spoken),
        "algorithm.map": _lines(f"{kid} {alg}" for kid, alg in spoken.items()),
        JWKS: orjson.dumps({"keys": [_jwk(kid, key) for kid, key in named.items()]}),
    }


def _lines(lines: Iterator[str] | list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _pem(key: jwt.PyJWK) -> bytes:
    pem: bytes = key.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def _jwk(kid: str, key: jwt.PyJWK) -> dict[str, object]:
    members = key.Algorithm.to_jwk(key.key, as_dict=True)
    return {name: value for name, value in members.items() if name != "key_ops"} | {"kid": kid, "alg": key.algorithm_name, "use": "sig"}


class Mirror:
    """A directory with the keys of `source`."""

    def __init__(self, source: KeySource, directory: Path, keep_seconds: float, reload: Reload | None) -> None:
        self._source = source
        self._directory = directory
        self._keep_seconds = keep_seconds
        self._reload = reload
        self._due = directory / ".reload"

    async def round(self) -> bool:
        """Read, write, reload, each if need be. Whether all of it worked. Raises `OSError` when the directory cannot be written."""
        began = time.monotonic()
        await self._source.first()
        read = self._source.age_seconds <= time.monotonic() - began
        if read:
            self._write(self._known())
        elif self._age_seconds() > self._keep_seconds:
            if (self._directory / JWKS).exists():
                _log.warning("the keys were not read for %.0f s: nothing is accepted any more", self._keep_seconds)
            else:
                _log.warning("no keys were read yet: an empty set is written, with which nothing is accepted; is --jwks right?")
            self._write({})
        return await self._reloaded() and read

    def _known(self) -> Keys:
        try:
            return self._source.keys()
        except Refused:  # the issuer says that there are none
            return {}

    def _age_seconds(self) -> float:
        """How long ago the keys in the directory were read."""
        try:
            age = time.time() - (self._directory / JWKS).stat().st_mtime
        except FileNotFoundError:
            return float("inf")
        return age if age > -_CLOCK_SECONDS else float("inf")

    def _write(self, keys: Keys) -> None:
        wanted = files_of(keys, self._directory)
        with self._alone():
            changed = {name: content for name, content in wanted.items() if _content(self._directory / name) != content}
            dead = [
                path for path in self._directory.glob("*.pem") if path.name not in wanted and (_content(path) or b"").startswith(_PUBLIC)
            ]
            if changed or dead:
                if self._reload is not None:
                    self._due.touch()
                for name, content in changed.items():
                    _replace(self._directory / name, content)
                for path in dead:
                    path.unlink(missing_ok=True)
                _log.info("keys written: %s", " ".join(name.removesuffix(".pem") for name in wanted if name.endswith(".pem")) or "none")
            os.utime(self._directory / JWKS)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep others that write the same directory out."""
        with (self._directory / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    async def _reloaded(self) -> bool:
        if self._reload is None or not self._due.exists():
            return True
        if not await self._reload():
            return False
        self._due.unlink(missing_ok=True)
        return True


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


# -- how a front is told


def by_command(command: list[str]) -> Reload:
    """Run a command, without a shell."""

    async def run() -> bool:
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
        except OSError as error:
            _log.warning("the front cannot be reloaded: %s: %s", command[0], error.strerror)
            return False
        try:
            async with asyncio.timeout(RELOAD_SECONDS):
                status = await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            _log.warning("the front cannot be reloaded: %s did not end within %.0f s", command[0], RELOAD_SECONDS)
            return False
        if status:
            _log.warning("the front cannot be reloaded: %s ended with %d; it is tried again", command[0], status)
        return status == 0

    return run


def by_signal(pid_file: Path, number: signal.Signals) -> Reload:
    """Signal the process in a file. One that does not run reads the keys when it starts."""

    async def send() -> bool:
        try:
            pid = int(pid_file.read_text())
            if pid <= 1:  # would mean groups of processes, or init
                raise ValueError("no process id")
            os.kill(pid, number)
        except (FileNotFoundError, ProcessLookupError):
            _log.info("the front does not run: it reads the keys when it starts")
        except (OSError, ValueError, OverflowError) as error:
            _log.warning("the front cannot be reloaded by %s: %s", pid_file, error if isinstance(error, OSError) else "no process id")
            return False
        return True

    return send


# -- the program


async def run(mirror: Mirror, refresh_seconds: float) -> None:
    """Keep the directory up to date until SIGTERM or SIGINT; SIGHUP reads at once. Raises `OSError`."""
    stop, now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        stop.set()
        now.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, now.set)
    ready = False
    while not stop.is_set():
        now.clear()
        done = await mirror.round()
        if not ready:
            _tell_systemd()
            ready = True
        pause = refresh_seconds if done else min(RETRY_SECONDS, refresh_seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await now.wait()


def _tell_systemd() -> None:
    """sd_notify(3), for ``Type=notify``: the first keys are there, or known not to be."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)


def _signal(_context: click.Context, _parameter: click.Parameter, name: str) -> signal.Signals:
    try:
        return signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"]
    except KeyError:
        raise click.BadParameter("must be a signal's name, such as HUP or USR2") from None


def _command(_context: click.Context, _parameter: click.Parameter, text: str | None) -> list[str] | None:
    try:
        words = None if text is None else shlex.split(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if words == []:
        raise click.BadParameter("must be a command")
    return words


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--jwks", required=True, metavar="URL|FILE", help="Where the broker's public keys are.")
@click.option("--directory", required=True, type=click.Path(file_okay=False, path_type=Path), help="For the files, and nothing else.")
@click.option("--refresh", default=60.0, show_default=True, type=click.FloatRange(min=1), help="Seconds between readings of the keys.")
@click.option(
    "--keep",
    default=86400.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Seconds for which known keys stay while the broker is away. Then there are none.",
)
@click.option("--reload", "command", callback=_command, metavar="COMMAND", help='What reloads the front, such as "nginx -s reload".')
@click.option("--pid-file", type=click.Path(dir_okay=False, path_type=Path), help="Of the front: it is reloaded by a signal.")
@click.option("--signal", "number", default="HUP", show_default=True, callback=_signal, help="The signal for the process of --pid-file.")
@click.option("--once", is_flag=True, help="Read once, write, reload if need be. Ends with 1 when the keys were not read.")
def main(
    jwks: str,
    directory: Path,
    refresh: float,
    keep: float,
    command: list[str] | None,
    pid_file: Path | None,
    number: signal.Signals,
    once: bool,
) -> None:
    """Write the broker's public keys into a directory, and reload the web server that reads them there.

    For each key KID.pem (SubjectPublicKeyInfo); jwks.json; and for HAProxy haproxy.cfg, pem.map and algorithm.map. Nothing in
    them is secret. SIGHUP reads at once.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if command is not None and pid_file is not None:
        raise click.UsageError("--reload and --pid-file exclude each other")
    directory = Path(os.path.abspath(directory))
    if not _PLACE.match(str(directory)):
        raise click.UsageError("--directory: letters, digits and ._-/ only: HAProxy's files name it")
    reload = by_command(command) if command is not None else by_signal(pid_file, number) if pid_file is not None else None
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        mirror = Mirror(KeySource(jwks, refresh_seconds=refresh, keep_seconds=keep), directory, keep, reload)
        if not once:
            asyncio.run(run(mirror, refresh))
        elif not asyncio.run(mirror.round()):
            raise SystemExit(1)
    except OSError as error:
        raise click.ClickException(f"{error.filename or directory} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    main()
