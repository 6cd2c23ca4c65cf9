"""Which reports cannot be true, whoever sends them. They are refused, so that the sender finds his mistake.

Rules
- Bytes take time. No transfer lasted longer than its ticket exists, but for `CLOCK_SECONDS`: the clocks of brokers differ.
- A place delivered, repetitions included, at most `REPETITIONS` times the blob; at least `LEAST_BYTES` are always believed.
"""

from __future__ import annotations

from typing import NamedTuple

CLOCK_SECONDS = 30.0
"""A transfer may be told to have begun so long before its ticket."""

REPETITIONS = 10
"""So many times the blob may one place have moved, with everything that was sent again."""

LEAST_BYTES = 1 << 20
"""Never is a report refused for fewer bytes."""


class Implausible(NamedTuple):
    """The field that is to blame, and what it might have been."""

    field: str
    expected: str


def implausible(bytes: int, seconds: float | None, setup_seconds: float | None, size: int | None, age_seconds: float) -> Implausible | None:
    """What cannot be true of a report on a blob of `size` by a ticket of that age; ``None`` when all of it can.

    `seconds` is ``None`` when the report does not say.
    """
    if seconds == 0 and bytes > 0:
        return Implausible("seconds", "more than 0 for bytes that were moved; or leave it out")
    most_seconds = max(0.0, age_seconds) + CLOCK_SECONDS
    if seconds is not None and seconds > most_seconds:
        return Implausible("seconds", f"at most {most_seconds:.0f}: the ticket is no older")
    if size is not None and bytes > max(LEAST_BYTES, REPETITIONS * size):
        return Implausible("bytes", f"at most {max(LEAST_BYTES, REPETITIONS * size)}: the blob has {size}")
    if setup_seconds is not None and seconds is not None and setup_seconds > seconds:
        return Implausible("setup_seconds", "at most seconds: it is a part of them")
    return None
