"""What is counted, under which names (prometheus.io, "Metric and label naming").

Cardinality is bounded: `store` by the registered stores (a name that was forgotten stays until the restart), `project` by
`PROJECTS`, `site` never appears, and every other label takes values of a fixed list: operations of the contract, problem
types, reasons, states, statement names. No label is called job or instance: those are Prometheus' own.

Counters and histograms keep their own numbers and hand them over when they are read, without the
locks that one event loop does not need.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST

PROJECTS = 20
"""So many projects are told apart by name, those that hold most; the others are added up under the name "". """

_REQUEST_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIGNING_SECONDS = (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3)
_TRANSFER_SECONDS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400)
_WAIT_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 45, 60)
_RATIO = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10)


class Counts(Collector):
    """A counter by labels, for instance ``tickets.inc("download", "granted", "s3-a")``."""

    __slots__ = ("_text", "_values", "labels", "name")

    def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        self.name = name
        self.labels = labels
        self._text = text
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def inc(self, *labels: str, by: float = 1) -> None:
        try:
            self._values[labels] += by
        except KeyError:
            self._values[labels] = by

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self.name, self._text, labels=self.labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        yield family


class Times(Collector):
    """A histogram by labels. `observe(value, *labels)`; ``with seconds.time("grant"):`` measures a block."""

    __slots__ = ("_bounds", "_counts", "_sums", "_text", "labels", "name")

    def __init__(self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> None:
        self.name = name
        self.labels = labels
        self._text = text
        self._bounds = buckets
        self._counts: dict[tuple[str, ...], list[int]] = {}  # by bucket, the last one for what is over every bound
        self._sums: dict[tuple[str, ...], float] = {}

    def observe(self, value: float, *labels: str) -> None:
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._counts[labels] = [0] * (len(self._bounds) + 1)
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[labels] = self._sums.get(labels, 0.0) + value

    @contextmanager
    def time(self, *labels: str) -> Iterator[None]:
        began = perf_counter()
        try:
            yield
        finally:
            self.observe(perf_counter() - began, *labels)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self.name, self._text, labels=self.labels)
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        for labels, counts in self._counts.items():
            family.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), self._sums[labels])
        yield family


class Levels:
    """A gauge by labels. `replace` sets all of them at once, so that what is gone does not stay; what `follow` names is asked
    for when the gauge is read."""

    __slots__ = ("_metric",)

    def __init__(self, registry: CollectorRegistry, name: str, text: str, labels: tuple[str, ...]) -> None:
        self._metric = Gauge(name, text, labels, registry=registry)

    def set(self, value: float, *labels: str) -> None:
        self._metric.labels(*labels).set(value)

    def follow(self, read: Callable[[], float], *labels: str) -> None:
        self._metric.labels(*labels).set_function(read)

    def replace(self, values: Mapping[tuple[str, ...], float]) -> None:
        self._metric.clear()
        for labels, value in values.items():
            self._metric.labels(*labels).set(value)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Every metric of one broker; made by `create`. The comment names the labels."""

    registry: CollectorRegistry
    tickets: Counts  # operation, outcome, store: the first place of the answer, or "" without one
    exclusions: Counts  # reason
    estimate_ratio: Times  # direction: reported / estimated seconds
    estimated_seconds: Times  # direction
    reported_seconds: Times  # direction
    reports: Counts  # store, outcome
    reported_bytes: Counts  # store, direction
    signals: Counts  # kind
    suspicion: Levels  # store, direction
    failures: Levels  # store
    spread_seconds: Times  # outcome
    uploads: Levels  # state
    replicas: Levels  # state
    copies: Levels  # state
    images: Levels  # status
    vetting_seconds: Gauge
    leases: Levels  # store, direction
    slots: Levels  # store, direction
    leases_refused: Counts  # store, direction
    quota_refusals: Counts  # operation
    waiting: Levels  # store, direction
    wait_seconds: Times  # direction, outcome
    retry_after_ratio: Times  # how
    bandwidth: Levels  # store, direction
    space_taken: Levels  # store
    space_capacity: Levels  # store
    project_leases: Levels  # project
    project_waiting: Levels  # project
    paths: Levels  # store, direction
    path_rates: Levels  # store, direction, of: worst, median, best
    path_successes: Levels  # store, direction, of
    deletions: Levels  # state
    database_seconds: Times  # statement: the name of the function that runs it
    coalesced: Times  # statement: requests that shared one round trip
    queued: Levels  # statement
    database_connections: Levels  # state
    database_bytes: Gauge
    signing_seconds: Times  # kind
    store_requests: Counts  # store, method, outcome
    store_seconds: Times  # store, method
    http_requests: Counts  # operation, status
    http_seconds: Times  # operation
    http_connections: Gauge
    http_refusals: Counts  # reason
    auth_failures: Counts  # reason
    keystone_tokens: Counts  # outcome
    keystone_seconds: Times  # operation
    tokens_unchecked: Counts  # reason
    hot_hits: Counts
    hot_misses: Counts
    hot_evictions: Counts
    hot_bytes: Gauge
    memory_age: Gauge
    jobs: Counts  # task, outcome
    signing_keys: Levels  # state
    info: Levels  # version

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self.registry)

    def ticket(self, operation: str, outcome: str, store: str = "") -> None:
        """Count a ticket; `store` is the place that was ranked first, if there was one."""
        self.tickets.inc(operation, outcome, store)

    def exclusion(self, reason: str) -> None:
        """Count a candidate that was not offered."""
        self.exclusions.inc(reason)


