"""Clocks that differ: bearer tokens are taken up to the stated leeway, and not a second past it."""

from __future__ import annotations

import time

import pytest

from broker import config
from broker.cli.token import sign
from broker.model import Role
from tests.parts.broker import AUDIENCE, PROJECT, Api, RunningBroker

LEEWAY = config.Auth().leeway_seconds
SLACK = 3
"""Seconds that a request may take at most, for the answer to be certain."""


@pytest.mark.parametrize(
    ("ahead", "status"),
    [(0, 200), (LEEWAY - SLACK, 200), (LEEWAY + SLACK, 401), (600, 401), (3600, 401)],
)
async def test_a_token_from_a_clock_that_is_ahead(ahead: float, status: int, api: Api, broker: RunningBroker) -> None:
    """Not before: the issuer's clock may be ahead by the leeway."""
    token = sign(broker.context.keys, AUDIENCE, Role.MEMBER, PROJECT, "alice", 7200, None, time.time() + ahead)
    assert (await api.as_(token).get("/v1/images")).status == status


@pytest.mark.parametrize(
    ("ended", "status"),
    [(0, 200), (LEEWAY - SLACK, 200), (LEEWAY + 1, 401), (LEEWAY + 100, 401)],
)
async def test_a_token_that_has_ended(ended: float, status: int, api: Api, broker: RunningBroker) -> None:
    """Expiry: accepted for the leeway, and one that was verified before is forgotten at the same instant."""
    ttl = 100.0
    token = sign(broker.context.keys, AUDIENCE, Role.MEMBER, PROJECT, "alice", ttl, None, time.time() - ttl - ended)
    other = api.as_(token)
    assert (await other.get("/v1/images")).status == status
    assert (await other.get("/v1/images")).status == status
