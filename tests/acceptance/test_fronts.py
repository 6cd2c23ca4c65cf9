"""The fronts of deploy/ as real servers: what each lets through and refuses, what the probe finds, whose keys count, what its logs hold."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

from broker.model import Abilities
from broker.sign.token import TokenSigner, generate_key, jwks
from broker.stores.http import HttpStore
from broker.stores.probe import probe
from deploy.fill import fill
from tests.acceptance import store_contract as contract
from tests.parts import envoy, haproxy, nginx
from tests.parts.condition import wait_for
from tests.parts.front import DEPLOY, FrontPart
from tests.parts.process import find_program
from tests.parts.records import FRONT, storeside_record, without_clock

KINDS = ["nginx", "haproxy", "envoy"]
STARTS: dict[str, Callable[..., contextlib.AbstractContextManager[FrontPart]]] = {
    "nginx": nginx.start, "haproxy": haproxy.start, "envoy": envoy.start,
}  # fmt: skip


@pytest.fixture(params=KINDS)
def front(request: pytest.FixtureRequest) -> FrontPart:
    part: FrontPart = request.getfixturevalue(f"{request.param}_front")
    return part


@pytest.fixture
def place(front: FrontPart) -> Iterator[str]:
    """A directory of one's own, as a path at the front."""
    name = f"/{secrets.token_hex(6)}"
    yield name
    shutil.rmtree(front.root / name[1:], ignore_errors=True)


def laid(front: FrontPart, path: str, content: bytes = b"content") -> str:
    """An object that lies there already."""
    file = front.root / path[1:]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return path


async def ask(session: aiohttp.ClientSession, front: FrontPart, method: str, target: str, **options: Any) -> tuple[int, bytes]:
    async with session.request(method, URL(front.url + target, encoded=True), allow_redirects=False, **options) as response:
        return response.status, await response.read()


def store_at(front: FrontPart, session: aiohttp.ClientSession, abilities: Abilities = FRONT) -> HttpStore:
    return HttpStore(storeside_record(front, abilities), front.signer, session)


# -- what it is for


async def test_what_the_probe_finds(front: FrontPart, http_session: aiohttp.ClientSession) -> None:
    record = storeside_record(front, Abilities())
    found = await probe(HttpStore(record, front.signer, http_session), record, http_session, time.time())
    assert without_clock(found.abilities) == without_clock(FRONT)
    assert [step.name for step in found.steps if step.result is None] == ["multipart"]
    assert list(front.root.glob("probe-*")) == []


async def test_one_object_from_beginning_to_end(front: FrontPart, http_session: aiohttp.ClientSession) -> None:
    await contract.check_single(http_session, store_at(front, http_session), ["sha256"])
    await contract.check_octet_stream(http_session, store_at(front, http_session))


async def test_strange_names(front: FrontPart, http_session: aiohttp.ClientSession, place: str) -> None:
    for name in ("image blobs/ü", "a+b", "100% (of) it's!", "~$&*,=:@", "token", "x" * 200):
        path = f"{place}/{name}"
        assert (await ask(http_session, front, "PUT", f"{quote(path)}?token={front.token('PUT', path)}", data=b"abc"))[0] == 201
        assert (front.root / path[1:]).read_bytes() == b"abc"
        for spelled in (quote(path), quote(path, safe="/!$&'()*+,=:@")):
            answer = await ask(http_session, front, "GET", f"{spelled}?token={front.token('GET', path)}")
            assert answer == (200, b"abc"), spelled


async def test_token_in_the_field(front: FrontPart, http_session: aiohttp.ClientSession, place: str) -> None:
    path = laid(front, f"{place}/a")
    for scheme in ("Bearer", "bearer"):
        field = {"Authorization": f"{scheme} {front.token('GET', path)}"}
        assert await ask(http_session, front, "GET", path, headers=field) == (200, b"content")


