"""HTTP as an attacker speaks it: every byte of a request is his, nothing is normalised, and answers are read with patience for nonsense."""

from __future__ import annotations

import asyncio
import http.client
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self
from urllib.parse import urlsplit

from broker.model import Handle

_PATIENCE_SECONDS = 60.0
_MOST = 64 << 20
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """What came back; `status` 0 when the server hung up without an answer that can be read."""

    status: int
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = field(default=b"", repr=False)

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def shows(self, secret: bytes) -> bool:
        """Whether the secret stands anywhere in the answer."""
        return secret in self.body or any(secret.decode() in value for _, value in self.headers)


@dataclass(frozen=True)
class Shot:
    """One request as it goes out. `target` is path and query. A ``Content-Length`` that is not among `headers` is that of the body."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None

    @classmethod
    def of(cls, handle: Handle, body: bytes | None = None) -> Self:
        """The request that a ticket's handle stands for."""
        parts = urlsplit(handle.url)
        target = handle.url[len(f"{parts.scheme}://{parts.netloc}") :]
        headers = tuple((name, value) for name, value in handle.headers.items() if name.lower() != "content-length")
        return cls(handle.method, target, headers, body)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """Names and values of the query as they stand there, still encoded."""
        pairs = [item.partition("=") for item in self.query.split("&")] if self.query else []
        return [(name, value) for name, _, value in pairs]

    def parameter(self, name: str) -> str:
        return next(value for other, value in self.parameters if other == name)

    def by(self, method: str, body: bytes | None = None) -> Self:
        return replace(self, method=method, body=body)

    def at(self, path: str) -> Self:
        """The same query at another path."""
        return replace(self, target=f"{path}?{self.query}" if self.query else path)

    def asking(self, query: str) -> Self:
        """The same path with another query."""
        return replace(self, target=f"{self.path}?{query}" if query else self.path)

    def adding(self, query: str) -> Self:
        return self.asking(f"{self.query}&{query}" if self.query else query)

    def setting(self, name: str, value: str) -> Self:
        """The query with the value of one parameter replaced."""
        return self.asking("&".join(f"{other}={value if other == name else old}" for other, old in self.parameters))

    def lacking(self, *names: str) -> Self:
        """The query without some parameters."""
        return self.asking("&".join(f"{name}={value}" for name, value in self.parameters if name not in names))

    def saying(self, *headers: tuple[str, str]) -> Self:
        """With more headers."""
        return replace(self, headers=(*self.headers, *headers))

    def silent_on(self, *names: str) -> Self:
        """Without some headers."""
        left_out = {name.lower() for name in names}
        return replace(self, headers=tuple((name, value) for name, value in self.headers if name.lower() not in left_out))

    def raw(self, host: str) -> bytes:
        """The request's bytes."""
        given = {name.lower() for name, _ in self.headers}
        lines = [f"{self.method} {self.target} HTTP/1.1"]
        lines += [] if "host" in given else [f"Host: {host}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        body = self.body or b""
        if not given & {"content-length", "transfer-encoding"} and (self.body is not None or self.method in ("PUT", "POST")):
            lines.append(f"Content-Length: {len(body)}")
        lines += [] if "connection" in given else ["Connection: close"]
        return "\r\n".join(lines).encode("latin-1", "surrogateescape") + b"\r\n\r\n" + body


async def fire(origin: str, shot: Shot) -> Reply:
    """Send it over a connection of its own and read the answer."""
    parts = urlsplit(origin)
    answer = await converse(origin, shot.raw(parts.netloc), _PATIENCE_SECONDS, lambda answer: _is_whole(answer, shot.method))
    return parse(answer, shot.method)


def _is_whole(answer: bytes, method: str) -> bool:
    """Whether the first answer has come to its end: some servers are slow to close afterwards."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end or head[9:10] == b"1":
        return False
    if method == "HEAD" or head[9:12] in (b"204", b"304"):
        return True
    length = _LENGTH.search(head)
    return length is not None and len(body) >= int(length[1])


async def converse(origin: str, raw: bytes, patience: float, is_enough: Callable[[bytes], bool] = lambda answer: False) -> bytes:
    """Send bytes and read until the server closes, has been silent for `patience` seconds, or what has come `is_enough`."""
    parts = urlsplit(origin)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    answer = bytearray()
    sending = asyncio.ensure_future(_send(writer, raw))
    try:
        while len(answer) < _MOST:
            async with asyncio.timeout(patience):
                chunk = await reader.read(1 << 16)
            if not chunk:
                break
            answer += chunk
            if is_enough(answer):
                break
    except (TimeoutError, ConnectionError):
        pass
    finally:
        sending.cancel()
        writer.close()
    return bytes(answer)


async def _send(writer: asyncio.StreamWriter, raw: bytes) -> None:
    # A server may refuse before it has read all, and hang up.
    try:
        writer.write(raw)
        await writer.drain()
    except ConnectionError:
        return


class _Bytes:
    """What http.client takes for a socket."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def makefile(self, mode: str) -> io.BytesIO:
        return self._file


def parse(answer: bytes, method: str) -> Reply:
    """The first answer in what a server sent."""
    response = http.client.HTTPResponse(_Bytes(answer), method=method)  # type: ignore[arg-type]
    try:
        response.begin()
        headers = response.getheaders()
        try:
            body = response.read()
        except http.client.IncompleteRead as cut:
            body = cut.partial
    except (http.client.HTTPException, OSError, ValueError):
        return Reply(0, body=answer)
    return Reply(response.status, headers, body)
