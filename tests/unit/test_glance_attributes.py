"""Images in Glance's words, and back; errors in its shape."""

from __future__ import annotations

from typing import Any

import glanceclient.exc  # type: ignore[import-untyped]
import openstack.exceptions
import orjson
import pytest
import requests

from broker import errors
from broker.web.glance import attributes, documents, fault

ID = "6ecbb4be-0000-4000-8000-000000000000"
MD5, SHA256, SHA512 = "a" * 32, "b" * 64, "c" * 128


def native(**more: Any) -> dict[str, Any]:
    """An image as GET /v1/images/ID shows it."""
    return {
        "id": ID, "name": "debian", "project": "demo", "visibility": "private", "status": "active", "properties": {"os_type": "linux"},
        "tags": ["t"], "protected": False, "hidden": True, "min_disk": 1, "min_ram": 2, "disk_format": None, "container_format": None,
        "blobs": {"raw": blob(9, sha512=SHA512), "qcow2": blob(5, md5=MD5, sha256=SHA256)},
        "created_at": "2026-01-02T03:04:05Z", "updated_at": "2026-01-02T03:04:06Z", **more,
    }  # fmt: skip


def blob(size: int | None, state: str = "active", **digests: str) -> dict[str, Any]:
    return {"id": ID, "size": size, "state": state, "digests": digests}


def test_what_is_shown_is_what_the_schema_has() -> None:
    shown = attributes.show(native(), ["east", "west"])
    named = set(documents.IMAGE_PROPERTIES) - {"direct_url", "locations"}
    assert set(shown) == named | {"os_type"}
    assert shown | {"id": ID, "owner": "demo", "os_hidden": True, "stores": "east,west", "file": f"/v2/images/{ID}/file"} == shown


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        ({}, {"disk_format": "qcow2", "container_format": "bare", "size": 5, "os_hash_algo": "sha256", "os_hash_value": SHA256}),
        ({}, {"checksum": MD5}),
        ({"disk_format": "raw"}, {"disk_format": "raw", "size": 9, "checksum": None, "os_hash_algo": "sha512", "os_hash_value": SHA512}),
        ({"disk_format": "iso", "container_format": "ova"}, {"disk_format": "iso", "container_format": "ova", "size": 5}),
        ({"blobs": {"raw": blob(5, md5=MD5)}}, {"checksum": MD5, "os_hash_algo": None, "os_hash_value": None}),
        ({"blobs": {"raw": blob(5, sha1="0" * 40)}}, {"size": 5, "checksum": None, "os_hash_algo": None, "os_hash_value": None}),
        (
            {"status": "queued", "blobs": {"raw": blob(5, "queued", md5=MD5)}},
            {"status": "queued", "size": None, "checksum": None, "disk_format": "raw", "container_format": None},
        ),
        ({"blobs": {}, "status": "queued"}, {"disk_format": None, "container_format": None, "size": None}),
        ({"blobs": {"qcow2": blob(None, "queued"), "raw": blob(9)}, "disk_format": "qcow2"}, {"disk_format": "qcow2", "size": 9}),
        ({"name": ""}, {"name": None}),
        ({"status": "pending"}, {"status": "deactivated"}),
        ({"properties": {"id": "evil", "stores": "x", "direct_url": "http://x"}}, {"id": ID}),
    ],
)  # fmt: skip
def test_what_is_shown(image: dict[str, Any], shown: dict[str, Any]) -> None:
    found = attributes.show(native(**image))
    assert found | shown == found
    assert "stores" not in found
    assert "direct_url" not in found


def test_a_new_image() -> None:
    body = {"id": ID.upper(), "name": None, "tags": ["a", "a"], "os_hidden": True, "owner": "other", "min_ram": 5, "os_type": "linux"}
    assert attributes.read_new(body) == {
        "id": ID, "name": "", "visibility": "shared", "tags": ["a"], "hidden": True, "project": "other", "min_ram": 5,
        "properties": {"os_type": "linux"},
    }  # fmt: skip
    assert attributes.read_new({}) == {"name": "", "visibility": "shared", "properties": {}}


@pytest.mark.parametrize(
    ("body", "error", "field"),
    [
        ({"id": "no uuid"}, errors.Invalid, "id"),
        ({"id": None}, errors.Invalid, "id"),
        ({"name": 5}, errors.Invalid, "name"),
        ({"visibility": "everyone"}, errors.Invalid, "visibility"),
        ({"os_type": ["linux"]}, errors.Invalid, "os_type"),
        ({"": "x"}, errors.Invalid, None),
        ({"size": 5}, errors.Forbidden, None),
        ({"status": "active"}, errors.Forbidden, None),
        ({"stores": "east"}, errors.Forbidden, None),
        ({"deleted": "x"}, errors.Forbidden, None),
        ({"os_glance_import_task": "x"}, errors.Forbidden, None),
        ({"locations": []}, errors.Forbidden, "locations"),
        ({f"p{number}": "x" for number in range(attributes.MAX_PROPERTIES + 1)}, errors.TooLarge, None),
        ({f"p{number}": "x" for number in range(10_000)}, errors.TooLarge, None),
        ({"tags": [str(number) for number in range(attributes.MAX_TAGS + 1)]}, errors.TooLarge, None),
    ],
)
def test_a_new_image_is_refused(body: Any, error: type[errors.BrokerError], field: str | None) -> None:
    with pytest.raises(error) as raised:
        attributes.read_new(body)
    assert raised.value.field == field


def test_as_many_properties_as_may_be() -> None:
    assert len(attributes.read_new({f"p{number}": "x" for number in range(attributes.MAX_PROPERTIES)})["properties"]) == 128


@pytest.mark.parametrize("kind", errors.problem_types().values(), ids=lambda kind: kind.type)
def test_both_clients_read_every_error(kind: type[errors.BrokerError]) -> None:
    error = kind("It went wrong.", field="name", expected="another one")
    status, body, headers = fault.render(error, True)
    response = requests.Response()
    response.status_code, response._content = status, body
    response.headers.update({name.lower(): value for name, value in headers.items()})
    told = "It went wrong. Field: name. Expected: another one."
    if kind is errors.PreconditionFailed:
        told = orjson.loads(body)["error"]["message"]
    assert status == {errors.PreconditionFailed: 409, errors.Busy: 503, errors.QuotaExceeded: 503}.get(kind, kind.status)
    assert told in str(glanceclient.exc.from_response(response, body))
    with pytest.raises(openstack.exceptions.HttpException) as raised:
        openstack.exceptions.raise_from_response(response)
    assert (raised.value.status_code, raised.value.details) == (status, told)
    assert orjson.loads(body)["error"]["code"] == status


def test_an_error_repeats_no_secret() -> None:
    _, body, _ = fault.render(errors.Invalid("There is no such field.", field="Bearer eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln"))
    assert b"eyJzdWIiOiJhIn0" not in body
