"""OpenStack Image service API v2 ("Glance"), for the clients that people already have.

A handler is named as its operation in the contract, schemas/glance.json, in snake_case; whatever a module here exports is one.
"""

from __future__ import annotations

from broker.web.call import Handler
from broker.web.contract import Contract
from broker.web.dialect import Dialect
from broker.web.glance import about, cache, download, fault, images, imports, info, locations, members, upload

_MODULES = (about, cache, download, images, imports, info, locations, members, upload)
_HANDLERS: dict[str, Handler] = {name: getattr(module, name) for module in _MODULES for name in module.__all__}

DIALECT = Dialect(
    Contract("glance.json"), ("/v2", "/versions"), _HANDLERS, fault.render, "X-Openstack-Request-Id",
    "There is no such path: the broker has images, their members, locations and cache, but no tasks and no metadata definitions.",
)  # fmt: skip
