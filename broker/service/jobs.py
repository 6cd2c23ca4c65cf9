"""What a broker does by itself, beside answering: reap, sweep, forget what is old, count.

Rules: each job runs alone in its own loop; a failure is logged and counted and the job runs again next time; several brokers
may run the same job at once (the catalogue's locks keep them apart), and pause a little differently so as not to meet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from broker import errors
from broker.catalog import brokers, changes, counts, failures, idempotency, keys, leases, partitions, reports, verdicts, waits
from broker.metrics import PROJECTS
from broker.model import Direction
from broker.service import adapting, key_rotation, reap, signals
from broker.service.context import Context
from broker.sign.rotation import State

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """Something to be done every `seconds`, a quarter more or less."""

    name: str
    seconds: float
    run: Callable[[Context], Awaitable[object]]


async def _sweep(context: Context) -> None:
    await leases.sweep(context.db)
    await waits.sweep(context.db)


async def _forget(context: Context) -> None:
    await changes.forget_old(context.db)
    await idempotency.forget_old(context.db)
    await keys.forget_dead(context.db)
    await failures.forget_old(context.db)
    await reports.forget_old(context.db)
    await brokers.forget_dead(context.db)


async def count(context: Context) -> None:
    """Set the gauges that cost the catalogue a scan."""
    metrics = context.metrics
    found = await counts.states(context.db)
    for subject, gauge in (
        ("uploads", metrics.uploads),
        ("copies", metrics.copies),
        ("replicas", metrics.replicas),
        ("images", metrics.images),
    ):
        gauge.replace({(entry.state,): entry.number for entry in found if entry.subject == subject})
    metrics.vetting_seconds.set(await verdicts.waiting_seconds(context.db))
    metrics.deletions.replace({(state,): number for state, number in (await counts.deletions(context.db)).items()})
    metrics.database_bytes.set(await counts.size(context.db))


async def measure(context: Context) -> None:
    """Set the gauges that move with every ticket and report."""
    metrics, db = context.metrics, context.db
    keys_by_state = context.keys.states(context.clock())
    metrics.signing_keys.replace({(state,): keys_by_state[state] for state in (*State, "unreadable")})
    metrics.failures.replace({(store,): number for store, number in context.memory.failing(context.clock()).items()})
    metrics.suspicion.replace({(store, way.value): doubt for way in Direction for store, doubt in context.memory.doubts(way).items()})
    held = await counts.stores(db)
    metrics.leases.replace({(entry.store, entry.direction): entry.leased for entry in held if entry.slots is not None})
    metrics.slots.replace({(entry.store, entry.direction): entry.slots for entry in held if entry.slots is not None})
    metrics.bandwidth.replace({(entry.store, entry.direction): entry.bandwidth for entry in held if entry.bandwidth is not None})
    spaces = await counts.spaces(db)
    metrics.space_taken.replace({(entry.store,): entry.taken for entry in spaces})
    metrics.space_capacity.replace({(entry.store,): entry.capacity for entry in spaces if entry.capacity is not None})
    metrics.project_leases.replace({(name,): number for name, number in (await counts.project_leases(db, PROJECTS)).items()})
    metrics.project_waiting.replace({(name,): number for name, number in (await counts.project_waits(db, PROJECTS)).items()})
    paths = await counts.paths(db, LATELY * context.policy.paths.half_life_seconds)
    metrics.paths.replace({(entry.store, entry.direction): entry.sites for entry in paths})
    metrics.path_rates.replace({(p.store, p.direction, of): rate for p in paths for of, rate in zip(OF, p.rates or (), strict=False)})
    metrics.path_successes.replace({(p.store, p.direction, of): share for p in paths for of, share in zip(OF, p.successes, strict=True)})


OF = ("worst", "median", "best")
"""The sites that a path gauge tells of."""

LATELY = 4
"""A path that nobody reported on for so many half-lives has next to no weight left, and is no longer told."""


JOBS = (
    Job("reap", 5.0, reap.reap),
    Job("sweep", 10.0, _sweep),
    Job("forget", 300.0, _forget),
    Job("keys", 5.0, key_rotation.look_after),
    Job("adapt", 2.0, adapting.adapt_slots),
    Job("signals", 20.0, signals.look_back),
)
"""What the catalogue needs from somebody: any broker that was not started with ``--only api``."""


def age(keep_days: int) -> Job:
    """Tickets and reports are forgotten after so many days."""

    async def run(context: Context) -> None:
        today = datetime.fromtimestamp(context.clock(), UTC).date()
        made, dropped = await partitions.tend(context.db, today, keep_days)
        if made or dropped:
            _log.info("partitions of tickets and reports", made=made, dropped=dropped)

    return Job("age", 3600.0, run)


REPEATS = Job("repeats", 1.0, signals.take_repeats)
"""What every broker that answers does with the requests that came twice."""

GAUGES = (Job("count", 60.0, count), Job("measure", 10.0, measure))
"""What every broker does for its own metrics."""


async def repeat(context: Context, job: Job) -> None:
    """Run a job again and again until cancelled."""
    while True:
        try:
            await job.run(context)
            context.metrics.jobs.inc(job.name, "ok")
        except errors.Unavailable:
            context.metrics.jobs.inc(job.name, "unavailable")
        except Exception:
            context.metrics.jobs.inc(job.name, "failed")
            _log.exception("job failed", job=job.name)
        await asyncio.sleep(job.seconds * context.rng.uniform(0.75, 1.25))
