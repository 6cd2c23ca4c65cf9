"""The contracts, tried by a machine: requests made from openapi.json and those of the dialects, right ones and wrong ones, against a
broker as a process.

Not checked are ``missing_required_header`` (a missing If-Match is our 428, RFC 6585, which that check does not take for a
refusal), ``positive_data_acceptance`` (a schema cannot say which stores and images there are), ``ignored_auth`` (some answers
are public) and ``use_after_free``, ``ensure_resource_availability`` (they need a story; other tests tell theirs).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok

from broker.web.dialects import DIALECTS, NATIVE
from tests.parts.broker import BrokerProcess, mint, serve
from tests.parts.postgres import Postgres

EXAMPLES, EXAMPLES_OF_DIALECTS = 15, 5
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


OPERATIONS: dict[str, tuple[Any, int]] = {}
"""By method and path, each with how often it is tried."""
for _dialect in DIALECTS:
    for _type in {type for operation in _dialect.contract.operations() for type in operation.bodies}:
        schemathesis.serializer.alias(_type, "application/json")
    for _found in schemathesis.openapi.from_dict(dict(_dialect.contract.document)).get_all_operations():
        assert isinstance(_found, Ok), _found
        OPERATIONS[_found.ok().label] = _found.ok(), EXAMPLES if _dialect is NATIVE else EXAMPLES_OF_DIALECTS


@pytest.mark.parametrize("label", OPERATIONS)
def test_every_answer_is_in_the_contract(label: str, running: BrokerProcess, tokens: dict[str, str]) -> None:
    """No 5xx, no undocumented status, media type, header or shape, whoever asks and whatever is sent."""
    answered = 0
    operation, examples = OPERATIONS[label]

    @given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode)))
    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def run(case: schemathesis.Case[Any]) -> None:
        nonlocal answered
        for token in tokens.values():
            case.call_and_validate(base_url=running.url, checks=CHECKED, headers={"Authorization": f"Bearer {token}"})
            answered += 1

    run()
    assert answered >= len(tokens)
