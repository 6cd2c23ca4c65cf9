"""Which addresses the broker opens, and how that is made sure of (invariant 9).

Rules

- What is checked is the address that a socket is about to be connected to, in the step that makes the socket: whatever a name
  server answers before or after does not matter (DNS rebinding), and addresses that are written as such take the same way.
- Public addresses are open to all stores. Loopback, private and other addresses inside somebody's network are open only to
  stores that are declared internal. Link-local ones (where clouds keep their metadata), multicast and addresses of no machine
  are open to none.
- An IPv6 address that carries an IPv4 one is judged by that (mapped, RFC 4291 section 2.5.5; NAT64, RFC 6052); what 6to4 and Teredo
  carry is never opened (RFC 7526).

Ranges are those of the IANA special-purpose address registries (RFC 6890), spelled out, since what Python's ``ipaddress``
says of them differs between its versions.
"""

from __future__ import annotations

import errno
import socket
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import aiohttp

from broker.errors import Invalid, StoreUnavailable

CONNECTIONS = 200
CONNECTIONS_PER_HOST = 50
"""So that one slow store does not keep the broker from all the others."""


class Reach(IntEnum):
    """How far away an address is; only the first two are ever opened."""

    PUBLIC = 0
    INSIDE = 1
    NEVER = 2


_RANGES: tuple[tuple[str, Reach, str], ...] = (
    ("169.254.0.0/16", Reach.NEVER, "link-local"),
    ("100.100.100.200/32", Reach.NEVER, "metadata"),  # Alibaba Cloud, "Instance metadata"
    ("168.63.129.16/32", Reach.NEVER, "metadata"),  # Azure, "What is IP address 168.63.129.16?"
    ("fd00:ec2::254/128", Reach.NEVER, "metadata"),  # Amazon EC2, "Instance metadata"
    ("fd20:ce::254/128", Reach.NEVER, "metadata"),  # Google Cloud, "About VM metadata"
    ("127.0.0.0/8", Reach.INSIDE, "loopback"),
    ("10.0.0.0/8", Reach.INSIDE, "private"),
    ("172.16.0.0/12", Reach.INSIDE, "private"),
    ("192.168.0.0/16", Reach.INSIDE, "private"),
    ("100.64.0.0/10", Reach.INSIDE, "shared (carrier-grade NAT)"),
    ("198.18.0.0/15", Reach.INSIDE, "benchmarking"),
    ("192.0.2.0/24", Reach.INSIDE, "documentation"),
    ("198.51.100.0/24", Reach.INSIDE, "documentation"),
    ("203.0.113.0/24", Reach.INSIDE, "documentation"),
    ("0.0.0.0/8", Reach.NEVER, "unspecified"),
    ("192.0.0.0/24", Reach.NEVER, "reserved"),
    ("192.88.99.0/24", Reach.NEVER, "reserved"),
    ("224.0.0.0/4", Reach.NEVER, "multicast"),
    ("240.0.0.0/4", Reach.NEVER, "reserved"),
    ("0.0.0.0/0", Reach.PUBLIC, "public"),
    ("::1/128", Reach.INSIDE, "loopback"),
    ("::/128", Reach.NEVER, "unspecified"),
    ("fc00::/7", Reach.INSIDE, "private"),
    ("fe80::/10", Reach.NEVER, "link-local"),
    ("ff00::/8", Reach.NEVER, "multicast"),
    ("2001:db8::/32", Reach.INSIDE, "documentation"),
    ("3fff::/20", Reach.INSIDE, "documentation"),
    ("2001::/23", Reach.NEVER, "reserved"),  # Teredo among them
    ("2002::/16", Reach.NEVER, "reserved"),
    ("2000::/3", Reach.PUBLIC, "public"),
    ("::/0", Reach.NEVER, "reserved"),
)
"""The first range that holds an address decides."""

_NETWORKS = [(ip_network(text), reach, word) for text, reach, word in _RANGES]
_V4 = [(network, reach, word) for network, reach, word in _NETWORKS if isinstance(network, IPv4Network)]
_V6 = [(network, reach, word) for network, reach, word in _NETWORKS if isinstance(network, IPv6Network)]
_CARRIERS = tuple(IPv6Network(text) for text in ("::ffff:0:0/96", "64:ff9b::/96", "::/96"))
"""Prefixes whose addresses end with an IPv4 one: mapped, NAT64, compatible."""


def judge(address: str) -> tuple[Reach, str]:
    """How far `address` is, and in a word why. What is no address is out of reach."""
    try:
        found = ip_address(address)
    except ValueError:
        return Reach.NEVER, "unreadable"
    if isinstance(found, IPv6Address):
        carried = _carried(found)
        if carried is None:
            value = IPv6Address(int(found))  # without its zone
            return next((reach, word) for network, reach, word in _V6 if value in network)
        found = carried
    return next((reach, word) for network, reach, word in _V4 if found in network)


def _carried(address: IPv6Address) -> IPv4Address | None:
    if int(address) <= 1:  # :: and ::1 are no IPv4-compatible addresses
        return None
    return IPv4Address(int(address) & 0xFFFFFFFF) if any(address in network for network in _CARRIERS) else None


class ForbiddenAddress(OSError):
    """A socket was not made, for its address is out of reach."""

    def __init__(self, reach: Reach, word: str) -> None:
        super().__init__(errno.EACCES, "forbidden address")  # one text for all: of several equal ones the library raises the first
        self.reach = reach
        self.word = word


class AddressRefused(StoreUnavailable):
    """A store whose address the broker does not open."""

    def __init__(self, store: str, cause: ForbiddenAddress) -> None:
        rule = "opens for no store" if cause.reach is Reach.NEVER else "opens only for stores that are declared internal"
        super().__init__(f"store {store} is at {_article(cause.word)} address, which the broker {rule}")
        self._cause = cause

    def as_invalid(self) -> Invalid:
        """The same, said to who registers the store: which field to set, if any can help."""
        if self._cause.reach is Reach.NEVER:
            return Invalid(self.detail + ".", field="endpoint", expected="an address of a store, by which the broker can reach it")
        return Invalid(
            self.detail + ". If it is meant to be inside your network, declare it.",
            field="internal",
            expected="true (with the command: --internal)",
        )


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def refusal(error: BaseException) -> ForbiddenAddress | None:
    """The `ForbiddenAddress` behind an error of aiohttp's, if it was one."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return cause if isinstance(cause, ForbiddenAddress) else None


def connector(*, internal: bool) -> aiohttp.TCPConnector:
    """Connections to addresses within reach: public ones, and those inside somebody's network if `internal`."""
    farthest = Reach.INSIDE if internal else Reach.PUBLIC
    known = lru_cache(maxsize=1024)(judge)

    def make(address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, where = address
        reach, word = known(where[0])
        if reach > farthest:
            raise ForbiddenAddress(reach, word)
        return socket.socket(family, kind, protocol)

    return aiohttp.TCPConnector(limit=CONNECTIONS, limit_per_host=CONNECTIONS_PER_HOST, socket_factory=make)
