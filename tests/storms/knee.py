"""``python -m tests.storms knee``: slots that adapt find the knee of a store, and follow it when it moves.

A real broker and its own job, real tickets, leases, waiting and reports; only the moving of bytes is a model, which is what has the
knee: each transfer gets its full rate until so many run at once, then all share what there is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from broker.model import Role
from tests.parts.cluster import Brokers, brokers_on, disk_of, disk_store, ok, put, register
from tests.parts.postgres import Postgres

BODY, RATE = 1 << 20, 2 << 20
TICK_SECONDS = 0.02
MOST = 32
SETTINGS = (
    "[policy.admission]\nadapt_seconds = 2.0\nmin_lease_seconds = 20.0\nmax_lease_seconds = 20.0\n[policy.ranking]\nfailure_seconds = 1.0\n"
)


class Model:
    """What the store moves."""

    def __init__(self, knee: int) -> None:
        self.knee = knee
        self.running = 0
        self.moved = 0.0

    async def move(self) -> None:
        """One body."""
        self.running += 1
        left, then = float(BODY), time.monotonic()
        try:
            while left > 0:
                await asyncio.sleep(TICK_SECONDS)
                now = time.monotonic()
                gone = min(left, (now - then) * RATE * min(1.0, self.knee / self.running))
                left, then = left - gone, now
                self.moved += gone
        finally:
            self.running -= 1


async def _client(brokers: Brokers, session: aiohttp.ClientSession, image: str, number: int, model: Model) -> None:
    headers = {"Authorization": f"Bearer {brokers.token(subject=f'client-{number}')}"}
    url = f"{brokers.running[0].url}/v1/tickets"
    while True:
        async with session.post(url, json={"operation": "download", "image": image, "wait": 30}, headers=headers) as response:
            if response.status != 201:
                await asyncio.sleep(0.2)
                continue
            ticket = await response.json()
        began = time.monotonic()
        await model.move()
        report = {"store": "disk", "outcome": "ok", "bytes": BODY, "seconds": time.monotonic() - began}
        async with session.post(f"{url}/{ticket['id']}/report", json=report, headers=headers) as response:
            await response.read()


async def _watch(brokers: Brokers, session: aiohttp.ClientSession, model: Model, seconds: float) -> tuple[list[int], float]:
    """The slots that the broker had, second by second, and the share of the best throughput in the last third."""
    admin, slots, moved = brokers.api(session, Role.ADMIN), [], []
    for _ in range(int(seconds)):
        before, then = model.moved, time.monotonic()
        await asyncio.sleep(1)
        moved.append((model.moved - before) / (time.monotonic() - then))
        slots.append(ok(await admin.get("/v1/stores/disk"))["read_slots"])
    return slots, statistics.mean(moved[-len(moved) // 3 :]) / (model.knee * RATE)


async def run(brokers: Brokers, knees: list[int], seconds: float, place: Path) -> None:
    """Print a JSON line for each knee."""
    with disk_of(brokers, place) as disk:
        await register(brokers, disk_store(disk, read_adaptive={"min": 2, "max": MOST}))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            image = (await put(brokers.api(session), session, os.urandom(BODY), "disk"))["image"]
            model = Model(knees[0])
            clients = [asyncio.create_task(_client(brokers, session, image, number, model)) for number in range(2 * MOST)]
            for knee in knees:
                model.knee = knee
                slots, share = await _watch(brokers, session, model, seconds)
                last = slots[-len(slots) // 3 :]
                figure = {"storm": "knee", "knee": knee, "slots": statistics.median(last), "least": min(last), "most": max(last)}
                print(json.dumps({**figure, "throughput": round(share, 2), "every_5_s": slots[::5]}), flush=True)
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.storms knee", description=__doc__)
    parser.add_argument("--knees", type=int, nargs="+", default=[8, 16, 4])
    parser.add_argument("--seconds", type=float, default=120, help="for each")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="storm-") as place,
        Postgres(None) as postgres,
        brokers_on(postgres.create(), Path(place), 1, settings=SETTINGS) as brokers,
    ):
        asyncio.run(run(brokers, given.knees, given.seconds, Path(place) / "disk"))


if __name__ == "__main__":
    main()
