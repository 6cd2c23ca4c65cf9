"""``python -m tests.storms leases``: unexpired leases never exceed a store's slots, whatever happens to the brokers (invariant 3).

Real brokers on one real PostgreSQL; a part of them is killed with -9 and started again, or stopped and let go on, at random.
Clients take tickets, activate, refresh, report, release and forget; slots are lowered and raised through the API meanwhile. The
stores are real, let one token be used once at a time, and write down every body that they move. What an observer saw, and what
the database wrote down of every instant, is judged at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from broker import config
from broker.catalog import connect
from broker.model import Role
from broker.sign.token import TokenSigner, generate_key
from tests.parts import storeside
from tests.parts.cluster import Brokers, disk_store, keyring_of, put, register
from tests.parts.postgres import Postgres
from tests.parts.storeside import StoresidePart
from tests.storms import crowd, observer
from tests.storms.havoc import Havoc
from tests.storms.store import VARIABLE, events

BODY = 64 << 10
MOST_SLOTS = 10

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Plan:
    """How large a storm is. `worst` of the `brokers` are down at a time."""

    seconds: float
    brokers: int = 4
    worst: int = 2
    stores: int = 3
    clients: int = 40
    lease_seconds: float = 4.0
    seed: int = 1


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    plan: Plan
    history: observer.History
    looks: observer.Observer
    tally: crowd.Tally
    kills: int
    stops: int
    miscounted: int
    """Stores whose count of leases differs from their leases at the end."""
    lost: int
    """Images of acknowledged commits that the database does not have as active."""

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept."""
        found = [*self.looks.over[:5], *self.history.over[:5], *self.history.unleased[:5], *self.tally.wrong[:5]]
        return [*found, *(["counts differ from leases"] if self.miscounted else []), *(["commits were lost"] if self.lost else [])]


async def run(postgres: Postgres, place: Path, plan: Plan) -> Outcome:
    """One storm."""
    lease = plan.lease_seconds
    settings = (
        f"[policy.admission]\nmin_lease_seconds = {lease}\nmax_lease_seconds = {lease}\nmin_ticket_seconds = 20.0\n"
        "[policy.uploads]\nupload_ttl_seconds = 30\nurl_ttl_seconds = 20\npart_url_ttl_seconds = 20\n"
    )
    draw = random.Random(plan.seed)
    with (
        Havoc(postgres.create(), place, plan.brokers, plan.worst, settings, lease * 1.5, draw) as havoc,
        _stores(plan, place, havoc) as disks,
    ):
        parsed = config.load(havoc.brokers[0].config)
        brokers = Brokers(tuple(havoc.brokers), await keyring_of(havoc.database, parsed), havoc.issuer, parsed.credentials_dir)
        await register(brokers, *[disk_store(disk, disk.audience, read_slots=4, write_slots=3) for disk in disks])
        db = await connect.connect_one(havoc.database)
        watcher = observer.Observer(await connect.connect_one(havoc.database))
        async with aiohttp.ClientSession() as session:
            content = os.urandom(BODY)
            seen = {"name": "storm", "visibility": "community"}
            made = await put(brokers.api(session), session, content, *[disk.audience for disk in disks], image=seen)
            await watcher.prepare()
            tally = crowd.Tally()
            clients = [
                crowd.Client(session, havoc.urls, brokers.token(subject=f"client-{number}", project=f"project-{number % 5}"), made["image"],
                             content, lease, random.Random(f"{plan.seed}-{number}"), tally)
                for number in range(plan.clients)
            ]  # fmt: skip
            going = (watcher.watch(), _limits(brokers, disks, draw), *[client.run() for client in clients])
            work = [asyncio.create_task(each) for each in going]
            harm = asyncio.create_task(havoc.run())
            await asyncio.wait([*work, harm], timeout=plan.seconds, return_when=asyncio.FIRST_COMPLETED)
            havoc.going = False
            await harm
            ended = [task for task in work if task.done()]
            pending = set(work)
            while pending:  # a time-out that ends just now may swallow a cancellation
                for task in pending:
                    task.cancel()
                _, pending = await asyncio.wait(pending, timeout=1)
            for task in ended:
                task.result()
        ids = {row["name"]: row["id"] for row in await db.fetch("SELECT id, name FROM stores")}
        moved = {ids[disk.audience]: events(disk.root.parent / "transfers") for disk in disks}
        told = await observer.history(db, moved)
        miscounted = await db.fetchval(
            """SELECT count(*) FROM slots s WHERE s.leased <> (
                   SELECT count(*) FROM leases l WHERE (l.store_id, l.direction) = (s.store_id, s.direction))"""
        )
        kept = await db.fetchval("SELECT count(*) FROM images WHERE id::text = any($1) AND status = 'active'", tally.committed)
        await db.close()
        await watcher.db.close()
    return Outcome(plan, told, watcher, tally, havoc.kills, havoc.stops, miscounted, len(tally.committed) - kept)


