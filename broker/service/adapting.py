"""Slots that adapt: one broker at a time looks at what the stores moved, and moves their slots (`broker.adapt`).

Lowering drains: leases that are there stay, and none are granted until fewer are left (invariant 3).
"""

from __future__ import annotations

from broker import adapt
from broker.catalog import adapting
from broker.service.context import Context


async def adapt_slots(context: Context) -> None:
    """Judge every window that is over."""
    if not any(store.read_adaptive or store.write_adaptive for store in context.memory.stores().values()):
        return
    async with adapting.alone(context.db) as connection:
        if connection is None:
            return
        for window in await adapting.windows(connection, context.policy.admit.adapt_seconds, context.clock()):
            search = adapt.read(window.search, window.slots, window.bounds)
            if window.seconds is not None:
                full = window.leased >= adapt.FULL_SHARE * search.level
                search = adapt.step(search, window.bounds, window.bytes / window.seconds if full and window.bytes else None)
            await adapting.write(context.db, window, search.level, search.document())
