"""The README's servers behind the broker, as they stand there, each behind a real server: what an adapter lets in, and what it holds
a body to. Also the pure `verify` as the README uses it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest

from broker.claims import TransferToken
from broker.sign.token import TokenSigner, generate_key, jwks
from broker.storeside import Refused
from tests.acceptance.test_readme import programs
from tests.parts.process import free_ports, listens, running

ISSUER, STORE = "http://127.0.0.1:8080", "disk-9"
KEY = generate_key("ES256", time.time() - 60)
SIGNER = TokenSigner([KEY], ISSUER)
DATA = bytes(range(256)) * 400

WSGIREF = "import program, wsgiref.simple_server as s; s.make_server('127.0.0.1', {port}, program.app).serve_forever()"
SERVERS = {
    "uvicorn": ("storeside.asgi", ["-m", "uvicorn", "--no-access-log", "--port", "{port}", "program:app"]),
    "hypercorn": ("storeside.asgi", ["-m", "hypercorn", "--bind", "127.0.0.1:{port}", "program:app"]),
    "gunicorn": ("storeside.wsgi", ["-m", "gunicorn", "--bind", "127.0.0.1:{port}", "--threads", "4", "program:app"]),
    "wsgiref": ("storeside.wsgi", ["-c", WSGIREF]),
    "aiohttp": ("storeside.middleware", ["program.py"]),
}  # fmt: skip


class Server(NamedTuple):
    """A program of the README behind a real server."""

    name: str
    port: int
    log: Path


class Answer(NamedTuple):
    status: int
    body: bytes


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    module, arguments = SERVERS[request.param]
    place = tmp_path_factory.mktemp(request.param)
    (place / "jwks.json").write_text(json.dumps(jwks([KEY])))
    (program,) = [text for text in programs() if module in text]
    (port,) = free_ports(1)
    text = program.replace("http://127.0.0.1:8080/.well-known/jwks.json", str(place / "jwks.json")).replace("8490", str(port))
    (place / "program.py").write_text(text)
    command = [sys.executable, *(argument.replace("{port}", str(port)) for argument in arguments)]
    with running(command, log=place / "log", ready=lambda: listens(port)):
        yield Server(request.param, port, place / "log")


def token(method: str, path: str, **claims: Any) -> str:
    now = time.time()
    fields: dict[str, Any] = {"expires_at": now + 600, "not_before": now, "id": "i", "audience": STORE} | claims
    return SIGNER.sign(TransferToken(issuer=ISSUER, subject="test", method=method, path=path, **fields), now)


def send(server: Server, method: str, target: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    given = dict(headers or {})
    with contextlib.closing(connection):
        try:
            connection.request(method, target, body, given, encode_chunked=given.get("Transfer-Encoding") == "chunked")
        except ConnectionError:
            return Answer(0, b"")  # refused before the body was out, and hung up
        response = connection.getresponse()
        return Answer(response.status, response.read())


def do(server: Server, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, **claims: Any) -> Answer:
    signed = token("GET" if method == "HEAD" else method, path, **claims)
    return send(server, method, f"{quote(path)}?token={signed}", body, headers)


def raw(server: Server, text: bytes) -> bytes:
    """What is answered to bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(text)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_what_is_put_comes_back(server: Server) -> None:
    path = "/a b/ü+%;=@.img"
    assert do(server, "PUT", path, DATA, length=len(DATA), digest=sha256(DATA)).status == 201
    assert do(server, "GET", path) == (200, DATA)
    assert do(server, "HEAD", path) == (200, b"")
    in_header = {"Authorization": f"Bearer {token('GET', path)}"}
    assert send(server, "GET", quote(path), headers=in_header) == (200, DATA)
    assert do(server, "GET", "/none").status == 404
    assert do(server, "PUT", "/empty", b"", length=0, digest=sha256(b"")).status == 201
    assert do(server, "GET", "/empty") == (200, b"")


def test_what_the_application_does_for_uploads(server: Server) -> None:
    """Nothing is overwritten, the digest is told, and what is deleted is gone."""
    path = "/once"
    assert [do(server, "PUT", path, body).status for body in (DATA, b"other")] == [201, 412]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("HEAD", f"{path}?token={token('GET', path)}")
        told = connection.getresponse().headers["Repr-Digest"]
    assert told == f"sha-256=:{base64.b64encode(hashlib.sha256(DATA).digest()).decode()}:"
    assert [do(server, "DELETE", path).status for _ in range(2)] == [200, 404]
    assert do(server, "GET", path).status == 404


@pytest.mark.parametrize(
    ("body", "claims"),
    [
        (DATA, {"digest": sha256(b"other")}),
        (DATA, {"digest": "md5:" + "0" * 32, "length": len(DATA)}),
        (DATA, {"length": len(DATA) - 1}),
        (DATA, {"length": len(DATA) + 1}),
        (b"", {"digest": sha256(b"other")}),
    ],
)
def test_no_wrong_body_arrives(server: Server, body: bytes, claims: dict[str, Any]) -> None:
    assert do(server, "PUT", "/wrong", body, **claims).status == 400
    assert do(server, "GET", "/wrong").status == 404


