"""One range from one source into the file, in a thread.

Rules
- Nothing is believed unseen: Content-Range and Content-Length must fit what was asked for, before a byte is written.
- 206 is expected; 200 with a fitting Content-Range, too. A plain 200 holds the whole blob: what lies before the range is read
  and thrown away.
- Bytes are written through a `Window`, whose end another thread may bring forward at any time.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import threading
import time
from collections.abc import Collection, Mapping

from broker.client.trouble import LocalTrouble
from broker.client.wire import BLOCK, StoreTrouble, Why, Wire, describe, refusal

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)\Z")


class Window:
    """The bytes that one thread fetches and writes: from `start`, now at `position`, up to `end`. Safe to look at from any thread."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.position = start
        self.end = end
        self.began = time.monotonic()
        self._lock = threading.Lock()

    def write(self, file: int, data: memoryview) -> bool:
        """Write what belongs to the window; whether it wants more. Raises `LocalTrouble` when the disk does not take it."""
        with self._lock:
            wanted = min(len(data), self.end - self.position)
            written = 0
            while written < wanted:
                try:
                    written += os.pwrite(file, data[written:wanted], self.position + written)
                except OSError as error:
                    raise disk_trouble(error) from None
            self.position += wanted
            return self.position < self.end

    def copy(self, source: int, file: int, most: int, refusals: Collection[int]) -> int | None:
        """Have the kernel copy what comes next, at most `most` bytes, from the same place of another file. How many it copied; ``None``
        when it refuses in one of these ways (`errno`). Raises `LocalTrouble` when the disk does not take it."""
        with self._lock:
            try:
                count = os.copy_file_range(source, file, min(most, self.end - self.position), self.position, self.position)
            except OSError as error:
                if error.errno in refusals:
                    return None
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise disk_trouble(error) from None
                raise
            self.position += count
            return count

    def cut(self, at: int) -> int:
        """Give up the bytes from `at` on; returns where the window really ends, for some of them may have been written already."""
        with self._lock:
            self.end = max(self.position, min(self.end, at))
            return self.end


def disk_trouble(error: OSError) -> LocalTrouble:
    """A failed write in our words."""
    return LocalTrouble(f"cannot write: {describe(error)}", "make room or choose another target, then run the command again: it resumes")


class Reader:
    """Reads ranges of one blob of `size` bytes over one kept connection, and measures.

    `received` counts bytes off the network, `seconds` the time spent in requests, `setup_seconds` the wait for the first byte.
    """

    def __init__(self, size: int, stall_seconds: float) -> None:
        self.size = size
        self.wire = Wire(stall_seconds)
        self.received = 0
        self._seconds = 0.0
        self._began: float | None = None
        self.setup_seconds: float | None = None
        self.ignores_ranges = False
        self._buffer = memoryview(bytearray(BLOCK))

    @property
    def seconds(self) -> float:
        """Time spent in requests, the one under way included."""
        began = self._began
        return self._seconds + (time.monotonic() - began if began is not None else 0.0)

    def fetch(self, url: str, headers: Mapping[str, str], window: Window, file: int) -> None:
        """Fetch `window` into `file`. Raises `StoreTrouble`, or `LocalTrouble` for the disk; what was written until then stays."""
        began = self._began = time.monotonic()
        try:
            response = self._request(url, headers, window, began)
            if response is None:
                return
            skip = self._check(response, window)
            self._copy(response, window, file, skip)
        except (StoreTrouble, LocalTrouble):
            self.wire.close()
            raise
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            # http.client raises the last two when another thread has broken the connection beneath it.
            raise self.wire.broken(error) from None
        finally:
            self._seconds += time.monotonic() - began
            self._began = None

    def _request(self, url: str, headers: Mapping[str, str], window: Window, began: float) -> http.client.HTTPResponse | None:
        """The answer, its header read; ``None`` when another source has taken the whole window meanwhile."""
        while True:
            start, end = window.position, window.end
            if start >= end:
                return None
            connection, target, kept = self.wire.open(url)
            try:
                connection.putrequest("GET", target, skip_accept_encoding=True)
                for name, value in headers.items():
                    if name.lower() not in ("host", "range"):
                        connection.putheader(name, value)
                connection.putheader("Range", f"bytes={start}-{end - 1}")
                connection.endheaders()
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                trouble = self.wire.broken(error)
                if kept and trouble.why is Why.BROKEN:
                    continue  # the store closed the kept connection in the meantime
                raise trouble from None
            if self.setup_seconds is None:
                self.setup_seconds = time.monotonic() - began
            return response

    def _check(self, response: http.client.HTTPResponse, window: Window) -> int:
        """How many bytes of the body come before the window. Raises `StoreTrouble` for an answer that does not fit."""
        if response.status not in (200, 206):
            raise refusal(response)
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise StoreTrouble(Why.WRONG, "sent the bytes encoded")
        length = response.length
        told = response.headers.get("Content-Range")
        if told is not None:
            match = _CONTENT_RANGE.match(told)
            if match is None or int(match[1]) != window.position or match[3] not in (str(self.size), "*"):
                raise StoreTrouble(Why.WRONG, "sent another range or a blob of another size")
            if length is not None and length != int(match[2]) - int(match[1]) + 1:
                raise StoreTrouble(Why.WRONG, "sent a length that differs from its range")
            return 0
        if response.status == 206:
            raise StoreTrouble(Why.WRONG, "answered 206 without Content-Range")
        if length is not None and length != self.size:
            raise StoreTrouble(Why.WRONG, f"holds {length} bytes instead of {self.size}")
        self.ignores_ranges = True
        return window.position

    def _copy(self, response: http.client.HTTPResponse, window: Window, file: int, skip: int) -> None:
        left = response.length
        while window.position < window.end:
            count = self._read(response, left)
            if count == 0:
                raise self.wire.broken(EOFError())
            if left is not None:
                left -= count
            self.received += count
            data = self._buffer[:count]
            if skip:
                data = data[skip:] if skip < count else data[:0]
                skip = max(0, skip - count)
            if data and not window.write(file, data):
                break
        if left == 0 and not response.will_close:
            response.length = 0
            response.close()
        else:
            self.wire.close()  # bytes that nobody wants are on their way, or the end of the body is unknown

    def _read(self, response: http.client.HTTPResponse, left: int | None) -> int:
        if left is None or response.chunked:
            data = response.read1(BLOCK)
            self._buffer[: len(data)] = data
            return len(data)
        # The buffered reader below the response reads straight into our buffer, as much as has arrived.
        return response.fp.readinto1(self._buffer[: min(BLOCK, left)]) if left else 0
