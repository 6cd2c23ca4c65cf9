"""What deploy/nginx/edge.conf asks: where the bytes of an image go to and come from, and what became of an upload.

An edge carries the bytes of clients that speak Glance's API. It reads the answers' header fields and no bodies, which its clients get.
"""

from __future__ import annotations

from broker.web.contract import Contract
from broker.web.dialect import Dialect
from broker.web.edge import handlers
from broker.web.edge.fault import render

DIALECT = Dialect(
    Contract("edge.json"),
    ("/edge",),
    {name: getattr(handlers, name) for name in handlers.__all__},
    render,
)
