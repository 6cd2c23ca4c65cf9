"""The contract, tried by a machine: requests made from openapi.json, right ones and wrong ones, against a broker as a process.

Not checked are ``missing_required_header`` (a missing If-Match is our 428, RFC 6585, which that check does not take for a
refusal), ``positive_data_acceptance`` (a schema cannot say which stores and images there are), ``ignored_auth`` (some answers
are public) and ``use_after_free``, ``ensure_resource_availability`` (they need a story; other tests tell theirs).
"""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS, load_all_checks

from broker.web import contract
from tests.parts.broker import BrokerProcess, mint, serve
from tests.parts.postgres import Postgres

EXAMPLES = 15
"""Requests of each operation for each role."""

NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
load_all_checks()
CHECKED: list[Any] = [check for check in CHECKS.get_all() if check.__name__ in NAMES]


@pytest.fixture(scope="module")
def running(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    with serve(postgres.create(), tmp_path_factory.mktemp("schemathesis")) as broker:
        yield broker


@pytest.fixture(scope="module")
def tokens(running: BrokerProcess) -> dict[str, str]:
    return {role: asyncio.run(mint(running.database, running.config, role)) for role in ("admin", "member")}


schema = schemathesis.openapi.from_dict(dict(contract.document()))


@schema.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_every_answer_is_in_the_contract(case: schemathesis.Case[Any], running: BrokerProcess, tokens: dict[str, str]) -> None:
    """No 5xx but the documented 503, no undocumented status, media type, header or shape, whoever asks and whatever is sent."""
    for token in tokens.values():
        case.call_and_validate(base_url=running.url, checks=CHECKED, headers={"Authorization": f"Bearer {token}"})


def test_every_operation_was_reached(running: BrokerProcess) -> None:
    """Lest the checks pass because nothing was asked: the broker counted what the tests above sent."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{running.metrics_url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found: dict[str, set[str]] = {}
    for operation, status in re.findall(r'broker_http_requests_total\{operation="(\w*)",status="(\d+)"\}', text):
        found.setdefault(operation, set()).add(status)
    assert {operation.id for operation in contract.operations()} <= found.keys()
    assert {"200", "201", "400", "403", "404", "405", "428"} <= set.union(*found.values())
    assert not {status for status in set.union(*found.values()) if status.startswith("5") and status != "503"}
