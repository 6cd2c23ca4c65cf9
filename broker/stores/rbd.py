"""Pools of a Ceph cluster that hold images as block devices (RBD). The handle is ``rbd://FSID/POOL/IMAGE@SNAPSHOT``.

The endpoint is ``rbd://FSID/POOL``: the cluster's id and a pool. There are no settings and no credential: clients have their own
keys for the cluster.

Rules
- A key names a snapshot, since only that does not change; it has to be a protected one if clients shall clone it.
- Whoever clones moves no byte; whoever exports reads the raw bytes whose size and digests the blob has.
"""

from __future__ import annotations

import re
from typing import ClassVar
from urllib.parse import urlsplit

from broker.errors import Invalid
from broker.model import Store
from broker.stores.handed import HandedStore

_FSID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,128}@[A-Za-z0-9_.-]{1,128}\Z")


class RbdStore(HandedStore):
    """One pool. Raises `Invalid` when its endpoint names none."""

    kind: ClassVar[str] = "rbd"
    schemes: ClassVar[tuple[str, ...]] = ("rbd",)

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        parts = urlsplit(store.endpoint)
        pool = parts.path.removeprefix("/")
        if parts.scheme != "rbd" or parts.query or parts.fragment or not _FSID.match(parts.netloc) or not _NAME.match(pool):
            raise Invalid("The endpoint names no pool.", field="endpoint", expected="rbd://FSID/POOL")
        self._pool = f"rbd://{parts.netloc}/{pool}"

    def check_key(self, key: str) -> None:
        if not _KEY.match(key):
            raise Invalid("This names no snapshot.", field="key", expected="IMAGE@SNAPSHOT: letters, digits, _, . and -")

    def _url(self, key: str) -> str:
        return f"{self._pool}/{key}"