def create(version: str = "") -> Metrics:
    """Fresh metrics with a registry of their own."""
    registry = CollectorRegistry()

    def counts(name: str, text: str, *labels: str) -> Counts:
        made = Counts(f"broker_{name}", text, labels)
        registry.register(made)
        return made

    def times(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _REQUEST_SECONDS) -> Times:
        made = Times(f"broker_{name}", text, labels, buckets)
        registry.register(made)
        return made

    def levels(name: str, text: str, *labels: str) -> Levels:
        return Levels(registry, f"broker_{name}", text, labels)

    metrics = Metrics(
        registry=registry,
        tickets=counts(
            "tickets_total", "Tickets by operation, outcome and the store that was placed first.", "operation", "outcome", "store"
        ),
        exclusions=counts("exclusions_total", "Candidates that were not offered, by reason.", "reason"),
        estimate_ratio=times("estimate_error_ratio", "Reported seconds of a transfer over those estimated.", "direction", buckets=_RATIO),
        estimated_seconds=times(
            "estimated_seconds", "Estimated seconds of transfers that were reported.", "direction", buckets=_TRANSFER_SECONDS
        ),
        reported_seconds=times("reported_seconds", "Seconds that transfers reported.", "direction", buckets=_TRANSFER_SECONDS),
        reports=counts("reports_total", "Reports of transfers by store and outcome.", "store", "outcome"),
        reported_bytes=counts("reported_bytes_total", "Bytes that transfers reported to have moved.", "store", "direction"),
        signals=counts("signals_total", "What was counted instead of a report, by kind.", "kind"),
        suspicion=levels("suspicion", "How far a store is doubted for everyone, 0 to 1.", "store", "direction"),
        failures=levels("failures", "Clients that a store is kept from, since it failed them a moment ago.", "store"),
        spread_seconds=times("failure_spread_seconds", "Time until every broker knew of a failure that was reported.", "outcome"),
        uploads=levels("uploads", "Uploads by state.", "state"),
        replicas=levels("replicas", "Replicas by state.", "state"),
        copies=levels("copies", "Copies that were asked for, by state.", "state"),
        images=levels("images", "Images by status.", "status"),
        vetting_seconds=Gauge(
            "broker_vetting_waiting_seconds", "How long the image has waited for approval that has waited longest.", registry=registry
        ),
        leases=levels("leases", "Unexpired leases.", "store", "direction"),
        slots=levels("slots", "Concurrent transfers that a store allows.", "store", "direction"),
        leases_refused=counts("leases_refused_total", "Leases that were asked for when every slot was taken.", "store", "direction"),
        bandwidth=levels("bandwidth_bytes_per_second", "Bandwidth that a store declares.", "store", "direction"),
        space_taken=levels("space_taken_bytes", "Bytes of replicas and open uploads on a store.", "store"),
        space_capacity=levels("space_capacity_bytes", "Capacity that a store declares.", "store"),
        project_leases=levels("project_leases", "Unexpired leases by project.", "project"),
        project_waiting=levels("project_waiting", "Requests that wait for a slot at any broker, by project.", "project"),
        paths=levels("paths", "Sites that reported transfers with a store lately.", "store", "direction"),
        path_rates=levels(
            "path_rate_bytes_per_second", "Average rate of a store's paths, of the worst, median and best site.", "store", "direction", "of"
        ),
        path_successes=levels(
            "path_success_ratio", "Share of transfers that delivered, of the worst, median and best site.", "store", "direction", "of"
        ),
        deletions=levels("deletions", "Objects that are to be removed from stores, by state.", "state"),
        quota_refusals=counts("quota_refusals_total", "Requests refused since their project held as much as it may.", "operation"),
        waiting=levels(
            "waiting",
            "Requests that wait at this broker for a slot; one that waits for several stores counts at each.",
            "store",
            "direction",
        ),
        wait_seconds=times(
            "wait_seconds", "Time that requests waited for a slot, by how it ended.", "direction", "outcome", buckets=_WAIT_SECONDS
        ),
        retry_after_ratio=times("retry_after_ratio", "Seconds until a slot was had over those told.", "how", buckets=_RATIO),
        database_seconds=times("database_seconds", "Time of database statements, waiting for a connection included.", "statement"),
        coalesced=times(
            "coalesced_requests",
            "Requests that shared one database round trip.",
            "statement",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        ),
        queued=levels("queued_requests", "Requests that wait for the next round trip which they can share.", "statement"),
        database_connections=levels("database_connections", "Connections to the database by state, and how many may be open.", "state"),
        database_bytes=Gauge("broker_database_bytes", "Size of the database.", registry=registry),
        signing_seconds=times("signing_seconds", "Time to sign one URL or token.", "kind", buckets=_SIGNING_SECONDS),
        store_requests=counts("store_requests_total", "Requests of the broker to stores.", "store", "method", "outcome"),
        store_seconds=times("store_request_seconds", "Time of the broker's requests to stores.", "store", "method"),
        http_requests=counts("http_requests_total", "Requests by operation and status.", "operation", "status"),
        http_seconds=times("http_request_seconds", "Time from a request's head to its answer.", "operation"),
        http_connections=Gauge("broker_http_connections", "Connections to the API that are open.", registry=registry),
        http_refusals=counts("http_refusals_total", "Connections that were closed before they brought a request, by reason.", "reason"),
        tokens_unchecked=counts(
            "tokens_unchecked_total", "Bearer tokens that were not looked at, after too many refused ones, by reason.", "reason"
        ),
        auth_failures=counts("auth_failures_total", "Tokens that were refused, by reason.", "reason"),
        keystone_tokens=counts("keystone_tokens_total", "Tokens of Keystone, by where the answer came from.", "outcome"),
        keystone_seconds=times("keystone_request_seconds", "Time of the broker's requests to Keystone.", "operation"),
        hot_hits=counts("hot_hits_total", "Blobs that were found in memory."),
        hot_misses=counts("hot_misses_total", "Blobs that were looked up in the catalogue."),
        hot_evictions=counts("hot_evictions_total", "Blobs and images that left memory to make room."),
        hot_bytes=Gauge("broker_hot_bytes", "Estimated size of the blobs and images in memory.", registry=registry),
        memory_age=Gauge("broker_memory_age_seconds", "Time since memory was last brought up to date.", registry=registry),
        jobs=counts("jobs_total", "Runs of background jobs.", "task", "outcome"),
        signing_keys=levels("signing_keys", "Signing keys by what they are doing, as this broker knows them.", "state"),
        info=levels("info", "The running broker.", "version"),
    )
    metrics.info.set(1, version)
    ProcessCollector(registry=registry)
    return metrics
