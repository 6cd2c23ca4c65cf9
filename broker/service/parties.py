"""As whom a principal asks for slots: its project at its role's priority, with the weight and the limits that hold for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.catalog.leases import Party
from broker.catalog.quotas import Quota
from broker.model import Principal

if TYPE_CHECKING:
    from broker.service.context import Context

_NO_QUOTA = Quota("")


def party_of(context: Context, principal: Principal) -> Party:
    """As whom this principal asks for slots."""
    policy = context.policy.admit
    own = context.memory.quotas.get(principal.project, _NO_QUOTA)
    priority = policy.service_weight if principal.sees_private_stores else 1.0
    return Party(
        principal.project,
        priority,
        priority * (1.0 if own.weight is None else own.weight),
        (policy.project_max_leases or None) if own.max_leases is None else own.max_leases,
        (policy.project_max_bytes or None) if own.max_bytes is None else own.max_bytes,
    )
