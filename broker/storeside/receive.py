"""A request's body onto the disk, hashed on the way.

The loop only collects what arrives; every few megabytes go to two threads at once, one that writes and computes SHA-256, one that
computes MD5 (both release the interpreter), while the next ones arrive. Memory per request: two batches. A client that is
slower than the limits allow is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiohttp import StreamReader

from broker.storeside.disk import disk_errors
from broker.storeside.limits import Limits, Waiting
from broker.storeside.refused import Refused

BATCH_BYTES = 4 << 20
READ_BYTES = 1 << 20
"""What to collect from the socket before the loop looks at it."""


@dataclass(frozen=True, slots=True)
class Received:
    """What arrived: bytes, and lowercase hex digests."""

    length: int
    sha256: str
    md5: str

    def check(self, digest: str | None) -> None:
        """Raises `Refused` (400) when `digest` (``sha256:HEX``, ``md5:HEX``) is not this one."""
        if digest is None:
            return
        name, _, value = digest.partition(":")
        if value != (self.sha256 if name == "sha256" else self.md5):
            raise Refused(400, "the body's digest is not the one that the token binds")


async def receive(
    stream: StreamReader, descriptor: int, offset: int, length: int | None, limits: Limits, moved: Callable[[int], object]
) -> Received:
    """Write the body from `offset` on; `moved` is told of every chunk.

    Raises `Refused`: 400 when it is longer or shorter than `length`, or the client went away; 408 when it comes too slowly.
    """
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    total, waiting, batch = 0, 0, list[bytes]()
    pace = Waiting(limits)
    working: set[asyncio.Future[None]] = set()
    try:
        while True:
            chunk = await _next(stream, pace)
            moved(len(chunk))
            total += len(chunk)
            waiting += len(chunk)
            if length is not None and total > length:
                raise Refused(400, "the body is longer than the token allows")
            if chunk:
                batch.append(chunk)
            if waiting >= BATCH_BYTES or (batch and not chunk):
                await _done(working)
                full, position = batch, offset + total - waiting
                working = {
                    asyncio.ensure_future(asyncio.to_thread(_write, descriptor, full, position, sha256)),
                    asyncio.ensure_future(asyncio.to_thread(_hash, md5, full)),
                }
                batch, waiting = [], 0
            if not chunk:
                break
        await _done(working)
    finally:
        if working:  # the threads use the descriptor, which the caller closes next
            await asyncio.wait(working)
    if length is not None and total != length:
        raise Refused(400, "the body is shorter than the token says")
    return Received(total, sha256.hexdigest(), md5.hexdigest())


async def _next(stream: StreamReader, pace: Waiting) -> bytes:
    while True:
        chunk = None
        try:
            with pace.counted():
                async with asyncio.timeout(pace.left):
                    chunk = await stream.readany()
        except TimeoutError:
            pass
        except Exception:  # aiohttp tells a broken body in many ways
            raise Refused(400, "the body ended early or is malformed") from None
        if pace.too_slow(len(chunk or b"")) and chunk != b"":
            raise Refused(408, "the body comes too slowly")
        if chunk is not None:
            return chunk


async def _done(working: set[asyncio.Future[None]]) -> None:
    if working:
        await asyncio.wait(working)
        for future in working:
            future.result()


def _write(descriptor: int, chunks: Sequence[bytes], position: int, sha256: hashlib._Hash) -> None:
    with disk_errors():
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                written = os.pwrite(descriptor, rest, position)
                position += written
                rest = rest[written:]
    _hash(sha256, chunks)


def _hash(digest: hashlib._Hash, chunks: Sequence[bytes]) -> None:
    for chunk in chunks:
        digest.update(chunk)
