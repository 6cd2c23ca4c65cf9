"""Who gets how much: max-min fair shares of a fluid network, worked out anew whenever something changes.

Every flow goes from a store up and down the tree of sites to a machine. Its resources are the store's rate, the links on the way (each
direction its own) and the machine's interface; besides, one flow may be capped (a store's limit for one connection).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from broker.sites import ancestors
from tests.bench.simulate.scene import Scene

Rates = NDArray[np.float64]


class Network:
    """Resources by index: stores first, then the links up and down, then the machines; the last one is no limit and pads paths."""

    def __init__(self, scene: Scene) -> None:
        self._links = list(scene.links)
        ups = [scene.links[site] for site in self._links]
        self.capacity: Rates = np.array([s.rate for s in scene.stores] + ups + ups + [n.rate for n in scene.nodes] + [np.inf])
        self.nominal = self.capacity.copy()
        self._stores = len(scene.stores)
        self._nodes_at = self._stores + 2 * len(self._links)
        self._longest = 2 + 2 * max([len(ancestors(site)) for site in (*self._links, "")])
        self._scene = scene
        self._known: dict[tuple[int, str], list[int]] = {}

    def path(self, store: int, node: int) -> list[int]:
        """The resources that a flow uses, padded to one length."""
        site = self._scene.nodes[node].site
        between = self._known.get((store, site))
        if between is None:
            between = self._known[store, site] = self._between(self._scene.stores[store].site, site)
        used = [store, *between, self._nodes_at + node]
        return used + [len(self.capacity) - 1] * (self._longest - len(used))

    def _between(self, origin: str, target: str) -> list[int]:
        out, into = ancestors(origin), ancestors(target)
        shared = {site for site in out if site in into}
        up = [self._stores + self._links.index(site) for site in out if site not in shared and site in self._scene.links]
        first_down = self._stores + len(self._links)
        down = [first_down + self._links.index(site) for site in into if site not in shared and site in self._scene.links]
        return up + down

    def crosses(self, store: int, node: int) -> bool:
        """Whether the flow leaves its region (the first two levels of the tree)."""
        one, other = self._scene.stores[store].site.split("/")[:2], self._scene.nodes[node].site.split("/")[:2]
        return one != other

    def shares(self, paths: Sequence[Sequence[int]], caps: Rates) -> Rates:
        """Max-min fair rates of the flows, in rounds: whoever is the poorest at all of his resources gets his share."""
        flows = np.asarray(paths)
        rates = np.zeros(len(flows))
        if not len(flows):
            return rates
        left, open_ = self.capacity.copy(), np.ones(len(flows), dtype=bool)
        while open_.any():
            used = flows[open_]
            count = np.bincount(used.ravel(), minlength=len(left))
            with np.errstate(invalid="ignore"):
                level = np.where(count > 0, left / np.maximum(count, 1), np.inf)
            wanted = np.minimum(level[used].min(axis=1), caps[open_])
            lowest = np.full(len(left), np.inf)  # what the poorest flow at each resource would get
            np.minimum.at(lowest, used.ravel(), np.repeat(wanted, used.shape[1]))
            lowest[-1] = np.inf
            settled = (wanted <= lowest[used].min(axis=1) * (1 + 1e-9)) | (wanted <= 0)
            index = np.flatnonzero(open_)[settled]
            rates[index] = wanted[settled]
            np.subtract.at(left, flows[index].ravel(), np.repeat(rates[index], flows.shape[1]))
            np.maximum(left, 0, out=left)
            left[-1] = np.inf
            open_[index] = False
        return rates
