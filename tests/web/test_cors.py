"""CORS: pages of the origins that the operator named may use the API; everyone else is answered as if there were no such thing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import aiohttp
import pytest

from tests.parts.broker import Api, BrokerProcess, serve
from tests.parts.postgres import Postgres

PAGE = "https://app.example.org"


@pytest.fixture(scope="module")
def open_broker(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    with serve(postgres.create(), tmp_path_factory.mktemp("cors"), http=f'cors_origins = ["http://127.0.0.1:3000", "{PAGE}"]\n') as running:
        yield running


async def ask(broker: BrokerProcess, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str]]:
    async with aiohttp.ClientSession() as session, session.request(method, broker.url + path, headers=headers) as answer:
        return answer.status, answer.headers


@pytest.mark.parametrize("path", ["/v1/tickets", "/v1/nowhere", "/ga4gh/drs/v1/objects/x", "/ga4gh/drs/v1/objects"])
async def test_a_preflight_is_answered_for_every_path_alike(open_broker: BrokerProcess, path: str) -> None:
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    status, fields = await ask(open_broker, "OPTIONS", path, asks)
    assert (status, fields["Access-Control-Allow-Origin"], fields["Vary"]) == (204, PAGE, "Origin")
    assert "POST" in fields["Access-Control-Allow-Methods"]
    allowed = {name.strip().lower() for name in fields["Access-Control-Allow-Headers"].split(",")}
    assert {"authorization", "content-type", "if-match", "idempotency-key", "x-auth-token"} <= allowed
    assert fields["Access-Control-Max-Age"] == "600"
    assert "Access-Control-Allow-Credentials" not in fields


async def test_a_page_may_read_answers_and_errors(open_broker: BrokerProcess) -> None:
    known = {"Origin": PAGE, "Authorization": f"Bearer {await asyncio.to_thread(open_broker.token)}"}
    for path, headers, expected in (("/v1/stores", known, 200), ("/v1/stores", {"Origin": PAGE}, 401), ("/v1/nowhere", known, 404)):
        status, fields = await ask(open_broker, "GET", path, headers)
        assert (status, fields["Access-Control-Allow-Origin"]) == (expected, PAGE)
        assert fields["Vary"].split(", ")[-1] == "Origin" and "Access-Control-Allow-Credentials" not in fields
        exposed = {name.strip() for name in fields["Access-Control-Expose-Headers"].split(",")}
        assert {"Link", "Location", "Digest", "Repr-Digest", "ETag", "Retry-After", "X-Request-Id"} <= exposed


@pytest.mark.parametrize(
    "origin", ["null", "*", PAGE + "/", PAGE + ":443", "http://app.example.org", "https://evil.example", "https://app.example.org.evil", ""]
)
async def test_no_other_page_may(open_broker: BrokerProcess, origin: str) -> None:
    status, fields = await ask(open_broker, "GET", "/v1", {"Origin": origin})
    assert (status, fields["Vary"]) == (200, "Origin") and not [name for name in fields if name.startswith("Access-Control")]
    status, fields = await ask(open_broker, "OPTIONS", "/v1", {"Origin": origin, "Access-Control-Request-Method": "GET"})
    assert status == 405 and not [name for name in fields if name.startswith("Access-Control")]


async def test_the_status_page_is_for_its_own_origin(open_broker: BrokerProcess) -> None:
    status, fields = await ask(open_broker, "GET", "/", {"Origin": PAGE, "Accept": "text/html"})
    assert status == 401 and "Access-Control-Allow-Origin" not in fields  # asks to sign in


async def test_by_default_there_is_nothing_of_it(api: Api) -> None:
    answer = await api.get("/v1", Origin=PAGE)
    assert answer.status == 200 and "Vary" not in answer.headers and "Access-Control-Allow-Origin" not in answer.headers
    assert (await api.send("OPTIONS", "/v1", headers={"Origin": PAGE, "Access-Control-Request-Method": "GET"})).status == 405