async def _limits(brokers: Brokers, disks: list[StoresidePart], draw: random.Random) -> None:
    """Lower and raise slots through the API, by any broker that answers."""
    timeout = aiohttp.ClientTimeout(total=crowd.ANSWER_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        apis = [brokers.api(session, Role.ADMIN, at=at) for at in range(len(brokers.running))]
        while True:
            await asyncio.sleep(draw.uniform(0.2, 1.0))
            changed = {draw.choice(("read_slots", "write_slots")): draw.randint(0, MOST_SLOTS)}
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                reply = await draw.choice(apis).patch(f"/v1/stores/{draw.choice(disks).audience}", changed, "*")
                assert reply.status in (200, 412, 503), reply.body  # 412: two at once


@contextlib.contextmanager
def _stores(plan: Plan, place: Path, havoc: Havoc) -> Iterator[list[StoresidePart]]:
    """Storesides that write down what they move, and let a token be used once at a time."""
    signer = TokenSigner([generate_key("ES256", 0)], havoc.issuer)  # never used: the brokers sign
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                storeside.start(
                    _directory(place / name), audience=name, signer=signer, keys=f"{havoc.issuer}/.well-known/jwks.json",
                    prefix=("env", f"PYTHONPATH={_ROOT}", f"{VARIABLE}={place / name / 'transfers'}"), module="tests.storms.store",
                    options=("--reads-per-token", "1", "--writes-per-token", "1", "--slow-seconds", "60"),
                )
            )
            for name in (f"disk-{number}" for number in range(1, plan.stores + 1))
        ]  # fmt: skip


def _directory(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def figures(outcome: Outcome) -> Iterator[dict[str, object]]:
    """What was seen, one figure each."""
    told, tally, looks = outcome.history, outcome.tally, outcome.looks
    for case, value in {
        "leases over slots, as looked at": len(looks.over),
        "leases over slots, at any instant": len(told.over),
        "bodies at stores without a lease": len(told.unleased),
        "looks": looks.looks,
        "looks that saw a store full": looks.full,
        "leases granted": told.granted,
        "grants that took the last slot": told.full,
        "leases renewed": told.renewed,
        "leases given back": told.ended - told.expired,
        "leases expired": told.expired,
        "changes of slots": told.limits,
        "brokers killed": outcome.kills,
        "brokers stopped": outcome.stops,
        "requests without an answer": tally.unanswered,
        "bodies seen at stores": told.transfers,
        "bodies moved by clients": tally.transfers,
        "bodies cut before their lease could end": tally.cut,
        "second uses of a token refused by stores": tally.doubled,
        "commits acknowledged": len(tally.committed),
        "acknowledged commits lost": outcome.lost,
        "wrong answers": len(tally.wrong),
        "stores that count other leases than there are": outcome.miscounted,
    }.items():
        yield {"storm": "leases", "case": case, "value": value}
    yield {
        "storm": "leases",
        "case": "most bodies at once",
        "value": {f"{id} {way}": most for (id, way), most in sorted(told.most.items())},
    }
    yield {"storm": "leases", "case": "answers", "value": dict(sorted(tally.answers.items()))}


def main() -> None:
    default = Plan(120)
    parser = argparse.ArgumentParser(prog="python -m tests.storms leases", description=__doc__)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--brokers", type=int, default=default.brokers)
    parser.add_argument("--worst", type=int, default=default.worst, help="so many of them are down at a time")
    parser.add_argument("--stores", type=int, default=default.stores)
    parser.add_argument("--clients", type=int, default=default.clients)
    parser.add_argument("--seed", type=int, default=default.seed)
    given = parser.parse_args()
    plan = Plan(given.seconds, given.brokers, given.worst, given.stores, given.clients, seed=given.seed)
    with tempfile.TemporaryDirectory(prefix="storm-") as place, Postgres(None) as postgres:
        outcome = asyncio.run(run(postgres, Path(place), plan))
    for figure in figures(outcome):
        print(json.dumps(figure))
    told, broken = outcome.history, outcome.broken
    print(
        f"{plan.seconds:g} s, {plan.brokers} brokers, {outcome.kills} times one was killed and {outcome.stops} times stopped: "
        f"{told.granted} leases granted, {len(told.over)} over slots; "
        f"{told.transfers} bodies at the stores, {len(told.unleased)} without a lease"
    )
    for each in broken:
        print(each, file=sys.stderr)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
