"""The main job on real stores, from the first ticket to the last byte; deploy/demo.sh makes ready for it and runs it.

Every part is a real process on 127.0.0.1: a broker with its PostgreSQL, SeaweedFS (S3) and a verifying file server, in a directory
of their own. They end with this program, however it ends. What it shows are the commands that a person would type.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from deploy import boot_image
from tests.parts import process, seaweedfs, traffic

IMAGE = "boot-image"
NEAR, FAR = "s3-az1", "disk-az2"
ALLOWED_BYTES = 1 << 20
"""What the broker's sockets may carry, whatever is moved."""

_NEEDED_BYTES = 2 << 30
_STOP_SECONDS = 20
_STEPS = 6


class DemoFailed(Exception):
    """A step did not do what it should; the text says which."""


@dataclass(frozen=True, slots=True)
class House:
    """The parts that run, and where: `place` is the directory of everything, and the commands' working directory."""

    place: Path
    url: str
    broker_pid: int
    store_pid: int
    environment: Mapping[str, str]

    def run(self, *arguments: str) -> None:
        """Show a command, run it, and let it print."""
        shown = shlex.join(("broker", *arguments))
        print(f"$ {shown}", flush=True)
        # Off a terminal there are people all the same: let lists be tables, without colours.
        as_it_is = sys.stdout.isatty() or arguments[0] in ("put", "copy", "get")
        plain = {} if as_it_is else {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "132", "LINES": "50"}
        done = subprocess.run(
            [_program("broker"), *arguments], cwd=self.place, env={**self.environment, **plain}, stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT, check=False, preexec_fn=process.die_with_parent,
        )  # fmt: skip
        if done.returncode:
            raise DemoFailed(f"`{shown}` ended with exit code {done.returncode}")

    def verify(self, file: str, sha256: str) -> None:
        """Compare what was downloaded with what was uploaded, without trusting the client's word; remove it."""
        found = _sha256(self.place / file)
        if found != sha256:
            raise DemoFailed(f"{file} is not what was uploaded: SHA-256 {found}, not {sha256}")
        print(f"  checked again here: SHA-256 of {file} is that of the image", flush=True)
        (self.place / file).unlink()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--once", is_flag=True, help="End after the last step; else everything stays up until Ctrl-C.")
