"""Every error is a problem that can be looked up, and its headers are what the RFCs ask for."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import jsonschema_rs
import orjson
import pytest
import structlog

from broker import errors, log
from broker.web import contract, problem, routes
from broker.web.call import Answer, Call
from broker.web.dialects import NATIVE
from tests.parts.broker import Api, RunningBroker


@pytest.mark.parametrize("name", sorted(errors.problem_types()))
def test_every_type_is_described_and_renders_as_the_contract_says(name: str) -> None:
    described = problem.describe(name)
    assert described["status"] == errors.problem_types()[name].status
    assert len(described["description"]) > 20
    status, body, headers = problem.render(errors.problem_types()[name]("What happened."))
    schema = {"$ref": "#/components/schemas/Problem", "components": contract.NATIVE.document["components"]}
    assert jsonschema_rs.Draft202012Validator(schema).is_valid(orjson.loads(body))
    assert status == described["status"]
    assert headers["Content-Type"] == "application/problem+json"
    assert headers["Cache-Control"] == "no-store"
    assert ("WWW-Authenticate" in headers) == (status == 401)
    assert ("Retry-After" in headers) == (status in (429, 503))


def test_retry_after_is_whole_seconds_rounded_up() -> None:
    _, body, headers = problem.render(errors.Busy(retry_after=2.1))
    assert headers["Retry-After"] == "3"
    assert orjson.loads(body)["retry_after"] == 2.1


def test_what_is_excluded_is_told() -> None:
    _, body, _ = problem.render(errors.NoSource("None.", extra={"excluded": [{"store": "a", "reason": "disabled"}]}))
    assert orjson.loads(body)["excluded"] == [{"store": "a", "reason": "disabled"}]


async def test_what_nobody_expected_says_nothing_and_logs_without_secrets(
    broker: RunningBroker, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(call: Call) -> Answer:
        raise KeyError("http://store/k?X-Amz-Signature=5ec7e7 of secret-project")

    monkeypatch.setattr(routes.Router, "find", _always(broken))
    root = logging.getLogger()
    handlers, level, stream = root.handlers[:], root.level, io.StringIO()
    log.configure("info", "json", stream=stream)
    try:
        async with session.get(f"{broker.url}/v1/images", headers={"Authorization": f"Bearer {broker.token()}"}) as response:
            status, text, request_id = response.status, await response.text(), response.headers["X-Request-Id"]
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    assert status == 500
    assert "KeyError" not in text
    assert "secret-project" not in text
    assert request_id in text
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (event,) = [line for line in lines if line["event"] == "unexpected error"]
    assert event["request_id"] == request_id
    assert "KeyError" in event["exception"]
    assert "5ec7e7" not in stream.getvalue()


def _always(handler: Callable[[Call], Awaitable[Answer]]) -> Any:
    operation = next(operation for operation in contract.NATIVE.operations() if operation.id == "listImages")
    return lambda self, path, method: (routes.Route(NATIVE, operation, handler), {})


async def test_the_types_in_answers_can_be_looked_up(api: Api) -> None:
    reply = await api.get("/v1/images/x")
    assert (await api.get(reply.body["type"])).body["status"] == reply.status
