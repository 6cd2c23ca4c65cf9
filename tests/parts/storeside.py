"""The verifying file server as a real process, with a key to sign tokens for it.

`start` is a context manager that the demo and the benchmarks use as well; `storeside` is the fixture of the tests: call it
for a server of one's own, or take `storeside_part`, which all tests of a session share.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from broker.claims import TransferToken
from broker.sign.token import TokenSigner, generate_key, jwks
from tests.parts.process import answers, free_ports, running

ISSUER = "http://broker.test"


@dataclass(frozen=True, slots=True)
class StoresidePart:
    """A running server: its URL, its directory, its name in tokens, who signs them, its process id, its log, and where its
    metrics are."""

    url: str
    root: Path
    audience: str
    signer: TokenSigner
    pid: int
    log: Path
    metrics_url: str = field(default="", kw_only=True)

    def claims(self, method: str, path: str, **claims: Any) -> TransferToken:
        """A token for `method` on `path` for ten minutes; `claims` are fields of TransferToken."""
        now = time.time()
        fields: dict[str, Any] = {"issuer": ISSUER, "audience": self.audience, "subject": "test", "method": method, "path": path}
        fields |= {"expires_at": now + 600, "not_before": now, "id": secrets.token_hex(8)}
        return TransferToken(**(fields | claims))

    def token(self, method: str, path: str, **claims: Any) -> str:
        return self.signer.sign(self.claims(method, path, **claims), time.time())

    def signed(self, method: str, path: str, **claims: Any) -> str:
        """The URL of `path` with such a token."""
        return f"{self.url}{quote(path)}?token={self.token(method, path, **claims)}"


@contextlib.contextmanager
def start(
    directory: Path,
    *,
    audience: str = "disk-1",
    signer: TokenSigner | None = None,
    keys: str | None = None,
    root: Path | None = None,
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
    options: Sequence[str] = (),
    module: str = "broker.storeside.server",
) -> Iterator[StoresidePart]:
    """Run the server on `root` (by default in `directory`, which also takes its key set and log) until the block ends.

    With `keys` (a URL or file) the server takes its keys from there and `signer` signs; else a fresh key is made.
    `prefix` is what runs the server: ``ip netns exec NAME``. `options` are given to it as well; `module` is what has its ``main``.
    """
    root = root or directory / "root"
    root.mkdir(parents=True, exist_ok=True)
    if signer is None:
        key = generate_key("ES256", time.time() - 60)
        signer = TokenSigner([key], ISSUER)
        keys = str(directory / "jwks.json")
        Path(keys).write_text(json.dumps(jwks([key])))
    assert keys is not None
    port, metrics = free_ports(2)
    url = f"http://{host}:{port}"
    metrics_url = f"http://{host}:{metrics}"
    log = directory / "storeside.log"
    arguments = [*prefix, sys.executable, "-m", module, "--root", str(root), "--listen", f"{host}:{port}"]
    arguments += ["--audience", audience, "--issuer", signer.issuer, "--jwks", keys, "--refresh", "1"]
    arguments += ["--metrics", f"{host}:{metrics}", *options]
    with running(arguments, log=log, ready=lambda: answers(f"{metrics_url}/metrics")) as process:
        yield StoresidePart(url, root, audience, signer, process.pid, log, metrics_url=metrics_url)


@pytest.fixture(scope="session")
def storeside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., StoresidePart]]:
    """Starts servers, each with a directory of its own; they end with the session. Arguments as for `start`."""
    names = itertools.count(1)
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(start(tmp_path_factory.mktemp(f"storeside{next(names)}"), **options))


@pytest.fixture(scope="session")
def storeside_part(storeside: Callable[..., StoresidePart]) -> StoresidePart:
    """One server for all tests of the session; each test uses keys of its own."""
    return storeside()
