"""An answer, whole when it is made: its head and body go out in one write.

aiohttp's own `Response` may be changed until the moment it is sent; that freedom costs more than ranking a ticket's sources.
What HTTP asks of an answer's framing (RFC 9112) is here: length, connection, date.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus

from aiohttp import HttpVersion10, web
from aiohttp.abc import AbstractStreamWriter

_SERVER = "transfer-broker"
_STATUS_LINES = {
    version: {status.value: f"HTTP/{version} {status.value} {status.phrase}\r\n" for status in HTTPStatus} for version in ("1.0", "1.1")
}


class Reply(web.StreamResponse):
    """One answer. `fields` are its header fields but for those of framing; `body` is ``None`` where there is none, as with 204.

    `close` ends the connection after it.
    """

    def __init__(self, status: int, fields: Mapping[str, str], body: bytes | None, *, close: bool = False) -> None:
        # The base class's own would make room for what an answer gains on the way: fields, cookies, a stream.
        self._code = status
        self._fields = fields
        self._content = body
        self._stays = not close

    @property
    def status(self) -> int:
        return self._code

    @property
    def keep_alive(self) -> bool:
        """Whether the connection stays open; what the request says of that is known once the answer was prepared."""
        return self._stays

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        self._req = request
        self._stays = self._stays and request.keep_alive
        writer = self._payload_writer = request.writer
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Send it, and wait while the client does not read. Raises `ConnectionError`, and `ValueError` for a field with a line break."""
        request, writer, content = self._req, self._payload_writer, self._content
        assert request is not None and writer is not None
        sent = head(self._code, self._fields, content, request.version <= HttpVersion10, self._stays)
        self._req = None
        await writer.write_eof(sent if content is None or request.method == "HEAD" else sent + content)


def head(status: int, fields: Mapping[str, str], content: bytes | None, is_old: bool, stays: bool) -> bytes:
    """Status line and header fields (RFC 9112 sections 4 and 5)."""
    lines = [_STATUS_LINES["1.0" if is_old else "1.1"][status]]
    for name, value in fields.items():
        if not value.isprintable():  # after a line break a value could go on with fields of its own
            raise ValueError("a header field holds control characters")
        lines.append(f"{name}: {value}\r\n")
    if content is not None:
        lines.append(f"Content-Length: {len(content)}\r\n")
    elif status != HTTPStatus.NO_CONTENT:
        lines.append("Content-Length: 0\r\n")
    if stays == is_old:  # HTTP/1.1 goes on unless told otherwise, HTTP/1.0 ends (RFC 9112 section 9.3)
        lines.append("Connection: keep-alive\r\n" if stays else "Connection: close\r\n")
    lines.append(_server_and_date(int(time.time())))
    return "".join(lines).encode()


_last_date = (0, "")


def _server_and_date(now: int) -> str:
    """The fields that all answers of one second share, and the empty line."""
    global _last_date
    if _last_date[0] != now:
        _last_date = (now, f"Server: {_SERVER}\r\nDate: {formatdate(now, usegmt=True)}\r\n\r\n")
    return _last_date[1]
