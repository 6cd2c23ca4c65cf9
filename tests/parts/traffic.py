"""What a process has read and written, counted by the kernel.

The counters are `rchar` and `wchar` of /proc/PID/io (proc(5)): bytes that went through read(2), write(2) and their relatives, to
and from sockets, files and pipes alike. They know nothing of send(2), recv(2) and splice(2), so they count all of a process's
sockets only if it uses none of these. uvloop moves the bytes of its streams by read(2) and write(2); `check` shows that it is so.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

_PROBE_BYTES = 128 << 10  # less than a request for a ticket may have


class Uncounted(RuntimeError):
    """Bytes went through the process's sockets that its counters did not see."""


def carried(pid: int) -> tuple[int, int]:
    """Bytes that the process read and wrote since its start, children that it has waited for included."""
    lines = (line.split(": ") for line in Path(f"/proc/{pid}/io").read_text("ascii").splitlines())
    counters = {name: int(value) for name, value in lines}
    return counters["rchar"], counters["wchar"]


def check(pid: int, url: str, token: str) -> tuple[int, int]:
    """Send the broker `pid` at `url` a request, and have it send an answer, of known sizes; what the counters saw of both.

    Raises `Uncounted` when that is less than what went through its sockets.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    read, written = carried(pid)
    with opener.open(f"{url}/openapi.json", timeout=10) as response:
        answer = len(response.read())
    body = json.dumps({"operation": "download", "unknown": "x" * _PROBE_BYTES}).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        opener.open(urllib.request.Request(f"{url}/v1/tickets", body, headers), timeout=10).close()
    except urllib.error.HTTPError as error:  # what it asks for is nonsense
        error.close()
    saw_read, saw_written = (now - before for now, before in zip(carried(pid), (read, written), strict=True))
    if saw_read < len(body) or saw_written < answer:
        raise Uncounted(
            f"/proc/{pid}/io counted {saw_read:,} of {len(body):,} bytes sent to it and {saw_written:,} of {answer:,} sent by it"
        )
    return saw_read, saw_written
