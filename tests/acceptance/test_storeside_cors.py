"""The file server and pages of other origins: those that the operator named may read, and a token is needed all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from broker.storeside.server import main
from tests.acceptance.test_storeside import DATA, do, put, send
from tests.parts.storeside import StoresidePart, start

PAGE, OTHER = "https://app.example.org", "http://[::1]:3000"
ASKS = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type,x-broker-meta-blob"}


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoresidePart]:
    options = ["--cors-origin", PAGE, "--cors-origin", OTHER]
    with start(tmp_path_factory.mktemp("cors"), options=options) as part:
        put(part, "/there")
        yield part


@pytest.mark.parametrize("origin", [PAGE, OTHER])
def test_pages_of_named_origins_may_read(part: StoresidePart, origin: str) -> None:
    asked = send(part, "OPTIONS", "/there?token=whatever", headers={"Origin": origin, **ASKS})
    assert (asked.status, asked.body, asked.headers["access-control-allow-origin"]) == (204, b"", origin)
    assert asked.headers["access-control-allow-headers"] == ASKS["Access-Control-Request-Headers"]
    assert {"GET", "HEAD", "PUT"} <= set(asked.headers["access-control-allow-methods"].split(", "))
    fields = {"Origin": origin}
    answers = [
        do(part, "GET", "/there", headers=fields), do(part, "GET", "/there", headers={**fields, "Range": "bytes=0-1"}),
        do(part, "HEAD", "/there", headers=fields), do(part, "PUT", f"/new-{len(origin)}", DATA, fields),
        do(part, "PUT", "/there", DATA, fields), do(part, "GET", "/nothing", headers=fields), send(part, "GET", "/there", headers=fields),
    ]  # fmt: skip
    assert [answer.status for answer in answers] == [200, 206, 200, 201, 412, 404, 401]
    for answer in answers:
        assert (answer.headers["access-control-allow-origin"], answer.headers["vary"]) == (origin, "Origin")
        assert {"Content-Range", "ETag", "Repr-Digest"} <= set(answer.headers["access-control-expose-headers"].split(", "))
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["null", "*", "", PAGE + "/", "https://app.example.org.evil", "http://app.example.org"])
def test_pages_of_others_may_not(part: StoresidePart, origin: str) -> None:
    assert send(part, "OPTIONS", "/there", headers={"Origin": origin, **ASKS}).status == 405
    for answer in (do(part, "GET", "/there", headers={"Origin": origin}), send(part, "GET", "/there", headers={"Origin": origin})):
        assert answer.headers["vary"] == "Origin" and not [name for name in answer.headers if name.startswith("access-control")]


def test_an_odd_preflight(part: StoresidePart) -> None:
    """What it asks for is repeated only where it is a list of names; a body ends the connection unread."""
    odd = send(part, "OPTIONS", "/there", headers={"Origin": PAGE, **ASKS, "Access-Control-Request-Headers": "a;b=<c>"})
    assert (odd.status, odd.headers["access-control-allow-headers"]) == (204, "")
    assert send(part, "OPTIONS", "/there", b"x" * 100, {"Origin": PAGE, **ASKS}).headers["connection"] == "close"
    assert send(part, "OPTIONS", "/there", headers={"Origin": PAGE}).status == 405


def test_an_origin_that_is_none(tmp_path: Path) -> None:
    for wrong in ("*", "https://app.example.org/", "app.example.org"):
        arguments = ["--root", str(tmp_path), "--audience", "a", "--issuer", "i", "--jwks", "none", "--cors-origin", wrong]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2 and "must be http(s)://HOST[:PORT]" in done.output