async def test_rs256(front: FrontPart, http_session: aiohttp.ClientSession, place: str, tmp_path: Path) -> None:
    path, keys = laid(front, f"{place}/a"), [generate_key(algorithm, 0) for algorithm in ("ES256", "RS256")]
    source = tmp_path / "jwks.json"
    source.write_text(json.dumps(jwks(keys)))
    with STARTS[front.kind](tmp_path, signer=TokenSigner(keys, front.signer.issuer), keys=str(source), root=front.root) as other:
        for key in keys:
            token = TokenSigner([key], front.signer.issuer).sign(other.claims("GET", path), time.time())
            assert await ask(http_session, other, "GET", f"{path}?token={token}") == (200, b"content")


# -- what it refuses


def changed(token: str, part: int, **fields: object) -> str:
    """The token with fields of its header (0) or claims (1) changed and its signature as it was. `None` takes a field away."""
    parts = token.split(".")
    value = json.loads(base64.urlsafe_b64decode(parts[part] + "=="))
    value = {name: field for name, field in {**value, **fields}.items() if field is not None}
    parts[part] = base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()
    return ".".join(parts)


def claimed(front: FrontPart, **claims: object) -> str:
    """A token with a right signature over claims that are not right. `None` takes a claim away."""
    whole: dict[str, Any] = {**front.claims("GET", claims.pop("at", "/")).to_claims(), **claims}  # type: ignore[arg-type]
    whole = {name: value for name, value in whole.items() if value is not None}
    return front.signer._sign(whole, time.time())


WRONG: dict[str, Callable[[FrontPart, str], str]] = {
    "no token at all": lambda front, path: "",
    "no JWT": lambda front, path: "eyJhbGciOiJub25lIn0",
    "another key": lambda front, path: TokenSigner([generate_key("ES256", 0)], front.signer.issuer).sign(
        front.claims("GET", path), time.time()
    ),
    "altered claims": lambda front, path: changed(front.token("GET", f"{path}-"), 1, path=path),
    "alg none": lambda front, path: changed(front.token("GET", path), 0, alg="none").rpartition(".")[0] + ".",
    "HS256": lambda front, path: changed(front.token("GET", path), 0, alg="HS256"),
    "no kid": lambda front, path: changed(front.token("GET", path), 0, kid=None),
    "kid as a path": lambda front, path: changed(front.token("GET", path), 0, kid="../keys/jwks"),
    "without signature": lambda front, path: front.token("GET", path).rpartition(".")[0] + ".",
    "signature spelled otherwise": lambda front, path: respelled(front.token("GET", path)),
    "padded": lambda front, path: front.token("GET", path) + "==",
    "too long": lambda front, path: front.token("GET", path) + "A" * 4096,
    "expired": lambda front, path: front.token("GET", path, expires_at=time.time() - 1),
    "not yet": lambda front, path: front.token("GET", path, not_before=time.time() + 10),
    "another issuer": lambda front, path: claimed(front, at=path, iss="http://elsewhere"),
    "another store": lambda front, path: front.token("GET", path, audience="disk-2"),
    "several stores": lambda front, path: claimed(front, at=path, aud=[front.audience]),
    "another method": lambda front, path: front.token("DELETE", path),
    "another path": lambda front, path: front.token("GET", f"{path}-"),
    "the directory": lambda front, path: front.token("GET", path.rpartition("/")[0]),
    "unknown claim": lambda front, path: claimed(front, at=path, only="tuesdays"),
    "no jti": lambda front, path: claimed(front, at=path, jti=None),
    "nbf as text": lambda front, path: claimed(front, at=path, nbf="0"),
    "length of a GET": lambda front, path: claimed(front, at=path, len=7),
    "list of parts": lambda front, path: front.token("GET", path, upload="u"),
}  # fmt: skip


def respelled(token: str) -> str:
    """The same bytes of signature: the last character has four bits that do not count."""
    return token[:-1] + {"A": "B", "Q": "R", "g": "h", "w": "x"}[token[-1]]


