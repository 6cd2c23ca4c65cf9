"""Glance's API over HTTP: what it refuses and how it says so, its limits, and who speaks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import aiohttp
import orjson
import pytest

from broker.model import Role
from broker.web.glance.attributes import MAX_PROPERTIES
from broker.web.glance.patch import V20, V21
from tests.parts.broker import Api
from tests.parts.cluster import Brokers, brokers_on
from tests.parts.postgres import Postgres

ID = "6ecbb4be-0000-4000-8000-000000000000"
IMAGE = f"/v2/images/{ID}"


@pytest.fixture(scope="module")
def brokers(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    with brokers_on(postgres.create(), tmp_path_factory.mktemp("glance"), 1) as running:
        yield running


@pytest.fixture
def glance(brokers: Brokers, session: aiohttp.ClientSession) -> Api:
    """Speaks with a token in X-Auth-Token, as OpenStack's clients do."""
    return Api(brokers.issuer, session, None, {"X-Auth-Token": brokers.token()})


async def patched(glance: Api, path: str, *operations: Any, type: str = V21) -> Any:
    return await glance.send("PATCH", path, list(operations), headers={"Content-Type": type})


REFUSED: list[tuple[str, str, bytes | None, str, int, str]] = [
    ("GET", "/v2/images/debian", None, "", 404, "No such image"),
    ("GET", "/v2/images/%ff", None, "", 400, "no UTF-8"),
    ("GET", IMAGE, None, "", 404, "No such image"),
    ("GET", f"{IMAGE}/file", None, "", 404, "No such image"),
    ("PUT", f"{IMAGE}/file", b"x" * 100_000, "application/octet-stream", 404, "No such image"),
    ("DELETE", IMAGE, None, "", 404, "No such image"),
    ("DELETE", "/v2/images/debian", None, "", 404, "No such image"),
    ("PUT", f"{IMAGE}/tags/x", None, "", 404, "No such image"),
    ("GET", f"{IMAGE}/members/a%00b", None, "", 400, "member_id"),
    ("DELETE", f"{IMAGE}/members/a%00b", None, "", 400, "member_id"),
    ("POST", f"{IMAGE}/actions/deactivate", None, "", 404, "No such image"),
    ("POST", f"{IMAGE}/actions/explode", None, "", 404, "no such path"),
    ("GET", "/v2/metadefs/namespaces", None, "", 404, "no metadata definitions"),
    ("PUT", IMAGE, None, "", 405, "DELETE, GET, HEAD, PATCH"),
    ("POST", "/v2/schemas/image", None, "", 405, "GET, HEAD"),
    ("GET", "/v2/images?limit=many", None, "", 400, "limit"),
    ("GET", "/v2/images?limit=-1", None, "", 400, "at least 0"),
    ("GET", "/v2/images?visibility=mine", None, "", 400, "visibility"),
    ("GET", "/v2/images?member_status=maybe", None, "", 400, "member_status"),
    ("GET", "/v2/images?protected=perhaps", None, "", 400, "protected"),
    ("GET", "/v2/images?name=a&name=b", None, "", 400, "twice"),
    ("GET", "/v2/images?sort=colour", None, "", 400, "created_at"),
    ("GET", "/v2/images?a%00b=c", None, "", 400, "properties"),
    ("GET", "/v2/images?a=%00", None, "", 400, "properties.a"),
    ("GET", "/v2/images?" + "&".join(f"p{number}=x" for number in range(33)), None, "", 400, "32"),
    ("POST", "/v2/images", b"", "application/json", 400, "body"),
    ("POST", "/v2/images", b"{", "application/json", 400, "no JSON"),
    ("POST", "/v2/images", b"[]", "application/json", 400, "object"),
    ("POST", "/v2/images", b'{"name": 5}', "application/json", 400, "Field: name. Expected: null or string."),
    ("POST", "/v2/images", b'{"name": "' + b"x" * 256 + b'"}', "application/json", 400, "255"),
    ("POST", "/v2/images", b'{"id": "debian"}', "application/json", 400, "Field: id"),
    ("POST", "/v2/images", b'{"x": {"y": 1}}', "application/json", 400, "Field: x. Expected: string."),
    ("POST", "/v2/images", b'{"size": 5}', "application/json", 403, "read-only"),
    ("POST", "/v2/images", b'{"visibility": "public"}', "application/json", 403, "administrators"),
    ("POST", "/v2/images", b'{"owner": "other"}', "application/json", 403, "administrators"),
    ("POST", "/v2/images", b'{"name": "' + b"x" * (1 << 20) + b'"}', "application/json", 413, "1048576"),
    ("POST", "/v2/images", b"<image/>", "text/xml", 415, "application/json"),
    ("PATCH", IMAGE, b"[]", "application/json", 415, V21),
    ("PATCH", IMAGE, b"{}", V21, 400, "array"),
    ("PATCH", IMAGE, b"[5]", V21, 400, "object"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]} {case[1][:60]} {(case[2] or b'')[:20]!r}")
