"""How many bearer tokens that are refused somebody may send before they are no longer looked at.

Rules

- Counted are refusals of tokens, by the client's address (an IPv6 one by its /64, what a provider gives to one customer), and
  by all clients together, which bounds what checking signatures may cost a broker. Each is a bucket that refills steadily.
- Addresses from which a token was accepted before have the second bucket to themselves: whoever has a thousand addresses shuts
  out other strangers, and nobody who works with the broker.
- A token that is remembered as good never comes here. When a bucket is empty, tokens of subjects that were accepted before
  are still looked at, out of a small bucket of each such subject: whoever shares an address with an attacker can renew its token,
  unless the attacker knows its subject.
- What is kept is bounded: the least recently counted go first.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from functools import lru_cache

import orjson

from broker.buckets import MAX_KEPT, Buckets, Rate
from broker.errors import Forbidden, TooManyRefusals, Unauthenticated
from broker.metrics import Metrics
from broker.model import Principal

ALL = Rate(1000, 200)
"""Of all strangers together, and as many of all others; a refused token costs about 0.3 ms of a processor."""

SUBJECT = Rate(5, 0.1)


class Refusals:
    """Stands before the check of tokens that are not known yet."""

    def __init__(self, metrics: Metrics, rate: Rate, clock: Callable[[], float] = time.monotonic, *, together: Rate = ALL) -> None:
        self._metrics = metrics
        self._addresses = Buckets(rate, clock)
        self._together = Buckets(together, clock)
        self._subjects = Buckets(SUBJECT, clock)
        self._accepted: OrderedDict[Hashable, None] = OrderedDict()
        self._from: OrderedDict[Hashable, None] = OrderedDict()

    async def check(self, address: str, header: str, authenticate: Callable[[str], Awaitable[Principal]]) -> Principal:
        """What `authenticate` makes of the header. Raises what it raises, and `TooManyRefusals` without asking it."""
        network = network_of(address)
        taken = self._take(network, header)
        try:
            principal = await authenticate(header)
        except (Unauthenticated, Forbidden):
            raise
        except BaseException:
            self._give_back(taken)
            raise
        self._give_back(taken)
        _keep_in_mind(self._from, network)
        claimed = claimed_subject(header)
        if claimed is not None:
            _keep_in_mind(self._accepted, claimed)
        return principal

    def _take(self, network: str, header: str) -> tuple[tuple[Buckets, Hashable], ...]:
        reason, wait = "address", self._addresses.take(network)
        if not wait:
            stranger = network not in self._from
            reason, wait = "all", self._together.take(stranger)
            if not wait:
                return (self._addresses, network), (self._together, stranger)
            self._addresses.give_back(network)
        claimed = claimed_subject(header)
        if claimed in self._accepted and not self._subjects.take(claimed):
            return ((self._subjects, claimed),)
        self._metrics.tokens_unchecked.inc(reason)
        raise TooManyRefusals(retry_after=math.ceil(wait))

    @staticmethod
    def _give_back(taken: tuple[tuple[Buckets, Hashable], ...]) -> None:
        for buckets, key in taken:
            buckets.give_back(key)


def _keep_in_mind(kept: OrderedDict[Hashable, None], key: Hashable) -> None:
    kept[key] = None
    kept.move_to_end(key)
    if len(kept) > MAX_KEPT:
        kept.popitem(last=False)


@lru_cache(maxsize=4096)
def network_of(address: str) -> str:
    """What is counted as one client: an IPv4 address, or the /64 of an IPv6 one."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.IPv6Address(int(found) >> 64 << 64))
    return address


def claimed_subject(header: str) -> Hashable | None:
    """The issuer and the subject that a JWT names, unverified; ``None`` when it is no JWT or names none."""
    parts = header.split(".")
    if len(parts) != 3 or len(parts[1]) > 8000:
        return None
    try:
        payload = orjson.loads(base64.urlsafe_b64decode(parts[1] + "=="))
    except (ValueError, binascii.Error):
        return None
    if not isinstance(payload, dict):
        return None
    issuer, subject = payload.get("iss"), payload.get("sub")
    return (issuer, subject) if isinstance(issuer, str) and isinstance(subject, str) else None
