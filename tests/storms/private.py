"""``python -m tests.storms private``: how long answers take that name a private store, beside the same that name one that does not exist.

A member asks both in turn, in random order; the store has replicas, leases and reports. A line for each kind of request: medians in ms,
their ratio, and the share of pairs in which the private store's answer took longer (one half, where there is nothing to learn). Exits 1
when a ratio is off by more than a quarter, or a share by more than 0.15.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from broker.model import Role
from tests.acceptance.test_private_stores import HIDDEN, Things, World, hide, things, world_on
from tests.bench.options import at_least
from tests.parts.broker import Api
from tests.parts.postgres import Postgres

GHOST = "ghost"
MOST_RATIO, MOST_SHARE = 1.25, 0.15


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.storms private", description=__doc__)
    parser.add_argument("pairs", type=at_least(2), nargs="?", default=400, help="pairs of each kind of request; 400 by default")
    pairs = parser.parse_args().pairs
    with Postgres(None) as postgres, tempfile.TemporaryDirectory() as place:
        fine = asyncio.run(_measure(postgres.create(), Path(place), pairs))
    print("a private store and none take alike" if fine else "A PROMISE WAS BROKEN")
    sys.exit(0 if fine else 1)


async def _measure(database: str, place: Path, pairs: int) -> bool:
    fine = True
    async with world_on(database, place) as world:
        await world.register(HIDDEN, exposure="service", read_slots=9, write_slots=9)
        known = await hide(world, await things(world))
        member = world.api(Role.MEMBER)
        for name in _requests(known, HIDDEN, known.other):
            seen = await _pairs(world, member, known, name, pairs)
            with_, without = zip(*seen, strict=True)
            ratio = statistics.median(with_) / statistics.median(without)
            share = statistics.mean(a > b for a, b in seen)
            good = 1 / MOST_RATIO < ratio < MOST_RATIO and abs(share - 0.5) < MOST_SHARE
            fine = fine and good
            medians = {"private_ms": round(statistics.median(with_), 2), "none_ms": round(statistics.median(without), 2)}
            line = {"storm": "private", "request": name, **medians, "ratio": round(ratio, 3), "share": round(share, 3), "fine": good}
            print(json.dumps(line), flush=True)
    return fine


def _requests(known: Things, store: str, replica: str) -> dict[str, tuple[str, str, Any]]:
    """What is asked about `store`, and about `replica` there."""
    ticket = {"operation": "download", "blob": known.blob}
    upload = {"operation": "upload", "blob": known.blob}
    return {
        "store": ("GET", f"/v1/stores/{store}", None),
        "replica": ("GET", f"/v1/replicas/{replica}", None),
        "replicas there": ("GET", f"/v1/replicas?store={store}", None),
        "paths there": ("GET", f"/v1/paths?store={store}", None),
        "prefer": ("POST", "/v1/tickets", {**ticket, "prefer": [store]}),
        "only": ("POST", "/v1/tickets", {**ticket, "only": [store]}),
        "upload there": ("POST", "/v1/tickets", {**upload, "only": [store]}),
        "register": ("POST", f"/v1/blobs/{known.blob}/replicas", {"store": store, "key": "demo/x"}),
        "delete": ("DELETE", f"/v1/replicas/{replica}", None),
    }


async def _pairs(world: World, member: Api, known: Things, name: str, pairs: int) -> list[tuple[float, float]]:
    """Milliseconds with the private store's name and with the other's."""
    seen = []
    for number in range(pairs + 20):
        took = {}
        for store in random.sample((HIDDEN, GHOST), 2):
            method, path, body = _requests(known, store, known.other if store == HIDDEN else str(uuid4()))[name]
            began = time.perf_counter()
            await member.send(method, path, body)
            took[store] = (time.perf_counter() - began) * 1000
        if number >= 20:
            seen.append((took[HIDDEN], took[GHOST]))
    return seen


if __name__ == "__main__":
    main()
