"""What is simulated: a network with its stores and machines, what they want, and what goes wrong. Read from TOML.

A workload names its topology: a file of that name in ``topologies`` (or beside the workload) with ``links``, ``stores`` and
``nodes``. What the workload says of these itself stands instead; ``[store.NAME]`` changes single fields of one store.

Rates are bytes per second, sizes bytes, instants seconds from the start, positions kilometres on a plane (for the policies that go by
miles). A link is the way between a site and its parent; each direction has the capacity. Sites without a link are not limited.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

TOPOLOGIES = Path(__file__).parent / "topologies"

Place = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Store:
    """`rate` is what it can really serve, `declared` what its operator told the broker, `slots` how many transfers at once."""

    name: str
    site: str
    rate: float
    declared: int | None = None
    slots: int | None = None
    per_connection: float = float("inf")
    at: Place = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Group:
    """Machines alike: at one site, with the same network interface, of one project."""

    site: str
    count: int
    rate: float
    project: str = "tenant"
    at: Place = (0.0, 0.0)
    lies: bool = False
    """Whatever they used, they report a failure."""


@dataclass(frozen=True, slots=True)
class Change:
    """From `at` on a store serves this share of its rate: 0 is dead. Foreign traffic is a change that nobody leased."""

    at: float
    store: str
    share: float


@dataclass(frozen=True, slots=True)
class Want:
    """One download: at `at` machine `node` wants a blob."""

    at: float
    node: int
    blob: int


@dataclass(frozen=True, slots=True)
class Node:
    """One machine; `project` for the fairness, `address` as the broker sees it."""

    site: str
    rate: float
    project: str
    at: Place
    lies: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """One workload, ready to run: wants in order of time, and which stores have each blob."""

    name: str
    stores: Sequence[Store]
    links: Mapping[str, float]
    nodes: Sequence[Node]
    groups: Sequence[Group]
    size: int
    replicas: Sequence[tuple[str, ...]]
    wants: Sequence[Want]
    changes: Sequence[Change] = ()
    brokers: int = 1
    stale_seconds: float = 0.5
    about: str = ""

    def node_group(self, node: int) -> int:
        """The index of the group that a machine belongs to."""
        for index, group in enumerate(self.groups):
            if node < group.count:
                return index
            node -= group.count
        raise IndexError(node)


def load(path: Path, seed: int) -> Scene:
    """Read a workload; arrivals and replicas are drawn by `seed`. Raises `KeyError`, `TypeError` for what is missing or unknown."""
    data = _whole(path)
    rng = Random(seed)
    stores = [Store(**_placed(entry | data.get("store", {}).get(entry["name"], {}))) for entry in data["stores"]]
    groups = [Group(**_placed(entry)) for entry in data["nodes"]]
    nodes = [Node(g.site, g.rate, g.project, g.at, g.lies) for g in groups for _ in range(g.count)]
    demand = data["demand"]
    replicas = _replicas([store.name for store in stores], demand, rng)
    wants = sorted(_wants(len(nodes), len(replicas), demand, rng), key=lambda want: want.at)
    changes = [Change(**entry) for entry in data.get("changes", [])]
    broker = data.get("brokers", {})
    return Scene(
        path.stem, stores, data.get("links", {}), nodes, groups, int(demand["size"]), replicas, wants, sorted(changes, key=lambda c: c.at),
        int(broker.get("count", 1)), float(broker.get("stale_seconds", 0.5)), data.get("about", ""),
    )  # fmt: skip


def _whole(path: Path) -> dict[str, Any]:
    """The workload together with its topology."""
    data = tomllib.loads(path.read_text())
    if "topology" not in data:
        return data
    name = f"{data['topology']}.toml"
    beside = path.parent / name
    return tomllib.loads((beside if beside.exists() else TOPOLOGIES / name).read_text()) | data


def _placed(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if name == "at" else value for name, value in entry.items()}


def _replicas(stores: Sequence[str], demand: Mapping[str, Any], rng: Random) -> list[tuple[str, ...]]:
    count = int(demand.get("replicas", len(stores)))
    return [tuple(stores) if count >= len(stores) else tuple(rng.sample(list(stores), count)) for _ in range(int(demand.get("blobs", 1)))]


def _wants(nodes: int, blobs: int, demand: Mapping[str, Any], rng: Random) -> list[Want]:
    """With `within`, every machine in so many seconds; with `rate`, so many a second for `seconds`, by Zipf's law. Or both."""
    wants = []
    weights = [1 / (rank + 1) ** demand.get("exponent", 1.0) for rank in range(blobs)]
    if "within" in demand:
        wants += [Want(demand.get("at", 0.0) + rng.random() * demand["within"], node, 0) for node in range(nodes)]
    if "rate" in demand:
        now = 0.0
        while (now := now + rng.expovariate(demand["rate"])) < demand["seconds"]:
            wants.append(Want(now, rng.randrange(nodes), rng.choices(range(blobs), weights)[0]))
    return wants
