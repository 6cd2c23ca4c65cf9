"""What is found, in the words of DRS: names, checksums of bundles, instants, statuses."""

from __future__ import annotations

import hashlib
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors
from broker.accept import Candidate
from broker.catalog.compact import CompactBlob
from broker.model import Abilities, Image, ImageStatus, Visibility, new_id
from broker.service.objects import Found, Part
from broker.web.drs import shapes

HOST = "drs.example.org"


def blob(id: str, size: int = 1, **digests: str) -> CompactBlob:
    summary = orjson.dumps({"id": id, "size": size, "digests": digests, "state": "active"}).decode()
    return CompactBlob(id, size, summary, (), ())


def image(name: str) -> Image:
    return Image(new_id(), name, "p", Visibility.PUBLIC, ImageStatus.ACTIVE, {}, {}, created_at=1_700_000_000)


def place(scheme: str) -> Candidate:
    return Candidate("s", "eu", scheme, Abilities(), replica="r")


@given(st.text(max_size=40), st.sampled_from(["raw", "qcow2"]))
def test_names_are_portable(name: str, format: str) -> None:
    """DrsObject.name: [A-Za-z0-9.-_]; nothing that leads out of a directory."""
    found = shapes.name_of(Part(blob(str(new_id())), image(name), format, ()))
    assert found is not None and set(found) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_") and found.strip(".")


@given(st.lists(st.binary(min_size=16, max_size=16).map(bytes.hex), min_size=2, max_size=5), st.randoms())
def test_a_bundle_has_the_checksum_of_its_members_in_any_order(members: list[str], rng: object) -> None:
    parts = tuple(Part(blob(str(new_id()), 3, md5=md5), image("i"), f"f{index}", ()) for index, md5 in enumerate(members))
    shown = shapes.drs_object(Found(str(new_id()), image("i"), parts), [], HOST)
    assert shown["checksums"] == [{"type": "md5", "checksum": hashlib.md5("".join(sorted(members)).encode()).hexdigest()}]
    assert shown["size"] == 3 * len(members) and len({each["name"] for each in shown["contents"]}) == len(members)


def test_members_without_a_digest_in_common_make_no_bundle() -> None:
    parts = tuple(Part(blob(str(new_id()), 3, **{name: "ab"}), image("i"), name, ()) for name in ("md5", "sha256"))
    with pytest.raises(errors.NotFound, match="digest"):
        shapes.drs_object(Found(str(new_id()), image("i"), parts), [], HOST)


@pytest.mark.parametrize(
    ("id", "created"),
    [
        ("017f22e2-79b0-7cc3-98c4-dc0c0c07398f", "2022-02-22T19:22:22Z"),  # RFC 9562 appendix A.6
        ("ffffffff-ffff-7fff-bfff-ffffffffffff", "9999-12-31T23:59:59Z"),
        ("123e4567-e89b-42d3-a456-426614174000", "2023-11-14T22:13:20Z"),  # not one of ours: the image's
    ],
)
def test_when_an_object_was_made(id: str, created: str) -> None:
    shown = shapes.drs_object(Found(id, None, (Part(blob(id, md5="ab"), image("i"), "raw", ()),)), [[]], HOST)
    assert shown["created_time"] == created and "access_methods" not in shown


def test_an_access_method_is_a_replica() -> None:
    id = str(new_id())
    shown = shapes.drs_object(Found(id, None, (Part(blob(id, md5="ab"), None, None, ()),)), [[place("http"), place("file")]], HOST)
    assert [method["type"] for method in shown["access_methods"]] == ["https", "file"]
    assert "name" not in shown and "aliases" not in shown
    assert shapes.access_url({"url": "u", "headers": {"A": "b"}}) == {"url": "u", "headers": ["A: b"]}


@pytest.mark.parametrize(
    ("url", "id"),
    [("https://drs.example.org", "org.example.drs.drs"), ("http://10.0.0.1:8080", "10.0.0.1.drs"), ("http://[::1]:8080", "::1.drs")],
)
def test_service_info(url: str, id: str) -> None:
    assert shapes.service_info(url, "1", 5)["id"] == id


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.NoSource("x"), 404), (errors.NotFound("x"), 404), (errors.Forbidden("x"), 403), (errors.Busy("x"), 429),
        (errors.TooLarge("x"), 413), (errors.Unavailable("x"), 503), (errors.Invalid("x", field="f", expected="e"), 400),
    ],
)  # fmt: skip
def test_errors(error: errors.BrokerError, status: int) -> None:
    code, body, headers = shapes.render(error)
    assert (code, headers["Content-Type"]) == (status, "application/json")
    assert orjson.loads(body) == {"msg": "x (field f: expected e)" if error.field else "x", "status_code": status}
    assert ("Retry-After" in headers) == (status in (429, 503))


def test_no_secret_comes_back_in_an_error() -> None:
    token = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
    assert token.encode() not in shapes.render(errors.Invalid("There is no such field.", field=token, expected="e"))[1]


def test_a_drs_uri_names_no_port() -> None:
    assert shapes.uri(shapes.host_of("https://drs.example.org:8443"), str(UUID(int=0))) == f"drs://drs.example.org/{UUID(int=0)}"