@pytest.mark.parametrize("what", WRONG)
async def test_wrong_tokens(front: FrontPart, http_session: aiohttp.ClientSession, place: str, what: str) -> None:
    path = laid(front, f"{place}/a")
    token = WRONG[what](front, path)
    for target, headers in ((f"{path}?token={token}", {}), (path, {"Authorization": f"Bearer {token}"})):
        status, body = await ask(http_session, front, "GET", target, headers=headers)
        assert status in (400, 401, 403), (what, status)
        assert body != b"content"
        assert token == "" or token.encode() not in body


async def test_tokens_at_the_edge_of_their_time(front: FrontPart, http_session: aiohttp.ClientSession, place: str) -> None:
    path, now = laid(front, f"{place}/a"), time.time()
    soon = front.token("GET", path, not_before=now + 4)
    assert (await ask(http_session, front, "GET", f"{path}?token={soon}"))[0] == 200
    assert (await ask(http_session, front, "GET", f"{path}?token={front.token('GET', path, expires_at=now)}"))[0] == 401


SPELLINGS = [
    "/{0}/../{0}/a", "/{0}/./a", "/{0}//a", "//{0}/a", "/{0}/a/", "/{0}%2Fa", "/{0}%2fa", "/{0}/%2e/a", "/x/%2e%2e/{0}/a", "/{0}/a;x",
    "/{0}/a%00", "/{0}/a%", "/{0}/%ff", "/{0}/a%0a", "/{0}%5Ca", "/{0}\\a", "/{0}/a%2561", "/{0}/a#b", "http://x/{0}/../{0}/a",
]  # fmt: skip


@pytest.mark.parametrize("spelled", SPELLINGS)
async def test_paths_that_can_be_read_in_two_ways(front: FrontPart, place: str, spelled: str) -> None:
    """Whatever the token names: what nginx, a decoder, or nobody would make of it."""
    laid(front, f"{place}/a")
    raw = spelled.format(place[1:])
    for named in {f"{place}/a", raw, raw.replace("%2F", "/")}:
        status = raw_status(front, f"GET {raw}?token={front.token('GET', named)} HTTP/1.1")
        assert status in (0, 400, 401, 403, 404), (raw, named, status)


@pytest.mark.parametrize("what", ["twice", "other", "both", "two fields", "escaped name"])
async def test_one_token_in_one_place(front: FrontPart, http_session: aiohttp.ClientSession, place: str, what: str) -> None:
    path = laid(front, f"{place}/a")
    token = front.token("GET", path)
    query = {"twice": f"?token={token}&token={token}", "other": f"?token={token}&x=1", "both": f"?token={token}", "two fields": "",
             "escaped name": f"?%74oken={token}"}[what]  # fmt: skip
    fields = [("Authorization", f"Bearer {token}")] * {"both": 1, "two fields": 2}.get(what, 0)
    status, _ = await ask(http_session, front, "GET", path + query, headers=fields)
    assert status in (400, 401)


@pytest.mark.parametrize("method", ["POST", "PATCH", "COPY", "MOVE", "MKCOL", "PROPFIND", "OPTIONS", "TRACE", "LOCK", "get"])
async def test_other_methods(front: FrontPart, place: str, method: str) -> None:
    path = laid(front, f"{place}/a")
    for claim in ("GET", "PUT", "DELETE"):
        head = f"{method} {path}?token={front.token(claim, path)} HTTP/1.1\r\nDestination: {place}/b\r\nContent-Length: 0"
        assert raw_status(front, head) in (0, 400, 401, 403, 404, 405)
    assert [file.name for file in (front.root / place[1:]).iterdir()] == ["a"]


