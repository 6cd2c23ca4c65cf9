"""The verifying file server as a real process: what its tokens allow, what it keeps, and what it never does."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

from broker.sign.token import TokenSigner, generate_key, jwks
from tests.parts.condition import wait_for
from tests.parts.process import listens
from tests.parts.storeside import ISSUER, StoresidePart, start

DATA = bytes(range(256)) * 40
NUMBERS = itertools.count(1)


@pytest.fixture
def part(storeside_part: StoresidePart) -> StoresidePart:
    return storeside_part


@pytest.fixture
def path() -> str:
    return f"/images/{next(NUMBERS)}/a b+é%.img"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(
    part: StoresidePart, method: str, target: str, body: Any = None, headers: Mapping[str, str] | None = None, token: str | None = None
) -> Answer:
    """One request just as given: `target` is not normalised."""
    address = urlsplit(part.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
    given = dict(headers or {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    with contextlib.closing(connection):
        connection.request(method, target, body, given, encode_chunked=given.get("Transfer-Encoding") == "chunked")
        response = connection.getresponse()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def do(part: StoresidePart, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, **claims: Any) -> Answer:
    """One request with the token for it; `claims` are fields of TransferToken."""
    return send(part, method, quote(path), body, headers, part.token("GET" if method == "HEAD" else method, path, **claims))


def put(part: StoresidePart, path: str, data: bytes = DATA, **headers: str) -> Answer:
    return do(part, "PUT", path, data, headers)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def repr_digest(data: bytes) -> str:
    return ", ".join(
        f"{name}=:{base64.b64encode(hashlib.new(algorithm, data).digest()).decode()}:"
        for name, algorithm in (("sha-256", "sha256"), ("md5", "md5"))
    )


def leftovers(part: StoresidePart) -> list[str]:
    return os.listdir(part.root / ".broker" / "tmp")


# --- whole objects ---


def test_what_was_put_comes_back(part: StoresidePart, path: str) -> None:
    answer = do(part, "PUT", path, DATA, {"X-Broker-Meta-Blob": "42 %"}, length=len(DATA), digest=f"sha256:{sha256(DATA)}")
    assert answer.status == 201
    assert answer.headers["repr-digest"] == repr_digest(DATA)
    got, head = do(part, "GET", path), do(part, "HEAD", path)
    assert (got.status, got.body) == (200, DATA)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(DATA))
    assert head.headers["repr-digest"] == repr_digest(DATA)
    assert head.headers["content-type"] == "application/octet-stream"
    assert head.headers["x-broker-meta-blob"] == "42 %"
    without_date = [{name: value for name, value in answer.headers.items() if name != "date"} for answer in (got, head)]
    assert without_date[0] == without_date[1]
    assert (part.root / path[1:]).read_bytes() == DATA


def test_an_empty_object(part: StoresidePart, path: str) -> None:
    assert do(part, "PUT", path, b"", {"Content-Length": "0"}, length=0).status == 201
    assert do(part, "GET", path).body == b""
    assert do(part, "HEAD", path).headers["repr-digest"] == repr_digest(b"")


def test_nothing_is_ever_overwritten(part: StoresidePart, path: str) -> None:
    assert put(part, path).status == 201
    assert put(part, path, b"other").status == 412
    assert do(part, "GET", path).body == DATA
    assert put(part, path + "/below").status == 409
    assert put(part, path.rpartition("/")[0]).status == 412


def test_of_many_writers_one_wins(part: StoresidePart, path: str) -> None:
    bodies = [bytes([number]) * 300_000 for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda body: put(part, path, body).status, bodies))
    assert sorted(statuses) == [201] + [412] * 7
    assert do(part, "GET", path).body == bodies[statuses.index(201)]
    assert leftovers(part) == []


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"digest": "sha256:" + sha256(b"other")}, 400),
        ({"digest": "md5:" + "0" * 32}, 400),
        ({"length": len(DATA) + 1}, 400),
        ({"length": len(DATA) - 1}, 400),
        ({"digest": "md5:" + hashlib.md5(DATA).hexdigest()}, 201),
    ],
)
def test_length_and_digest_are_enforced(part: StoresidePart, path: str, claims: dict[str, Any], status: int) -> None:
    assert do(part, "PUT", path, DATA, **claims).status == status
    assert do(part, "HEAD", path).status == (200 if status == 201 else 404)
    assert leftovers(part) == []


def test_chunked_bodies_only_where_no_length_is_bound(part: StoresidePart, path: str) -> None:
    chunked = {"Transfer-Encoding": "chunked"}
    assert do(part, "PUT", path, iter([DATA]), chunked, length=len(DATA)).status == 411
    assert do(part, "PUT", path, iter([DATA, DATA]), chunked).status == 201
    assert do(part, "GET", path).body == DATA * 2


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 0-1/2"},
        {"Content-Encoding": "gzip"},
        {"X-Broker-Meta-x_y": "1"},
        {"X-Broker-Meta-a": "é"},
        {"X-Broker-Meta-a": "x" * 2049},
    ],
)
def test_what_would_not_be_kept_as_sent_is_refused(part: StoresidePart, path: str, headers: dict[str, str]) -> None:
    assert do(part, "PUT", path, DATA, headers).status in (400, 415)
    assert do(part, "HEAD", path).status == 404


def test_a_client_that_dies_leaves_nothing(part: StoresidePart, path: str) -> None:
    address = urlsplit(part.url)
    token = part.token("PUT", path, length=1_000_000)
    with socket.create_connection((str(address.hostname), address.port or 0)) as client:
        client.sendall(f"PUT {quote(path)}?token={token} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode() + DATA)
        wait_for(lambda: leftovers(part) != [])
    wait_for(lambda: leftovers(part) == [])
    assert do(part, "HEAD", path).status == 404
    assert put(part, path).status == 201


def test_the_body_is_asked_for_only_when_it_will_be_taken(part: StoresidePart, path: str) -> None:
    address = urlsplit(part.url)

    def first_line(token: str) -> bytes:
        with socket.create_connection((str(address.hostname), address.port or 0), timeout=30) as client:
            client.sendall(
                f"PUT {quote(path)}?token={token} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n".encode()
            )
            return client.makefile("rb").readline()

    assert first_line(part.token("PUT", path)).startswith(b"HTTP/1.1 100 ")
    assert first_line(part.token("GET", path)).startswith(b"HTTP/1.1 403 ")


def test_delete(part: StoresidePart, path: str) -> None:
    assert do(part, "DELETE", path).status == 404
    put(part, path)
    assert do(part, "DELETE", path).status == 204
    assert do(part, "GET", path).status == 404
    assert not (part.root / path[1:]).parent.exists()
    assert put(part, path).status == 201


# --- ranges and conditions ---


@pytest.mark.parametrize(
    ("field", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=5-99", 5, 99),
        ("bytes=10000-", 10000, 10239),
        ("bytes=-10", 10230, 10239),
        ("bytes=10239-99999", 10239, 10239),
        ("bytes=-99999", 0, 10239),
    ],
)
def test_a_range(part: StoresidePart, path: str, field: str, first: int, last: int) -> None:
    put(part, path)
    answer = do(part, "GET", path, headers={"Range": field})
    assert answer.status == 206
    assert answer.body == DATA[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(DATA)}"
    assert answer.headers["repr-digest"] == repr_digest(DATA)


@pytest.mark.parametrize(
    ("field", "status"),
    [
        ("bytes=10240-", 416),
        ("bytes=-0", 416),
        ("bytes=9-5", 200),
        ("bytes=0-1,5-6", 200),
        ("lines=1-2", 200),
        ("bytes=" + "9" * 30 + "-", 200),
    ],
)
def test_other_ranges(part: StoresidePart, path: str, field: str, status: int) -> None:
    put(part, path)
    answer = do(part, "GET", path, headers={"Range": field})
    assert answer.status == status
    assert answer.headers.get("content-range") == (f"bytes */{len(DATA)}" if status == 416 else None)
    assert do(part, "HEAD", path, headers={"Range": field}).status == 200


def test_conditions(part: StoresidePart, path: str) -> None:
    etag = put(part, path).headers["etag"]
    assert do(part, "GET", path, headers={"If-None-Match": f'"x", W/{etag}'}).status == 304
    assert do(part, "GET", path, headers={"If-None-Match": '"x"'}).status == 200
    assert do(part, "GET", path, headers={"If-Match": '"x"'}).status == 412
    assert do(part, "GET", path, headers={"If-Match": etag, "Range": "bytes=0-1"}).body == DATA[:2]
    assert do(part, "GET", path, headers={"If-Range": etag, "Range": "bytes=0-1"}).status == 206
    assert do(part, "GET", path, headers={"If-Range": '"x"', "Range": "bytes=0-1"}).status == 200


# --- who may ---


def test_without_a_token_nothing_but_health(part: StoresidePart, path: str) -> None:
    put(part, path)
    answer = send(part, "GET", quote(path))
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json["status"] == 401
    assert send(part, "GET", "/healthz").status == 200
    assert send(part, "OPTIONS", quote(path)).status == 405


def test_the_token_may_stand_in_the_query_but_once(part: StoresidePart, path: str) -> None:
    put(part, path)
    token = part.token("GET", path)
    target = quote(path)
    assert send(part, "GET", f"{target}?token={token}").body == DATA
    assert send(part, "GET", f"{target}?token={token}&token={token}").status == 400
    assert send(part, "GET", f"{target}?token={token}", token=token).status == 400
    assert send(part, "GET", f"{target}?token={token}&x=1").status == 400


@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST"])
def test_a_read_token_cannot_write(part: StoresidePart, path: str, method: str) -> None:
    put(part, path)
    assert send(part, method, quote(path), b"evil", token=part.token("GET", path)).status == 403
    assert do(part, "GET", path).body == DATA


def test_a_stranger_and_a_late_one_are_refused(part: StoresidePart, path: str) -> None:
    put(part, path)
    stranger = TokenSigner([generate_key("ES256", 0)], ISSUER)
    assert send(part, "GET", quote(path), token=stranger.sign(part.claims("GET", path), time.time())).status == 401
    assert do(part, "GET", path, expires_at=time.time() - 10, not_before=time.time() - 20).status == 401
    assert do(part, "GET", path, not_before=time.time() + 30).status == 401
    assert do(part, "GET", path, audience="disk-2").status == 401


# --- paths ---


@pytest.mark.parametrize(
    "spelling",
    [
        "/images/../images/x",
        "/images/./x",
        "/images//x",
        "//images/x",
        "/images/x/",
        "/images/%2e%2e/x",
        "/..%2fetc/passwd",
        "/images/x%00",
        "/%zz",
        "/%ff",
        "/",
        "images",
    ],
)
def test_strange_paths_name_nothing_even_with_a_token(part: StoresidePart, spelling: str) -> None:
    granted = unquote(spelling) if unquote(spelling).startswith("/") and "\0" not in spelling and "%00" not in spelling else "/images/x"
    for method in ("GET", "PUT", "DELETE"):
        answer = send(part, method, spelling, b"evil" if method == "PUT" else None, token=part.token(method, granted))
        assert answer.status in (400, 403, 404)
    assert not (part.root / "images" / "x").exists()


@pytest.mark.parametrize("path", ["/.broker/uploads/x", "/.Broker/tmp/x", "/.broker", "/healthz"])
def test_the_hidden_directory_is_out_of_reach(part: StoresidePart, path: str) -> None:
    for method in ("PUT", "DELETE"):
        assert do(part, method, path, b"evil" if method == "PUT" else None).status == 404
    assert do(part, "PUT", path, b"evil", upload="u", offset=0, length=4).status == 404
    if path != "/healthz":
        assert do(part, "GET", path).status == 404


def test_links_and_devices_lead_nowhere(part: StoresidePart, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (part.root / "link-file").symlink_to(tmp_path / "secret")
    (part.root / "link-dir").symlink_to(tmp_path)
    os.mkfifo(part.root / "fifo")
    for path in ("/link-file", "/link-dir/secret", "/link-dir", "/fifo", "/images"):
        assert do(part, "GET", path).status in (404, 409), path
        assert do(part, "DELETE", path).status in (404, 409), path
    assert do(part, "PUT", "/link-dir/new", b"evil").status in (404, 409)
    assert do(part, "PUT", "/link-file", b"evil").status == 412
    assert os.listdir(tmp_path) == ["secret"]
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_digests_are_not_told_of_bytes_that_others_changed(part: StoresidePart, path: str) -> None:
    put(part, path)
    (part.root / path[1:]).write_bytes(DATA[::-1])
    assert "repr-digest" not in do(part, "HEAD", path).headers
    assert do(part, "GET", path).body == DATA[::-1]


# --- multipart ---

PIECES = [bytes([65 + number]) * 70_000 for number in range(4)]
WHOLE = b"".join(PIECES)


@pytest.fixture
def upload() -> str:
    return f"upload-{next(NUMBERS)}"


def put_part(part: StoresidePart, path: str, upload: str, number: int, data: bytes | None = None, digest: str | None = None) -> Answer:
    body = PIECES[number] if data is None else data
    return do(part, "PUT", path, body, upload=upload, offset=number * 70_000, length=len(body), digest=digest)


def finish(part: StoresidePart, path: str, upload: str, count: int = 4, **claims: Any) -> Answer:
    parts = [{"offset": number * 70_000, "length": 70_000, "sha256": sha256(PIECES[number])} for number in range(count)]
    return do(part, "POST", path, json.dumps({"parts": parts, "metadata": {"blob": "7"}}), upload=upload, **claims)


def test_parts_become_an_object(part: StoresidePart, path: str, upload: str) -> None:
    assert do(part, "GET", path, upload=upload).status == 404
    for number in (2, 0, 3, 1):
        answer = put_part(part, path, upload, number, digest=f"sha256:{sha256(PIECES[number])}")
        assert answer.status == 200
    listed = do(part, "GET", path, upload=upload).json["parts"]
    assert listed == [
        {"offset": number * 70_000, "length": 70_000, "sha256": sha256(data), "md5": hashlib.md5(data).hexdigest()}
        for number, data in enumerate(PIECES)
    ]
    assert do(part, "GET", path).status == 404
    done = finish(part, path, upload, length=len(WHOLE))
    assert (done.status, done.json) == (200, {"size": len(WHOLE), "digests": {"sha256": sha256(WHOLE)}})
    assert do(part, "GET", path).body == WHOLE
    head = do(part, "HEAD", path)
    assert head.headers["repr-digest"] == repr_digest(WHOLE).partition(",")[0]
    assert head.headers["x-broker-meta-blob"] == "7"


def test_after_the_end_no_replay_changes_anything(part: StoresidePart, path: str, upload: str) -> None:
    for number in range(4):
        put_part(part, path, upload, number)
    first = finish(part, path, upload)
    assert put_part(part, path, upload, 1, b"E" * 70_000).status == 404
    assert do(part, "GET", path, upload=upload).status == 404
    assert do(part, "DELETE", path, upload=upload).status == 404
    again = finish(part, path, upload)
    assert (again.status, again.json) == (200, first.json)
    assert do(part, "GET", path).body == WHOLE


def test_a_part_may_be_sent_again_before_the_end(part: StoresidePart, path: str, upload: str) -> None:
    put_part(part, path, upload, 0, b"x" * 70_000)
    put_part(part, path, upload, 1, b"y" * 90_000)  # too long: overlaps the next
    for number in range(4):
        assert put_part(part, path, upload, number).status == 200
    assert finish(part, path, upload).status == 200
    assert do(part, "GET", path).body == WHOLE


def test_a_broken_part_is_no_part(part: StoresidePart, path: str, upload: str) -> None:
    put_part(part, path, upload, 0)
    assert put_part(part, path, upload, 0, b"x" * 70_000, digest=f"sha256:{sha256(PIECES[0])}").status == 400
    assert do(part, "GET", path, upload=upload).json == {"parts": []}
    assert put_part(part, path, upload, 0, b"").status == 400


@pytest.mark.parametrize(
    ("parts", "claims", "status"),
    [
        ([{"offset": 0, "length": 70_000}, {"offset": 70_000, "length": 70_000}], {"length": 140_001}, 400),
        ([{"offset": 0, "length": 70_000}, {"offset": 70_000, "length": 70_000}], {"digest": "md5:" + "0" * 32}, 400),
        ([{"offset": 0, "length": 70_000}, {"offset": 70_000, "length": 1}], {}, 409),
        ([{"offset": 70_000, "length": 70_000}], {}, 409),
        ([{"offset": 0, "length": 70_000, "sha256": "0" * 64}], {}, 409),
        ([{"offset": 0, "length": 70_000}, {"offset": 70_000, "length": 70_000}, {"offset": 140_000, "length": 5}], {}, 409),
        ([], {}, 400),
        ([{"offset": 0}], {}, 400),
        ([{"offset": 0, "length": -1}], {}, 400),
        ([{"offset": 0, "length": 70_000, "sha256": "é"}], {}, 400),
        ("all", {}, 400),
    ],
)
def test_only_what_arrived_is_finished(
    part: StoresidePart, path: str, upload: str, parts: Any, claims: dict[str, Any], status: int
) -> None:
    for number in range(2):
        put_part(part, path, upload, number)
    assert do(part, "POST", path, json.dumps({"parts": parts}), upload=upload, **claims).status == status
    assert do(part, "HEAD", path).status == 404
    assert finish(part, path, upload, 2, digest="md5:" + hashlib.md5(WHOLE[:140_000]).hexdigest()).status == 200
    assert do(part, "HEAD", path).headers["repr-digest"] == repr_digest(WHOLE[:140_000])


def test_an_upload_does_not_overwrite_either(part: StoresidePart, path: str, upload: str) -> None:
    put_part(part, path, upload, 0)
    put(part, path)
    assert finish(part, path, upload, 1).status == 412
    assert do(part, "GET", path).body == DATA


def test_giving_up_frees_the_bytes_for_good(part: StoresidePart, path: str, upload: str) -> None:
    put_part(part, path, upload, 0)
    assert do(part, "DELETE", path, upload=upload).status == 204
    assert put_part(part, path, upload, 0).status == 404
    assert finish(part, path, upload, 1).status == 404
    (directory,) = (part.root / ".broker" / "uploads").glob(f"*-{upload}")
    assert os.listdir(directory) == ["ended"]


def test_an_upload_belongs_to_one_path(part: StoresidePart, path: str, upload: str) -> None:
    put_part(part, path, upload, 0)
    assert finish(part, path + "2", upload, 1).status == 404
    assert do(part, "DELETE", path).status == 404  # the object's token is not the upload's
    assert do(part, "GET", path, upload=upload).status == 200


def test_nothing_is_finished_while_a_part_is_written(part: StoresidePart, path: str, upload: str) -> None:
    put_part(part, path, upload, 0)
    address = urlsplit(part.url)
    token = part.token("PUT", path, upload=upload, offset=0, length=70_000)
    with socket.create_connection((str(address.hostname), address.port or 0)) as client:
        client.sendall(f"PUT {quote(path)}?token={token} HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n".encode() + b"half")
        wait_for(lambda: do(part, "GET", path, upload=upload).json == {"parts": []})
        busy = finish(part, path, upload, 1)
        assert (busy.status, busy.headers["retry-after"]) == (503, "1")
        assert put_part(part, path, upload, 0).status == 503
        assert put_part(part, path, upload, 1).status == 200
    wait_for(lambda: put_part(part, path, upload, 0).status == 200)
    assert finish(part, path, upload, 2).status == 200
    assert do(part, "GET", path).body == WHOLE[:140_000]


# --- the process ---


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    with start(tmp_path) as first:
        put(first, "/whole")
        put_part(first, "/joined", "u", 0)
        put_part(first, "/joined", "u", 1)
        os.kill(first.pid, signal.SIGKILL)
    (tmp_path / "second").mkdir()
    with start(tmp_path / "second", root=first.root) as second:
        assert do(second, "GET", "/whole").body == DATA
        assert finish(second, "/joined", "u", 2).status == 200
        assert do(second, "GET", "/joined").body == WHOLE[:140_000]


def test_a_stop_lets_transfers_end(tmp_path: Path) -> None:
    with start(tmp_path) as part:
        address = urlsplit(part.url)
        port = address.port or 0
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            head = f"PUT /slow?token={part.token('PUT', '/slow')} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(DATA)}\r\n\r\n"
            client.sendall(head.encode() + DATA[:100])
            wait_for(lambda: leftovers(part) != [])
            os.kill(part.pid, signal.SIGTERM)
            wait_for(lambda: not listens(port))
            client.sendall(DATA[100:])
            assert client.makefile("rb").readline().startswith(b"HTTP/1.1 201 ")
        assert (part.root / "slow").read_bytes() == DATA


def test_a_rotated_key_is_taken_and_a_revoked_one_refused(tmp_path: Path) -> None:
    with start(tmp_path) as part:
        put(part, "/x")
        new = generate_key("EdDSA", time.time() - 1)
        (tmp_path / "jwks.json").write_text(json.dumps(jwks([new])))
        token = TokenSigner([new], ISSUER).sign(part.claims("GET", "/x"), time.time())
        wait_for(lambda: send(part, "GET", "/x", token=token).status == 200)
        assert do(part, "GET", "/x").status == 401
        (tmp_path / "jwks.json").unlink()
        wait_for(lambda: "keys not read" in part.log.read_text())
        assert send(part, "GET", "/x", token=token).status == 200


def test_no_token_is_in_the_log(part: StoresidePart, path: str) -> None:
    token = part.token("GET", path)
    send(part, "GET", f"{quote(path)}?token={token}")
    send(part, "GET", f"{quote(path)}?token={token}&%")
    address = urlsplit(part.url)
    with socket.create_connection((str(address.hostname), address.port or 0)) as client:
        client.sendall(f"GET /x?token={token} HTTP/9.9 nonsense\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(4096), b"")).decode()
    assert " 400 " in answer.splitlines()[0] and "application/problem+json" in answer
    assert token[:20] not in answer
    assert token.rpartition(".")[2] not in part.log.read_text()


@pytest.fixture
def crowd(part: StoresidePart) -> Iterator[list[socket.socket]]:
    address = urlsplit(part.url)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection((str(address.hostname), address.port or 0))) for _ in range(50)]


def test_idle_connections_hold_nobody_up(part: StoresidePart, path: str, crowd: list[socket.socket]) -> None:
    for client in crowd:
        client.sendall(b"GET /x HTTP/1.1\r\nHost:")
    assert put(part, path).status == 201
