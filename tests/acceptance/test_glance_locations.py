"""Locations, copies and the cache as OpenStack's clients see them: python-glanceclient as it is, on SeaweedFS, Swift and a cache.

One broker for the whole file; agents are the client library's, in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import aiohttp
import glanceclient  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner
from glanceclient import exc
from yarl import URL

from broker.cli import exits
from broker.cli.main import main
from broker.model import Role
from broker.sign.tempurl import temp_url
from tests.parts.broker import PROJECT
from tests.parts.cluster import Brokers, brokers_on, disk_of, disk_store, ok, register, s3_client, s3_store, swift_store
from tests.parts.postgres import Postgres
from tests.parts.process import find_program
from tests.parts.seaweedfs import S3Part
from tests.parts.swift import SwiftPart
from tests.parts.traffic import carried

_numbers = itertools.count(1)


@dataclass(frozen=True)
class House:
    """A broker with the stores ``weed``, ``swift``, ``near`` (a cache), and ``vault``, a private one in a folder of weed's bucket."""

    brokers: Brokers
    weed: S3Part
    swift: SwiftPart

    @property
    def url(self) -> str:
        return self.brokers.running[0].url

    def client(self, role: Role = Role.MEMBER, project: str = PROJECT) -> Any:
        return glanceclient.Client("2", endpoint=self.url, token=self.brokers.token(role, project, f"{role}-{project}"))

    def image(self, client: Any, **fields: Any) -> str:
        """A queued image."""
        return str(client.images.create(name="i", disk_format="raw", container_format="bare", **fields).id)

    def at_weed(self, key: str, content: bytes) -> str:
        """An object that somebody put there behind the broker's back; its URL."""
        s3_client(self.weed).put_object(Bucket=self.weed.bucket, Key=key, Body=content, ChecksumAlgorithm="SHA256")
        return f"s3://{self.weed.endpoint.partition('//')[2]}/{self.weed.bucket}/{key}"

    def at_swift(self, key: str, content: bytes) -> str:
        path = f"/v1/{self.swift.account}/{self.swift.container}/{key}"
        url = temp_url("PUT", self.swift.endpoint, path, self.swift.temp_url_key, time.time() + 300)

        async def put() -> None:
            async with aiohttp.ClientSession() as session, session.put(URL(url, encoded=True), data=content) as response:
                assert response.status == 201

        asyncio.run(put())
        return f"swift+{self.swift.endpoint}{path}"

    def work(self) -> int:
        """Let an agent make every copy that waits. Returns how many."""
        done = self.run("agent", "--once")
        return sum(line.endswith("verified by the broker") for line in done.splitlines())

    def run(self, *arguments: str, ends: int = 0) -> str:
        """What `broker` prints for an agent, when it ends with the code `ends`."""
        environment = {"BROKER_URL": self.url, "BROKER_TOKEN": self.brokers.token(Role.SERVICE, "ops", "agent")}
        done = CliRunner().invoke(main, arguments, env=environment, catch_exceptions=False)
        assert done.exit_code == ends, done.output
        return done.output


def fresh(size: int = 70_000) -> bytes:
    return random.Random(f"locations {next(_numbers)}").randbytes(size)


