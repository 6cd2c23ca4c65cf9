"""The stores and sites that a broker knows, kept whole: there are few of them, and every decision needs them.

Rules
- A store's driver is opened when first used, and anew when the store, its credential or the keys have changed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping

from broker import errors
from broker.catalog import sites
from broker.metrics import Times
from broker.model import Store
from broker.service.reads import Reads
from broker.sites import ancestors
from broker.stores.base import Store as Driver

KNOWN_ADDRESSES = 10_000
"""Addresses whose site is remembered, at most."""

OpenStore = Callable[[Store], Driver]
"""Makes the driver of a store; raises `errors.StoreUnavailable` when its credential is missing."""


class Topology:
    """Every store and site, and what talks to the stores."""

    def __init__(self, open_store: OpenStore, signing_seconds: Times) -> None:
        self._open_store = open_store
        self.reads = Reads(self.driver, signing_seconds)
        self._stores: dict[str, Store] = {}
        self._by_id: dict[int, Store] = {}
        self._drivers: dict[str, Driver] = {}
        self._sites: dict[str, sites.Site] = {}
        self._networks: list[tuple[sites.Network, str]] = []
        self._site_by_address: dict[str, str | None] = {}

    def take_over(self, stores: Iterable[Store], found_sites: Iterable[sites.Site]) -> None:
        """These are all stores and sites from now on."""
        before, self._stores = self._stores, {store.name: store for store in stores}
        self._by_id = {store.id: store for store in self._stores.values()}
        for name in list(self._drivers):
            if self._stores.get(name) != before.get(name):
                del self._drivers[name]
                self.reads.forget()
        self._sites = {site.path: site for site in found_sites}
        networks = [(network, site.path) for site in self._sites.values() for network in site.networks]
        self._networks = sorted(networks, key=lambda entry: -entry[0].prefixlen)
        self._site_by_address.clear()

    # -- stores

    def store(self, name: str) -> Store | None:
        """The store of that name."""
        return self._stores.get(name)

    def store_by_id(self, id: int) -> Store | None:
        """The store with that number."""
        return self._by_id.get(id)

    def stores(self) -> Mapping[str, Store]:
        """Every store by name."""
        return self._stores

    def driver(self, name: str) -> Driver:
        """What talks to the store and signs for it. Raises `errors.StoreUnavailable`."""
        driver = self._drivers.get(name)
        if driver is None:
            store = self._stores.get(name)
            if store is None:
                raise errors.StoreUnavailable("The store is not registered.")
            driver = self._drivers[name] = self._open_store(store)
        return driver

    def forget_drivers(self) -> None:
        """Open every driver anew when next used: credentials or keys have changed."""
        self._drivers.clear()
        self.reads.forget()

    # -- sites

    def has_site(self, path: str) -> bool:
        """Whether the site is registered, or lies below one that is."""
        return any(known in self._sites for known in ancestors(path))

    def site_of(self, address: str) -> str | None:
        """The site whose network holds the address; the narrowest network decides."""
        if not self._networks:
            return None
        if address not in self._site_by_address:
            if len(self._site_by_address) >= KNOWN_ADDRESSES:
                self._site_by_address.clear()
            self._site_by_address[address] = self._look_up_site(address)
        return self._site_by_address[address]

    def _look_up_site(self, address: str) -> str | None:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return None
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        return next((site for network, site in self._networks if ip.version == network.version and ip in network), None)
