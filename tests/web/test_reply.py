"""The framing of answers: what HTTP/1.0 and 1.1, HEAD and Connection ask of them (RFC 9112)."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from broker.web.reply import head
from tests.parts.broker import RunningBroker


@pytest.mark.parametrize(
    ("status", "content", "is_old", "stays", "line", "has", "lacks"),
    [
        (200, b"{}", False, True, "HTTP/1.1 200 OK", ["Content-Length: 2"], ["Connection"]),
        (201, b"", False, True, "HTTP/1.1 201 Created", ["Content-Length: 0"], ["Connection"]),
        (503, None, False, False, "HTTP/1.1 503 Service Unavailable", ["Content-Length: 0", "Connection: close"], []),
        (204, None, False, True, "HTTP/1.1 204 No Content", [], ["Content-Length", "Connection"]),
        (200, b"{}", True, True, "HTTP/1.0 200 OK", ["Connection: keep-alive"], []),
        (200, b"{}", True, False, "HTTP/1.0 200 OK", [], ["Connection"]),
    ],
)
def test_head(status: int, content: bytes | None, is_old: bool, stays: bool, line: str, has: list[str], lacks: list[str]) -> None:
    first, *fields = head(status, {"X-A": "b"}, content, is_old, stays).decode().removesuffix("\r\n\r\n").split("\r\n")
    assert first == line
    assert {"X-A: b", "Server: transfer-broker", *has} <= set(fields)
    assert not [field for field in fields if field.startswith(tuple(lacks))]
    assert sum(field.startswith("Date: ") and field.endswith(" GMT") for field in fields) == 1


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: x", "a\nb", "a\rb", "a\0b"])
def test_no_value_writes_a_field_of_its_own(value: str) -> None:
    with pytest.raises(ValueError, match="control characters"):
        head(200, {"Location": value}, b"", False, True)


async def ask(broker: RunningBroker, *requests: bytes, heads: int) -> bytes:
    """Send the requests, each after something came back for the one before; read until there are so many heads."""
    address = urlsplit(broker.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        got = b""
        async with asyncio.timeout(20):
            for request in requests:
                writer.write(request)
                got += await reader.readuntil(b"\r\n\r\n")
            while got.count(b"\r\n\r\n") < heads:
                got += await reader.readuntil(b"\r\n\r\n")
        return got
    finally:
        writer.close()


async def test_head_has_the_length_and_no_body(broker: RunningBroker) -> None:
    got = await ask(broker, b"HEAD /v1 HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n", heads=1)
    fields, _, body = got.partition(b"\r\n\r\n")
    assert fields.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\nConnection: close" in fields
    assert b"\r\nContent-Length: 0\r\n" not in fields and not body


async def test_an_old_client_may_keep_its_connection(broker: RunningBroker) -> None:
    request = b"HEAD /v1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    got = await ask(broker, request, request, heads=2)
    assert got.count(b"HTTP/1.0 200 OK\r\n") == 2 == got.count(b"\r\nConnection: keep-alive\r\n")


async def test_one_connection_takes_many_requests(broker: RunningBroker) -> None:
    got = await ask(broker, b"HEAD /v1 HTTP/1.1\r\nHost: b\r\n\r\n" * 20, heads=20)
    assert got.count(b"HTTP/1.1 200 OK\r\n") == 20 and b"{" not in got
