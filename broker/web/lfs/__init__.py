"""Git LFS: the batch API with the basic transfer adapter (git-lfs, docs/api/batch.md), below ``/lfs/PROJECT/REPOSITORY``."""

from __future__ import annotations

from broker.web.contract import Contract
from broker.web.dialect import Dialect
from broker.web.lfs import handlers
from broker.web.lfs.render import render

DIALECT = Dialect(
    Contract("lfs.json"), ("/lfs",), {name: getattr(handlers, name) for name in handlers.__all__}, render,
    unknown="There is no such path: a repository (lfs.url) is /lfs/PROJECT/REPOSITORY, and only its batches and locks are answered.",
)  # fmt: skip
