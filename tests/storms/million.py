"""``python -m tests.storms million``: a project asks for a million tickets, in batches of 500 on 4 connections; another one for single
tickets, before and meanwhile. One broker without a limit, for what grows; then one with the default limit, for what is refused.

Lines: ``quiet`` and ``flood`` (the other project's latency in ms), ``grown`` (the broker's memory and the database's size per ticket),
``bounded`` (what the limit let through).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from broker.catalog import connect
from broker.model import Role
from tests.bench import catalogue
from tests.bench.options import at_least
from tests.bench.stage import write_credentials
from tests.parts.broker import BrokerProcess, mint, serve
from tests.parts.postgres import Postgres

BATCH, CONNECTIONS, BLOBS = 500, 4, 20_000
QUIET_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.storms million", description=__doc__)
    parser.add_argument("tickets", type=at_least(10), nargs="?", default=1_000_000, help="how many; a million by default")
    tickets = parser.parse_args().tickets
    with Postgres(None) as postgres, tempfile.TemporaryDirectory() as place:
        url = postgres.create()
        asyncio.run(_fill(url))
        fine = True
        for name, settings in (("unbounded", "project_tickets_per_hour = 0"), ("bounded", f"project_tickets_per_hour = {tickets // 10}")):
            with _broker(url, Path(place), settings) as broker:
                fine = asyncio.run(_storm(broker, url, tickets if name == "unbounded" else tickets // 5, name)) and fine
        print("the other project was served throughout" if fine else "A PROMISE WAS BROKEN")
        sys.exit(0 if fine else 1)


async def _fill(url: str) -> None:
    connection: Any = await connect.connect_one(url)
    await catalogue.fill(connection, "hmac", blobs=BLOBS)
    await connection.close()


@contextmanager
def _broker(url: str, place: Path, settings: str) -> Iterator[BrokerProcess]:
    data = place / "data"
    data.mkdir(exist_ok=True)
    if not (data / "credentials").exists():
        write_credentials(data)
    with serve(url, place, settings=f"[log]\nlevel = 'warning'\n[policy.admission]\n{settings}\n") as broker:
        yield broker


async def _storm(broker: BrokerProcess, url: str, tickets: int, name: str) -> bool:
    flood = await mint(url, broker.config, Role.MEMBER, "p0", "flood")
    other = await mint(url, broker.config, Role.MEMBER, "p1", "other")
    async with aiohttp.ClientSession() as session:
        quiet = await _single(session, broker, other, lambda: False, QUIET_SECONDS)
        before, rows = _memory(broker.pid), await _size(url)
        began = time.monotonic()
        asking = asyncio.gather(*(_batches(session, broker, flood, tickets // CONNECTIONS) for _ in range(CONNECTIONS)))
        watching = asyncio.create_task(_watch(broker.pid, asking.done))
        meanwhile = await _single(session, broker, other, asking.done, 600)
        counts = [sum(column) for column in zip(*await asking, strict=True)]
        seconds = time.monotonic() - began
    after, grown = _memory(broker.pid), await _size(url)
    _line(name, "quiet", **_latency(quiet))
    _line(name, "flood", **_latency(meanwhile))
    granted, failed, refused = counts
    _line(
        name, "grown", asked=tickets, granted=granted, failed=failed, refused_batches=refused, seconds=round(seconds, 1),
        tickets_per_second=round(granted / seconds), broker_mb_before=before >> 20, broker_mb_after=after >> 20,
        broker_mb_each_5_s=await watching,
        database_bytes_per_ticket=round((grown - rows) / max(1, granted)),
    )  # fmt: skip
    served = all(status == 201 for status, _ in meanwhile)
    return served and (name == "unbounded" or refused > 0)


async def _batches(session: aiohttp.ClientSession, broker: BrokerProcess, token: str, tickets: int) -> tuple[int, int, int]:
    """Ask for so many tickets; how many were granted and failed, and how many batches were refused."""
    granted = failed = refused = 0
    headers = {"Authorization": f"Bearer {token}"}
    for number in range(tickets // BATCH):
        asked = [{"operation": "download", "blob": str(catalogue.blob_id((number * BATCH + i) % BLOBS)), "count": 3} for i in range(BATCH)]
        async with session.post(f"{broker.url}/v1/tickets:batch", json={"tickets": asked}, headers=headers) as answer:
            body = await answer.json()
            if answer.status == 200:
                good = sum("sources" in ticket for ticket in body["tickets"])
                granted, failed = granted + good, failed + BATCH - good
            else:
                assert answer.status == 429, body
                refused += 1
    return granted, failed, refused


async def _single(
    session: aiohttp.ClientSession, broker: BrokerProcess, token: str, done: Callable[[], bool], most_seconds: float
) -> list[tuple[int, float]]:
    """Single tickets, one after another, until `done`: the status and the milliseconds of each."""
    seen = []
    end = time.monotonic() + most_seconds
    body = {"operation": "download", "blob": str(catalogue.blob_id(1)), "count": 3}
    while not done() and time.monotonic() < end:
        began = time.perf_counter()
        async with session.post(f"{broker.url}/v1/tickets", json=body, headers={"Authorization": f"Bearer {token}"}) as answer:
            await answer.read()
        seen.append((answer.status, (time.perf_counter() - began) * 1000))
        await asyncio.sleep(0.005)
    return seen


def _latency(seen: list[tuple[int, float]]) -> Mapping[str, Any]:
    values = sorted(milliseconds for _, milliseconds in seen)
    cuts = statistics.quantiles(values, n=100)
    statuses = sorted({status for status, _ in seen})
    return {"requests": len(values), "p50_ms": round(cuts[49], 1), "p99_ms": round(cuts[98], 1), "statuses": statuses}


def _memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _watch(pid: int, done: Callable[[], bool]) -> list[int]:
    """Resident MB, every five seconds until `done`."""
    seen = []
    while not done():
        seen.append(_memory(pid) >> 20)
        await asyncio.sleep(5)
    return seen


async def _size(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT pg_database_size(current_database())"))
    finally:
        await connection.close()


def _line(storm: str, what: str, **figures: Any) -> None:
    print(json.dumps({"storm": "million", "case": storm, "line": what, **figures}), flush=True)


if __name__ == "__main__":
    main()
