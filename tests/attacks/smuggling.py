"""A request hidden in another one (RFC 9112 section 11.2): a front must not read a message otherwise than the server behind it.

The hidden request asks for the victim's object without any ticket, which a file server behind a front would serve. It counts when a
byte of it comes back on that connection or on any honest one after it, when an honest reader gets something else than his own, and
when the server behind a front has seen a request for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from tests.attacks.attack import Tries, attack
from tests.attacks.target import Target, TokenTarget, fresh_key
from tests.attacks.wire import Shot, converse, fire

_PATIENCE_SECONDS = 1.0
_LOG_SECONDS = 30.0
_AT_ONCE = 24


def fronts(target: Target) -> bool:
    return target.front or (target.own and target.scheme == "token")


def _vectors(hidden: bytes) -> Iterator[tuple[str, bytes, bytes]]:
    """Names, header lines and bodies of messages that end in two places."""
    size = len(hidden)
    ended = b"0\r\n\r\n"
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (size, hidden)

    def both(name: str, coding: bytes) -> Iterator[tuple[str, bytes, bytes]]:
        yield f"CL.TE, {name}", b"Content-Length: %d\r\n%s\r\n" % (len(ended) + size, coding), ended + hidden
        yield f"TE.CL, {name}", b"Content-Length: %d\r\n%s\r\n" % (len(b"%x\r\n" % size), coding), chunk

    yield from both("plain", b"Transfer-Encoding: chunked")
    for name, coding in (
        ("space before the colon", b"Transfer-Encoding : chunked"),
        ("tab", b"Transfer-Encoding:\tchunked"),
        ("capitals", b"TRANSFER-ENCODING: CHUNKED"),
        ("xchunked", b"Transfer-Encoding: xchunked"),
        ("folded", b"Transfer-Encoding:\r\n chunked"),
        ("folded name", b"X: y\r\n Transfer-Encoding: chunked"),
        ("identity, chunked", b"Transfer-Encoding: identity, chunked"),
        ("chunked, identity", b"Transfer-Encoding: chunked, identity"),
        ("twice", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"),
        ("vertical tab", b"Transfer-Encoding: \x0bchunked"),
        ("NUL", b"Transfer-Encoding: chunked\x00"),
        ("quoted", b'Transfer-Encoding: "chunked"'),
        ("underscore", b"Transfer_Encoding: chunked"),
        ("bare LF before", b"X: y\nTransfer-Encoding: chunked"),
        ("bare CR before", b"X: y\rTransfer-Encoding: chunked"),
        ("a comma", b"Transfer-Encoding: ,chunked"),
        ("hop by hop", b"Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked"),
        ("another letter", b"Transfer-Encoding: chun\xcbked"),
    ):
        yield from both(name, coding)
    for name, lengths in (
        ("0 first", b"Content-Length: 0\r\nContent-Length: %d"),
        ("0 last", b"Content-Length: %d\r\nContent-Length: 0"),
        ("a list", b"Content-Length: 0, %d"),
        ("plus", b"Content-Length: +%d"),
        ("a space", b"Content-Length: 0 %d"),
        ("hexadecimal", b"Content-Length: 0x0\r\nX: %d"),
        ("negative", b"Content-Length: -0\r\nX: %d"),
        ("empty", b"Content-Length:\r\nX: %d"),
        ("space before the colon", b"Content-Length : %d"),
        ("hop by hop", b"Connection: Content-Length\r\nContent-Length: %d"),
        ("underscore", b"Content_Length: %d"),
        ("folded", b"Content-Length: 0\r\n %d"),
        ("too many figures", b"Content-Length: 18446744073709551616\r\nX: %d"),
        ("none", b"X: %d"),
        ("as it is", b"Content-Length: %d"),
    ):
        yield f"length, {name}", lengths % size + b"\r\n", hidden
    te = b"Transfer-Encoding: chunked\r\n"
    for name, body in (
        ("an extension", b"0;a=b\r\n\r\n" + hidden),
        ("an extension with LF", b"0;a\nb\r\n\r\n" + hidden),
        ("a long extension", b"0;" + b"a" * 20000 + b"\r\n\r\n" + hidden),
        ("0x0", b"0x0\r\n\r\n" + hidden),
        ("+0", b"+0\r\n\r\n" + hidden),
        ("00000", b"00000\r\n\r\n" + hidden),
        ("a space", b"0 \r\n\r\n" + hidden),
        ("LF alone", b"0\n\n" + hidden),
        ("CR alone", b"0\r\r" + hidden),
        ("overflow", b"10000000000000000\r\n" + hidden),
        ("negative", b"-1\r\n" + hidden),
        ("data beyond the size", b"1\r\nxx" + ended + hidden),
        ("trailers", b"0\r\nContent-Length: 99\r\nHost: evil\r\n\r\n" + hidden),
        ("an extension that ends the line elsewhere", b"2;\nxx\r\n%x\r\n0\r\n\r\n" % size + hidden + b"\r\n0\r\n\r\n"),
    ):
        yield f"chunk size, {name}", te, body
    yield "Expect", b"Expect: 100-continue\r\nContent-Length: %d\r\n" % size, hidden
    yield "Upgrade to h2c", b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n", hidden
    yield (
        "Upgrade to websocket",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 99\r\nSec-WebSocket-Key: x\r\n",
        hidden,
    )


@attack("request smuggled", holds="a ticket to read or write one object", on=fronts)
async def smuggled(target: Target, tries: Tries) -> None:
    """A second request stands in the body of a GET and of a PUT, in messages whose end is told twice or obscurely: both lengths,
    Transfer-Encoding in disguise, folded lines, doubled lengths, chunk sizes and extensions, upgrades."""
    get = target.get(target.mine.key)
    victim = target.get(target.victim.key).path
    hidden = f"GET {victim} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
    two = get.saying(("Connection", "keep-alive")).raw("127.0.0.1") + get.raw("127.0.0.1")
    answer = await converse(target.origin, two, 30.0)
    tries.control(answer.count(b"HTTP/1.1 200") == 2, "two honest requests over one connection")
    await _logged(target, tries)
    slots, seen = asyncio.Semaphore(_AT_ONCE), target.seen_behind()

    async def one(name: str, method: str, headers: bytes, body: bytes) -> None:
        async with slots:
            key = fresh_key("smuggled")
            target_ = get.target if method == "GET" else target.put(key, b"", bound=False).target
            raw = f"{method} {target_} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode() + headers + b"\r\n" + body
            answer = await converse(target.origin, raw, _PATIENCE_SECONDS)
            after = await fire(target.origin, get)
            shown = target.victim.marker in answer or after.shows(target.victim.marker) or after.body != target.mine.content
            tries.tried(f"{method}, {name}", shown, answer[:12].decode("latin-1"))
            if method == "PUT":
                await target.store.delete(key)

    methods = ("GET", "PUT") if target.writes else ("GET",)
    await asyncio.gather(*(one(name, method, headers, body) for method in methods for name, headers, body in _vectors(hidden)))
    if target.behind is not None:
        tries.tried("seen by the server behind", target.seen_behind() != seen)


async def _logged(target: Target, tries: Tries) -> None:
    """The log of the server behind shows what reaches it."""
    end = time.monotonic() + _LOG_SECONDS
    while target.behind is not None and target.mine.key not in target.behind.read_text():
        tries.control(time.monotonic() < end, "an honest request in the log behind the front")
        await asyncio.sleep(0.05)


@attack("request line disguised", holds="a ticket to read one object", on=fronts)
async def disguised(target: Target, tries: Tries) -> None:
    """Request lines, versions and hosts that two servers read otherwise, and a second request on the honest one's connection."""
    get = target.get(target.mine.key)
    victim = target.get(target.victim.key).path
    end = b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    own, other = get.target.encode(), victim.encode()
    lines = {
        "two targets": b"GET " + own + b" " + other + end,
        "a tab": b"GET\t" + other + b" " + own + end,
        "two spaces": b"GET  " + other + b"?" + own + end,
        "absolute form, another host": b"GET http://127.0.0.1:1" + own + end,
        "authority in the path": b"GET //127.0.0.1" + other + end,
        "HTTP/0.9": b"GET " + other + b"\r\n",
        "HTTP/1.0 kept alive": b"GET " + other + b" HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "HTTP/2.0": b"GET " + other + b" HTTP/2.0\r\nHost: x\r\n\r\n",
        "lines before it": b"\r\n\r\nGET " + other + end,
        "LF alone": b"GET " + other + b" HTTP/1.1\nHost: 127.0.0.1\nConnection: close\n\n",
        "NUL": b"GET " + own.replace(b"?", b"\x00" + other + b"?") + end,
        "a second request without a ticket": get.saying(("Connection", "keep-alive")).raw("127.0.0.1") + b"GET " + other + end,
        "a second request with the first's": get.saying(("Connection", "keep-alive")).raw("127.0.0.1")
        + b"GET "
        + other
        + b"?"
        + get.query.encode()
        + end,
        "a preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        "the PROXY protocol": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\nGET " + other + end,
        "asterisk": b"GET *" + end,
        "CONNECT": b"CONNECT 127.0.0.1:80" + end + b"GET " + other + end,
    }

    async def one(name: str, raw: bytes) -> None:
        answer = await converse(target.origin, raw, _PATIENCE_SECONDS)
        after = await target.fire(get)
        tries.tried(name, target.victim.marker in answer or after.body != target.mine.content, answer[:12].decode("latin-1"))

    seen = target.seen_behind()
    await asyncio.gather(*(one(name, raw) for name, raw in lines.items()))
    if target.behind is not None:
        tries.tried("seen by the server behind", target.seen_behind() != seen)


@attack(
    "named file behind the front", holds="a ticket to read one object", on=lambda target: isinstance(target, TokenTarget) and fronts(target)
)
async def files_behind(target: TokenTarget, tries: Tries) -> None:
    """Honest tokens, as a broken broker might sign them, for what is no object: the server's own files, folders, what lies above the
    root."""
    for path in (
        "/",
        "/.broker",
        "/.broker/",
        "/.broker/tmp",
        "/.broker/uploads",
        "/../../../../etc/passwd",
        "/etc/passwd",
        "/.",
        "/..",
        "/%2e%2e/etc/passwd",
    ):
        token = target.honest("", path=path)
        await tries.fire(path, Shot("GET", f"{path}?token={token}"))
