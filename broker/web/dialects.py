"""Every API that is spoken here, the broker's own first."""

from __future__ import annotations

from broker.web import contract, drs, edge, glance, lfs, problem
from broker.web.dialect import Dialect
from broker.web.handlers import HANDLERS

NATIVE = Dialect(contract.NATIVE, ("",), HANDLERS, problem.render)

DIALECTS = (NATIVE, glance.DIALECT, lfs.DIALECT, edge.DIALECT, drs.DIALECT)
