"""Metrics: named as Prometheus wants, on a listener of their own, and bounded."""

from __future__ import annotations

import asyncio
import subprocess

import aiohttp
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from broker import metrics
from broker.errors import StoreUnavailable
from broker.service import jobs
from broker.stores.exchange import Exchange, tracing
from tests.parts.broker import Api, RunningBroker
from tests.parts.process import find_program


def exercised() -> metrics.Metrics:
    """Metrics with a child for every label set."""
    found = metrics.create("1.0")
    for name in found.__slots__:
        metric = getattr(found, name)
        if isinstance(metric, metrics.Counts):
            metric.inc(*("a" for _ in metric.labels))
        elif isinstance(metric, metrics.Times):
            metric.observe(0.1, *("a" for _ in metric.labels))
        elif isinstance(metric, metrics.Levels):
            metric.set(1, *("a" for _ in metric._metric._labelnames))
    return found


def test_promtool_finds_nothing_to_mend() -> None:
    promtool = find_program("promtool", "apt-get install prometheus")
    checked = subprocess.run([promtool, "check", "metrics"], input=exercised().render(), capture_output=True, check=False, timeout=60)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_every_name_begins_with_broker_or_process_and_labels_are_those_stated() -> None:
    allowed = {
        "operation",
        "outcome",
        "store",
        "reason",
        "direction",
        "state",
        "status",
        "statement",
        "kind",
        "method",
        "task",
        "version",
        "project",
        "of",
        "how",
        "le",
    }
    families = list(text_string_to_metric_families(exercised().render().decode()))
    assert len(families) >= 25
    for family in families:
        assert family.name.startswith(("broker_", "process_"))
        for sample in family.samples:
            assert sample.labels.keys() <= allowed


def test_a_gauge_forgets_what_is_gone() -> None:
    found = metrics.create()
    found.leases.replace({("a", "read"): 1, ("b", "read"): 2})
    found.leases.replace({("b", "read"): 3})
    assert b'store="a"' not in found.render()
    assert b'broker_leases{direction="read",store="b"} 3.0' in found.render()


