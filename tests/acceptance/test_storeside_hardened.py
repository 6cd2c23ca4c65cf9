"""The verifying file server against clients that are slow, many, greedy or dishonest, and against a disk that is full."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.storeside.connection import MAX_FIELDS
from tests.acceptance.test_storeside import DATA, WHOLE, Answer, do, finish, leftovers, put, send
from tests.parts.authority import Authority
from tests.parts.condition import wait_for
from tests.parts.process import find_program
from tests.parts.storeside import StoresidePart, start

MIB = 1 << 20
FEW = ["--connections", "40", "--reads-per-token", "3", "--writes-per-token", "1", "--head-seconds", "15"]
IMPATIENT = ["--head-seconds", "1", "--slow-seconds", "2", "--slow-bytes", "50000"]


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoresidePart]:
    """A server that takes few at once."""
    with start(tmp_path_factory.mktemp("few"), options=FEW) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoresidePart]:
    """A server that waits for nobody."""
    with start(tmp_path_factory.mktemp("impatient"), options=IMPATIENT) as running:
        yield running


def connect(part: StoresidePart, timeout: float = 30) -> socket.socket:
    address = urlsplit(part.url)
    return socket.create_connection((str(address.hostname), address.port or 0), timeout=timeout)


def head(part: StoresidePart, method: str, path: str, *fields: str, **claims: Any) -> bytes:
    """A request's head with a token in its target."""
    lines = [f"{method} {quote(path)}?token={part.token(method, path, **claims)} HTTP/1.1", "Host: x", *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def rest(client: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while chunk := client.recv(65536):
            found += chunk
    return found


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


def metric(part: StoresidePart, name: str, **labels: str) -> float:
    with urllib.request.urlopen(f"{part.metrics_url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def used(part: StoresidePart, method: str, path: str, token: str, body: bytes | None = None) -> Answer:
    return send(part, method, quote(path), body, token=token)


# --- tokens that work once ---


def test_an_upload_token_works_once_even_when_the_object_is_gone(part: StoresidePart) -> None:
    token = part.token("PUT", "/once", length=len(DATA))
    assert used(part, "PUT", "/once", token, DATA).status == 201
    assert used(part, "PUT", "/once", token, DATA).status == 412
    assert do(part, "DELETE", "/once").status == 204
    again = used(part, "PUT", "/once", token, DATA)
    assert (again.status, again.json["detail"]) == (403, "the token was used")
    assert do(part, "GET", "/once").status == 404
    assert put(part, "/once").status == 201
    assert metric(part, "storeside_tokens_refused_total", reason="used") >= 1


def test_a_deletion_token_works_once(part: StoresidePart) -> None:
    put(part, "/gone")
    token = part.token("DELETE", "/gone")
    assert used(part, "DELETE", "/gone", token).status == 204
    assert used(part, "DELETE", "/gone", token).status == 404
    put(part, "/gone")
    assert used(part, "DELETE", "/gone", token).status == 403
    assert do(part, "GET", "/gone").body == DATA


def test_a_failed_upload_uses_nothing_up(part: StoresidePart) -> None:
    token = part.token("PUT", "/retried", length=len(DATA), digest=f"sha256:{hashlib.sha256(DATA).hexdigest()}")
    assert used(part, "PUT", "/retried", token, bytes(len(DATA))).status == 400
    with connect(part) as client:
        client.sendall(f"PUT /retried?token={token} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(DATA)}\r\n\r\n".encode() + DATA[:100])
        wait_for(lambda: leftovers(part) != [])
    wait_for(lambda: leftovers(part) == [])
    wait_for(lambda: used(part, "PUT", "/retried", token, DATA).status == 201)
    assert do(part, "GET", "/retried").body == DATA


def test_what_was_used_stays_used_after_a_kill(tmp_path: Path) -> None:
    with start(tmp_path) as first:
        token = first.token("PUT", "/once")
        assert used(first, "PUT", "/once", token, DATA).status == 201
        assert do(first, "DELETE", "/once").status == 204
        os.kill(first.pid, signal.SIGKILL)
    (tmp_path / "second").mkdir()
    with start(tmp_path / "second", root=first.root, signer=first.signer, keys=str(tmp_path / "jwks.json")) as second:
        assert used(second, "PUT", "/once", token, DATA).status == 403
        assert do(second, "GET", "/once").status == 404


def test_of_many_requests_with_one_token_one_wins(tmp_path: Path) -> None:
    with start(tmp_path, options=["--writes-per-token", "0"]) as part:
        for number in range(5):
            token = part.token("PUT", f"/{number}")
            bodies = [bytes([index]) * 200_000 for index in range(6)]
            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(lambda body, number=number, token=token: used(part, "PUT", f"/{number}", token, body), bodies))
            statuses = [answer.status for answer in answers]
            assert statuses.count(201) == 1
            assert set(statuses) <= {201, 403, 412}
            assert do(part, "GET", f"/{number}").body == bodies[statuses.index(201)]
        assert leftovers(part) == []


def test_after_the_end_of_an_upload_its_tokens_are_dead_though_the_object_is_deleted(part: StoresidePart) -> None:
    token = part.token("PUT", "/parts", upload="u-dead", offset=0, length=70_000)
    assert used(part, "PUT", "/parts", token, WHOLE[:70_000]).status == 200
    assert used(part, "PUT", "/parts", token, WHOLE[:70_000]).status == 200
    first = finish(part, "/parts", "u-dead", 1)
    assert first.status == 200
    assert do(part, "DELETE", "/parts").status == 204
    assert used(part, "PUT", "/parts", token, WHOLE[:70_000]).status == 404
    assert finish(part, "/parts", "u-dead", 1).json == first.json  # the first answer, but nothing is made again
    assert do(part, "GET", "/parts").status == 404


# --- how many ---


def test_requests_at_once_with_one_token(part: StoresidePart) -> None:
    (part.root / "big").write_bytes(bytes(64 * MIB))
    token = part.token("GET", "/big")
    request = f"GET /big?token={token} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(connect(part))
            client.sendall(request)
            assert client.recv(15) == b"HTTP/1.1 200 OK"
        refused = used(part, "GET", "/big", token)
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert do(part, "HEAD", "/big").status == 200  # another token
    wait_for(lambda: used(part, "HEAD", "/big", token).status == 200)
    assert metric(part, "storeside_tokens_refused_total", reason="busy") >= 1


def test_a_second_write_with_one_token_waits_for_the_first(part: StoresidePart) -> None:
    token = part.token("PUT", "/twice")
    with connect(part) as client:
        client.sendall(f"PUT /twice?token={token} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1".encode())
        wait_for(lambda: leftovers(part) != [])
        assert used(part, "PUT", "/twice", token, DATA).status == 429
    wait_for(lambda: used(part, "PUT", "/twice", token, DATA).status == 201)


def test_whoever_says_nothing_keeps_no_place_from_others(part: StoresidePart) -> None:
    """At the limit the connection that has been idle longest gives way: nobody without a token fills the server by sitting there."""
    wait_for(lambda: metric(part, "storeside_connections") == 0)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(part)) for _ in range(40)]
        silent[1].sendall(b"GET /half HTTP/1.1\r\nX: ")
        wait_for(lambda: metric(part, "storeside_connections") == 40)
        for number in range(2):
            client = stack.enter_context(connect(part))
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
            assert rest(silent[number]) == b""
            assert metric(part, "storeside_connections") == 40
        silent[39].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert status(rest(silent[39])) == 200


