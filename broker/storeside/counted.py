"""What the file server counts, for Prometheus. No label holds a token, a path or an id: each takes a few fixed values."""

from __future__ import annotations

import os
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from broker import __version__
from broker.storeside.jwks import KeySource
from broker.storeside.refused import WHY, Refused

METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")
DIRECTIONS = ("in", "out")


class Counted:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, keys: KeySource | None = None, root: int | None = None) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests by method and status.", "method", "status")
        self._refused = self._counter("tokens_refused", "Requests that were refused for their token, by reason.", "reason")
        self._bytes = self._counter("bytes", "Bytes of bodies that came in and went out.", "direction")
        self._transfers = Gauge("storeside_transfers", "Bodies under way.", ["direction"], registry=self.registry)
        self._slow = self._counter("slow_clients", "Transfers that were ended because the client was too slow.", "direction")
        self.connections = Gauge("storeside_connections", "Open connections.", registry=self.registry)
        self.turned_away = Counter("storeside_connections_refused", "Connections beyond the limit.", registry=self.registry)
        Gauge("storeside_info", "The running server.", ["version"], registry=self.registry).labels(__version__).set(1)
        for why in WHY:
            self._refused.labels(why)
        for direction in DIRECTIONS:
            self._bytes.labels(direction), self._slow.labels(direction), self._transfers.labels(direction)
        if keys is not None:
            self._watch("keys_age_seconds", "Seconds since the issuer's keys were read.", lambda: keys.age_seconds)
            self._watch("clock_offset_seconds", "How far this clock is ahead of the issuer's.", lambda: keys.clock_offset or 0.0)
        if root is not None:
            self._watch("free_bytes", "Space that is left.", lambda: free_bytes(root))

    def answered(self, method: str, status: int, refused: Refused | None = None) -> None:
        self._requests.labels(method if method in METHODS else "other", str(status)).inc()
        if refused is not None and refused.why is not None:
            self._refused.labels(refused.why).inc()

    def moved(self, direction: str, count: int) -> None:
        self._bytes.labels(direction).inc(count)

    def under_way(self, direction: str) -> Gauge:
        """Use its ``track_inprogress``."""
        return self._transfers.labels(direction)

    def slow(self, direction: str) -> None:
        self._slow.labels(direction).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"storeside_{name}", text, labels, registry=self.registry)

    def _watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"storeside_{name}", text, registry=self.registry).set_function(value)


def free_bytes(directory: int) -> int:
    """What the file system of an open directory has left for us."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
