"""Whatever is sent, the answer is a clear problem: the right status, the field that is wrong, and nothing of our inside."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from tests.parts.broker import Api, RunningBroker, broker_on

ID = "0198a5f2-0000-7000-8000-000000000000"
TICKET = f"/v1/tickets/{ID}"
DOWNLOAD: dict[str, Any] = {"operation": "download", "image": ID}
UPLOAD: dict[str, Any] = {"operation": "upload", "image": {"name": "x"}}
STORE: dict[str, Any] = {"name": "s", "kind": "s3", "site": "eu", "endpoint": "http://127.0.0.1:1"}
COMMIT: dict[str, Any] = {"size": 5, "digests": {"sha256": "a" * 64}}
PIECES: dict[str, Any] = {"length": 65536, "algorithm": "sha256", "digests": ["a" * 64]}

FIELDS: list[tuple[str, str, Any, str]] = [
    ("no operation", "/v1/tickets", {"image": ID}, "operation"),
    ("unknown operation", "/v1/tickets", {**DOWNLOAD, "operation": "steal"}, "operation"),
    ("operation of another type", "/v1/tickets", {**DOWNLOAD, "operation": ["download"]}, "operation"),
    ("unknown field", "/v1/tickets", {**DOWNLOAD, "cuont": 1}, "cuont"),
    ("field of the other operation", "/v1/tickets", {**DOWNLOAD, "size": 1}, "size"),
    ("id that is no UUID", "/v1/tickets", {**DOWNLOAD, "image": "debian"}, "image"),
    ("id in upper case", "/v1/tickets", {**DOWNLOAD, "image": ID.upper()}, "image"),
    ("id as a number", "/v1/tickets", {**DOWNLOAD, "image": 5}, "image"),
    ("count 0", "/v1/tickets", {**DOWNLOAD, "count": 0}, "count"),
    ("count 10^9", "/v1/tickets", {**DOWNLOAD, "count": 10**9}, "count"),
    ("count -1", "/v1/tickets", {**DOWNLOAD, "count": -1}, "count"),
    ("count 1.5", "/v1/tickets", {**DOWNLOAD, "count": 1.5}, "count"),
    ("count as text", "/v1/tickets", {**DOWNLOAD, "count": "3"}, "count"),
    ("count true", "/v1/tickets", {**DOWNLOAD, "count": True}, "count"),
    ("count null", "/v1/tickets", {**DOWNLOAD, "count": None}, "count"),
    ("parallel 0", "/v1/tickets", {**DOWNLOAD, "parallel": 0}, "parallel"),
    ("no formats", "/v1/tickets", {**DOWNLOAD, "formats": []}, "formats"),
    ("a store twice", "/v1/tickets", {**DOWNLOAD, "prefer": ["a", "a"]}, "prefer"),
    ("a store with a bad name", "/v1/tickets", {**DOWNLOAD, "avoid": ["fine", "../x"]}, "avoid.1"),
    ("a site with a bad name", "/v1/tickets", {**DOWNLOAD, "site": "EU"}, "site"),
    ("a site with nine steps", "/v1/tickets", {**DOWNLOAD, "site": "a/" * 8 + "a"}, "site"),
    ("size 0", "/v1/tickets", {**UPLOAD, "size": 0}, "size"),
    ("size -1", "/v1/tickets", {**UPLOAD, "size": -1}, "size"),
    ("size 2^53 + 1", "/v1/tickets", {**UPLOAD, "size": 2**53 + 1}, "size"),
    ("size 10^300", "/v1/tickets", {**UPLOAD, "size": 1e300}, "size"),
    ("digest too short", "/v1/tickets", {**UPLOAD, "digests": {"sha256": "a" * 63}}, "digests.sha256"),
    ("digest too long", "/v1/tickets", {**UPLOAD, "digests": {"sha256": "a" * 65}}, "digests.sha256"),
    ("digest of another length", "/v1/tickets", {**UPLOAD, "digests": {"md5": "a" * 64}}, "digests.md5"),
    ("digest in upper case", "/v1/tickets", {**UPLOAD, "digests": {"sha256": "A" * 64}}, "digests.sha256"),
    ("digest with a line end", "/v1/tickets", {**UPLOAD, "digests": {"md5": "a" * 32 + "\n"}}, "digests.md5"),
    ("unknown digest", "/v1/tickets", {**UPLOAD, "digests": {"crc32": "a"}}, "digests.crc32"),
    ("no digests", "/v1/tickets", {**UPLOAD, "digests": {}}, "digests"),
    ("name with a control character", "/v1/tickets", {"operation": "upload", "image": {"name": "a\x00b"}}, "image.name"),
    ("name with a line separator", "/v1/tickets", {"operation": "upload", "image": {"name": "a\u2028b"}}, "image.name"),
    ("unknown field inside", "/v1/tickets", {"operation": "upload", "image": {"name": "a", "owner": "b"}}, "image.owner"),
    ("name of 1 MB", "/v1/images", {"name": "x" * 1_000_000}, "name"),
    ("empty name", "/v1/images", {"name": ""}, "name"),
    ("no name", "/v1/images", {}, "name"),
    ("name with an escape", "/v1/images", {"name": "\x1b[31m"}, "name"),
    ("property of 5000 characters", "/v1/images", {"name": "a", "properties": {"k": "v" * 5000}}, "properties.k"),
    ("property that is no text", "/v1/images", {"name": "a", "properties": {"k": 1}}, "properties.k"),
    ("bad property name", "/v1/images", {"name": "a", "properties": {"k\n": "v"}}, "properties"),
    ("200 properties", "/v1/images", {"name": "a", "properties": {str(n): "v" for n in range(200)}}, "properties"),
    ("unknown visibility", "/v1/images", {"name": "a", "visibility": "secret"}, "visibility"),
    ("no tickets", "/v1/tickets:batch", {"tickets": []}, "tickets"),
    ("501 tickets", "/v1/tickets:batch", {"tickets": [DOWNLOAD] * 501}, "tickets"),
    ("one bad ticket", "/v1/tickets:batch", {"tickets": [DOWNLOAD, {**DOWNLOAD, "count": 99}]}, "tickets.1.count"),
    ("an upload in a batch", "/v1/tickets:batch", {"tickets": [UPLOAD]}, "tickets.0.operation"),
    ("part 0", f"{TICKET}/parts", {"numbers": [0]}, "numbers.0"),
    ("part 10001", f"{TICKET}/parts", {"numbers": [10001]}, "numbers.0"),
    ("no parts", f"{TICKET}/parts", {"numbers": []}, "numbers"),
    ("digest of part x", f"{TICKET}/parts", {"numbers": [1], "digests": {"x": {"md5": "a" * 32}}}, "digests"),
    ("commit without size", f"{TICKET}/commit", {"digests": {"sha256": "a" * 64}}, "size"),
    ("commit without digests", f"{TICKET}/commit", {"size": 5}, "digests"),
    ("pieces of 1 byte", f"{TICKET}/commit", {**COMMIT, "pieces": {**PIECES, "length": 1}}, "pieces.length"),
    ("report of nothing", f"{TICKET}/report", {"store": "s"}, "outcome"),
    ("report of -1 bytes", f"{TICKET}/report", {"store": "s", "outcome": "ok", "bytes": -1}, "bytes"),
    ("report of 10^20 seconds", f"{TICKET}/report", {"store": "s", "outcome": "ok", "seconds": 1e20}, "seconds"),
    ("report with a line end", f"{TICKET}/report", {"store": "s", "outcome": "ok", "detail": "a\nb"}, "detail"),
    ("endpoint with a path", "/v1/stores", {**STORE, "endpoint": "http://h/../x"}, "endpoint"),
    ("endpoint with a user", "/v1/stores", {**STORE, "endpoint": "http://u:p@h"}, "endpoint"),
    ("endpoint of another scheme", "/v1/stores", {**STORE, "endpoint": "gopher://h"}, "endpoint"),
    ("store with a bad name", "/v1/stores", {**STORE, "name": "S_1"}, "name"),
    ("-1 slots", "/v1/stores", {**STORE, "read_slots": -1}, "read_slots"),
    ("cost as text", "/v1/stores", {**STORE, "cost": "low"}, "cost"),
    ("network that is none", "/v1/sites", {"path": "eu", "networks": ["10.0.0.0"]}, "networks.0"),
    ("key with a control character", f"/v1/blobs/{ID}/replicas", {"store": "s", "key": "a\x7f"}, "key"),
    ("key that is empty", f"/v1/blobs/{ID}/replicas", {"store": "s", "key": ""}, "key"),
]  # fmt: skip

EITHER = [
    ("neither image nor blob", {"operation": "download"}),
    ("image and blob", {"operation": "download", "image": ID, "blob": ID}),
    ("upload of neither", {"operation": "upload"}),
]

BODIES: list[tuple[str, bytes, int]] = [
    ("nothing", b"", 400),
    ("half an object", b'{"name": "x"', 400),
    ("two values", b'{"name": "x"} {}', 400),
    ("no UTF-8", b'{"name": "\xff"}', 400),
    ("half a surrogate", b'{"name": "\\ud800"}', 400),
    ("NaN", b'{"name": NaN}', 400),
    ("a number without end", b'{"name": 1e999}', 400),
    ("100,000 brackets", b"[" * 100_000, 400),
    ("a list", b"[]", 400),
    ("null", b"null", 400),
    ("a form", b"name=x", 400),
    ("too much", b'{"name": "' + b"x" * (9 << 20) + b'"}', 413),
]


@pytest.fixture
def admin(api: Api, broker: RunningBroker) -> Api:
    return api.as_(broker.token("admin"))


def assert_clear(body: dict[str, Any]) -> None:
    """A problem that helps, and neither a traceback nor a copy of what was sent."""
    text = str(body)
    assert len(text) < 3000
    for inside in ("Traceback", "asyncpg", 'File "', "site-packages", "SELECT", "jsonschema"):
        assert inside not in text


async def test_every_field_that_is_wrong_is_named(admin: Api) -> None:
    wrong = []
    for name, path, body, field in FIELDS:
        reply = await admin.post(path, body)
        assert_clear(reply.body)
        if (reply.status, reply.body.get("field")) != (400, field) or not reply.body.get("expected"):
            wrong.append((name, reply.status, reply.body))
    assert not wrong


async def test_either_but_not_both(admin: Api) -> None:
    for name, body in EITHER:
        reply = await admin.post("/v1/tickets", body)
        assert (reply.status, reply.body["expected"]) == (400, "exactly one of image, blob"), name


async def test_what_is_no_json(api: Api) -> None:
    for name, raw, status in BODIES:
        reply = await api.send("POST", "/v1/images", raw=raw)
        assert reply.status == status, (name, reply.body)
        assert_clear(reply.body)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "multipart/form-data"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 201),
        ({"Idempotency-Key": "x" * 300}, 400),
        ({"Idempotency-Key": "a b"}, 400),
        ({"X-Client-Instance": "x" * 300}, 400),
        ({"X-Client-Instance": "a\tb"}, 400),
    ],
)
async def test_headers(api: Api, headers: dict[str, str], status: int) -> None:
    reply = await api.send("POST", "/v1/images", {"name": "x"}, headers=headers)
    assert reply.status == status
    if status != 201:
        assert_clear(reply.body)


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("/v1/images/debian", 400, "image"),
        (f"/v1/images/{ID}x", 400, "image"),
        ("/v1/images/%00", 400, "image"),
        ("/v1/images/%ff", 400, None),
        ("/v1/images/..%2f..%2fetc%2fpasswd", 400, "image"),
        (f"/v1/images/{ID}", 404, None),
        ("/v1/images?limit=0", 400, "limit"),
        ("/v1/images?limit=1000000000", 400, "limit"),
        ("/v1/images?limit=99999999999999999999999", 400, "limit"),
        ("/v1/images?limit=ten", 400, "limit"),
        ("/v1/images?limit=", 400, "limit"),
        ("/v1/images?limit=1&limit=2", 400, None),
        ("/v1/images?lmiit=1", 400, "lmiit"),
        ("/v1/images?name=%00", 400, "name"),
        ("/v1/images?name=%ff", 400, None),
        ("/v1/images?marker=nonsense", 400, "marker"),
        ("/v1/images?marker=%00", 400, "marker"),
        ("/v1/images?status=lost", 400, "status"),
        ("/v1/images?" + "&".join(f"a{n}=1" for n in range(50)), 400, None),
        ("/v1/stores?marker=%00", 400, "marker"),
        ("/v1/replicas?marker=x", 400, "marker"),
        ("/v1/paths?marker=x", 400, "marker"),
        ("/v1/stores/UPPER", 400, "store"),
        ("/v1/stores/none", 404, None),
        ("/v1/sites/none%2Fhere", 404, None),
        ("/v1/sites/none/here", 404, None),
        ("/v1/nothing", 404, None),
        ("//v1", 404, None),
        ("/v1/", 404, None),
        ("/v1?x=1", 400, "x"),
    ],
)
async def test_addresses(admin: Api, path: str, status: int, field: str | None) -> None:
    reply = await admin.get(path)
    assert (reply.status, reply.body.get("field")) == (status, field), reply.body
    assert_clear(reply.body)


@pytest.mark.parametrize(
    ("etag", "status"), [(None, 428), ("5", 400), ('W/"1"', 400), ('"1", "2"', 412), ('"99999999999999999999"', 412), ('""', 412)]
)
async def test_etags(api: Api, etag: str | None, status: int) -> None:
    made = await api.post("/v1/images", {"name": "x"})
    assert (await api.delete(made.headers["Location"], etag)).status == status


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"])
async def test_other_methods_say_which_there_are(api: Api, method: str) -> None:
    reply = await api.send(method, "/v1/images")
    assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD, POST")


async def test_a_body_where_none_belongs(api: Api) -> None:
    assert (await api.send("POST", f"{TICKET}/refresh", {"x": 1})).status == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"GET /v1 HTTP/9.9\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20000 + b"\r\n\r\n",
        b"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET " + b"/x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_what_is_no_http(broker: RunningBroker, raw: bytes) -> None:
    host, port = broker.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.split()[1] == (b"431" if len(raw) > 8190 else b"400")
    assert b"application/problem+json" in answer
    assert b"Traceback" not in answer
    assert b"aiohttp" not in answer


@pytest.mark.parametrize(
    "line",
    [b"GET /v1/images/\xff HTTP/1.1", b"GET /v1/images?name=\xff HTTP/1.1", b"POST /v1/images HTTP/1.1\r\nIdempotency-Key: \xff\xfe"],
)
async def test_raw_bytes_outside_of_utf_8(broker: RunningBroker, line: bytes) -> None:
    host, port = broker.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(line + f"\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {broker.token()}\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.split()[1] == b"400"
    assert b"application/problem+json" in answer


async def test_a_client_that_leaves_in_mid_body_harms_nobody(broker: RunningBroker, api: Api) -> None:
    host, port = broker.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/images HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {broker.token()}\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + b"Content-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.transport.abort()
    assert (await api.get("/v1/images")).body["images"] == []


async def test_more_than_was_announced_is_refused_while_it_arrives(broker: RunningBroker, session: aiohttp.ClientSession) -> None:
    async def endless() -> Any:
        for _ in range(40):
            yield b" " * (1 << 20)

    headers = {"Authorization": f"Bearer {broker.token()}", "Content-Type": "application/json"}
    try:
        async with session.post(f"{broker.url}/v1/images", data=endless(), headers=headers) as response:
            assert response.status == 413
    except aiohttp.ClientConnectionError:
        pass  # the broker hung up before the answer could be read
    assert (await Api(broker.url, session, broker.token()).get("/v1")).status == 200


@pytest.mark.parametrize("depth", [200, 1000, 100_000])
async def test_nesting_has_an_end(api: Api, depth: int) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        nested = opening * depth + b"1.0" + closing * depth
        for raw in (nested, b'{"operation":"upload","image":{"name":"x","properties":' + nested + b"}}"):
            reply = await api.send("POST", "/v1/tickets", raw=raw)
            assert reply.status == (400 if len(raw) <= 256 << 10 else 413), reply.body


async def test_whole_numbers_may_be_written_as_fractions(api: Api) -> None:
    reply = await api.send("POST", "/v1/tickets", raw=b'{"operation": "download", "image": "%s", "count": 3.0}' % str(uuid4()).encode())
    assert reply.status == 404


async def test_the_body_limit_is_a_setting(database: str, tmp_path: Any, session: aiohttp.ClientSession) -> None:
    async with broker_on(database, tmp_path, {"http": {"body_limit_bytes": 4096}}) as small:
        api = Api(small.url, session, small.token())
        assert (await api.post("/v1/images", {"name": "x", "properties": {"k": "v" * 4000, "l": "v" * 4000}})).status == 413
        assert (await api.post("/v1/images", {"name": "x"})).status == 201


async def test_a_body_of_very_many_faults_costs_little(api: Api) -> None:
    """The first fault ends the check: to find a million of them took gigabytes."""
    many = b'{"operation":"download",' + b",".join(b'"k%d":1' % number for number in range(20_000)) + b"}"
    assert (await api.send("POST", "/v1/tickets", raw=many)).status == 400
    assert (await api.send("POST", "/v1/tickets", raw=many * 2)).status == 413
    reply = await api.send("POST", "/v1/tickets:batch", raw=b'{"tickets":[' + b"{}," * 1_000_000 + b"{}]}")
    assert (reply.status, reply.body["field"]) == (400, "tickets")


@pytest.mark.parametrize("name", ["Authorization", "Idempotency-Key"])
async def test_a_header_that_comes_twice(broker: RunningBroker, name: str) -> None:
    """A front that takes the last of two would see another principal, or another request."""
    body = b'{"name":"x"}'
    given = {"Authorization": f"Bearer {broker.token()}", "Idempotency-Key": "one"}
    lines = [f"{header}: {value}" for header, value in given.items()] + [f"{name}: {given[name]}"]
    head = "\r\n".join(["POST /v1/images HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}", *lines])
    host, _, port = broker.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.encode() + b"\r\n\r\n" + body)
    answer = await asyncio.wait_for(reader.readuntil(b"}"), 10)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert name.encode() in answer
