"""How projects share a store that has too few slots, and whether ``Retry-After`` comes true: two real brokers, clients that hold leases.

Cases: ``equal`` (four projects of 4, 8, 16 and 32 clients; Jain's index of what they were granted), ``weighted`` (weights 1, 2 and 4, as
many clients each; Jain's index of what they were granted for their weight), ``retry-after`` (seconds until a slot was had over those that
were told, median: of clients that ``waited`` for it at the broker, and of those that ``returned`` when they were told to, as often as
it took). Nothing is moved: clients take a ticket, hold it for as long as a transfer would last, and report. ``--seconds N`` a case (20).
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp

from broker.catalog import connect
from broker.model import new_id
from tests.parts.broker import Api
from tests.parts.cluster import Brokers, brokers_on
from tests.parts.postgres import Postgres

SECONDS = 20.0
WARM_SECONDS = 3.0
SIZE = 100_000_000
SETTINGS = '[policy.admission]\nmin_retry_seconds = 0.05\n[log]\nlevel = "warning"\n'


async def make_store(brokers: Brokers, name: str, slots: int) -> UUID:
    """A store with so many slots, and a blob on it that everybody may read; nobody ever talks to it."""
    db = await connect.connect_one(brokers.database)
    await db.execute("INSERT INTO sites (path) VALUES ('eu') ON CONFLICT DO NOTHING")
    store = await db.fetchval(
        """INSERT INTO stores (name, kind, site, endpoint, abilities) VALUES ($1, 'http', 'eu', 'https://' || $1 || '.example', $2)
           RETURNING id""",
        name, {"reads": True, "ranges": True},
    )  # fmt: skip
    await db.execute("INSERT INTO spaces (store_id) VALUES ($1)", store)
    await db.execute("INSERT INTO slots (store_id, direction, slots) VALUES ($1, 'read', $2), ($1, 'write', NULL)", store, slots)
    blob, image = new_id(), new_id()
    await db.execute("INSERT INTO blobs (id, size, digests, state) VALUES ($1, $2, '{}', 'active')", blob, SIZE)
    await db.execute(
        """INSERT INTO replicas (id, blob_id, store_id, key, state, project, subject, observed_by, observed_strength, observed_at)
           VALUES ($1, $2, $3, 'key', 'active', 'p', 'u', 'broker', 'sha256', now())""",
        new_id(), blob, store,
    )  # fmt: skip
    await db.execute(
        "INSERT INTO images (id, name, project, subject, visibility, status) VALUES ($1, 'i', 'p', 'u', 'public', 'active')", image
    )
    await db.execute("INSERT INTO image_blobs VALUES ($1, 'raw', $2)", image, blob)
    await db.close()
    return blob


async def transfer(api: Api, ticket: Any, seconds: float) -> None:
    """Hold a ticket's lease for as long as a transfer lasts, and report it."""
    began = time.monotonic()
    await asyncio.sleep(seconds)
    body = {"store": ticket["sources"][0]["store"], "outcome": "ok", "bytes": SIZE, "seconds": time.monotonic() - began}
    reply = await api.post(f"/v1/tickets/{ticket['id']}/report", body)
    assert reply.status == 204, reply.body


async def saturate(
    brokers: Brokers, session: aiohttp.ClientSession, blob: UUID, clients: dict[str, int], hold: tuple[float, float], seconds: float
) -> Counter[str]:
    """So many clients of each project ask again and again, waiting for their turns; the transfers granted to each after a while."""
    granted: Counter[str] = Counter()
    count_from = time.monotonic() + WARM_SECONDS

    async def client(project: str, number: int) -> None:
        draw = random.Random(f"{project} {number}")
        api = brokers.api(session, project=project, subject=f"{project}-{number}", at=number % len(brokers.running))
        while True:
            reply = await api.post("/v1/tickets", {"operation": "download", "blob": str(blob), "wait": 60})
            if reply.status == 201:
                if time.monotonic() >= count_from:
                    granted[project] += 1
                await transfer(api, reply.body, draw.uniform(*hold))
            else:
                assert reply.status == 429, reply.body

    tasks = [asyncio.create_task(client(project, number)) for project, count in clients.items() for number in range(count)]
    await finished(tasks, WARM_SECONDS + seconds)
    return granted