def test_connections_beyond_the_limit_are_turned_away(part: StoresidePart) -> None:
    wait_for(lambda: metric(part, "storeside_connections") == 0)
    before = metric(part, "storeside_connections_refused_total")
    with contextlib.ExitStack() as stack:
        for number in range(40):
            client = stack.enter_context(connect(part))
            client.sendall(head(part, "PUT", f"/busy/{number}", "Content-Length: 9") + b"1")
        wait_for(lambda: metric(part, "storeside_transfers", direction="in") == 40)
        assert rest(stack.enter_context(connect(part))).startswith(b"HTTP/1.1 503 ")
        assert metric(part, "storeside_connections") == 40
    wait_for(lambda: put(part, f"/after/{time.time_ns()}").status == 201)
    assert metric(part, "storeside_connections_refused_total") == before + 1


@pytest.mark.parametrize("count", [MAX_FIELDS - 10, MAX_FIELDS + 1])
def test_the_number_of_fields(part: StoresidePart, count: int) -> None:
    with connect(part) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: 1\r\n" % number for number in range(count)) + b"\r\n")
        assert status(client.recv(12)) == (200 if count < MAX_FIELDS else 400)


@pytest.mark.parametrize(
    "text", [b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /x HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\n\r\n"]
)
def test_heads_that_are_too_long(part: StoresidePart, text: bytes) -> None:
    with connect(part) as client:
        client.sendall(text)
        answer = rest(client)
    assert status(answer) == 400
    assert b"aaa" not in answer


# --- how slow ---


def push(client: socket.socket, text: bytes, pause: float = 0.02) -> None:
    """Send `text` again and again, until the server answers or hangs up."""
    end, position = time.monotonic() + 60, 0
    client.settimeout(1)
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                position = (position + client.send(text[position:])) % len(text)
            if pause and select.select([client], [], [], pause)[0]:
                break
    client.settimeout(30)


def test_a_head_that_never_ends(impatient: StoresidePart) -> None:
    with connect(impatient) as client, connect(impatient) as silent:
        client.sendall(b"GET /x HTTP/1.1\r\nX: ")
        push(client, b"y")  # a byte now and then does not help
        assert rest(client) == rest(silent) == b""


def test_an_idle_connection_is_closed_after_its_answer(impatient: StoresidePart) -> None:
    with connect(impatient) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(rest(client)) == 200


def test_a_body_that_drips(impatient: StoresidePart) -> None:
    part = impatient
    before = metric(part, "storeside_slow_clients_total", direction="in")
    with connect(part) as client:
        client.sendall(head(part, "PUT", "/drip", "Content-Length: 1000000", length=1_000_000))
        push(client, b"x")
        assert status(rest(client)) == 408
    wait_for(lambda: leftovers(part) == [])
    assert metric(part, "storeside_slow_clients_total", direction="in") == before + 1
    assert do(part, "HEAD", "/drip").status == 404


def test_a_reader_that_does_not_read(impatient: StoresidePart) -> None:
    part = impatient
    (part.root / "big").write_bytes(bytes(64 * MIB))
    before = metric(part, "storeside_slow_clients_total", direction="out")
    with connect(part) as client:
        client.sendall(head(part, "GET", "/big"))
        wait_for(lambda: metric(part, "storeside_slow_clients_total", direction="out") == before + 1)
        assert len(rest(client)) < 64 * MIB
    wait_for(lambda: metric(part, "storeside_transfers", direction="out") == 0)


def test_a_reader_that_is_slow_but_not_too_slow(impatient: StoresidePart) -> None:
    part = impatient
    (part.root / "slow").write_bytes(bytes(16 * MIB))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.settimeout(30)
        client.connect(("127.0.0.1", urlsplit(part.url).port or 0))
        client.sendall(head(part, "GET", "/slow", "Connection: close"))
        got = 0
        while chunk := client.recv(65536):
            got += len(chunk)
            time.sleep(0.015)
    assert got > 16 * MIB


def test_answers_that_are_never_read(tmp_path: Path) -> None:
    """Of pipelined requests: the server keeps no more of them than fits in a buffer, and not for long."""
    with start(tmp_path, options=["--slow-seconds", "1", "--slow-bytes", "50000"]) as part:
        put(part, "/told", **{"X-Broker-Meta-text": "x" * 2000})
        with connect(part) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            # Long answers: megabytes have to be waiting before the kernel takes no more of them.
            push(client, f"HEAD /told?token={part.token('GET', '/told')} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 20, pause=0)
        assert metric(part, "storeside_slow_clients_total", direction="out") == 1
        assert do(part, "HEAD", "/none").status == 404


# --- a disk that is full ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[StoresidePart]:
    """A server alone with a file system of 24 MiB."""
    find_program("unshare", "apt-get install util-linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    space = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    mount = f'mount -t tmpfs -o size=24m tmpfs {disk} && exec "$@"'
    with start(tmp_path, root=disk, prefix=[*space, "sh", "-c", mount, "sh"]) as part:
        yield part


def seen(part: StoresidePart, *names: str) -> list[str]:
    """What lies in a directory, as the server sees it."""
    return sorted(os.listdir(Path(f"/proc/{part.pid}/root", *part.root.parts[1:], *names)))


def free(part: StoresidePart) -> int:
    status = os.statvfs(f"/proc/{part.pid}/root{part.root}")
    return status.f_bavail * status.f_frsize


def test_a_full_disk(small_disk: StoresidePart) -> None:
    part, empty = small_disk, free(small_disk)
    body = os.urandom(16 * MIB)
    chunked = {"Transfer-Encoding": "chunked"}
    assert put(part, "/first", body).status == 201
    full = put(part, "/second", body)
    assert (full.status, full.json["detail"]) == (507, "the store is full")
    in_chunks = do(part, "PUT", "/third", (body[start : start + 65536] for start in range(0, len(body), 65536)), chunked)
    assert in_chunks.status == 507
    assert seen(part) == [".broker", "first"]
    assert seen(part, ".broker", "tmp") == []
    assert free(part) >= empty - 16 * MIB - 65536
    assert do(part, "GET", "/first").body == body
    assert do(part, "DELETE", "/first").status == 204
    assert put(part, "/second", body).status == 201
    assert do(part, "GET", "/second").body == body


def test_parts_on_a_full_disk(small_disk: StoresidePart) -> None:
    """Space of a part that did not arrive is given back; the upload goes on when there is room."""
    part, size = small_disk, 10 * MIB
    body = os.urandom(size)
    assert put(part, "/other", os.urandom(8 * MIB)).status == 201
    with connect(part) as client:
        client.sendall(head(part, "PUT", "/big", f"Content-Length: {size}", upload="u", offset=0, length=size) + body[:-1])
        wait_for(lambda: free(part) < size)
        assert do(part, "PUT", "/big", body, upload="u", offset=size, length=size).status == 507
    wait_for(lambda: free(part) > 15 * MIB)
    assert do(part, "PUT", "/big", body, upload="u", offset=0, length=size).status == 200
    assert do(part, "PUT", "/big", body, upload="u", offset=size, length=size).status == 507
    assert do(part, "DELETE", "/other").status == 204
    assert do(part, "PUT", "/big", body, upload="u", offset=size, length=size).status == 200
    parts = [{"offset": offset, "length": size} for offset in (0, size)]
    assert do(part, "POST", "/big", json.dumps({"parts": parts}), upload="u").status == 200
    assert do(part, "GET", "/big").body == body * 2


# --- requests that say two things ---


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: 5, 5",
        "Content-Length: +5",
        "Content-Length: -5",
        "Content-Length: 5\x0b",
        "Content-Length: 0x5",
        "Content-Length : 5",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding:\x0bchunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Content-Length: 5\r\nHost: y",
        "X: a\r\n Content-Length: 5",
        "X: a\rContent-Length: 5",
    ],
)
def test_no_second_request_is_smuggled_in(part: StoresidePart, fields: str) -> None:
    name = hashlib.sha256(fields.encode()).hexdigest()
    inner = head(part, "PUT", f"/smuggled/{name}", "Content-Length: 4") + b"evil"
    outer = head(part, "PUT", f"/outer/{name}", fields)
    with connect(part) as client:
        client.sendall(outer + b"0\r\n\r\n" + inner)
        answer = rest(client)
    assert status(answer) == 400
    assert b" 201 " not in answer
    assert do(part, "HEAD", f"/smuggled/{name}").status == 404
    assert do(part, "HEAD", f"/outer/{name}").status == 404


def test_a_body_whose_end_is_a_half_close(part: StoresidePart) -> None:
    with connect(part) as client:
        client.sendall(head(part, "PUT", "/half", "Content-Length: 10", length=10) + b"half")
        client.shutdown(socket.SHUT_WR)
        assert not rest(client).startswith(b"HTTP/1.1 2")
    wait_for(lambda: leftovers(part) == [])
    assert do(part, "HEAD", "/half").status == 404


# --- conditions, as the server does them ---


def test_head_and_get_agree_on_conditions(part: StoresidePart) -> None:
    put(part, "/agree")
    told = do(part, "HEAD", "/agree").headers
    table = [
        ({"If-Match": told["etag"]}, 200),
        ({"If-Match": f"W/{told['etag']}"}, 412),
        ({"If-None-Match": "*"}, 304),
        ({"If-Modified-Since": told["last-modified"]}, 304),
        ({"If-Modified-Since": told["last-modified"], "If-None-Match": '"x"'}, 200),
        ({"If-Unmodified-Since": "Sat, 01 Jan 2000 00:00:00 GMT"}, 412),
        ({"If-Unmodified-Since": told["last-modified"]}, 200),
    ]
    for fields, status in table:
        got, looked = do(part, "GET", "/agree", headers=fields), do(part, "HEAD", "/agree", headers=fields)
        assert got.status == looked.status == status, fields
        assert {**got.headers, "date": ""} == {**looked.headers, "date": ""}, fields
        assert looked.body == b""


def test_conditions_of_writes(part: StoresidePart) -> None:
    assert put(part, "/written", **{"If-Match": "*"}).status == 412
    etag = put(part, "/written", **{"If-None-Match": "*"}).headers["etag"]
    assert do(part, "DELETE", "/written", headers={"If-Match": '"other"'}).status == 412
    assert do(part, "DELETE", "/written", headers={"If-Match": etag}).status == 204


def test_no_range_makes_an_answer_longer_than_the_object(part: StoresidePart) -> None:
    put(part, "/ranges")
    for field in (
        "bytes=" + ",".join(["0-"] * 1000),
        "bytes=" + ",".join(f"{number}-{number}" for number in range(1000)),
        "bytes=0-,-1",
        "bytes=-1-5",
        "bytes=--5",
        "bytes=1e3-",
        "bytes=0-0x10",
        "bytes=" + "1" * 5000 + "-",
        "bytes=٠-٥",
    ):
        answer = do(part, "GET", "/ranges", headers={"Range": field.encode().decode("latin-1")})
        assert (answer.status, len(answer.body)) == (200, len(DATA)), field


def test_the_server_does_not_say_what_it_is_made_of(part: StoresidePart) -> None:
    put(part, "/plain")
    answers = [do(part, "GET", "/plain"), do(part, "HEAD", "/none"), send(part, "GET", "/plain"), send(part, "GET", "/healthz")]
    assert {answer.headers["server"] for answer in answers} == {"storeside"}
    with connect(part) as client:
        client.sendall(b"nonsense\r\n\r\n")
        text = rest(client).lower()
    assert b"aiohttp" not in text
    assert b"python" not in text


# --- what it tells of itself ---


def test_metrics(part: StoresidePart) -> None:
    path = f"/counted/{time.time_ns()}"
    names = {
        "put": {"name": "storeside_requests_total", "method": "PUT", "status": "201"},
        "in": {"name": "storeside_bytes_total", "direction": "in"},
        "out": {"name": "storeside_bytes_total", "direction": "out"},
        "path": {"name": "storeside_tokens_refused_total", "reason": "path"},
        "other": {"name": "storeside_requests_total", "method": "other", "status": "405"},
    }
    before = {name: metric(part, **labels) for name, labels in names.items()}
    token = part.token("GET", path)
    put(part, path)
    do(part, "GET", path, headers={"Range": "bytes=0-99"})
    used(part, "GET", path + "x", token)
    send(part, "OPTIONS", "/x")
    change = {name: metric(part, **labels) - before[name] for name, labels in names.items()}
    assert change == {"put": 1, "in": len(DATA), "out": 100, "path": 1, "other": 1}
    assert 0 <= metric(part, "storeside_keys_age_seconds") < 60
    with urllib.request.urlopen(f"{part.metrics_url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    assert token[:20] not in text
    assert "counted" not in text
    with urllib.request.urlopen(f"{part.metrics_url}/healthz", timeout=30) as answer:
        assert answer.status == 200


def test_without_keys_it_is_not_healthy(tmp_path: Path) -> None:
    with start(tmp_path) as part:
        (tmp_path / "jwks.json").write_text('{"keys": []}')
        wait_for(lambda: put(part, "/x").status == 503)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{part.metrics_url}/healthz", timeout=30)
        assert "no usable key" in part.log.read_text()


def secured(directory: Path) -> tuple[list[str], ssl.SSLContext]:
    """The options of a server with a certificate, and the context of clients that believe it."""
    authority = Authority(directory)
    pair = authority.issue("localhost", "127.0.0.1")
    return ["--tls-cert", str(pair.certificate), "--tls-key", str(pair.key)], ssl.create_default_context(cafile=authority.certificate)


def test_handshakes_that_never_end(tmp_path: Path) -> None:
    """They count as connections, are over when a head would have to be, and leave no file open."""
    options, context = secured(tmp_path)
    with start(tmp_path, options=[*options, "--connections", "5", "--head-seconds", "2"]) as part, contextlib.ExitStack() as stack:
        files = len(os.listdir(f"/proc/{part.pid}/fd"))
        silent = [stack.enter_context(connect(part)) for _ in range(50)]
        for client in silent[5:]:
            assert rest(client) == b""
        assert [rest(client) for client in silent[:5]] == [b""] * 5
        wait_for(lambda: metric(part, "storeside_connections") == 0)
        wait_for(lambda: len(os.listdir(f"/proc/{part.pid}/fd")) <= files)
        assert metric(part, "storeside_connections_refused_total") >= 1
        for _ in range(20):
            with urllib.request.urlopen(f"{part.url.replace('http', 'https', 1)}/healthz", timeout=30, context=context) as answer:
                assert answer.status == 200
        assert "Traceback" not in part.log.read_text()


def test_tls(tmp_path: Path) -> None:
    options, context = secured(tmp_path)
    with start(tmp_path, options=options) as part:
        body = os.urandom(3 * MIB)
        url = part.url.replace("http", "https", 1)
        for method, data in (("PUT", body), ("GET", None)):
            request = urllib.request.Request(f"{url}/x?token={part.token(method, '/x')}", data, method=method)
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                assert answer.status in (200, 201)
                assert data is not None or answer.read() == body
        os.kill(part.pid, signal.SIGHUP)
        with urllib.request.urlopen(f"{url}/healthz", timeout=30, context=context) as answer:
            assert answer.status == 200
