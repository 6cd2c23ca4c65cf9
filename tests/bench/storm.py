"""A real boot storm: machines in network namespaces, stores behind rate limits, one of which turns slow and one dies.

Every machine and every store has a network namespace and an address of its own, all on one bridge; what a store sends is limited
(``tc tbf``). All machines want one image at once. Cases: ``loop`` is our client with tickets, ``nearest`` and ``random`` are our
client with the order of stores given to it (the next one when one fails, as mirrors' users do), ``curl`` is curl from the best
store. `ratio` is the makespan over the least that anybody could reach (``simulate.bound``: a maximum flow over what the stores
could send, second by second, known in advance). Needs root, iproute2 and curl. Every client checks the image's digest; a machine
that got no image fails the run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from broker import config
from broker.client.api import Broker
from broker.sign.token import TokenSigner, generate_key
from tests.bench.options import at_least
from tests.bench.simulate import bound
from tests.bench.simulate.scene import Change, Group, Node, Scene, Want
from tests.bench.simulate.scene import Store as SceneStore
from tests.parts import seaweedfs, storeside
from tests.parts.broker import serve
from tests.parts.postgres import Postgres
from tests.parts.process import die_with_parent, find_program

BRIDGE, NET = "storm0", "10.77"
GATEWAY = f"{NET}.0.1"
PAYLOAD = 1448 / 1514
"""Share of what tbf counts that is content: the rest is Ethernet, IP and TCP."""

MEGABYTE = 1_000_000
SITES = ("eu/az1", "eu/az2", "eu/az3")
CASES = ("loop", "nearest", "random", "curl")


@dataclass(frozen=True)
class Limit:
    """What one store may send: megabytes a second, and what becomes of it during the storm."""

    name: str
    address: str
    site: str
    rate: float
    slots: int


LIMITS = (
    Limit("weed", f"{NET}.0.11", SITES[0], 24, 10),
    Limit("disk-1", f"{NET}.0.12", SITES[1], 16, 8),
    Limit("disk-2", f"{NET}.0.13", SITES[2], 8, 4),
)
SLOW, DYING = LIMITS[0], LIMITS[2]


@dataclass
class Field:
    """Where it happens."""

    place: Path
    url: str
    tokens: Sequence[str]
    image: UUID
    sha256: str
    machines: Sequence[str]
    dying_pid: int


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench storm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machines", type=at_least(1), default=24, help="24 by default")
    parser.add_argument("--size", type=at_least(1), default=64, help="of the image, in MB; 64 by default")
    parser.add_argument("--case", action="append", choices=CASES, help="all by default; may be repeated")
    parser.add_argument("--runs", type=at_least(1), default=1, help="of each case; 1 by default")
    parser.add_argument("--slow-at", type=float, default=8.0, help="when weed turns to a fifth of its rate, in seconds")
    parser.add_argument("--dies-at", type=float, default=12.0, help="when disk-2 is killed, in seconds; 0: never")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("python -m tests.bench storm needs root: it makes network namespaces")
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("curl", "curl")):
        find_program(program, f"apt-get install {package}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the namespaces go, too
    least = lower_bound(options.machines, options.size * MEGABYTE, options.slow_at, options.dies_at)
    for run in range(options.runs):
        for case in options.case or CASES:
            with network(options.machines) as machines, stage(machines, options.size * MEGABYTE) as here:
                seconds = asyncio.run(storm(here, case, options.slow_at, options.dies_at, run))
            line = {
                "bench": "storm", "case": case, "value": round(max(seconds), 2), "unit": "s", "ratio": round(max(seconds) / least, 3),
                "comparator": "fluid lower bound", "comparator_value": round(least, 2),
                "p50_s": round(sorted(seconds)[len(seconds) // 2], 2), "machines": options.machines, "size_mb": options.size,
            }  # fmt: skip
            print(json.dumps(line), flush=True)


def lower_bound(machines: int, size: int, slow_at: float, dies_at: float) -> float:
    """The least makespan, by what the stores can send in each second."""
    stores = [SceneStore(limit.name, limit.site, limit.rate * MEGABYTE * PAYLOAD) for limit in LIMITS]
    changes = [Change(slow_at, SLOW.name, 0.2)] + ([Change(dies_at, DYING.name, 0.0)] if dies_at else [])
    group = Group("eu", machines, 1e9)
    nodes = [Node("eu", 1e9, "", (0.0, 0.0), False)] * machines
    wants = [Want(0.0, number, 0) for number in range(machines)]
    return bound.makespan(Scene("storm", stores, {}, nodes, [group], size, [tuple(s.name for s in stores)], wants, changes))


# -- the network


@contextlib.contextmanager
def network(count: int) -> Iterator[list[str]]:
    """A bridge with the stores' addresses and limits, and `count` namespaces; their names."""
    names = [f"m{number}" for number in range(count)]
    with contextlib.ExitStack() as stack:
        _ip("link", "add", BRIDGE, "type", "bridge")
        stack.callback(_ip, "link", "del", BRIDGE)
        _ip("addr", "add", f"{GATEWAY}/16", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for limit in LIMITS:
            _host(stack, _space(limit), limit.address)
            _limit("add", limit, limit.rate)
        for number, name in enumerate(names):
            _host(stack, name, f"{NET}.{1 + number % len(SITES)}.{1 + number}")
        yield names


def _host(stack: contextlib.ExitStack, name: str, address: str) -> None:
    """A namespace with an address on the bridge."""
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    _ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", f"v{name}", "master", BRIDGE, "up")
    _ip("-n", name, "addr", "add", f"{address}/16", "dev", "eth0")
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "link", "set", "eth0", "up")