async def test_writes(front: FrontPart, http_session: aiohttp.ClientSession, place: str) -> None:
    path, content = f"{place}/deep/er/a", secrets.token_bytes(20_000)
    right, other = (f"sha256:{hashlib.sha256(bytes_).hexdigest()}" for bytes_ in (content, b"other"))
    file = front.root / path[1:]

    async def put(status: int, data: Any = content, headers: dict[str, str] | None = None, method: str = "PUT", **claims: Any) -> None:
        target = f"{path}?token={front.token(method, path, **claims)}"
        answer = await ask(http_session, front, "PUT", target, data=data, headers=headers)
        assert answer[0] == status, (answer, claims, headers)
        assert file.exists() == (answer[0] in (201, 412))

    await put(403, method="GET")
    await put(403, method="DELETE")
    await put(400, length=len(content) - 1)
    await put(400, length=len(content) + 1)
    await put(400, digest=other, length=len(content))
    for claims in ({}, {"length": 5}):
        head = f"PUT {path}?token={front.token('PUT', path, **claims)} HTTP/1.1\r\nTransfer-Encoding: chunked"
        assert raw_status(front, head) == 411
    await put(400, headers={"Content-Range": "bytes 0-9/10"})
    await put(415, headers={"Content-Encoding": "gzip"})
    await put(403, upload="u", offset=0, length=len(content))
    await put(400, digest=other, headers={"X-Broker-Digest": right})
    await put(201, digest=right, length=len(content), headers={"X-Broker-Meta-Blob": "b"})
    await put(412, b"x" * len(content), length=len(content))
    await put(412, b"")
    assert file.read_bytes() == content


async def test_of_two_uploads_at_once_one_counts(front: FrontPart, http_session: aiohttp.ClientSession, place: str) -> None:
    bodies = [bytes([number]) * 300_000 for number in range(6)]
    for attempt in range(3):
        path = f"{place}/{attempt}"
        target = f"{path}?token={front.token('PUT', path)}"
        answers = await asyncio.gather(*(ask(http_session, front, "PUT", target, data=body) for body in bodies))
        statuses = [status for status, _ in answers]
        assert sorted(statuses) == [201] + [412] * 5
        assert (front.root / path[1:]).read_bytes() == bodies[statuses.index(201)]


async def test_a_broken_body_leaves_nothing(front: FrontPart, place: str) -> None:
    path = f"{place}/a"
    token = front.token("PUT", path, length=1000)
    with contextlib.closing(connected(front)) as connection:
        connection.sendall(f"PUT {path}?token={token} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nshort".encode())
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(20)
        with contextlib.suppress(OSError):
            connection.recv(100)
    assert not (front.root / path[1:]).exists()


async def test_a_refused_body_is_not_read(front: FrontPart, place: str) -> None:
    """The answer comes although nothing of the body has."""
    head = f"PUT {place}/a?token={front.token('GET', f'{place}/a')} HTTP/1.1\r\nContent-Length: 1000000\r\nExpect: 100-continue"
    assert raw_status(front, head) == 403


async def test_deleting_takes_its_own_token(front: FrontPart, http_session: aiohttp.ClientSession, place: str) -> None:
    path = laid(front, f"{place}/a")
    for method in ("GET", "PUT"):
        assert (await ask(http_session, front, "DELETE", f"{path}?token={front.token(method, path)}"))[0] == 403
    upload = front.token("DELETE", path, upload="u")
    assert (await ask(http_session, front, "DELETE", f"{path}?token={upload}"))[0] == 403
    assert (front.root / path[1:]).exists()
    target = f"{path}?token={front.token('DELETE', path)}"
    assert [(await ask(http_session, front, "DELETE", target))[0] for _ in range(2)] == [204, 404]


