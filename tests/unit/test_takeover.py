"""What another service's images become: tables of what is kept, mapped and left out."""

from __future__ import annotations

from typing import Any

import pytest

from broker.cli.takeover import Location, plan, without_user
from broker.model import Store

WEED = Store(id=1, name="weed", kind="s3", site="eu", endpoint="http://s3.example:8333", settings={"bucket": "glance"})
SWIFT = Store(
    id=2, name="swift-1", kind="swift", site="eu", endpoint="https://swift.example", settings={"account": "AUTH_g", "container": "images"}
)
ID = "6ecbb4be-0000-4000-8000-000000000000"
IMAGE: dict[str, Any] = {
    "id": ID, "name": "n", "status": "active", "visibility": "public", "owner": "p1", "size": 5,
    "checksum": "A" * 32, "os_hash_algo": "sha512", "os_hash_value": "b" * 128, "disk_format": "qcow2", "container_format": "bare",
    "protected": True, "os_hidden": False, "min_disk": 2,
    "min_ram": 0, "tags": ["y", "x"], "created_at": "2020-01-01T00:00:00Z", "updated_at": "2020-01-01T00:00:00Z", "virtual_size": None,
    "self": "/v2/images/x", "file": "/v2/images/x/file", "schema": "/v2/schemas/image", "direct_url": "s3://a:b@s3.example:8333/glance/k",
    "stores": "old", "os_type": "linux", "os_glance_import_task": "t", "hw_number": 5,
    "locations": [{"url": f"s3://ak:s/k@s3.example:8333/glance/{ID}", "metadata": {"store": "old"}}],
}  # fmt: skip


def test_an_image_is_kept_as_it_is() -> None:
    planned = plan(IMAGE, [WEED, SWIFT], {})
    assert planned.request == {
        "id": ID, "name": "n", "visibility": "public", "project": "p1", "disk_format": "qcow2", "container_format": "bare",
        "protected": True, "min_disk": 2, "tags": ["x", "y"], "properties": {"os_type": "linux"},
    }  # fmt: skip
    assert planned.digests == {"md5": "a" * 32, "sha512": "b" * 128}
    assert (planned.reason, planned.unmapped, planned.deactivated) == ("", (), False)


@pytest.mark.parametrize(
    ("url", "mapped", "store", "key"),
    [
        ("s3://s3.example:8333/glance/k", {}, "weed", "k"),
        ("s3+http://ak:sk@s3.example:8333/glance/k", {}, "weed", "k"),
        ("swift+https://swift.example/v1/AUTH_g/images/k", {}, "swift-1", "k"),
        ("swift+config://ref1/images/k", {"swift+config://ref1/images": "swift-1"}, "swift-1", "k"),
        (
            "swift+https://t%3Au:secret@keystone:5000/v3/images/k%20l",
            {"swift+https://keystone:5000/v3/images/": "swift-1"},
            "swift-1",
            "k l",
        ),
        ("file:///var/lib/glance/images/k", {"file:///var/lib/glance/images": "weed"}, "weed", "k"),
        ("swift+config://ref1/images/k", {"swift+config://ref1": "weed", "swift+config://ref1/images": "swift-1"}, "swift-1", "k"),
    ],
)
def test_locations_are_mapped(url: str, mapped: dict[str, str], store: str, key: str) -> None:
    planned = plan({**IMAGE, "locations": [{"url": url, "metadata": {}}]}, [WEED, SWIFT], mapped)
    (found,) = planned.locations
    assert (found.store, found.key) == (store, key)
    assert isinstance(found, Location)


@pytest.mark.parametrize(
    ("url", "mapped"),
    [
        ("rbd://fsid/pool/image/snap", {}),
        ("swift+config://ref1/images-private/k", {"swift+config://ref1/images": "swift-1"}),
        ("swift+config://ref1/images/../other/k", {"swift+config://ref1/images": "swift-1"}),
        ("swift+config://ref1/images/", {"swift+config://ref1/images": "swift-1"}),
        ("s3://user:secret@elsewhere/glance/k", {}),
    ],
)
def test_what_no_store_has_is_told_without_its_secrets(url: str, mapped: dict[str, str]) -> None:
    planned = plan({**IMAGE, "locations": [{"url": url, "metadata": {}}]}, [WEED, SWIFT], mapped)
    assert (planned.locations, planned.reason) == ((), "no registered store has its bytes")
    assert len(planned.unmapped) == 1
    assert "secret" not in repr(planned)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": "queued", "locations": []}, ""),
        ({"status": "deactivated"}, ""),
        ({"status": "saving"}, "its status is saving"),
        ({"status": "killed"}, "its status is killed"),
        ({"locations": []}, "its service shows no locations"),
        ({"id": "image-1"}, "its id is no UUID in lower case"),
        ({"id": ID.upper()}, "its id is no UUID in lower case"),
    ],
)
def test_who_is_left_out(change: dict[str, Any], reason: str) -> None:
    assert plan({**IMAGE, **change}, [WEED], {}).reason == reason


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://a:b@host/k", "s3://host/k"),
        ("swift+https://t:u:p%40@h:1/v3/c/k@1", "swift+https://h:1/v3/c/k@1"),
        ("swift://a@b:c@h/k", "swift://h/k"),
        ("s3://ak:s/e@host:80/b/k@1", "s3://host:80/b/k@1"),
        ("s3://[::1]:80/b/k@1", "s3://[::1]:80/b/k@1"),
        ("s3://[::1]/b/k@1", "s3://[::1]/b/k@1"),
        ("file:///a@b/k", "file:///a@b/k"),
        ("no url", "no url"),
    ],
)
def test_users_and_passwords_are_dropped(url: str, shown: str) -> None:
    assert without_user(url) == shown