def test_chunks(server: Server) -> None:
    chunked = {"Transfer-Encoding": "chunked"}
    assert do(server, "PUT", "/chunks", iter([DATA]), chunked, length=len(DATA)).status in (0, 411)
    if server.name == "wsgiref":  # it cannot tell where such a body ends
        assert do(server, "PUT", "/chunks", iter([DATA, DATA]), chunked).status in (0, 411)
    else:
        assert do(server, "PUT", "/chunks", iter([DATA, DATA]), chunked, digest=sha256(b"other")).status == 400
        assert do(server, "GET", "/chunks").status == 404
        assert do(server, "PUT", "/chunks", iter([DATA, DATA]), chunked, digest=sha256(DATA * 2)).status == 201
        assert do(server, "GET", "/chunks") == (200, DATA * 2)


def test_a_body_that_ends_early_is_no_object(server: Server) -> None:
    head = f"PUT /early?token={token('PUT', '/early')} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    assert b" 201 " not in raw(server, head.encode() + b"half")
    assert do(server, "GET", "/early").status == 404


def test_who_is_let_in(server: Server) -> None:
    do(server, "PUT", "/x", DATA)
    good = token("GET", "/x")
    now = time.time()
    stranger = TokenSigner([generate_key("ES256", 0)], ISSUER)
    by_stranger = stranger.sign(TransferToken(ISSUER, STORE, "s", "GET", "/x", now + 60, now, "i"), now)
    table = {
        ("GET", f"/x?token={good}"): 200,
        ("GET", "/x"): 401,
        ("GET", f"/x?token={good[:-2]}"): 401,
        ("GET", f"/x?token={by_stranger}"): 401,
        ("GET", f"/x?token={token('GET', '/x', audience='disk-8')}"): 401,
        ("GET", f"/x?token={token('GET', '/x', expires_at=now - 1)}"): 401,
        ("GET", f"/x?token={token('GET', '/x', not_before=now + 60)}"): 401,
        ("GET", f"/x?token={token('PUT', '/x')}"): 403,
        ("PUT", f"/x?token={good}"): 403,
        ("GET", f"/X?token={good}"): 403,
        ("GET", f"/%78?token={good}"): 200,
        ("GET", f"/x?token={good}&token={good}"): 400,
        ("GET", f"/x?token={good}&a=1"): 400,
        ("GET", f"/x/?token={good}"): 400,
        ("GET", f"//x?token={good}"): 400,
        ("GET", f"/./x?token={good}"): 400,
        ("GET", f"/a/../x?token={good}"): 400,
        ("GET", f"/%2e%2e/x?token={token('GET', '/../x')}"): 400,
        ("GET", f"/%2578?token={token('GET', '/%78')}"): 400,
        ("GET", f"/a%5cx?token={token('GET', '/a' + chr(92) + 'x')}"): 400,
        ("GET", f"/x%00?token={good}"): 400,
        ("GET", f"/%ff?token={good}"): 400,
    }
    if server.name == "wsgiref":
        table["GET", f"//x?token={good}"] = 200  # the server makes one slash of it
    seen = {(method, target): send(server, method, target).status for method, target in table}
    assert seen == table


def test_an_escaped_slash(server: Server) -> None:
    """Refused, but by wsgiref, which tells no raw target: there it is a slash for everybody."""
    do(server, "PUT", "/d/x", DATA)
    answer = send(server, "GET", f"/d%2fx?token={token('GET', '/d/x')}")
    assert answer == (200, DATA) if server.name == "wsgiref" else answer.status == 400
    assert send(server, "GET", f"/d%2fx?token={token('GET', '/x')}").status in (400, 403)


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: +5",
        "Content-Length: 5\r\nX-HTTP-Method-Override: DELETE",
        "Transfer-Encoding: chunked, identity",
    ],
)
def test_what_says_two_things_is_refused(server: Server, fields: str) -> None:
    path = f"/two/{hashlib.sha256(fields.encode()).hexdigest()}"
    body = b"5\r\nhello\r\n0\r\n\r\n" if "Transfer" in fields else b"hello"
    head = f"PUT {path}?token={token('PUT', path)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{fields}\r\n\r\n"
    raw(server, head.encode() + body)
    duplicate = fields.count("Content-Length") == 2
    # wsgiref shows the first of two lengths only, and reads just that; its connections end after one request.
    assert do(server, "GET", path).status == (200 if duplicate and server.name == "wsgiref" else 404)


def test_a_get_with_a_body_is_refused(server: Server) -> None:
    do(server, "PUT", "/x", DATA)
    assert do(server, "GET", "/x", b"body").status == 400


def test_the_log(server: Server) -> None:
    good = token("GET", "/logged")
    send(server, "GET", f"/logged?token={good}")
    send(server, "GET", f"/logged?token={good}&%")
    logged = good.rpartition(".")[2] in server.log.read_text()
    assert logged == (server.name == "wsgiref")  # its access log is always on, which is why the README warns of them


def test_the_pure_verifier() -> None:
    (program,) = [text for text in programs() if "def admit" in text]
    names: dict[str, Any] = {}
    exec(program, names)
    target, keys = f"/a%20b?token={token('GET', '/a b')}", jwks([KEY])
    grant = names["admit"]("GET", target, {"Host": "x"}, keys)
    assert (grant.token.path, grant.key, grant.body_length) == ("/a b", KEY.id, 0)
    with pytest.raises(Refused):
        names["admit"]("PUT", target, {"Host": "x"}, keys)
    assert re.search("audience=.disk-9", program)
