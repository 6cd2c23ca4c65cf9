"""Whose word a report is, and how much of it is heard outside of the client's own network.

Rules
- A voice is a principal at an address, an IPv6 client by its /64. The instance that a client names itself counts nothing
  here: it costs nothing to invent another one.
- At its own site, which token or network prove, a report counts in full. To wider sites a voice adds less and less: after
  reports that weigh W, decayed like the averages, it has added `heard(W)` at most, whatever it did, and that is less than
  `MOST`. So one client never weighs more than `MOST` fresh reports in the view of any other network.
- Nor does it weigh more by saying something extreme: what wider sites hear of one report is a rate within `RATE_FACTOR` of what they know,
  for a time at most `TIME_FACTOR` times what reports told on average, and the same for the setup. Where they know nothing, the time
  is `UNKNOWN_SECONDS` at most. So rates of other networks move with the share of voices, not with the size of a lie.
- `heard` is concave and 0 at 0, so decay never lets a voice add more than that: k · heard(W) ≤ heard(k · W) for 0 ≤ k ≤ 1.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import NamedTuple

from broker.paths import Contribution

SPARE = 2.0
"""How fast a voice fades: its first report counts 1, its second 1/2, its third 3/10."""

MOST = 1.0 + SPARE
"""What one voice can weigh at wider sites, in reports; it comes near, and never reaches it."""


RATE_FACTOR = 4.0
TIME_FACTOR = 2.0
UNKNOWN_SECONDS = 60.0


class Voice(NamedTuple):
    """Whose word it is. `network` and `project` say how independent two voices are of each other."""

    name: str
    network: str
    """The /24 of an IPv4 address, the /64 of an IPv6 one."""
    project: str


def voice(project: str, subject: str, address: str) -> Voice:
    """The voice of a principal at an address. Names hold no tabs, so that no two voices are called the same."""
    place, network = _networks(address)
    return Voice(f"{project}\t{subject}\t{place}", network, project)


def heard(weight: float) -> float:
    """The most that a voice has added to wider sites after reports of that weight."""
    return MOST * weight / (SPARE + weight)


def share(before: float, added: float) -> float:
    """The part of reports weighing `added`, from a voice that weighs `before`, that wider sites hear; 0 to 1."""
    return min(1.0, MOST * SPARE / ((SPARE + before) * (SPARE + before + added)))


def moderated(told: Contribution, known: Contribution | None) -> Contribution:
    """What wider sites would hear of a report if it were the first of its voice; `known` are their sums before."""
    busy = _bounded(told.busy_seconds, told.weight, known and known.busy_seconds, known and known.weight)
    rate = told.bytes / told.busy_seconds if told.busy_seconds > 0 else 0.0
    if known is not None and known.busy_seconds > 0 and known.bytes > 0:
        before = known.bytes / known.busy_seconds
        rate = min(max(rate, before / RATE_FACTOR), before * RATE_FACTOR)
    setup = _bounded(told.setup, told.setup_weight, known and known.setup, known and known.setup_weight)
    return told._replace(bytes=rate * busy, busy_seconds=busy, setup=setup)


def _bounded(seconds: float, weight: float, known: float | None, known_weight: float | None) -> float:
    """Seconds of a report, bounded by what reports told on average."""
    mean = known / known_weight * TIME_FACTOR if known and known_weight else UNKNOWN_SECONDS
    return min(seconds, weight * mean)


@lru_cache(maxsize=16384)
def _networks(address: str) -> tuple[str, str]:
    """The address, or the /64 of an IPv6 one; and the network by which it is independent of others."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address, address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            network = str(ipaddress.ip_network((ip, 64), strict=False))
            return network, network
        ip = ip.ipv4_mapped
    return str(ip), str(ipaddress.ip_network((ip, 24), strict=False))
