"""Nothing that lets anybody in reaches a log line (invariant 13)."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import stamina
import stamina.instrumentation
import structlog

from broker import log

JWT = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJlLW9mLWl0"

LEAKS = {
    "sigv4 url": ("https://s/k?X-Amz-Credential=AKIAX%2F2026&X-Amz-Signature=5ec7e7abc123&X-Amz-Expires=6", ["AKIAX", "5ec7e7abc123"]),
    "sigv4 url with session": ("GET http://x/k?X-Amz-Security-Token=FwoGZXIvYXdz&a=b", ["FwoGZXIvYXdz"]),
    "tempurl": ("https://swift/v1/a/c/o?temp_url_sig=deadbeefcafe&temp_url_expires=5", ["deadbeefcafe"]),
    "token in query": (f"http://store/k?token={JWT}", [JWT, "c2lnbmF0dXJl"]),
    "escaped query": ("redirect=http%3A%2F%2Fx%3Fsig%3Dabcdef987%26b", ["abcdef987"]),
    "header line": (f"Authorization: Bearer {JWT}", [JWT]),
    "headers as dict": ("{'Authorization': 'Bearer opaque-token-77', 'Accept': '*/*'}", ["opaque-token-77"]),
    "headers as pairs": ("[(b'Authorization', b'Basic dXNlcjpwYXNz')]", ["dXNlcjpwYXNz"]),
    "multidict": ("<CIMultiDictProxy('X-Auth-Token': 'gAAAAABtoken')>", ["gAAAAABtoken"]),
    "sigv4 header": ("Authorization: AWS4-HMAC-SHA256 Credential=AKIAZ/x, SignedHeaders=host, Signature=0badf00d", ["AKIAZ", "0badf00d"]),
    "bare jwt": (f"bad token {JWT}!", [JWT, "eyJhbGciOiJFUzI1NiJ9"]),
    "bare fernet": ("about gAAAAABrA0xyVb0-_Tq1X4lJk2Wc7Qm9aaaa== it said no", ["gAAAAABrA0xyVb0", "Qm9aaaa"]),
    "database url": ("cannot connect to postgresql://broker:hunter2@db:5432/x", ["hunter2"]),
    "private key": ("-----BEGIN PRIVATE KEY-----\nMIGHAgEA\n-----END PRIVATE KEY-----", ["MIGHAgEA"]),
    "configured": ("store answered with very-secret-key-of-s3 in it", ["very-secret-key-of-s3"]),
}  # fmt: skip


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    log.configure("debug", "json", secrets=lambda: ["very-secret-key-of-s3"], stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    stamina.instrumentation.set_on_retry_hooks(None)


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("way", ["message", "argument", "field", "nested", "exception", "chained", "structlog"])
def test_no_way_into_the_log(name: str, way: str, lines: io.StringIO) -> None:
    text, secrets = LEAKS[name]
    logger = logging.getLogger("some.library")
    match way:
        case "message":
            logger.warning(text)
        case "argument":
            logger.warning("failed: %s (%r)", text, text)
        case "field":
            logger.warning("failed", extra={"place": text})
        case "nested":
            logger.warning("failed", extra={"request": {"headers": [text], "more": (text,)}})
        case "exception":
            try:
                raise ValueError(text)
            except ValueError:
                logger.exception("failed")
        case "chained":
            try:
                try:
                    raise ValueError(text)
                except ValueError as error:
                    raise RuntimeError("outer") from error
            except RuntimeError:
                structlog.get_logger("x").exception("failed")
        case "structlog":
            structlog.get_logger("x").warning(text, place=text, authorization=text)
    written = lines.getvalue()
    assert written.count("\n") == 1
    json.loads(written)
    for secret in secrets:
        assert secret not in written


def test_harmless_text_stays() -> None:
    text = "GET /v1/images/0198a5f2?limit=3 took 4 ms; design=good; X-Amz-Expires=60; store eu-1 at 10.0.0.1:80"
    assert log.scrub(text) == text


def test_secret_fields_are_hidden_whatever_they_hold(lines: io.StringIO) -> None:
    structlog.get_logger("x").info("event", password="p1", secret_key="s2", token="t3", store="kept")
    event = json.loads(lines.getvalue())
    assert (event["password"], event["secret_key"], event["token"], event["store"]) == (log.HIDDEN, log.HIDDEN, log.HIDDEN, "kept")


def test_lines_carry_the_request(lines: io.StringIO) -> None:
    mark = log.current_request.set(log.RequestContext("r-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"))
    try:
        logging.getLogger("lib").info("one")
        structlog.get_logger("own").info("two")
    finally:
        log.current_request.reset(mark)
    for line in lines.getvalue().splitlines():
        event = json.loads(line)
        assert event["request_id"] == "r-1"
        assert event["traceparent"].startswith("00-aaaa")


def test_the_console_is_scrubbed_too() -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        log.configure("info", "console", stream=stream)
        try:
            raise ValueError(f"token={JWT}")
        except ValueError:
            structlog.get_logger("x").exception("failed")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    assert JWT not in stream.getvalue()
    assert "ValueError" in stream.getvalue()


def test_what_is_tried_again_is_one_short_line(lines: io.StringIO) -> None:
    """The class of the error alone: its text may quote a request."""
    for attempt in stamina.retry_context(on=OSError, attempts=2, wait_initial=0.0, wait_jitter=0.0):
        with attempt:
            if attempt.num == 1:
                raise ConnectionResetError("http://store.example.org/some/key")
    (line,) = map(json.loads, lines.getvalue().splitlines())
    assert (line["event"], line["error"], line["number"]) == ("trying again", "ConnectionResetError", 1)
    assert "store.example.org" not in lines.getvalue()