async def test_nothing_but_objects_is_reached(front: FrontPart, http_session: aiohttp.ClientSession, place: str, tmp_path: Path) -> None:
    laid(front, f"{place}/a")
    (tmp_path / "secret").write_bytes(b"secret")
    (front.root / place[1:] / "link").symlink_to(tmp_path / "secret")
    (front.root / place[1:] / "way").symlink_to(tmp_path)
    for path in ("/.broker/records", "/.BROKER/x", "/.broker/write", "/.broker/verify", place, f"{place}/link", f"{place}/way/secret"):
        for method in ("GET", "PUT", "DELETE"):
            target = f"{path}?token={front.token(method, path)}"
            status, body = await ask(http_session, front, method, target, data=b"x" if method == "PUT" else None)
            assert status >= 400
            assert b"secret" not in body
    into = f"{place}/way/new"
    assert (await ask(http_session, front, "PUT", f"{into}?token={front.token('PUT', into)}", data=b"x"))[0] >= 400
    assert sorted(file.name for file in tmp_path.iterdir()) == ["secret"]


# -- keys


@pytest.mark.parametrize("kind", KINDS)
async def test_keys_come_and_go(kind: str, http_session: aiohttp.ClientSession, tmp_path: Path) -> None:
    with STARTS[kind](tmp_path) as front:
        path = laid(front, "/a")
        first, second = front.signer._keys[0][0], generate_key("ES256", 0)
        tokens = [TokenSigner([key], front.signer.issuer).sign(front.claims("GET", path), time.time()) for key in (first, second)]

        async def statuses() -> list[int]:
            targets = [f"{path}?token={token}" for token in tokens]
            return [(await ask(http_session, front, "GET", target, headers={"Connection": "close"}))[0] for target in targets]

        assert await statuses() == [200, 401]
        await asyncio.to_thread(front.publish, [first, second])
        assert await statuses() == [200, 200]
        await asyncio.to_thread(front.publish, [second])
        assert await statuses() == [401, 200]


async def test_envoy_goes_on_while_the_broker_is_away(http_session: aiohttp.ClientSession, tmp_path: Path) -> None:
    """With the keys that it has, after more than one reading failed."""
    with envoy.start(tmp_path) as front:
        path = laid(front, "/a")
        (tmp_path / "jwks.json").unlink()
        await asyncio.to_thread(wait_for, lambda: front.log.read_text().count("jwks.json: failed") >= 2, "Envoy reads no keys")
        assert await ask(http_session, front, "GET", f"{path}?token={front.token('GET', path)}") == (200, b"content")


# -- logs