async def promised(
    brokers: Brokers, session: aiohttp.ClientSession, blob: UUID, clients: int, hold: tuple[float, float], seconds: float
) -> dict[str, list[float]]:
    """Clients that are sent away by turns wait on, or come back when they were told to: what happened over what was told."""
    ratios: dict[str, list[float]] = {"waited": [], "returned": []}
    count_from = time.monotonic() + WARM_SECONDS

    async def client(number: int) -> None:
        draw = random.Random(number)
        api = brokers.api(session, project=f"p{number % 3}", subject=f"c-{number}", at=number % len(brokers.running))
        request: dict[str, Any] = {"operation": "download", "blob": str(blob)}
        waits = number % 2 == 0
        while True:
            reply, asked, told = await api.post("/v1/tickets", request), time.monotonic(), 0.0
            if reply.status != 201:
                assert reply.status == 429, reply.body
                told = reply.body["retry_after"]
            while reply.status != 201:
                assert reply.status == 429, reply.body
                if waits:
                    reply = await api.post("/v1/tickets", {**request, "wait": 60})
                else:
                    await asyncio.sleep(reply.body["retry_after"])
                    reply = await api.post("/v1/tickets", request)
            if told and asked >= count_from:
                ratios["waited" if waits else "returned"].append((time.monotonic() - asked) / told)
            await transfer(api, reply.body, draw.uniform(*hold))

    await finished([asyncio.create_task(client(number)) for number in range(clients)], WARM_SECONDS + seconds)
    return ratios


async def finished(tasks: Sequence[asyncio.Task[None]], seconds: float) -> None:
    """Let them run for so long; raises what one of them raised."""
    done, running = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for task in done:
        task.result()


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1 when all are equal, 1/n when one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def line(case: str, **figures: Any) -> None:
    print(json.dumps({"bench": "fairness", "case": case, **figures}), flush=True)


async def measure(brokers: Brokers, seconds: float) -> None:
    """Every case."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = {f"equal-{count}": count for count in (4, 8, 16, 32)}
        granted = await saturate(brokers, session, await make_store(brokers, "equal", 8), clients, (0.4, 0.6), seconds)
        shares = [granted[project] for project in clients]
        line("equal", jain=round(jain(shares), 4), clients=list(clients.values()), granted=shares, slots=8)

        weights = {f"weight-{weight}": weight for weight in (1, 2, 4)}
        admin = brokers.api(session, "admin")
        for project, weight in weights.items():
            reply = await admin.send("PUT", f"/v1/quotas/{project}", {"weight": weight})
            assert reply.status == 200, reply.body
        await asyncio.sleep(2)  # every broker knows of it by then
        blob = await make_store(brokers, "weighted", 14)
        granted = await saturate(brokers, session, blob, dict.fromkeys(weights, 20), (0.4, 0.6), seconds)
        shares = [granted[project] for project in weights]
        even = [share / weight for share, weight in zip(shares, weights.values(), strict=True)]
        line("weighted", jain=round(jain(even), 4), weights=list(weights.values()), granted=shares, slots=14)

        ratios = await promised(brokers, session, await make_store(brokers, "promised", 4), 12, (1.0, 3.0), 2 * seconds)
        for how, seen in ratios.items():
            within = sum(0.5 <= ratio <= 2 for ratio in seen) / max(1, len(seen))
            median = round(statistics.median(seen), 3) if seen else None
            line("retry-after", how=how, median_ratio=median, within_factor_2=round(within, 3), promises=len(seen))


def main() -> None:
    if "--help" in sys.argv:
        sys.exit(__doc__)
    seconds = float(sys.argv[sys.argv.index("--seconds") + 1]) if "--seconds" in sys.argv else SECONDS
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as place,
        Postgres(None) as postgres,
        brokers_on(postgres.create(), Path(place), 2, settings=SETTINGS) as brokers,
    ):
        asyncio.run(measure(brokers, seconds))


if __name__ == "__main__":
    main()
