"""How many tickets a project may ask for: at the limit, one past it, in batches, and that others notice nothing."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from broker import errors
from broker.admit import Policy
from broker.service.pace import Pace
from tests.parts.broker import Api, broker_on
from tests.parts.condition import until
from tests.web.test_tickets import Desk, desk

__all__ = ["desk"]

DOWNLOAD = {"operation": "download", "blob": "01a20471-9cea-725f-bc0a-7702b28d121e"}


def test_at_the_limit_and_one_past_it() -> None:
    pace = Pace(Policy(project_tickets_per_hour=10))
    pace.count("a", 9)
    pace.count("a", 1)
    with pytest.raises(errors.QuotaExceeded) as refused:
        pace.count("a", 1)
    assert refused.value.retry_after == 120  # of 360 s: nobody is told to come back later
    pace.count("b", 10)


def test_a_batch_that_is_larger_than_the_limit_takes_all_of_it() -> None:
    pace = Pace(Policy(project_tickets_per_hour=10))
    pace.count("a", 500)
    with pytest.raises(errors.QuotaExceeded):
        pace.count("a", 1)


def test_no_limit() -> None:
    pace = Pace(Policy(project_tickets_per_hour=0))
    for _ in range(10):
        pace.count("a", 1_000_000)


async def test_over_http(database: str, tmp_path: Path) -> None:
    settings = {"policy": {"admission": {"project_tickets_per_hour": 6}}}
    async with broker_on(database, tmp_path, settings) as broker, aiohttp.ClientSession() as session:
        member = Api(broker.url, session, broker.token())
        assert (await member.post("/v1/tickets:batch", {"tickets": [DOWNLOAD] * 5})).status == 200
        assert (await member.post("/v1/tickets:batch", {"tickets": [DOWNLOAD] * 2})).status == 429
        assert (await member.post("/v1/tickets", DOWNLOAD)).status == 404  # no such blob, but counted
        refused = await member.post("/v1/tickets", DOWNLOAD)
        assert (refused.status, refused.body["type"]) == (429, "/problems/quota-exceeded")
        assert int(refused.headers["Retry-After"]) > 0
        other = Api(broker.url, session, broker.token(project="other"))
        assert (await other.post("/v1/tickets", DOWNLOAD)).status == 404


async def test_a_redirect_counts_as_the_ticket_that_it_is(database: str, tmp_path: Path) -> None:
    settings = {"policy": {"admission": {"project_tickets_per_hour": 1}}}
    async with broker_on(database, tmp_path, settings) as broker, aiohttp.ClientSession() as session:
        member = Api(broker.url, session, broker.token())
        content = f"/v1/images/{DOWNLOAD['blob']}/content"
        assert (await member.get(content)).status == 404
        refused = await member.get(content)
        assert (refused.status, refused.body["type"]) == (429, "/problems/quota-exceeded")


async def test_a_lone_source_counts_the_whole_blob_against_the_quota(desk: Desk) -> None:
    """Whatever the request says of sources at once."""
    blob = await desk.blob(await desk.store("alone"), size=1000)
    await desk.db.execute("INSERT INTO quotas (project, max_bytes) VALUES ('demo', 1000)")
    await until(lambda: "demo" in desk.broker.context.memory.quotas, "the quota is known")
    assert (await desk.ask(blob, parallel=4)).status == 201
    assert (await desk.ask(blob, parallel=4)).body["type"] == "/problems/quota-exceeded"