def connected(front: FrontPart) -> socket.socket:
    host, _, port = front.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def raw_status(front: FrontPart, head: str) -> int:
    """The status of the answer to a request whose head is written out, but for its last lines; 0 when it hangs up."""
    with contextlib.closing(connected(front)) as connection:
        connection.sendall(f"{head}\r\nHost: x\r\nConnection: close\r\n\r\n".encode("latin-1"))
        answer = b""
        with contextlib.suppress(OSError):
            while b"\r\n" not in (answer := answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")) and (chunk := connection.recv(65536)):
                answer += chunk
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0


async def test_no_log_has_a_token(front: FrontPart, http_session: aiohttp.ClientSession, place: str) -> None:
    """Requests that go wrong in many ways, most of them malformed: what the server says of them must not repeat them."""
    path = laid(front, f"{place}/a")
    token = front.token("GET", path)
    right = f"GET {path}?token={token} HTTP/1.1"
    heads = [
        right, f"GET {path}?token={token} HTTP/9.9", f"GET {path}?token={token} ", f"GET {path}?token={token}",
        f"get {path}?token={token} HTTP/1.1", f"{token} {path} HTTP/1.1", f"GET {path}/{token} HTTP/1.1",
        f"GET {path}%3Ftoken={token} HTTP/1.1", f"GET {path}/%65yJ{token[3:]} HTTP/1.1",
        f"{right}\r\nBad Field {token}", f"GET {path} HTTP/1.1\r\nAuthorization: Bearer {token}\r\n: {token}",
        f"{right}\r\nContent-Length: {token}", f"{right}\r\nTransfer-Encoding: {token}",
        f"GET {path}?token={token}{'x' * 9000} HTTP/1.1", f"{right}\r\nX: {'y' * 70000}",
        f"GET /../{path}?token={token} HTTP/1.1", f"GET /%zz?token={token} HTTP/1.1", f"GET http://h:p/{path}?token={token} HTTP/1.1",
        f"PUT {path}?token={token} HTTP/1.1\r\nContent-Length: 3",
        f"PUT {path}?token={token} HTTP/1.1\r\nTransfer-Encoding: chunked\r\nX:",
        f"PUT {path}?token={front.token('PUT', path)} HTTP/1.1\r\nContent-Length: 0\r\nReferer: http://x/?token={token}",
        f"GET {place}/none?token={front.token('GET', f'{place}/none')} HTTP/1.1\r\nReferer: http://x/?token={token}",
        f"GET {place}?token={front.token('GET', place)} HTTP/1.1", f"CONNECT {token}:80 HTTP/1.1", f"OPTIONS * HTTP/1.1\r\nHost: {token}",
        f"{right}\r\nUpgrade: h2c\r\nHTTP2-Settings: {token}", f"GET {path}?token={token}&{token}={token} HTTP/1.1",
        f"{right}\r\nUser-Agent: {token}\r\nCookie: token={token}\r\nRange: bytes={token}\r\nIf-Range: {token}",
    ]  # fmt: skip
    for head in heads:
        await asyncio.to_thread(raw_status, front, head)
    with contextlib.closing(connected(front)) as connection:  # a body that never comes
        put = front.token("PUT", f"{place}/b")
        connection.sendall(f"PUT {place}/b?token={put} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode())
    mark = secrets.token_hex(8)
    seen = f"{place}/{mark}"
    await ask(http_session, front, "GET", f"{seen}?token={front.token('GET', seen)}")
    await asyncio.to_thread(wait_for_line, front, mark)
    for log in front.logs:
        text = log.read_text(errors="replace")
        for secret in ("eyJ", token.split(".")[1][-40:], token.split(".")[2]):
            assert secret not in text, f"{log.name} of {front.kind} holds a token"


def wait_for_line(front: FrontPart, mark: str) -> None:
    wait_for(lambda: mark in front.log.read_text(errors="replace"), f"{front.log} does not have the last request")


async def test_the_log_says_why(front: FrontPart, http_session: aiohttp.ClientSession, place: str) -> None:
    path = laid(front, f"{place}/{secrets.token_hex(8)}")
    identity = secrets.token_hex(8)
    await ask(http_session, front, "GET", f"{path}?token={front.token('PUT', path, id=identity)}")
    await asyncio.to_thread(wait_for_line, front, identity)
    (line,) = (line for line in front.log.read_text().splitlines() if identity in line)
    assert "403 the token is for another method" in line
    json.loads(line)


# -- the files


@pytest.mark.parametrize(
    ("template", "values"),
    [("nginx/nginx.conf", {"ROOT": "/x"}), ("nginx/origin.conf", {"LISTEN": "1", "ROOT": "a b", "USER": "x", "STATE": "x", "CODE": "x"}),
     ("haproxy/haproxy.cfg", {"OTHER": "x"})],
)  # fmt: skip
def test_templates_say_what_is_missing(template: str, values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is missing|no OTHER|letters"):
        fill((DEPLOY / template).read_text(), values)


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_finds_nothing_to_complain_of(kind: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(f"{kind}_front").root.parent
    check = {
        "nginx": ["nginx", "-t", "-q", "-c", f"{place}/nginx.conf"],
        "haproxy": ["haproxy", "-c", "-q", "-f", f"{place}/haproxy.cfg", "-f", f"{place}/keys/haproxy.cfg"],
        "envoy": ["envoy", "--mode", "validate", "--log-level", "warning", "-c", f"{place}/envoy.yaml"],
    }[kind]
    done = subprocess.run([find_program(check[0], f"apt-get install {kind}"), *check[1:]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
