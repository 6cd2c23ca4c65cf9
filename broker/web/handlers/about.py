"""What the broker tells of itself: version and features, contract, problem types."""

from __future__ import annotations

from broker import __version__
from broker.web import contract, problem
from broker.web.call import Answer, Call

__all__ = ["get_contract", "get_problem", "get_service"]

FEATURES = (
    "adopt", "batch", "content", "convert", "copies", "download", "drs", "explain", "filename", "glance", "idempotency", "lfs", "members",
    "multipart", "observed", "parts", "pieces", "quotas", "refresh", "replicas", "report", "standby", "upload", "vetting", "wait",
)  # fmt: skip
"""What this broker understands beyond the least; clients look here before they send a field that is newer."""


async def get_service(call: Call) -> Answer:
    return Answer(200, {"service": "transfer-broker", "version": __version__, "features": list(FEATURES)})


async def get_contract(call: Call) -> Answer:
    return Answer(200, contract.NATIVE.text, {"Cache-Control": "public, max-age=3600"})


async def get_problem(call: Call) -> Answer:
    return Answer(200, problem.describe(call.path["type"]), {"Cache-Control": "public, max-age=3600"})
