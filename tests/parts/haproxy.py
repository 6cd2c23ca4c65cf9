"""HAProxy as deploy/haproxy configures it, before a file server that verifies nothing, or before a storeside."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from broker.sign.token import SigningKey, TokenSigner
from deploy.fill import fill
from tests.parts.condition import wait_for
from tests.parts.front import DEPLOY, FrontPart, goes_by, published
from tests.parts.nginx import keys_in, origin
from tests.parts.process import answers, find_program, free_ports, running


@contextlib.contextmanager
def start(
    directory: Path,
    *,
    audience: str = "disk-1",
    signer: TokenSigner | None = None,
    keys: str | None = None,
    root: Path | None = None,
    storeside: str | None = None,
) -> Iterator[FrontPart]:
    """Run HAProxy until the block ends, before nginx on `root` or the storeside with the URL `storeside` (which has `root`).

    With `keys` (a URL or file) it takes its keys from there and `signer` signs.
    """
    root = root or directory / "root"
    files, log, pid_file = directory / "keys", directory / "haproxy.log", directory / "haproxy.pid"
    given = published(directory, signer, keys)
    subprocess.run(
        [sys.executable, "-m", "broker.storeside.sidecar", "--jwks", given.source, "--directory", str(files), "--once"], check=True
    )
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        if storeside is None:
            behind, logs = stack.enter_context(origin(directory, root))
        else:
            behind, logs = urlsplit(storeside).netloc, ()
        values = {
            "LISTEN": f"127.0.0.1:{port}", "BACKEND": behind, "STORESIDE": "yes" if storeside else "no", "AUDIENCE": audience,
            "ISSUER": given.signer.issuer, "KEYS": str(files),
        }  # fmt: skip
        configuration = directory / "haproxy.cfg"
        configuration.write_text(fill((DEPLOY / "haproxy" / "haproxy.cfg").read_text(), values))
        arguments = [find_program("haproxy", "apt-get install haproxy"), "-W", "-p", str(pid_file)]
        arguments += ["-f", str(configuration), "-f", str(files / "haproxy.cfg")]
        ready = running(arguments, log=log, ready=lambda: answers(f"{url}/healthz"), end=signal.SIGTERM)
        process = stack.enter_context(ready)
        reload = ("--pid-file", str(pid_file), "--signal", "USR2")
        stack.enter_context(keys_in(files, given.source, *reload, log=directory / "keys.log"))

        def publish(fresh: Sequence[SigningKey]) -> None:
            given.replace(fresh)
            wait_for(lambda: goes_by(front, fresh), "the keys did not reach HAProxy")

        front = FrontPart(
            url, root, audience, given.signer, process.pid, log, "haproxy", (log, *logs, directory / "keys.log"), publish
        )  # fmt: skip
        yield front


@pytest.fixture(scope="session")
def haproxy_front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontPart]:
    """One for all tests of a session; each uses paths of its own."""
    with start(tmp_path_factory.mktemp("haproxy")) as front:
        yield front
