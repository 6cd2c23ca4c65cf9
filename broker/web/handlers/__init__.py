"""Thin handlers: from a checked call to the verb of the service, and from what it gives to an answer. One file per group.

A handler is named as its operation in the contract, in snake_case; whatever a module here lists in ``__all__`` is one.
"""

from __future__ import annotations

from broker.web.call import Handler
from broker.web.handlers import about, content, copies, images, keys, places, quotas, replicas, tickets, vetting

HANDLERS: dict[str, Handler] = {
    name: getattr(module, name)
    for module in (about, content, copies, images, keys, places, quotas, replicas, tickets, vetting)
    for name in module.__all__
}
"""Every handler by name."""