def _space(limit: Limit) -> str:
    return f"storm-{limit.name}"


def _limit(change: str, limit: Limit, rate: float) -> None:
    """Add or change what a store may send, in megabytes a second."""
    shape = ["tbf", "rate", f"{round(rate * 8 * MEGABYTE)}bit", "burst", "256kb", "latency", "200ms"]
    subprocess.run(["tc", "-n", _space(limit), "qdisc", change, "dev", "eth0", "root", *shape], check=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _inside(limit: Limit) -> list[str]:
    return ["ip", "netns", "exec", _space(limit)]


# -- the stage


@contextlib.contextmanager
def stage(machines: Sequence[str], size: int) -> Iterator[Field]:
    """A broker and three stores that have the image."""
    place = Path(tempfile.mkdtemp(prefix="bench-storm-"))
    place.chmod(0o711)
    try:
        with contextlib.ExitStack() as stack:
            database = stack.enter_context(Postgres(None)).create()
            broker = stack.enter_context(serve(database, place / "broker", host=GATEWAY))
            settings = config.load(broker.config)
            admin = broker.token("admin")
            environment = {**os.environ, "BROKER_URL": broker.url, "BROKER_TOKEN": admin, "XDG_STATE_HOME": str(place)}

            def run(*arguments: str) -> str:
                command = [find_program("broker", "pip install -e ."), *arguments]
                return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout.decode()

            signer = TokenSigner([generate_key("ES256", 0)], settings.http.public_url)
            weed = stack.enter_context(seaweedfs.start(place / "weed", host=LIMITS[0].address, prefix=_inside(LIMITS[0])))
            settings.credentials_dir.mkdir(parents=True, exist_ok=True)
            credential = settings.credentials_dir / "weed.json"
            credential.touch(mode=0o600)
            credential.write_text(json.dumps(weed.credential))
            for number, site in enumerate(SITES, 1):
                run("site", "add", site, "--network", f"{NET}.{number}.0/24")
            disks = {}
            for limit in LIMITS:
                common = ["--site", limit.site, "--read-slots", str(limit.slots), "--read-bandwidth", str(round(limit.rate * MEGABYTE))]
                if limit.name == "weed":
                    kind = ["--kind", "s3", "--internal", "--endpoint", weed.endpoint, "--credential", "weed",
                            "--setting", f"bucket={weed.bucket}", "--setting", f"region={weed.region}"]  # fmt: skip
                else:
                    (place / limit.name).mkdir()
                    disks[limit.name] = stack.enter_context(
                        storeside.start(
                            place / limit.name, audience=limit.name, signer=signer, keys=f"{broker.url}/.well-known/jwks.json",
                            host=limit.address, prefix=_inside(limit),
                        )
                    )  # fmt: skip
                    kind = ["--kind", "http", "--internal", "--endpoint", disks[limit.name].url]
                run("store", "add", limit.name, *kind, *common)
            source = place / "image"
            content = random.Random(7).randbytes(size)
            source.write_bytes(content)
            run("put", str(source), "--name", "image", "--to", "weed", "-q")
            for limit in LIMITS[1:]:
                run("copy", "image", "--to", limit.name, "-q")
            tokens = [broker.token("member", subject=f"machine-{number}") for number in range(len(machines))]
            image = UUID(json.loads(run("show", "image", "--json"))["id"])
            yield Field(place, broker.url, tokens, image, hashlib.sha256(content).hexdigest(), machines, disks[DYING.name].pid)
    finally:
        shutil.rmtree(place, ignore_errors=True)


# -- the storm


async def storm(here: Field, case: str, slow_at: float, dies_at: float, run: int) -> list[float]:
    """Seconds that each machine needed, in any order."""
    draw = random.Random(run)
    commands = [await _command(here, case, number, draw) for number in range(len(here.machines))]
    began = time.monotonic()
    trouble = asyncio.create_task(_trouble(here, slow_at, dies_at))
    try:
        return await asyncio.gather(*(_machine(here, number, command, began) for number, command in enumerate(commands)))
    finally:
        trouble.cancel()


async def _trouble(here: Field, slow_at: float, dies_at: float) -> None:
    await asyncio.sleep(slow_at)
    await asyncio.to_thread(_limit, "change", SLOW, SLOW.rate / 5)
    if dies_at:
        await asyncio.sleep(dies_at - slow_at)
        os.kill(here.dying_pid, signal.SIGKILL)


async def _command(here: Field, case: str, number: int, draw: random.Random) -> str:
    """What the machine runs, as a shell's line; its last word is the file."""
    get = f"{find_program('broker', 'pip install -e .')} get image -q --wait 3600 -o image"
    if case == "loop":
        return get
    if case == "curl":
        async with Broker(here.url, here.tokens[number]) as broker:
            ticket = await broker.download_ticket(image=here.image, only=[SLOW.name])  # the best store, as far as one can know
            await broker.release(ticket.id)  # curl knows of no leases; the URL stays good
        return f"curl -sSf -o image '{ticket.sources[0].url}'"
    stores = [limit.name for limit in LIMITS]
    mine = number % len(SITES)
    order = draw.sample(stores, len(stores)) if case == "random" else [stores[mine], *stores[:mine], *stores[mine + 1 :]]
    return " || ".join(f"{get} --parallel 1 --from {store}" for store in order)


async def _machine(here: Field, number: int, command: str, began: float) -> float:
    home = here.place / f"machine-{number}"
    home.mkdir()
    environment: Mapping[str, str] = {
        **os.environ, "BROKER_URL": here.url, "BROKER_TOKEN": here.tokens[number], "XDG_STATE_HOME": str(home), "HOME": str(home),
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", here.machines[number], "sh", "-c", command, cwd=home, env=environment, preexec_fn=die_with_parent,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await process.communicate()
    seconds = time.monotonic() - began
    got = home / "image"
    if process.returncode != 0 or not got.exists() or await asyncio.to_thread(_digest, got) != here.sha256:
        raise SystemExit(f"machine {number} ended with {process.returncode}: {said.decode(errors='replace')[-1000:]}")
    got.unlink()
    return seconds


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
