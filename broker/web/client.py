"""Which client asks, and where it is: the principal, the instance that it names itself, its address and its site.

Rules: X-Forwarded-For is believed only as far as trusted proxies wrote it: read from the right, the first address that is
no trusted proxy is the client's. The site is the token's, else that of the network; a hint in the request is not ours to
believe (it affects that request's ranking alone).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from functools import lru_cache

from broker.config import Network
from broker.errors import Invalid
from broker.model import Client, Principal

MAX_INSTANCE = 128
INSTANCE_HEADER = "X-Client-Instance"


class ClientFinder:
    """Makes the `Client` of a request. `site_of` tells the site of an address, if a network says so."""

    def __init__(self, trusted_proxies: Sequence[Network], site_of: Callable[[str], str | None]) -> None:
        self._site_of = site_of
        self._trusted = tuple(trusted_proxies)
        self.is_trusted: Callable[[str], bool] = lru_cache(maxsize=4096)(self._in_trusted)

    def find(self, principal: Principal, peer: str, forwarded: Sequence[str], instance: str | None) -> Client:
        """The client behind the socket's address `peer`; `forwarded` are the X-Forwarded-For fields. Raises `Invalid`."""
        if instance is None:
            instance = ""
        elif len(instance) > MAX_INSTANCE or not (instance.isascii() and instance.isprintable()):
            raise Invalid(
                "The instance is too long or not printable.", field=INSTANCE_HEADER, expected=f"at most {MAX_INSTANCE} ASCII characters"
            )
        address = self.address_of(peer, forwarded)
        return Client(principal, instance, address, principal.site or self._site_of(address))

    def address_of(self, peer: str, forwarded: Sequence[str]) -> str:
        """The address of the client behind the socket's address `peer`."""
        return self._behind(peer, forwarded) if forwarded and self.is_trusted(peer) else peer

    def _behind(self, peer: str, forwarded: Sequence[str]) -> str:
        address = peer
        for entry in reversed([part.strip() for field in forwarded for part in field.split(",")]):
            found = _address(entry)
            if found is None:
                break
            address = found
            if not self.is_trusted(found):
                break
        return address

    def _in_trusted(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip.version == network.version and ip in network for network in self._trusted)


def _address(text: str) -> str | None:
    """An address of X-Forwarded-For in canonical form: a port and brackets are dropped."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    return str(ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else str(ip)
