"""Problems become exceptions, exceptions become exit codes and lines that say what to do next; nothing shows a secret."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from broker import errors
from broker.cli import exits
from broker.cli.glance_source import Glance
from broker.client import settings
from broker.client.api import Broker, problem
from broker.client.trouble import BrokerUnreachable, ClientError, LocalTrouble, NoBroker, TransferFailed, VerificationFailed, WrongSetting
from tests.parts.process import find_program, free_ports


@pytest.mark.parametrize("kind", errors.problem_types().values())
def test_every_problem_comes_back_as_itself(kind: type[errors.BrokerError]) -> None:
    sent = kind("why", field="size", expected="more", retry_after=3.0, extra={"excluded": [{"store": "a", "reason": "full"}]})
    got = problem(kind.status, sent.problem())
    assert type(got) is kind
    assert got.problem() == sent.problem()


@pytest.mark.parametrize(
    ("status", "document", "expected"),
    [
        (404, {}, errors.NotFound),
        (502, {}, errors.Unavailable),
        (503, {"type": "/problems/of-tomorrow"}, errors.Unavailable),
        (500, {}, errors.BrokerError),
        (418, {"type": 7}, errors.BrokerError),
    ],
)
def test_an_answer_without_a_known_type_goes_by_its_status(status: int, document: dict[str, object], expected: type[Exception]) -> None:
    assert type(problem(status, document)) is expected


def test_retry_after_comes_from_the_header_when_the_body_has_none() -> None:
    assert problem(429, {}, "7").retry_after == 7.0
    assert problem(429, {}, "Wed, 21 Oct 2015 07:28:00 GMT").retry_after is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.Unauthenticated(), 3),
        (errors.Forbidden(), 3),
        (errors.NotFound(), 4),
        (errors.Mismatch(), 5),
        (VerificationFailed("x"), 5),
        (BrokerUnreachable("x"), 6),
        (errors.Unavailable(), 6),
        (errors.StoreUnavailable(), 6),
        (errors.Busy(), 7),
        (errors.Invalid(), 2),
        (errors.Conflict(), 1),
        (TransferFailed("x"), 1),
        (LocalTrouble("x"), 1),
        (NoBroker("x"), 1),
        (WrongSetting("x"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exits.code_of(error) == code


def test_lines_say_why_and_what_next() -> None:
    lines = exits.explain(errors.NoSource("Nothing.", extra={"excluded": [{"store": "weed", "reason": "slots"}]}))
    assert lines[0] == "No source can be offered: Nothing."
    assert lines[1] == "  weed: slots"
    assert "broker ticket" in lines[2]
    assert exits.explain(errors.Busy("Full.", retry_after=12))[-1] == "try again in 12 s"
    last = exits.explain(errors.QuotaExceeded("Too much.", retry_after=12))[-1]
    assert last == "try again in 12 s; if that does not help, ask an administrator (broker quota)"
    assert "replica add" in exits.explain(errors.Invalid("The broker looks at this store itself.", field="observed", expected="none"))[-1]
    assert "replica register" in exits.explain(errors.Invalid("The broker cannot look at this store.", field="observed"))[-1]
    assert "ask an administrator" in exits.explain(errors.Forbidden("An administrator has rejected the image."))[-1]
    assert len(exits.explain(errors.Forbidden("Only shared images have members.", field="visibility", expected="shared"))) == 1
    assert exits.explain(errors.Invalid("No.", field="name"))[-1] == "Invalid field: No. (field name)"


def test_url_and_token_are_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("BROKER_TOKEN", raising=False)
    monkeypatch.delenv("BROKER_URL", raising=False)
    assert settings.find_url() == settings.DEFAULT_URL
    assert settings.find_token() is None
    settings.token_path().parent.mkdir()
    settings.token_path().write_text("from-file\n")
    assert settings.find_token() == "from-file"
    monkeypatch.setenv("BROKER_TOKEN", "from-environment")
    assert settings.find_token() == "from-environment"
    (tmp_path / "other").write_text("given")
    assert settings.find_token(tmp_path / "other") == "given"
    monkeypatch.setenv("BROKER_URL", "https://broker.example/")
    assert settings.find_url() == "https://broker.example"
    assert settings.find_url("http://b") == "http://b"


def test_a_token_of_keystone_has_a_header_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before the file that may be left over, and after whatever was given on purpose."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("BROKER_TOKEN", raising=False)
    monkeypatch.delenv("OS_TOKEN", raising=False)
    assert settings.find_authorization() == {}
    settings.token_path().parent.mkdir()
    settings.token_path().write_text("from-file\n")
    assert settings.find_authorization() == {"Authorization": "Bearer from-file"}
    monkeypatch.setenv("OS_TOKEN", "gAAAAA")
    assert settings.find_authorization() == {"X-Auth-Token": "gAAAAA"}
    assert settings.find_authorization(file=settings.token_path()) == {"Authorization": "Bearer from-file"}
    assert settings.find_authorization("given") == {"Authorization": "Bearer given"}
    monkeypatch.setenv("BROKER_TOKEN", "from-environment")
    assert settings.find_authorization() == {"Authorization": "Bearer from-environment"}
    monkeypatch.delenv("BROKER_TOKEN")
    monkeypatch.setenv("OS_TOKEN", "two words")
    with pytest.raises(LocalTrouble, match="OS_TOKEN") as caught:
        settings.find_authorization()
    assert "two words" not in str(caught.value)


def test_a_cloud_that_is_away_is_not_one_that_was_not_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("OS_")]:
        monkeypatch.delenv(name)
    with pytest.raises(WrongSetting, match="no cloud to read from") as caught:
        Glance("unheard-of")
    assert "clouds.yaml" in exits.explain(caught.value)[-1]
    (port,) = free_ports(1)
    away = f"http://127.0.0.1:{port}/v3"
    given = {"AUTH_URL": away, "USERNAME": "x", "PASSWORD": "secret-1", "PROJECT_NAME": "x", "USER_DOMAIN_ID": "default"}
    for name, value in given.items():
        monkeypatch.setenv(f"OS_{name}", value)
    with pytest.raises(ClientError, match="no login at the cloud") as refused:
        Glance(None)
    assert "auth_url" in exits.explain(refused.value)[-1]
    assert "secret-1" not in str(refused.value)


@pytest.mark.parametrize("url", ["ftp://x", "nonsense", "http://"])
def test_what_is_no_url_is_said(url: str) -> None:
    with pytest.raises(LocalTrouble, match="no http"):
        settings.find_url(url)


@pytest.mark.parametrize("content", ["", "two words", "a\nb"])
def test_what_is_no_token_is_said_without_showing_it(content: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(LocalTrouble, match="no bearer token") as caught:
        settings.find_token(file)
    assert not content or content not in str(caught.value)


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (200, b"[]"), (302, b""), (400, b'{"detail": "?"}'), (404, b"")])
async def test_what_is_no_broker_is_said_at_once(status: int, body: bytes) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    async with TestServer(application) as server, Broker(str(server.make_url("/")), "token") as broker:
        with pytest.raises(NoBroker, match=f"status {status}"):
            await broker.store("a")


def test_tries_are_not_told_among_the_results() -> None:
    program = find_program("broker", "pip install -e '.[test]'")
    done = subprocess.run([program, "ls", "--url", "http://127.0.0.1:1", "--wait", "1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.count("\n") == 2


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "No token was sent."),
        ({"Authorization": f"Bearer {jwt.encode({'exp': 1_700_000_000}, 'k' * 32)}"}, "The token ended at 2023-11-14T22:13:20Z."),
        ({"Authorization": f"Bearer {jwt.encode({'exp': 32_503_680_000}, 'k' * 32)}"}, ""),
        ({"Authorization": f"Bearer {jwt.encode({'sub': 'x'}, 'k' * 32)}"}, ""),
        ({"Authorization": "Bearer a.b.c"}, ""),
        ({"Authorization": "Bearer a.W10.c"}, ""),
        ({"Authorization": "Bearer nonsense"}, ""),
        (
            {"X-Auth-Token": "gAAAAA"},
            "Keystone's token in OS_TOKEN is not good, or not any more: openstack token issue makes another.",
        ),
    ],
)
def test_what_is_wrong_with_a_refused_token_is_said_where_it_can_be_known(headers: dict[str, str], said: str) -> None:
    assert settings.trouble_with(headers) == said


async def test_a_token_that_has_ended_is_said_to_have() -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response(errors.Unauthenticated().problem(), status=401)

    application = web.Application()
    application.router.add_get("/{path:.*}", refuse)
    token = jwt.encode({"exp": 1_700_000_000}, "k" * 32)
    async with TestServer(application) as server, Broker(str(server.make_url("/")), token) as broker:
        with pytest.raises(errors.Unauthenticated) as caught:
            await broker.store("a")
    lines = exits.explain(caught.value)
    assert "ended at 2023-11-14" in lines[0] and "broker token create" in lines[-1]
    assert token not in "".join(lines)
