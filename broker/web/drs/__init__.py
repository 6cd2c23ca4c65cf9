"""GA4GH Data Repository Service 1.5, the side that reads (github.com/ga4gh/data-repository-service-schemas, drs-1.5.0)."""

from __future__ import annotations

from broker.web.contract import Contract
from broker.web.dialect import Dialect
from broker.web.drs import handlers, shapes

DIALECT = Dialect(
    Contract("drs.json"), ("/ga4gh/drs/v1",), {name: getattr(handlers, name) for name in handlers.__all__}, shapes.render
)  # fmt: skip
