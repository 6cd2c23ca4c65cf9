"""What the parts that verify tokens before files have in common: nginx, HAProxy and Envoy as deploy/ configures them.

Each is started from its template in deploy/, filled in by deploy/fill.py, exactly as somebody else would. Keys get to nginx and HAProxy
as files, in the layout of broker-storeside-keys.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from broker.sign.token import SigningKey, TokenSigner, generate_key, jwks
from tests.parts.process import PartMissing, answers
from tests.parts.storeside import ISSUER, StoresidePart

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@dataclass(frozen=True, slots=True)
class FrontPart(StoresidePart):
    """A running front. Objects are plain files under `root`; `logs` are all that it, and what is behind it, writes.

    `publish` replaces the keys, where the part was started without any, and returns when the front goes by the new ones.
    """

    kind: str
    logs: tuple[Path, ...]
    publish: Callable[[Sequence[SigningKey]], None]


@dataclass(frozen=True, slots=True)
class Published:
    """The keys that a front is to take: `source` is a URL or a file of a JWKS. `signer` is ours if `own`."""

    signer: TokenSigner
    source: str
    own: bool

    def replace(self, keys: Sequence[SigningKey]) -> None:
        assert self.own, "these keys are somebody else's"
        write_whole(Path(self.source), json.dumps(jwks(keys)))


def published(directory: Path, signer: TokenSigner | None, keys: str | None) -> Published:
    """The given keys, or a fresh one that is published as a file in `directory`."""
    if signer is not None:
        assert keys is not None
        return Published(signer, keys, False)
    key = generate_key("ES256", time.time() - 60)
    source = directory / "jwks.json"
    source.write_text(json.dumps(jwks([key])))
    return Published(TokenSigner([key], ISSUER), str(source), True)


def goes_by(front: FrontPart, keys: Sequence[SigningKey]) -> bool:
    """Whether the front accepts tokens of all of `keys`, and of the key that it was started with only if that is among them."""
    asked = front.claims("GET", "/no-such-object")
    signers = [TokenSigner([key], front.signer.issuer) for key in keys]
    tokens = [signer.sign(asked, time.time()) for signer in signers]
    first = front.signer.sign(asked, time.time())
    kept = first.partition(".")[0] in {token.partition(".")[0] for token in tokens}
    known = [answers(f"{front.url}/no-such-object?token={token}", (404,)) for token in tokens]
    return all(known) and answers(f"{front.url}/no-such-object?token={first}", (404,) if kept else (401,))


def write_whole(file: Path, text: str) -> None:
    """Replace a file at once."""
    fresh = file.with_name(f".{file.name}")
    fresh.write_text(text)
    fresh.rename(file)


def need(file: str, package: str) -> str:
    """A file of a Debian package. Raises `PartMissing` with the command that installs it."""
    if not Path(file).exists():
        raise PartMissing(f"{file} is not installed; install it with: apt-get install {package}")
    return file