@click.option("--keep", type=click.Path(path_type=Path), help="Directory for data and logs, kept; else a temporary one.")
@click.option("--port", type=click.IntRange(1, 65535), help="The broker's port; else a free one.")
def main(once: bool, keep: Path | None, port: int | None) -> None:
    """Show the main job on real stores: put, copy, ticket, get; a store dies; the broker has carried nothing."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    place = _directory(keep)
    try:
        _check_room(place)
        with _house(place, port) as house:
            moved, counted = _show(house)
            last = f"demo ok: moved {moved} bytes, broker carried {counted} bytes"
            if not once:
                print(last)
                _stay(house)
    except (DemoFailed, process.PartMissing, process.PartFailed, traffic.Uncounted, OSError, subprocess.CalledProcessError) as error:
        print(f"\ndemo failed: {error}\nThe logs of all parts are kept in {place}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _remove(place, keep)
        raise SystemExit(130) from None
    _remove(place, keep)
    if once:
        print(last)


def _terminated(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _remove(place: Path, keep: Path | None) -> None:
    if keep is None:
        shutil.rmtree(place, ignore_errors=True)


def _directory(keep: Path | None) -> Path:
    if keep is None:
        place = Path(tempfile.mkdtemp(prefix="broker-demo-"))
    else:
        place = keep.absolute()
        place.mkdir(parents=True, exist_ok=True)
        if any(place.iterdir()):
            raise click.UsageError(f"{place} is not empty")
    # PostgreSQL refuses to run as root and takes another account, which must be able to pass; nobody but root can list.
    place.chmod(0o711 if os.getuid() == 0 else 0o700)
    return place


def _check_room(place: Path) -> None:
    free = shutil.disk_usage(place).free
    if free < _NEEDED_BYTES:
        raise DemoFailed(f"{place} has {free >> 20} MiB free and {_NEEDED_BYTES >> 20} are needed; choose another place with --keep")


def _say(step: int, text: str) -> None:
    print(f"\n[{step}/{_STEPS}] {text}", flush=True)


def _program(name: str) -> str:
    return process.find_program(name, "pip install -e '.[demo]'")


@contextlib.contextmanager
def _part(words: list[str], log: Path, *urls: str) -> Iterator[subprocess.Popen[bytes]]:
    """Show a command and keep it running, until all of `urls` answer first. It is asked to end, so that it ends its own children."""
    print(f"$ {shlex.join(words)} &", flush=True)
    with process.running([_program(words[0]), *words[1:]], log=log, ready=lambda: all(map(process.answers, urls))) as part:
        try:
            yield part
        finally:
            part.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                part.wait(_STOP_SECONDS)


@contextlib.contextmanager
def _house(place: Path, port: int | None) -> Iterator[House]:
    """Steps 1 and 2: start and register everything."""
    api, metrics, disk = process.free_ports(3)
    url, disk_url = f"http://127.0.0.1:{port or api}", f"http://127.0.0.1:{disk}"
    if port is not None and process.listens(port):
        raise DemoFailed(f"something listens on port {port} already; choose another one with --port")
    listen = f'listen = "127.0.0.1:{port or api}"\nmetrics_listen = "127.0.0.1:{metrics}"\n'
    (place / "broker.toml").write_text(f'data_dir = "data"\n\n[http]\n{listen}')
    disk_root = place / "disk"
    disk_root.mkdir()

    with contextlib.ExitStack() as stack:
        _say(1, f"A broker with its PostgreSQL; a store that speaks S3 (SeaweedFS); a verifying file server. All of it in {place}")
        serve = _part(
            ["broker", "serve", "--config", "broker.toml"], place / "broker.log", f"http://127.0.0.1:{metrics}/healthz", f"{url}/v1"
        )
        broker = stack.enter_context(serve)
        print("$ weed mini … &", flush=True)
        s3 = stack.enter_context(seaweedfs.start(place / "seaweedfs"))
        words = ["broker-storeside", "--root", "disk", "--listen", f"127.0.0.1:{disk}", "--audience", FAR, "--issuer", url]
        words += ["--jwks", f"{url}/.well-known/jwks.json", "--grace", "1"]
        stack.enter_context(_part(words, place / "storeside.log", f"{disk_url}/healthz"))
        print(f"  process ids: broker {broker.pid}, SeaweedFS {s3.pid}; the file server asks the broker for its public keys, nothing else")

        house = House(place, url, broker.pid, s3.pid, _environment(place, url))
        _say(2, "Two sites with a store each; what each store really enforces is found out when it is added")
        credentials = place / "data" / "credentials"
        credentials.mkdir(exist_ok=True)
        _secret(credentials / f"{NEAR}.json", json.dumps(s3.credential))
        house.run("site", "add", "eu/az1", "--description", "this machine is here", "--network", "127.0.0.0/8")
        house.run("site", "add", "eu/az2")
        settings = ("--setting", f"bucket={s3.bucket}", "--setting", f"region={s3.region}")
        house.run(
            "store",
            "add",
            NEAR,
            "--kind",
            "s3",
            "--site",
            "eu/az1",
            "--internal",
            "--endpoint",
            s3.endpoint,
            "--credential",
            NEAR,
            *settings,
        )
        house.run("store", "add", FAR, "--kind", "http", "--site", "eu/az2", "--endpoint", disk_url, "--internal")
        yield house


def _environment(place: Path, url: str) -> dict[str, str]:
    """What the commands need to reach the broker; also written to the file `environment`, to be sourced by a shell."""
    words = ["token", "create", "--config", "broker.toml", "--role", "admin", "--project", "demo", "--ttl", "1d"]
    print(f"$ {shlex.join(['broker', *words])} > token", flush=True)
    done = subprocess.run([_program("broker"), *words], cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoFailed(f"broker token create: {done.stderr.strip()}")
    _secret(place / "token", done.stdout)
    bin = Path(sys.executable).parent
    names = {"BROKER_URL": url, "XDG_STATE_HOME": str(place / "state")}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in names.items()]
    exports.append(f'export BROKER_TOKEN="$(cat {shlex.quote(str(place / "token"))})" PATH={shlex.quote(str(bin))}:"$PATH"')
    (place / "environment").write_text("\n".join(exports) + "\n")
    return {**os.environ, **names, "BROKER_TOKEN": done.stdout.strip(), "TMPDIR": str(place)}


def _secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def _show(house: House) -> tuple[int, int]:
    """Steps 3 to 6: bytes moved between clients and stores, and bytes that the broker read and wrote meanwhile."""
    image, size, sha256 = _make_image(house.place)
    saw = traffic.check(house.broker_pid, house.url, house.environment["BROKER_TOKEN"])
    before = traffic.carried(house.broker_pid)
    format = image.suffix.removeprefix(".")

    _say(4, "Up to the first store, by a client to the second, the ranked ticket, and down from both at once")
    house.run("put", image.name, "--name", IMAGE, "--format", format, "--to", NEAR)
    house.run("copy", IMAGE, "--to", FAR)
    house.run("show", IMAGE)
    house.run("ticket", IMAGE, "--parallel", "2")
    print("  The estimate is for this machine and this image: `prior` by distance alone, `measured` from what transfers reported.")
    house.run("get", IMAGE, "-o", "from-both", "--parallel", "2")
    house.verify("from-both", sha256)

    _say(5, f"{NEAR} dies (kill -9 {house.store_pid}); the client, sent there first, goes on to {FAR} and tells the broker")
    os.kill(house.store_pid, signal.SIGKILL)
    house.run("get", IMAGE, "-o", "from-the-rest", "--prefer", NEAR, "--parallel", "1")
    house.verify("from-the-rest", sha256)
    house.run("ls", "paths", "--site", "eu/az1")
    house.run("ticket", IMAGE)

    _say(6, "What the broker carried, counted by the kernel")
    read, written = (now - then for now, then in zip(traffic.carried(house.broker_pid), before, strict=True))
    moved, counted = 5 * size, read + written  # put, copy (down and up), get, get; each verified to the last byte
    print(f"  rchar and wchar of /proc/{house.broker_pid}/io, from before the first put until now: all that the broker read and wrote,")
    print("  on sockets (clients, stores, PostgreSQL), files and pipes alike. Before it was used, the counter was tried:")
    print(f"  a request and an answer of known sizes raised it by {saw[0]:,} (read) and {saw[1]:,} (written) bytes, as they should.")
    print(f"  clients and stores moved {moved:,} bytes; the broker read {read:,} and wrote {written:,}: {counted / moved:.2%}")
    if counted >= ALLOWED_BYTES:
        raise DemoFailed(f"the broker carried {counted} bytes, and {ALLOWED_BYTES} are allowed")
    return moved, counted


def _make_image(place: Path) -> tuple[Path, int, str]:
    """Step 3: the image, its size and its SHA-256."""
    _say(3, f"A disk that a PC boots, {boot_image.SIZE >> 20} MiB of it, made by deploy/boot_image.py")
    image = boot_image.make(place)
    if image.suffix == ".raw":
        print("  qemu-img is not installed, so it stays a raw disk (apt-get install qemu-utils)")
    size, sha256 = image.stat().st_size, _sha256(image)
    print(f"  {image.name}: {size:,} bytes, SHA-256 {sha256}", flush=True)
    return image, size, sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stay(house: House) -> None:
    """Wait for Ctrl-C, with everything running but the store that was killed."""
    print(f"""
Everything but {NEAR} stays up. In another shell:

  . {shlex.quote(str(house.place / "environment"))}
  broker ls                                  # images; also stores, replicas, sites, paths
  broker ticket {IMAGE}                   # the ranking, and why a store is not in it
  broker get {IMAGE} -o /tmp/{IMAGE}
  broker put SOME-FILE --name mine --to {FAR}
  curl -s $BROKER_URL/openapi.json           # the contract

In a browser, {house.url} is the status page; sign in with the token in {house.place / "token"}

Ctrl-C ends everything.""", flush=True)  # fmt: skip
    try:
        while True:
            time.sleep(1)
            if not Path(f"/proc/{house.broker_pid}").exists():
                raise DemoFailed("the broker has ended")
    except KeyboardInterrupt:
        print("\nending everything")


if __name__ == "__main__":
    main()
