"""nginx as deploy/nginx configures it: a front that verifies tokens (`start`), and the plain file server that other fronts stand before
(`origin`)."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from broker.sign.token import SigningKey, TokenSigner
from deploy.fill import fill
from tests.parts.condition import wait_for
from tests.parts.front import DEPLOY, FrontPart, goes_by, need, published
from tests.parts.process import answers, find_program, free_ports, running

_MODULE = "/usr/lib/nginx/modules/ngx_http_js_module.so"
_HIDDEN = ("tmp", "locks", "records")


@contextlib.contextmanager
def keys_in(directory: Path, source: str, *options: str, log: Path) -> Iterator[None]:
    """broker-storeside-keys at work: `directory` has the keys of `source` as files, at most a second old."""
    arguments = [sys.executable, "-m", "broker.storeside.sidecar", "--jwks", source, "--directory", str(directory), "--refresh", "1"]
    with running([*arguments, *options], log=log, ready=lambda: (directory / "jwks.json").exists()):
        yield


def prepare(root: Path, state: Path) -> None:
    """The directories that the templates name."""
    for name in _HIDDEN:
        (root / ".broker" / name).mkdir(parents=True, exist_ok=True)
    state.mkdir(parents=True, exist_ok=True)


def _program() -> str:
    need(_MODULE, "libnginx-mod-http-js")
    return find_program("nginx", "apt-get install nginx")


@contextlib.contextmanager
def _nginx(configuration: Path, url: str) -> Iterator[int]:
    """The process id of the master of an nginx that serves."""
    arguments = [_program(), "-c", str(configuration), "-g", "daemon off;"]
    log = configuration.with_suffix(".out")
    with running(arguments, log=log, ready=lambda: answers(f"{url}/healthz"), end=signal.SIGTERM) as process:
        yield process.pid


@contextlib.contextmanager
def start(
    directory: Path, *, audience: str = "disk-1", signer: TokenSigner | None = None, keys: str | None = None, root: Path | None = None
) -> Iterator[FrontPart]:
    """Run nginx on `root` until the block ends. With `keys` (a URL or file) it takes its keys from there and `signer` signs."""
    root = root or directory / "root"
    state, files = directory / "state", directory / "keys"
    prepare(root, state)
    given = published(directory, signer, keys)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    values = {
        "LISTEN": f"127.0.0.1:{port}", "ROOT": str(root), "USER": "root", "AUDIENCE": audience, "ISSUER": given.signer.issuer,
        "KEYS": str(files), "STATE": str(state), "CODE": str(DEPLOY / "nginx"),
    }  # fmt: skip
    configuration = directory / "nginx.conf"
    configuration.write_text(fill((DEPLOY / "nginx" / "nginx.conf").read_text(), values))

    def publish(fresh: Sequence[SigningKey]) -> None:
        given.replace(fresh)
        wait_for(lambda: goes_by(front, fresh), "the keys did not reach nginx")

    log = state / "access.log"
    logs = (log, state / "error.log", directory / "nginx.out", directory / "keys.log")
    with keys_in(files, given.source, log=directory / "keys.log"), _nginx(configuration, url) as pid:
        front = FrontPart(url, root, audience, given.signer, pid, log, "nginx", logs, publish)
        yield front


@contextlib.contextmanager
def origin(directory: Path, root: Path) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """A file server on `root` that verifies nothing; its address and its logs."""
    state = directory / "origin"
    prepare(root, state)
    (port,) = free_ports(1)
    values = {"LISTEN": f"127.0.0.1:{port}", "ROOT": str(root), "USER": "root", "STATE": str(state), "CODE": str(DEPLOY / "nginx")}
    configuration = directory / "origin.conf"
    configuration.write_text(fill((DEPLOY / "nginx" / "origin.conf").read_text(), values))
    with _nginx(configuration, f"http://127.0.0.1:{port}"):
        yield f"127.0.0.1:{port}", (state / "access.log", state / "error.log", directory / "origin.out")


@pytest.fixture(scope="session")
def nginx_front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontPart]:
    """One for all tests of a session; each uses paths of its own."""
    with start(tmp_path_factory.mktemp("nginx")) as front:
        yield front
