"""``python -m tests.storms volumes``: the fastest transfer is none, on a real Ceph cluster and on a real file system that shares blocks.

An image lies at a file server, in a pool (RBD) and on a mount (XFS in a loop device; needs root). An agent registers the latter two
by what it reads there. Then a machine at that site downloads, clones the volume that its ticket names, and takes the file that its
ticket names; each result is compared. A line of JSON for each, with the bytes that the broker's process read and wrote meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.parts import traffic
from tests.parts.ceph import Ceph, ceph_in
from tests.parts.cluster import Brokers, brokers_on, disk_of
from tests.parts.postgres import Postgres
from tests.parts.process import find_program

SITE = "eu/az1"


@dataclass(frozen=True)
class Stage:
    """A broker, a machine at `SITE`, and the directory in which it works."""

    brokers: Brokers
    place: Path

    def broker(self, *arguments: str, stdin: subprocess.Popen[bytes] | None = None, role: str = "admin") -> str:
        """What a command of ours prints."""
        environment = {**os.environ, "BROKER_URL": self.brokers.running[0].url, "BROKER_TOKEN": self.brokers.token(role)}
        program = find_program("broker", "pip install -e '.[test]'")
        done = subprocess.run(
            [program, *arguments], env=environment, cwd=self.place, stdin=stdin.stdout if stdin is not None else None,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"broker {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def handle(self, image: str, scheme: str) -> str:
        """What a ticket names for who can open such a thing; any HTTP client can ask for it."""
        body = json.dumps({"operation": "download", "image": image, "schemes": [scheme]}).encode()
        headers = {"Authorization": f"Bearer {self.brokers.token('member')}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.brokers.running[0].url}/v1/tickets", body, headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(json.load(response)["sources"][0]["url"])

    @contextlib.contextmanager
    def told(self, what: str, size: int, **more: object) -> Iterator[dict[str, object]]:
        """Time what is done, count what the broker carries meanwhile, and print both."""
        pid = self.brokers.running[0].pid
        before, began = sum(traffic.carried(pid)), time.monotonic()
        seen: dict[str, object] = {}
        yield seen
        spent = time.monotonic() - began
        line = {
            "storm": "volumes",
            "what": what,
            "bytes": size,
            "seconds": round(spent, 3),
            "broker_bytes": sum(traffic.carried(pid)) - before,
        }
        print(json.dumps({**line, **more, **seen}), flush=True)


def _pool(stage: Stage, ceph: Ceph, image: str, blob: str, disk: Path) -> None:
    """Put the disk into the pool, have an agent register it, and clone it from a ticket's handle."""
    name = f"{ceph.pool}/debian"
    ceph.run("rbd", "import", "--no-progress", str(disk), name)
    ceph.run("rbd", "snap", "create", "--no-progress", f"{name}@v1")
    ceph.run("rbd", "snap", "protect", f"{name}@v1")
    stage.broker("store", "add", "ceph-1", "--kind", "rbd", "--site", SITE, "--endpoint", ceph.endpoint)
    with subprocess.Popen(ceph.command("rbd", "export", "--no-progress", f"{name}@v1", "-"), stdout=subprocess.PIPE) as export:
        stage.broker("replica", "register", blob, "-", "--store", "ceph-1", "--key", "debian@v1", stdin=export, role="service")
    size = disk.stat().st_size
    with stage.told("a volume is cloned", size) as seen:
        handle = stage.handle(image, "rbd")
        cluster, _, snapshot = handle.removeprefix("rbd://").partition("/")
        assert cluster == ceph.fsid, handle
        ceph.run("rbd", "clone", snapshot, f"{ceph.pool}/vm-1")
        seen["handle"] = handle
    with subprocess.Popen(ceph.command("rbd", "export", "--no-progress", f"{ceph.pool}/vm-1", "-"), stdout=subprocess.PIPE) as export:
        assert export.stdout is not None
        assert hashlib.file_digest(export.stdout, "sha256").digest() == _sha256(disk)


@contextlib.contextmanager
def _mounted(place: Path, size: int) -> Iterator[Path]:
    """A new XFS in a file, mounted."""
    file, mount = place / "xfs", place / "mount"
    with file.open("wb") as image:
        image.truncate(max(512 << 20, 4 * size))
    mount.mkdir()
    subprocess.run([find_program("mkfs.xfs", "apt-get install xfsprogs"), "-q", "-m", "reflink=1", str(file)], check=True)
    subprocess.run(["mount", "-o", "loop", str(file), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def _mount(stage: Stage, image: str, blob: str, disk: Path) -> None:
    """Lay the disk on a mount, have an agent register it, and get it by a ticket into the same file system."""
    size = disk.stat().st_size
    with _mounted(stage.place, size) as mount:
        (mount / "images").mkdir()
        there = mount / "images/debian.raw"
        there.write_bytes(disk.read_bytes())
        stage.broker("store", "add", "nfs-1", "--kind", "path", "--site", SITE, "--endpoint", f"file://{mount}/images")
        stage.broker("replica", "register", blob, str(there), "--store", "nfs-1", role="service")
        os.sync()
        before = os.statvfs(mount)
        with stage.told("a file is shared", size) as seen:
            stage.broker("get", image, "-o", str(mount / "vm-1.raw"), "--from", "nfs-1", role="member")
            os.sync()
            after = os.statvfs(mount)
            seen["bytes_taken_on_disk"] = (before.f_bfree - after.f_bfree) * before.f_frsize
        assert _sha256(mount / "vm-1.raw") == _sha256(disk)


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def run(brokers: Brokers, place: Path, size: int) -> None:
    """Everything, in turn."""
    stage, disk = Stage(brokers, place), place / "disk.raw"
    with disk.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    with disk_of(brokers, place / "objects") as objects:
        stage.broker("site", "add", SITE, "--network", "127.0.0.0/8")
        stage.broker("store", "add", "disk", "--kind", "http", "--site", SITE, "--endpoint", objects.url, "--internal")
        image = stage.broker("put", str(disk), "--name", "debian", "--format", "raw").strip()
        blob = stage.broker("ls", "replicas").split("\t")[1]
        with stage.told("a download, to compare with", size):
            stage.broker("get", image, "-o", "copy.raw", role="member")
        _mount(stage, image, blob, disk)
        with ceph_in(place / "ceph") as ceph:
            _pool(stage, ceph, image, blob, disk)
    print("each result had the disk's SHA-256")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.storms volumes", description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="size of the disk")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="storm-") as place,
        Postgres(None) as postgres,
        brokers_on(postgres.create(), Path(place), 1) as brokers,
    ):
        run(brokers, Path(place), given.mib << 20)


if __name__ == "__main__":
    main()