async def test_what_is_refused(case: tuple[str, str, bytes | None, str, int, str], glance: Api) -> None:
    method, path, body, type, status, told = case
    answer = await glance.send(method, path, raw=body, headers={"Content-Type": type} if type else {})
    assert (answer.status, told in str(answer.body)) == (status, True), answer.body
    if status >= 400:
        assert answer.body["error"]["code"] == status
    assert answer.headers["X-Openstack-Request-Id"] == answer.headers["X-Request-Id"]


async def test_as_much_as_goes_and_one_more(glance: Api) -> None:
    properties = {f"p{number}": "x" for number in range(MAX_PROPERTIES)}
    made = await glance.post("/v2/images", properties)
    assert made.status == 201
    path = made.body["self"]
    for more in (1, 10_000):
        assert (await glance.post("/v2/images", properties | {f"more{number}": "x" for number in range(more)})).status == 413
        many = [{"op": "add", "path": f"/more{number}", "value": "x"} for number in range(more)]
        assert (await patched(glance, path, *many)).status == 413
    assert (await patched(glance, path, {"op": "add", "path": "/last", "value": "x"}, {"op": "remove", "path": "/p0"})).status == 200
    await patched(glance, path, {"op": "replace", "path": "/tags", "value": [f"t{number}" for number in range(127)]})
    assert (await glance.send("PUT", f"{path}/tags/t127")).status == 204
    assert (await glance.send("PUT", f"{path}/tags/t128")).status == 413
    assert (await glance.send("PUT", f"{path}/tags/t127")).status == 204
    assert (await glance.send("PUT", f"{path}/tags/{'x' * 256}")).status == 400


async def test_all_of_a_patch_or_nothing(glance: Api) -> None:
    path = (await glance.post("/v2/images", {"name": "a"})).body["self"]
    answer = await patched(glance, path, {"op": "replace", "path": "/name", "value": "b"}, {"op": "remove", "path": "/absent"})
    assert answer.status == 409
    assert (await glance.get(path)).body["name"] == "a"
    assert (await patched(glance, path, {"replace": "/name", "value": "c"}, type=V20)).body["name"] == "c"
    assert (await patched(glance, path)).body["name"] == "c"


async def test_an_id_of_ones_own_is_free_once(glance: Api, brokers: Brokers) -> None:
    assert (await glance.post("/v2/images", {"id": ID})).body["id"] == ID
    other = glance.as_(None, X_Auth_Token=brokers.token(project="other"))
    for api in (glance, other):
        assert (await api.post("/v2/images", {"id": ID.upper()})).status == 409
    assert (await other.get(IMAGE)).status == 404


async def test_tokens(glance: Api, brokers: Brokers) -> None:
    """A bearer token of the broker's own serves in either header, but not in both; a bad one is told as Glance does."""
    token = brokers.token()
    assert (await glance.get("/v2/images")).status == 200
    assert (await glance.as_(token).get("/v2/images")).status == 200
    assert (await glance.as_(token, X_Auth_Token=token).get("/v2/images")).status == 400
    assert (await glance.as_(None, X_Auth_Token=token).get("/v1/images")).status == 200
    assert (await glance.as_(None, X_Auth_Token=token, X_Service_Token="whatever").get("/v2/images")).status == 200
    for wrong in ("", "nonsense", token + "x", brokers.token(ttl=-3600), "x" * 8001):
        answer = await glance.as_(None, X_Auth_Token=wrong).get("/v2/images")
        assert (answer.status, answer.body["error"]["code"]) == (401, 401)
    assert (await glance.as_(None).get("/v2/images")).status == 401
    for path in ("/", "/versions", "/v2", "/v2/", "/v2/schemas/image"):
        assert (await glance.as_(None).get(path)).status in (200, 300)


async def test_a_reader_writes_nothing(glance: Api, brokers: Brokers) -> None:
    path = (await glance.post("/v2/images", {"name": "a"})).body["self"]
    reader = glance.as_(None, X_Auth_Token=brokers.token(Role.READER))
    assert (await reader.get(path)).status == 200
    assert (await patched(reader, path, {"op": "replace", "path": "/name", "value": "b"})).status == 403
    for method, at in (("DELETE", path), ("PUT", f"{path}/tags/x"), ("POST", "/v2/images")):
        assert (await reader.send(method, at, {} if method == "POST" else None)).status == 403


async def test_a_body_that_is_not_read_ends_the_connection(glance: Api, brokers: Brokers) -> None:
    """PUT of bytes is answered before they come; what follows on the connection is never taken for a request."""
    path = (await glance.post("/v2/images", {"name": "a"})).body["self"]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(brokers.issuer.rpartition(":")[2]))
    head = f"PUT {path}/file HTTP/1.1\r\nHost: x\r\nX-Auth-Token: {brokers.token()}\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head.encode() + b"10\r\n")
    async with asyncio.timeout(20):
        told = await reader.readuntil(b"\r\n\r\n")
        assert told.startswith(b"HTTP/1.1 409 ")
        writer.write(b"GET /v1 HTTP/1.1\r\n0\r\n\r\n")
        answer = await reader.read()
    writer.close()
    assert orjson.loads(answer)["error"]["code"] == 409