@pytest.fixture(scope="module")
def house(postgres: Postgres, seaweedfs: S3Part, swift: SwiftPart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    place = tmp_path_factory.mktemp("locations")
    with contextlib.ExitStack() as stack:
        brokers = stack.enter_context(brokers_on(postgres.create(), place, 1))
        disk = stack.enter_context(disk_of(brokers, place / "disk", "near"))
        near = disk_store(disk, "near")
        near["settings"]["cache"] = "yes"
        vault = s3_store(brokers, seaweedfs, "vault", exposure="service")
        vault["settings"]["prefix"] = "vault/"
        asyncio.run(register(brokers, s3_store(brokers, seaweedfs), swift_store(brokers, swift), near, vault))
        yield House(brokers, seaweedfs, swift)


# -- locations


def test_the_first_location_is_what_the_image_is(house: House) -> None:
    glance, content = house.client(), fresh()
    id = house.image(glance)
    sha256 = hashlib.sha256(content).hexdigest()
    url = house.at_weed(f"{PROJECT}/{id}", content)
    with pytest.raises(exc.HTTPConflict, match="differs"):
        glance.images.add_image_location(id, url, {"os_hash_algo": "sha256", "os_hash_value": "0" * 64})
    assert glance.images.get(id).status == "queued"
    made = glance.images.add_image_location(id, url, {"os_hash_algo": "sha256", "os_hash_value": sha256})
    assert (made.status, made.size, made.os_hash_algo, made.os_hash_value) == ("active", len(content), "sha256", sha256)
    assert (made.checksum, made.stores) == (hashlib.md5(content).hexdigest(), "weed")
    told = [{"url": "s3+http" + url[2:], "metadata": {"store": "weed"}}]
    assert made.locations == told
    assert glance.images.get_image_locations(id)[:] == told
    with pytest.raises(exc.HTTPConflict, match="active"):
        glance.images.add_image_location(id, url)
    # Swift tells the MD5 alone: what cannot be compared is not taken at its word.
    other = house.image(glance)
    url = house.at_swift(f"{PROJECT}/{other}", content)
    with pytest.raises(exc.HTTPConflict, match="it tells md5"):
        glance.images.add_image_location(other, url, {"os_hash_algo": "sha512", "os_hash_value": hashlib.sha512(content).hexdigest()})
    plain = glance.images.add_image_location(other, url)
    assert (plain.status, plain.checksum, plain.os_hash_algo) == ("active", hashlib.md5(content).hexdigest(), None)


def test_further_locations_hold_the_same_bytes(house: House) -> None:
    glance, content = house.client(), fresh()
    id = house.image(glance)
    first, second = house.at_weed(f"{PROJECT}/{id}", content), house.at_swift(f"{PROJECT}/{id}", content)
    glance.images.add_location(id, first, {}, {"os_hash_algo": "sha256", "os_hash_value": hashlib.sha256(content).hexdigest()})
    with pytest.raises(exc.HTTPConflict, match="differs"):
        glance.images.add_location(id, house.at_swift(f"{PROJECT}/{id}-other", fresh()), {})
    with pytest.raises(exc.HTTPBadRequest, match=r"metadata\.store"):
        glance.images.add_location(id, second, {"store": "weed"})
    wrong = {"checksum": "0" * 32, "os_hash_algo": "sha256", "os_hash_value": "0" * 64}
    with pytest.raises(exc.HTTPConflict, match="other bytes"):
        glance.images.add_location(id, second, {}, wrong)
    both = glance.images.add_location(id, second, {"store": "swift"})
    assert both.stores == "swift,weed"
    with pytest.raises(exc.HTTPConflict):
        glance.images.add_location(id, second, {})  # it is registered
    urls = [location["url"] for location in both.locations]
    assert glance.images.update_location(id, urls[1], {"store": "swift"}).locations == both.locations
    glance.images.delete_locations(id, {urls[0]})
    assert [each["url"] for each in glance.images.get(id).locations] == urls[1:]
    with pytest.raises(exc.HTTPConflict, match="register another"):
        glance.images.delete_locations(id, {urls[1]})
    assert s3_client(house.weed).head_object(Bucket=house.weed.bucket, Key=f"{PROJECT}/{id}"), "nobody delegated its deletion"


def test_who_sees_and_adds_locations(house: House) -> None:
    owner, other, service, admin = (
        house.client(*who) for who in ((Role.MEMBER,), (Role.MEMBER, "other"), (Role.SERVICE, "ops"), (Role.ADMIN,))
    )
    content = fresh()
    id = house.image(owner, visibility="community")
    url = house.at_weed(f"volumes/{id}", content)
    for refused, status in ((owner, exc.HTTPForbidden), (other, exc.HTTPForbidden), (house.client(Role.READER), exc.HTTPForbidden)):
        with pytest.raises(status):
            refused.images.add_image_location(id, url)
    service.images.add_image_location(id, url)  # Cinder's and Nova's way: the service brings what it made for somebody
    assert [each["url"] for each in service.images.get(id).locations] == ["s3+http" + url[2:]]
    assert admin.images.get(id).locations == service.images.get(id).locations
    for told_less in (owner, other):
        image = told_less.images.get(id)
        assert (image.locations, image.stores, image.status) == ([], "weed", "active")
    with pytest.raises(exc.HTTPForbidden):
        other.images.add_location(id, house.at_weed(f"other/{id}", content), {})

    # A private store is none for members, whatever is there; a wider store that holds its folder names it by its own key.
    hidden, absent = (_refusal(owner, house.image(owner), f"{house.at_weed('x', b'x')[:-1]}{key}") for key in ("vault/k", "nowhere/k"))
    assert hidden == absent
    service.images.add_location(id, house.at_weed(f"vault/{id}", content), {"store": "vault"})
    assert service.images.get(id).stores == "vault,weed"
    assert other.images.get(id).stores == "weed"


def _refusal(client: Any, id: str, url: str) -> str:
    with pytest.raises(exc.HTTPForbidden) as refused:
        client.images.add_image_location(id, url)
    return str(refused.value)


def test_no_url_reaches_anything_else(house: House) -> None:
    glance = house.client(Role.ADMIN)
    id = house.image(glance)
    host = house.weed.endpoint.partition("//")[2]
    for url in (
        "http://169.254.169.254/latest/meta-data", "file:///etc/passwd", f"s3://user:secret@{host}/{house.weed.bucket}/k",
        f"s3://{host}/other-bucket/k", f"s3://{host}/{house.weed.bucket}/../k", f"s3://{host}/{house.weed.bucket}/k?x=1",
        f"http://{host}.evil/{house.weed.bucket}/k", "swift+config://ref/container/k", "k", "",
    ):  # fmt: skip
        with pytest.raises(exc.HTTPBadRequest, match="url") as refused:
            glance.images.add_image_location(id, url)
        assert "secret" not in str(refused.value)
    with pytest.raises(exc.HTTPConflict, match="no object"):
        glance.images.add_image_location(id, f"s3://{host}/{house.weed.bucket}/not-there")
    with pytest.raises(exc.HTTPBadRequest, match="validation_data"):
        glance.images.add_image_location(id, house.at_weed("k", b"k"), {"os_hash_algo": "crc32", "os_hash_value": "00"})
    with pytest.raises(exc.HTTPConflict, match="verified"):
        glance.images.add_image_location(id, house.at_weed("empty", b""))
    with pytest.raises(exc.HTTPNotFound):
        glance.images.add_image_location(str(uuid4()), f"s3://{host}/{house.weed.bucket}/k")
    assert glance.images.get(id).status == "queued"


@pytest.mark.parametrize(
    ("operations", "status"),
    [
        ([{"op": "add", "path": "/locations/0", "value": {"url": "x"}}], exc.HTTPBadRequest),
        ([{"op": "add", "path": "/locations/-", "value": {"url": "x", "metadata": {"a": 1}}}], exc.HTTPBadRequest),
        ([{"op": "remove", "path": "/locations/7"}], exc.HTTPConflict),
        ([{"op": "remove", "path": "/locations/-"}], exc.HTTPBadRequest),
        ([{"op": "remove", "path": "/locations"}], exc.HTTPBadRequest),
        ([{"op": "replace", "path": "/locations/0", "value": {}}], exc.HTTPBadRequest),
        ([{"op": "replace", "path": "/locations", "value": []}, {"op": "replace", "path": "/name", "value": "n"}], exc.HTTPBadRequest),
        ([{"op": "replace", "path": "/locations", "value": [{"url": "x", "metadata": {}}] * 2}], exc.HTTPBadRequest),
        ([{"op": "replace", "path": "/stores", "value": "weed"}], exc.HTTPForbidden),
    ],
)  # fmt: skip
def test_patches_of_locations_that_cannot_be(house: House, operations: list[dict[str, Any]], status: type[Exception]) -> None:
    glance = house.client()
    with pytest.raises(status):
        glance.images._send_image_update_request(house.image(glance), operations)


# -- stores, imports, tasks


def test_copies_are_asked_for_and_seen(house: House) -> None:
    glance, content = house.client(), fresh(20_000_000)
    assert [(each["id"], "description" in each) for each in glance.images.get_stores_info()["stores"]] == [
        ("near", True), ("swift", True), ("weed", True),
    ]  # fmt: skip
    with pytest.raises(exc.HTTPForbidden):
        glance.images.get_stores_info_detail()
    details = {each["id"]: each for each in house.client(Role.ADMIN).images.get_stores_info_detail()["stores"]}
    assert (details["weed"]["type"], details["weed"]["properties"]["bucket"], set(details)) == (
        "s3", house.weed.bucket, {"near", "swift", "vault", "weed"},
    )  # fmt: skip
    assert glance.images.get_import_info()["import-methods"]["value"] == ["glance-direct", "copy-image"]
    id = house.image(glance)
    glance.images.add_image_location(id, house.at_weed(f"{PROJECT}/{id}", content))
    for wrong, error in (
        ({"method": "web-download", "uri": "http://evil/"}, exc.HTTPBadRequest),
        ({"method": "glance-direct"}, exc.HTTPConflict),  # nothing is staged
        ({"method": "copy-image", "stores": ["nowhere"]}, exc.HTTPBadRequest),
        ({"method": "copy-image", "stores": ["vault"]}, exc.HTTPBadRequest),
        ({"method": "copy-image", "stores": ["weed"]}, exc.HTTPBadRequest),
    ):
        with pytest.raises(error):
            glance.images.image_import(id, **wrong)
    with pytest.raises(exc.HTTPConflict):
        glance.images.image_import(house.image(glance), "copy-image", stores=["swift"])
    glance.images.image_import(id, "copy-image", stores=["swift", "weed"])
    image = glance.images.get(id)
    assert (image.stores, image.os_glance_importing_to_stores) == ("weed", "swift")
    (task,) = glance.images.get_associated_image_tasks(id)["tasks"]
    assert (task["status"], task["owner"], task["input"]["import_req"]["stores"]) == ("pending", PROJECT, ["swift"])
    assert house.run("ls", "copies", "--state", "queued").split("\t")[1:5] == [id, "swift", "origin", "queued"]
    read, written = carried(house.brokers.running[0].pid)
    assert "No such store" in house.run("agent", "--once", "--to", "nowhere", ends=exits.NOT_FOUND)
    assert house.work() == 1
    read, written = (now - before for now, before in zip(carried(house.brokers.running[0].pid), (read, written), strict=True))
    print(f"an agent copied {len(content)} bytes; the broker read {read} and wrote {written}")
    assert read + written < 1_000_000 < len(content), "an agent's bytes go from store to store"
    image = glance.images.get(id)
    assert (image.stores, "os_glance_importing_to_stores" in image) == ("swift,weed", False)
    assert glance.images.get_associated_image_tasks(id)["tasks"][0]["status"] == "success"

    glance.images.delete_from_store("weed", id)
    assert glance.images.get(id).stores == "swift"
    for store, error in (
        ("weed", exc.HTTPNotFound),
        ("nowhere", exc.HTTPNotFound),
        ("vault", exc.HTTPNotFound),
        ("swift", exc.HTTPConflict),
    ):
        with pytest.raises(error):
            glance.images.delete_from_store(store, id)
    assert glance.info.get_usage()["image_count_total"]["usage"] > 0


# -- the cache


def test_the_cache(house: House) -> None:
    glance, member, content = house.client(Role.ADMIN), house.client(), fresh()
    id = house.image(member)
    for forbidden in (member.cache.list, lambda: member.cache.queue(id), lambda: member.cache.clear("both"), member.cache.prune):
        with pytest.raises(exc.HTTPForbidden):
            forbidden()
    with pytest.raises(exc.HTTPBadRequest):
        glance.cache.queue(id)  # no bytes
    with pytest.raises(exc.HTTPNotFound):
        glance.cache.queue(str(uuid4()))
    member.images.add_image_location(id, house.at_weed(f"{PROJECT}/{id}", content))
    glance.cache.queue(id)
    glance.cache.queue(id)
    assert glance.cache.list()["queued_images"] == [id]
    assert house.work() == 1
    (cached,) = glance.cache.list()["cached_images"]
    assert (cached["image_id"], cached["size"], glance.cache.list()["queued_images"]) == (id, len(content), [])
    assert glance.cache.list_cached_nodes(id)[:] == [_endpoint(house)]
    assert member.images.get(id).stores == "near,weed"

    # The command shows it; unknown hits and times are said to be so.
    environment = {**os.environ, "OS_AUTH_TOKEN": house.brokers.token(Role.ADMIN), "OS_IMAGE_URL": house.url, "PYTHONWARNINGS": "ignore"}
    glance_program = find_program("glance", "pip install -e '.[test]'")
    shown = subprocess.run(
        [glance_program, "cache-list"], capture_output=True, text=True, timeout=60, check=True, env=environment
    ).stdout  # fmt: skip
    assert [cell.strip() for cell in shown.splitlines()[3].split("|")[1:4]] == [id, "cached", "N/A"]

    glance.cache.delete(id)
    assert glance.cache.list()["cached_images"] == []
    glance.cache.queue(id)
    glance.cache.clear("queue")
    assert house.work() == 0
    with pytest.raises(exc.HTTPBadRequest):
        glance.cache.clear("everything")
    glance.cache.queue(id)
    assert house.work() == 1
    assert glance.cache.prune()["total_files_pruned"] == 0
    glance.cache.clean()
    glance.cache.clear("both")
    assert glance.cache.list()["cached_images"] == []
    assert member.images.get(id).stores == "weed", "the image itself is untouched"


def _endpoint(house: House) -> str:
    async def ask() -> str:
        async with aiohttp.ClientSession() as session:
            return str(ok(await house.brokers.api(session, Role.ADMIN).get("/v1/stores/near"))["endpoint"])

    return asyncio.run(ask())
