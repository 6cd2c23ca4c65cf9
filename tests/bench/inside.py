"""Where the time of a ticket goes: bytecodes and calls of Python by function, for a single ticket and for a blob of a batch of 100.

The broker runs in this process and its connections write into lists, so that the numbers are the same on a busy machine: what is
counted is the interpreter's work, not the time. What C does beneath (orjson, the driver of PostgreSQL, hashes) is not seen.
One JSON line a function; those of a case together come first.
"""

from __future__ import annotations

import asyncio
import json
import sys
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import uvloop

from broker import app, config
from broker.service import conditions, memory
from tests.bench.load import Request
from tests.bench.stage import stage
from tests.bench.tickets import HOT

SHOWN = 40


class _Wire(asyncio.Transport):
    """The server's end of a connection; `answered` is set by what it writes."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.answered = asyncio.Event()
        self.first = b""

    def write(self, data: Any) -> None:
        self.first = self.first or bytes(data)
        self.answered.set()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


def main() -> None:
    if "--help" in sys.argv:
        sys.exit(__doc__)
    uvloop.run(measure())


async def measure() -> None:
    async with stage("hmac") as built:
        path = built.place / "inside.toml"
        path.write_text(
            f'data_dir = "{built.place}"\n[http]\npublic_url = "http://127.0.0.1:8080"\nlisten = "127.0.0.1:0"\n'
            f'metrics_listen = "127.0.0.1:0"\n[database]\nurl = "{built.url}"\n[memory]\nhot_bytes = {HOT}\n[log]\nlevel = "warning"\n'
        )
        servers: list[Any] = []

        class Seen(app.ApiServer):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                servers.append(self)

        # Counting is slow: what was learnt to warm up must not age meanwhile.
        aged = patch.object(conditions, "OUTLOOK_SECONDS", float("inf")), patch.object(memory, "FRESH_SECONDS", float("inf"))
        with patch.object(app, "ApiServer", Seen), aged[0], aged[1]:
            async with app.running(config.load(Path(path))):
                await count("single", servers[0], built.tickets(200), 200)
                await count("batch", servers[0], built.batches(8, 100), 800)


async def count(case: str, server: Any, requests: Sequence[Request], tickets: int) -> None:
    """Send the requests once to warm up, and once more to count."""
    await drive(server, requests)
    bytecodes: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        name = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
        if event == "call":
            calls[name] += 1
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            bytecodes[name] += 1
        return trace

    sys.settrace(trace)
    await drive(server, requests)
    sys.settrace(None)
    total = {"bytecodes": round(sum(bytecodes.values()) / tickets), "calls": round(sum(calls.values()) / tickets, 1)}
    print(json.dumps({"bench": "inside", "case": case, **total}), flush=True)
    for name, by in bytecodes.most_common(SHOWN):
        told = {"bytecodes": round(by / tickets, 1), "calls": round(calls[name] / tickets, 2)}
        print(json.dumps({"bench": "inside", "case": case, "function": name, **told}), flush=True)


async def drive(server: Any, requests: Sequence[Request], connections: int = 4) -> None:
    """All requests, so many at a time."""
    waiting = iter(requests)

    async def one() -> None:
        protocol, wire = server(), _Wire()
        protocol.connection_made(wire)
        for request in waiting:
            wire.answered.clear()
            wire.first = b""
            body = request.body.encode()
            head = (
                f"POST {request.path} HTTP/1.1\r\nHost: broker\r\nContent-Type: application/json\r\n"
                f"Authorization: Bearer {request.token}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            protocol.data_received(head.encode() + body)
            await wire.answered.wait()
            assert wire.first.split(b" ")[1] in (b"200", b"201"), wire.first
        protocol.connection_lost(None)

    await asyncio.gather(*(one() for _ in range(connections)))


if __name__ == "__main__":
    main()
