"""What git-lfs says of objects, and what it is answered: every fault in its place, in its words."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as some

from broker import errors
from broker.model import Handle
from broker.service.repositories import Result, Wish
from broker.web.call import Call
from broker.web.lfs import handlers, objects
from broker.web.lfs.render import message, render, status

OID = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
VERIFY = "http://broker/lfs/p/r/objects/verify"
PUT = Handle("PUT", "http://store/key?signature", {"Content-Length": "4", "If-None-Match": "*"}, 1000.9)


def refused(**entry: Any) -> errors.BrokerError | None:
    (found,) = objects.read([{"oid": OID, "size": 4, **entry}])
    return found if isinstance(found, errors.BrokerError) else None


def test_an_object_is_a_wish() -> None:
    assert objects.read([{"oid": OID, "size": 0}, {"oid": OID, "size": 1 << 53, "authenticated": True}]) == [
        Wish(OID, 0),
        Wish(OID, 1 << 53),
    ]


@pytest.mark.parametrize(
    "oid", ["", "12345678", OID[:-1], OID + "0", OID.upper(), "g" + OID[1:], OID[:-1] + "\n", " " + OID[1:], "../" + OID[3:], "é" * 64]
)
def test_what_is_no_hash(oid: str) -> None:
    error = refused(oid=oid)
    assert error is not None
    assert (status(error), error.field, error.expected) == (422, "objects.0.oid", "64 hex digits in lower case")


def test_sizes_below_nothing() -> None:
    error = refused(size=-1)
    assert error is not None
    assert (status(error), error.field) == (422, "objects.0.size")


@given(some.lists(some.fixed_dictionaries({"oid": some.text(max_size=70) | some.just(OID), "size": some.integers()})))
def test_each_object_has_one_answer_in_its_place(entries: list[dict[str, Any]]) -> None:
    for index, (entry, found) in enumerate(zip(entries, objects.read(entries), strict=True)):
        if isinstance(found, Wish):
            assert (found.oid, found.size) == (entry["oid"], entry["size"])
            assert len(bytes.fromhex(found.oid)) == 32
        else:
            assert found.field is not None
            assert found.field.startswith(f"objects.{index}.")
            shown = objects.show(entry, found, "upload", VERIFY, 0)
            assert shown["error"]["code"] == 422
            assert orjson.dumps(shown["error"])


@pytest.mark.parametrize(
    ("result", "operation", "expected"),
    [
        (None, "upload", {}),
        (
            PUT, "upload",
            {"actions": {
                "upload": {
                    "href": PUT.url, "header": {"If-None-Match": "*"}, "expires_in": 900, "expires_at": "1970-01-01T00:16:40Z"
                },
                "verify": {"href": VERIFY},
            }},
        ),
        (
            Handle("GET", "http://store/key", {}, 50.0), "download",
            {"authenticated": True, "actions": {
                "download": {"href": "http://store/key", "expires_in": 0, "expires_at": "1970-01-01T00:00:50Z"}
            }},
        ),
        (errors.NotFound("No such object."), "download", {"error": {"code": 404, "message": "No such object."}}),
        (errors.Gone("The object has been deleted."), "download", {"error": {"code": 410, "message": "The object has been deleted."}}),
    ],
)  # fmt: skip
def test_what_is_shown(result: Result, operation: str, expected: dict[str, Any]) -> None:
    assert objects.show({"oid": OID, "size": 4}, result, operation, VERIFY, 100.0) == {"oid": OID, "size": 4, **expected}


@pytest.mark.parametrize(
    ("url", "href", "header"),
    [
        ("http://disk/objects/a/b?token=x.y-z_", "http://disk/objects/a/b", {"Authorization": "Bearer x.y-z_"}),
        ("http://swift/v1/A/c/o?temp_url_sig=s&temp_url_expires=1", None, None),
        ("http://s3/b/o?X-Amz-Signature=s", None, None),
    ],
)
def test_where_a_401_would_be_asked_for_again_for_ever(url: str, href: str | None, header: dict[str, str] | None) -> None:
    shown = objects.show({"oid": OID, "size": 4}, Handle("GET", url, {}, 50.0), "download", VERIFY, 0)["actions"]["download"]
    assert (shown["href"], shown.get("header")) == (href or url, header)


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (errors.Invalid("No.", field="operation", expected="one of download, upload"), 422,
         "No. (operation, expected: one of download, upload)"),
        (errors.Malformed("The body is no JSON."), 400, "The body is no JSON."),
        (errors.Forbidden(), 403, "Not allowed"),
        (errors.TooLarge("Too many objects.", field="objects", expected="at most 1000"), 413,
         "Too many objects. (objects, expected: at most 1000)"),
        (errors.NoDestination("No store.", extra={"excluded": [{"store": "a", "reason": "no-capacity"}]}), 507,
         "No store. (a: no-capacity)"),
        (errors.NoDestination("No store.", extra={"excluded": [{"store": "a", "reason": "no-capacity"},
                                                               {"store": "b", "reason": "unverifiable"}]}), 409,
         "No store. (a: no-capacity, b: unverifiable)"),
        (errors.NoDestination("No store.", extra={"excluded": []}), 409, "No store."),
        (errors.Busy("All is full.", retry_after=1.2), 429, "All is full. Come again in 2 s."),
        (errors.BrokerError(), 500, "Internal error"),
    ],
)  # fmt: skip
def test_errors(error: errors.BrokerError, expected: int, text: str) -> None:
    code, body, headers = render(error, False)
    assert (code, orjson.loads(body)) == (expected, {"message": text})
    assert headers["Content-Type"] == "application/vnd.git-lfs+json"
    assert ("Retry-After" in headers) is (expected == 429)


@pytest.mark.parametrize("token_given", [False, True])
def test_who_is_not_known_is_asked_for_a_password(token_given: bool) -> None:
    code, _, headers = render(errors.Unauthenticated(), token_given)
    assert (code, headers["LFS-Authenticate"]) == (401, 'Basic realm="transfer-broker"')


def test_who_has_to_wait_is_told_how_long() -> None:
    assert render(errors.Busy(retry_after=1.2), True)[2]["Retry-After"] == "2"
    for error in (errors.Unavailable(retry_after=1), errors.StoreUnavailable(), errors.Unavailable(retry_after=4.5)):
        code, _, headers = render(error, True)
        assert (code, headers["Retry-After"]) == (429, "5" if error.retry_after == 4.5 else "3"), "a 503 would be final"


def test_no_secret_is_repeated() -> None:
    secret = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJlLXRoYXQtaXMtbG9uZy1lbm91Z2gtdG8tY291bnQ"
    assert secret not in message(errors.Invalid("There is no such field.", field=secret, expected=secret))


@pytest.mark.parametrize(
    ("accept", "taken"),
    [
        (None, True), ("", True), ("*/*", True), ("application/vnd.git-lfs+json", True),
        ("application/vnd.git-lfs+json; charset=utf-8", True),
        ("text/html, application/json;q=0.5", True), ("Application/*", True), ("text/html", False), ("application/xml", False),
        ("application/vnd.git-lfs+jsonx", False), ("application/jsonp", False),
    ],
)  # fmt: skip
def test_what_is_accepted(accept: str | None, taken: bool) -> None:
    call = Call(None, "lfsBatch", headers={} if accept is None else {"Accept": accept})  # type: ignore[arg-type]
    if taken:
        handlers._require_accepted(call)
    else:
        with pytest.raises(errors.NotAcceptable):
            handlers._require_accepted(call)
