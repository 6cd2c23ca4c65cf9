"""Waiting for what has to come to pass, however slow the machine is; what never does fails the test instead of holding it up.

The time counts for the asking: a condition that was asked in time may take as long as it needs to say yes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

SECONDS = 120.0


def wait_for(condition: Callable[[], bool], what: str = "it did not come to pass", seconds: float = SECONDS) -> None:
    """Ask until it says yes; fails with `what`."""
    end = time.monotonic() + seconds
    asked = time.monotonic()
    while not condition():
        assert asked < end, f"{what} within {seconds:.0f} s"
        time.sleep(0.03)
        asked = time.monotonic()


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str = "it did not come to pass", seconds: float = SECONDS) -> None:
    """The same on an event loop, where `condition` may be asynchronous."""
    end = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        assert asked < end, f"{what} within {seconds:.0f} s"
        await asyncio.sleep(0.03)