def value(text: str, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return 0.0


async def test_requests_are_counted_by_operation_and_status(broker: RunningBroker, api: Api, session: aiohttp.ClientSession) -> None:
    await api.post("/v1/images", {"name": "x"})
    await api.post("/v1/images", {})
    await api.as_("wrong").get("/v1/images")
    await api.get("/v1/somewhere/else")
    await jobs.count(broker.context)
    async with session.get(f"{broker.metrics_url}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text = await response.text()
    assert value(text, "broker_http_requests_total", operation="createImage", status="201") == 1
    assert value(text, "broker_http_requests_total", operation="createImage", status="400") == 1
    assert value(text, "broker_http_requests_total", operation="listImages", status="401") == 1
    assert value(text, "broker_http_requests_total", operation="", status="404") == 1
    assert value(text, "broker_http_request_seconds_count", operation="createImage") == 2
    assert value(text, "broker_images", status="queued") == 1
    assert "somewhere" not in text


async def test_requests_to_stores_are_counted() -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(status=404 if request.path == "/gone" else 200)

    found = metrics.create()
    listener = await asyncio.get_running_loop().create_server(web.Server(answer), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with aiohttp.ClientSession(trace_configs=[tracing(found)]) as session:
        store = Exchange(session, "a")
        await store.ask("GET", f"{url}/here", {}, expect=(200,))
        with pytest.raises(StoreUnavailable):
            await store.ask("HEAD", f"{url}/gone", {}, expect=(200,))
        await session.get(f"{url}/not-a-store")
        listener.close()
        await listener.wait_closed()
        with pytest.raises(StoreUnavailable):
            await Exchange(session, "b").ask("GET", "http://127.0.0.1:1", {}, expect=(200,))
    text = found.render().decode()
    assert value(text, "broker_store_requests_total", store="a", method="GET", outcome="200") == 1
    assert value(text, "broker_store_requests_total", store="a", method="HEAD", outcome="404") == 1
    assert value(text, "broker_store_requests_total", store="b", method="GET", outcome="failed") == 1
    assert value(text, "broker_store_request_seconds_count", store="a", method="GET") == 1


async def test_the_operators_listener_is_its_own(broker: RunningBroker, api: Api, session: aiohttp.ClientSession) -> None:
    assert (await api.get("/metrics")).status == 404
    assert (await api.get("/healthz")).status == 404
    async with session.get(f"{broker.metrics_url}/v1") as response:
        assert response.status == 404
    async with session.get(f"{broker.metrics_url}/healthz") as response:
        assert (response.status, await response.json()) == (200, {"database": "ok"})


async def test_health_says_when_the_database_is_away(broker: RunningBroker, api: Api, session: aiohttp.ClientSession) -> None:
    broker.context.db.terminate()
    async with session.get(f"{broker.metrics_url}/healthz") as response:
        assert (response.status, await response.json()) == (503, {"database": "unreachable"})
    lost = await api.get("/v1/images")
    assert (lost.status, lost.body["type"]) == (503, "/problems/unavailable")
    assert int(lost.headers["Retry-After"]) >= 1
    assert (await api.get("/v1")).status == 200


async def test_what_the_catalogue_and_the_pool_say(broker: RunningBroker, session: aiohttp.ClientSession) -> None:
    db = broker.context.db
    await db.execute("INSERT INTO sites (path) VALUES ('eu/a'), ('eu/b')")
    store = await db.fetchval(
        """INSERT INTO stores (name, kind, site, endpoint, read_bandwidth)
           VALUES ('s', 'http', 'eu/a', 'http://127.0.0.1:1', 1000) RETURNING id"""
    )
    await db.execute("INSERT INTO slots (store_id, direction, slots, leased) VALUES ($1, 'read', 30, 23), ($1, 'write', NULL, 0)", store)
    await db.execute("INSERT INTO spaces (store_id, capacity, taken) VALUES ($1, 500, 50)", store)
    for number in range(metrics.PROJECTS + 2):  # ids that no job takes for those of a day long ago
        await db.execute(
            """WITH made AS (INSERT INTO tickets (id, operation, project, subject, instance, address, blob_id, places, expires_at)
                             VALUES (('f' || substr(gen_random_uuid()::text, 2))::uuid, 'download', $1, 's', 'i', 'a', gen_random_uuid(),
                                     '[]', now()) RETURNING id)
               INSERT INTO leases (ticket_id, store_id, direction, expires_at)
               SELECT id, $2, 'read', now() + interval '1 hour' FROM made""",
            f"project-{number:02d}", store,
        )  # fmt: skip
    for site, rate, good in (("eu/a", 10.0, 1.0), ("eu/b", 30.0, 0.5), ("eu", 20.0, 0.75)):
        await db.execute(
            "INSERT INTO paths VALUES ($1, $2, 'read', $3, 1, 0, 0, $4, 1, now())", site, store, rate, good
        )  # fmt: skip
    await db.execute("INSERT INTO paths VALUES ('us', $1, 'read', 1, 1, 0, 0, 1, 1, now() - interval '1 hour')", store)
    await db.execute(
        "INSERT INTO deletions (store_id, key, reason, attempts) VALUES ($1, 'a', 'x', 0), ($1, 'b', 'x', 2), ($1, 'c', 'x', 1)", store
    )
    await db.execute("INSERT INTO desks (id, seen_at) VALUES (gen_random_uuid(), now()), (gen_random_uuid(), now() - interval '1 minute')")
    await db.execute(
        """INSERT INTO waits (id, desk, project, priority, weight, direction, store_ids, bytes)
           SELECT gen_random_uuid(), id, 'project-00', 1, 1, 'read', ARRAY[$1::int], 1 FROM desks""",
        store,
    )
    await jobs.count(broker.context)
    await jobs.measure(broker.context)
    async with session.get(f"{broker.metrics_url}/metrics") as response:
        text = await response.text()
    assert value(text, "broker_leases", store="s", direction="read") == 23
    assert value(text, "broker_slots", store="s", direction="read") == 30
    assert 'broker_slots{direction="write"' not in text
    assert value(text, "broker_bandwidth_bytes_per_second", store="s", direction="read") == 1000
    assert value(text, "broker_space_taken_bytes", store="s") == 50
    assert value(text, "broker_space_capacity_bytes", store="s") == 500
    assert value(text, "broker_project_leases", project="project-00") == 1
    assert value(text, "broker_project_leases", project="") == 2
    assert text.count("broker_project_leases{") == metrics.PROJECTS + 1
    assert value(text, "broker_project_waiting", project="project-00") == 1, "who waits at a broker that is gone does not count"
    assert value(text, "broker_paths", store="s", direction="read") == 3
    for of, rate, share in (("worst", 10, 0.5), ("median", 20, 0.75), ("best", 30, 1)):
        assert value(text, "broker_path_rate_bytes_per_second", store="s", direction="read", of=of) == rate
        assert value(text, "broker_path_success_ratio", store="s", direction="read", of=of) == share
    assert value(text, "broker_deletions", state="waiting") == 1
    assert value(text, "broker_deletions", state="failing") == 2
    assert value(text, "broker_database_bytes") > 1_000_000
    connections = {state: value(text, "broker_database_connections", state=state) for state in ("busy", "idle", "limit")}
    assert connections["limit"] == 16 and 2 <= connections["busy"] + connections["idle"] <= 16
    assert 0 < value(text, "broker_memory_age_seconds") < 60
    assert 'broker_queued_requests{statement="grant"} 0.0' in text
    assert value(text, "process_resident_memory_bytes") > 10_000_000
