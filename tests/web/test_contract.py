"""The contract and the code say the same: every operation is bound, and its answers are as described."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from broker.web import contract
from broker.web.dialect import Dialect
from broker.web.dialects import DIALECTS, NATIVE
from broker.web.routes import Router
from tests.parts.broker import Api, RunningBroker


def test_every_operation_has_a_handler_and_every_handler_an_operation() -> None:
    Router(DIALECTS)


def test_a_missing_handler_stops_the_start() -> None:
    with pytest.raises(RuntimeError, match="create_ticket"):
        Router([replace(NATIVE, handlers={name: handler for name, handler in NATIVE.handlers.items() if name != "create_ticket"})])


def test_an_unknown_handler_stops_the_start() -> None:
    with pytest.raises(RuntimeError, match="make_coffee"):
        Router([replace(NATIVE, handlers={**NATIVE.handlers, "make_coffee": NATIVE.handlers["get_service"]})])


def test_no_operation_is_in_two_contracts() -> None:
    with pytest.raises(RuntimeError, match="two contracts"):
        Router([NATIVE, NATIVE])


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.contract.name)
def test_every_operation_describes_its_refusals(dialect: Dialect) -> None:
    for operation in dialect.contract.operations():
        responses = dialect.contract.document["paths"][operation.path][operation.method.lower()]["responses"]
        assert {"400", "503"} <= responses.keys(), operation.id
        if operation.secured:
            assert {"401", "429"} <= responses.keys(), operation.id
        if operation.roles:
            assert "403" in responses, operation.id
        if operation.bodies:
            assert {"413", "415"} <= responses.keys(), operation.id
            assert 4096 <= operation.body_limit <= 8 << 20, operation.id
        if any(parameter.name == "If-Match" for parameter in operation.parameters):
            assert {"412", "428"} <= responses.keys(), operation.id
        if any(parameter.name == "Idempotency-Key" for parameter in operation.parameters):
            assert "422" in responses, operation.id


async def test_what_is_public(api: Api) -> None:
    anonymous = api.as_(None)
    assert (await anonymous.get("/v1")).body["service"] == "transfer-broker"
    assert (await anonymous.get("/openapi.json")).body == contract.NATIVE.document
    keys = await anonymous.get("/.well-known/jwks.json")
    assert [key["kty"] for key in keys.body["keys"]] == ["EC", "EC"]  # one signs, one stands by
    assert "d" not in keys.body["keys"][0]
    assert "max-age" in keys.headers["Cache-Control"]
    busy = await anonymous.get("/problems/busy")
    assert (busy.body["status"], busy.body["title"]) == (429, "All slots are taken")
    assert (await anonymous.get("/problems/nothing")).status == 404


async def test_head_is_get_without_a_body(api: Api, broker: RunningBroker) -> None:
    async with api._session.head(broker.url + "/v1") as response:
        assert response.status == 200
        assert await response.read() == b""


async def test_a_site_from_birth_to_death(api: Api, broker: RunningBroker) -> None:
    admin = api.as_(broker.token("admin"))
    made = await admin.post("/v1/sites", {"path": "eu/az1", "networks": ["10.0.0.0/8"]})
    assert made.status == 201
    assert made.headers["Location"] == "/v1/sites/eu%2Faz1"
    assert (await admin.get(made.headers["Location"])).body == made.body
    changed = await admin.patch("/v1/sites/eu%2Faz1", {"description": "first"}, made.etag)
    assert (changed.status, changed.body["description"]) == (200, "first")
    assert (await admin.patch("/v1/sites/eu%2Faz1", {"description": "late"}, made.etag)).status == 412
    assert (await admin.patch("/v1/sites/eu%2Faz1", {"description": "any"}, "*")).status == 200
    assert (await admin.delete("/v1/sites/eu%2Faz1")).status == 428
    assert (await admin.delete("/v1/sites/eu%2Faz1", '"999"')).status == 412
    assert (await admin.delete("/v1/sites/eu%2Faz1", '"what"')).status == 412
    last = await admin.get("/v1/sites/eu%2Faz1")
    assert (await admin.delete("/v1/sites/eu%2Faz1", last.etag)).status == 204
    assert (await admin.get("/v1/sites/eu%2Faz1")).status == 404


async def test_an_image_from_birth_to_death(api: Api) -> None:
    made = await api.post("/v1/images", {"name": "debian", "properties": {"os": "linux"}})
    assert made.status == 201
    path = made.headers["Location"]
    assert (await api.get("/v1/images?name=debian&limit=1")).body["images"] == [made.body]
    changed = await api.patch(path, {"properties": {"os": None, "arch": "arm64"}}, made.etag)
    assert changed.body["properties"] == {"arch": "arm64"}
    gone = await api.delete(path, changed.etag)
    assert (gone.status, gone.body) == (200, {"id": made.body["id"], "deleting": [], "kept": []})
    assert (await api.get(path)).status == 404


async def test_pages_lead_through_everything(api: Api) -> None:
    names = [f"image-{number}" for number in range(5)]
    for name in names:
        assert (await api.post("/v1/images", {"name": name})).status == 201
    seen, marker = [], ""
    while True:
        page = (await api.get(f"/v1/images?limit=2{marker}")).body
        assert len(page["images"]) <= 2
        seen += [image["name"] for image in page["images"]]
        if "next" not in page:
            break
        marker = f"&marker={page['next']}"
    assert seen == names


async def test_a_retry_with_its_key_makes_nothing_twice(api: Api) -> None:
    first = await api.post("/v1/images", {"name": "once"}, Idempotency_Key="k1")
    again = await api.post("/v1/images", {"name": "once"}, Idempotency_Key="k1")
    assert (first.status, again.status) == (201, 201)
    assert first.body["id"] == again.body["id"]
    assert len((await api.get("/v1/images")).body["images"]) == 1
    other = await api.post("/v1/images", {"name": "twice"}, Idempotency_Key="k1")
    assert (other.status, other.body["type"]) == (422, "/problems/idempotency-mismatch")


async def test_many_retries_at_once_make_one_image(api: Api) -> None:
    replies = await asyncio.gather(*(api.post("/v1/images", {"name": "once"}, Idempotency_Key="k") for _ in range(8)))
    assert {reply.status for reply in replies} == {201}
    assert len({reply.body["id"] for reply in replies}) == 1


async def test_another_principal_has_other_keys(api: Api, broker: RunningBroker) -> None:
    first = await api.post("/v1/images", {"name": "mine"}, Idempotency_Key="k")
    second = await api.as_(broker.token(subject="bob")).post("/v1/images", {"name": "his"}, Idempotency_Key="k")
    assert second.status == 201
    assert second.body["id"] != first.body["id"]


async def test_every_answer_names_its_request_and_keeps_the_trace(api: Api) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    first, second = await api.get("/v1", traceparent=trace), await api.get("/v1", traceparent="nonsense")
    assert first.headers["traceparent"] == trace
    assert "traceparent" not in second.headers
    assert first.headers["X-Request-Id"] != second.headers["X-Request-Id"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/stores/none",
        "/v1/sites/none",
        "/v1/paths",
        "/v1/replicas",
        "/v1/stores",
        "/v1/sites",
        "/v1/tickets/00000000-0000-7000-8000-000000000000",
    ],
)
@pytest.mark.parametrize("role", ["admin", "service", "member", "reader"])
async def test_reading_answers_as_described_for_every_role(api: Api, broker: RunningBroker, path: str, role: str) -> None:
    assert (await api.as_(broker.token(role)).get(path)).status in (200, 403, 404)
