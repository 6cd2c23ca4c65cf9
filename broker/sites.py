"""The tree of sites: how far two places are from each other, and what lies around one.

A site is a path such as ``eu/az1/rack3/host7``. Its parent is the path without the last segment; above every root lies
``""``, which stands for the whole network. Nothing else is known of the topology, and nothing else is assumed.
"""

from __future__ import annotations

from functools import lru_cache

UNRELATED = 16
"""Distance of places without a common root, or when one of them is unknown: twice the depth that a site may have."""

EVERYWHERE = ""
"""The widest site: averages kept under it are those of all clients together."""


@lru_cache(maxsize=65536)
def distance(a: str | None, b: str | None) -> int:
    """Edges between two sites in the tree: 3 from ``eu/az1/rack3`` to ``eu/az2``, 0 to itself, `UNRELATED` at most."""
    if not a or not b:
        return UNRELATED
    if a == b:
        return 0
    left, right = a.split("/"), b.split("/")
    shared = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        shared += 1
    return len(left) + len(right) - 2 * shared if shared else UNRELATED


@lru_cache(maxsize=16384)
def ancestors(site: str | None) -> tuple[str, ...]:
    """A site and every wider one, nearest first, ending with `EVERYWHERE`: ``eu/az1``, ``eu``, ``""``.

    These are the paths to which one report belongs, and the order in which an estimate looks for evidence.
    """
    found = []
    while site:
        found.append(site)
        site = site.rpartition("/")[0]
    return (*found, EVERYWHERE)
