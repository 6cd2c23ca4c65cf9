"""OpenStack's own clients as they are: python-glanceclient, openstacksdk and the command lines of both.

One broker, a SeaweedFS that is trusted with tokens and a storeside that is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import itertools
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import glanceclient  # type: ignore[import-untyped]
import keystoneauth1.discover
import keystoneauth1.session
import keystoneauth1.token_endpoint
import openstack
import orjson
import pytest
from glanceclient import exc
from yarl import URL

from broker.model import Role
from tests.parts import traffic
from tests.parts.broker import PROJECT, Api
from tests.parts.cluster import Brokers, brokers_on, disk_of, disk_store, ok, put, register, s3_store
from tests.parts.postgres import Postgres
from tests.parts.process import find_program
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart

PATCH = "application/openstack-images-v2.1-json-patch"
ID = "6ecbb4be-0000-4000-8000-000000000000"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class House:
    """A broker, and clients of its Glance."""

    brokers: Brokers
    mortal: StoresidePart
    """A store that is trusted with tokens, and that a test kills."""

    @property
    def url(self) -> str:
        return self.brokers.running[0].url

    def client(self, role: Role = Role.MEMBER, project: str = PROJECT) -> Any:
        return glanceclient.Client("2", endpoint=self.url, token=self.brokers.token(role, project))

    def cloud(self, role: Role = Role.MEMBER) -> Any:
        return openstack.connect(
            load_yaml_config=False, load_envvars=False, auth_type="admin_token",
            auth={"endpoint": self.url, "token": self.brokers.token(role)}, image_endpoint_override=self.url, image_api_version="2",
        ).image  # fmt: skip

    def run(self, *command: str, fails: bool = False) -> str:
        """What a command line prints, that ends well or `fails`. Its token is in the environment, where no list of processes shows it."""
        token = self.brokers.token()
        told = {"OS_AUTH_TOKEN": token, "OS_IMAGE_URL": self.url}
        if command[0] == "openstack":
            told = {"OS_AUTH_TYPE": "admin_token", "OS_TOKEN": token, "OS_ENDPOINT": self.url, "OS_IMAGE_ENDPOINT_OVERRIDE": self.url}
        program = find_program(command[0], "pip install -e '.[test]'")
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **told, "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        printed = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, f"{done.returncode}:\n{printed}"
        return printed

    def upload(self, *stores: str, content: bytes | None = None) -> tuple[str, bytes]:
        """A new image with its bytes at these stores; its id."""
        content = content or fresh()

        async def bring() -> str:
            async with aiohttp.ClientSession() as session:
                done = await put(self.brokers.api(session), session, content, *stores)
                (image,) = ok(await self.brokers.api(session).get(f"/v2/images?os_hash_value={done['blob']['digests']['sha256']}"))[
                    "images"
                ]
                return str(image["id"])

        return asyncio.run(bring()), content


def read(data: Any) -> bytes:
    """What python-glanceclient gives as the bytes of an image."""
    return b"".join(data.wrapped)


def fresh(size: int = 300_000) -> bytes:
    return random.Random(f"glance {next(_numbers)}").randbytes(size)


@pytest.fixture(scope="module")
def house(postgres: Postgres, seaweedfs: S3Part, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    place = tmp_path_factory.mktemp("glance")
    with contextlib.ExitStack() as stack:
        brokers = stack.enter_context(brokers_on(postgres.create(), place, 1))
        disk, mortal = (stack.enter_context(disk_of(brokers, place / name, name)) for name in ("disk", "mortal"))
        stores = [s3_store(brokers, seaweedfs), disk_store(disk), disk_store(mortal, "mortal")]
        for store in (stores[0], stores[2]):
            store["settings"]["tokens"] = "trusted"
        asyncio.run(register(brokers, *stores))
        yield House(brokers, mortal)


# -- python-glanceclient


def test_images_come_change_and_go(house: House) -> None:
    glance = house.client()
    assert glance.schemas.get("image").name == "image"
    id = str(uuid4())
    made = glance.images.create(
        id=id, name="first", disk_format="qcow2", container_format="bare", min_disk=1, min_ram=64, tags=["a"], os_type="linux", gone="soon"
    )
    assert (made.id, made.status, made.visibility, made.os_type, made.owner) == (id, "queued", "shared", "linux", PROJECT)
    assert (made.size, made.checksum, made.os_hash_value) == (None, None, None)
    changed = glance.images.update(id, remove_props=["gone"], name="second", os_type="bsd", new="1", visibility="private", protected=True)
    assert (changed.name, changed.os_type, changed.new, changed.visibility) == ("second", "bsd", "1", "private")
    assert "gone" not in changed
    glance.image_tags.update(id, "b c")
    glance.image_tags.delete(id, "a")
    assert glance.images.get(id).tags == ["b c"]
    with pytest.raises(exc.HTTPNotFound):
        glance.image_tags.delete(id, "a")
    with pytest.raises(exc.HTTPForbidden, match="protected"):
        glance.images.delete(id)
    glance.images.update(id, protected=False)
    glance.images.delete(id)
    with pytest.raises(exc.HTTPNotFound, match="No such image"):
        glance.images.get(id)


def test_lists(house: House) -> None:
    glance, mark = house.client(), uuid4().hex
    ids = {
        name: glance.images.create(name=name, mark=mark, disk_format=format, container_format="bare", tags=[name], min_ram=ram).id
        for name, format, ram in (("a", "raw", 3), ("b", "raw", 2), ("c", "qcow2", 1))
    }

    def names(*, page_size: int = 2, sort: str = "name:asc", **filters: Any) -> list[str]:
        return [image.name for image in glance.images.list(page_size=page_size, sort=sort, filters={"mark": mark, **filters})]

    assert names() == ["a", "b", "c"]  # two pages
    assert names(sort="name:desc", page_size=1) == ["c", "b", "a"]
    assert names(sort="disk_format:asc,name:desc", page_size=1) == ["c", "b", "a"]
    assert names(disk_format="raw") == ["a", "b"]
    assert names(name="in:a,c") == ["a", "c"]
    assert names(tag=["b"]) == ["b"]
    assert names(tag=["b", "c"]) == []
    assert names(min_ram_min=2) == ["a", "b"]
    assert names(created_at="gte:2026-01-01T00:00:00Z") == ["a", "b", "c"]
    assert names(created_at="lt:2026-01-01T00:00:00Z") == []
    assert names(visibility="private") == []
    assert names(owner="somebody") == []
    glance.images.update(ids["b"], os_hidden=True)
    assert names() == ["a", "c"]
    assert names(os_hidden=True) == ["b"]
    assert [image.name for image in glance.images.list(limit=1, sort="name:asc", filters={"mark": mark})] == ["a"]
    assert [image.name for image in house.client(project="other").images.list(filters={"mark": mark})] == []
    with pytest.raises(exc.HTTPNotFound):
        house.client(project="other").images.get(ids["a"])


def test_bytes_come_from_the_store(house: House) -> None:
    glance = house.client()
    id, content = house.upload("weed", "disk")
    image = glance.images.get(id)
    assert (image.status, image.size, image.os_hash_algo) == ("active", len(content), "sha256")
    assert image.os_hash_value == hashlib.sha256(content).hexdigest()
    assert read(glance.images.data(id)) == content
    assert read(glance.images.data(id, prefer=["disk", "weed", "nowhere"])) == content


def test_no_byte_passes_through_the_broker(house: House) -> None:
    glance, broker = house.client(), house.brokers.running[0]
    traffic.check(broker.pid, house.url, house.brokers.token())
    before = sum(traffic.carried(broker.pid))
    id, content = house.upload("weed", content=fresh(16 << 20))
    for _ in range(3):
        assert read(glance.images.data(id)) == content
    carried = sum(traffic.carried(broker.pid)) - before
    print(f"{4 * len(content)} bytes moved, the broker carried {carried}")
    assert 1_000 < carried < 1_000_000


def test_no_token_goes_to_a_store_that_is_not_trusted(house: House) -> None:
    id, content = house.upload("disk")
    with pytest.raises(exc.HTTPConflict, match=r"disk \(not trusted with tokens\).*tokens: trusted"):
        house.client().images.data(id)
    with pytest.raises(openstack.exceptions.InvalidResponse, match="mismatch"):  # it never looks at the status
        house.cloud().download_image(id)
    assert content


def test_a_full_store_is_waited_for(house: House) -> None:
    """Nova and the others give up at once: the broker waits for them."""
    id, content = house.upload("weed")

    async def wait() -> int:
        async with aiohttp.ClientSession() as session:
            admin, other = house.brokers.api(session, Role.ADMIN), house.brokers.api(session, subject="first")

            async def slots(count: int | None) -> None:
                store = await admin.get("/v1/stores/weed")
                ok(await admin.patch("/v1/stores/weed", {"read_slots": count}, store.etag))

            await slots(1)
            try:
                held = ok(await other.post("/v1/tickets", {"operation": "download", "image": id}), 201)
                headers = {"X-Auth-Token": house.brokers.token(subject="second")}
                asked = asyncio.create_task(session.get(f"{house.url}/v2/images/{id}/file", headers=headers, allow_redirects=False))
                async with asyncio.timeout(25):
                    while await waiting(session) < 1:
                        await asyncio.sleep(0.05)
                await other.delete(f"/v1/tickets/{held['id']}")
                async with await asked as answer:
                    return answer.status
            finally:
                await slots(None)

    async def waiting(session: aiohttp.ClientSession) -> float:
        async with session.get(f"{house.brokers.running[0].metrics_url}/metrics") as answer:
            samples = re.findall(r'^broker_waiting\{direction="read",store="weed"\} (\S+)$', await answer.text(), re.MULTILINE)
        return sum(map(float, samples))

    assert asyncio.run(wait()) == 302
    assert content


def test_who_asks_again_is_sent_elsewhere(house: House) -> None:
    """These clients know one address at a time and report nothing: after a dead store the next request has to find another."""
    glance = house.client()
    id, content = house.upload("mortal", "weed")

    async def ask() -> list[str]:
        headers = {"X-Auth-Token": house.brokers.token(subject="another")}
        async with aiohttp.ClientSession(headers=headers) as session:
            found = []
            for _ in range(4):
                async with session.get(f"{house.url}/v2/images/{id}/file", allow_redirects=False) as answer:
                    assert answer.status == 302
                    found.append(URL(answer.headers["Location"]).authority)
            return found

    first, second, *again = asyncio.run(ask())
    assert first != second
    assert again == [first, second]
    os.kill(house.mortal.pid, signal.SIGKILL)
    try:
        data = glance.images.data(id)
    except exc.CommunicationError:
        data = glance.images.data(id)
    assert read(data) == content


def test_without_bytes(house: House) -> None:
    glance = house.client()
    image = glance.images.create(name="empty", disk_format="raw", container_format="bare")
    assert glance.images.data(image.id).wrapped is None
    with pytest.raises(exc.HTTPConflict, match="upload ticket"):
        glance.images.upload(image.id, io.BytesIO(b"x" * 140_000))
    assert glance.images.get(image.id).status == "queued"


def test_deactivated_images_are_given_to_nobody(house: House) -> None:
    admin, glance = house.client(Role.ADMIN), house.client()
    id, content = house.upload("weed")
    with pytest.raises(exc.HTTPForbidden):
        glance.images.deactivate(id)
    admin.images.deactivate(id)
    admin.images.deactivate(id)
    assert glance.images.get(id).status == "deactivated"
    with pytest.raises(exc.HTTPForbidden):
        glance.images.data(id)
    admin.images.reactivate(id)
    assert read(glance.images.data(id)) == content
    queued = glance.images.create(name="queued")
    with pytest.raises(exc.HTTPForbidden, match="queued"):
        admin.images.deactivate(queued.id)


def test_who_may_do_what(house: House) -> None:
    glance, reader, admin = house.client(), house.client(Role.READER), house.client(Role.ADMIN)
    image = glance.images.create(name="mine")
    with pytest.raises(exc.HTTPForbidden):
        reader.images.create(name="theirs")
    with pytest.raises(exc.HTTPForbidden):
        reader.images.update(image.id, name="theirs")
    with pytest.raises(exc.HTTPForbidden):
        glance.images.update(image.id, visibility="public")
    with pytest.raises(exc.HTTPForbidden):
        glance.images.update(image.id, owner="other")
    with pytest.raises(exc.HTTPUnauthorized):
        glanceclient.Client("2", endpoint=house.url, token="nonsense").images.get(image.id)
    assert admin.images.update(image.id, visibility="public", owner="other").owner == "other"
    assert glance.images.get(image.id).visibility == "public"
    with pytest.raises(exc.HTTPForbidden):
        glance.images.delete(image.id)


def test_the_command_line_of_glance(house: House, tmp_path: Path) -> None:
    """What it says when bytes cannot be sent is what the broker told."""
    id, content = house.upload("weed")
    (tmp_path / "new").write_bytes(content)
    described = ["--disk-format", "raw", "--container-format", "bare", "--property", "k=v"]
    created = house.run("glance", "image-create", "--name", "by-hand", *described, "--file", str(tmp_path / "new"), fails=True)
    assert "| k                | v  " in created
    assert "| status           | queued" in created
    assert "HTTP The broker carries no bytes. Ask for an upload ticket (POST /v1/tickets with this image, or `broker put`)" in created
    house.run("glance", "image-download", "--file", str(tmp_path / "image"), id)
    assert (tmp_path / "image").read_bytes() == content


# -- openstacksdk


def test_openstacksdk(house: House, tmp_path: Path) -> None:
    cloud, admin = house.cloud(), house.cloud(Role.ADMIN)
    id, content = house.upload("weed")
    image = cloud.get_image(id)
    assert (image.hash_value, image.size, image.status) == (hashlib.sha256(content).hexdigest(), len(content), "active")
    cloud.download_image(image, output=str(tmp_path / "image"), stream=True)
    assert (tmp_path / "image").read_bytes() == content
    changed = cloud.update_image(image, name="by sdk", min_disk=3, os_type="linux", is_protected=True)
    assert (changed.name, changed.min_disk, changed.is_protected) == ("by sdk", 3, True)
    assert cloud.find_image("by sdk").id == id
    assert [found.id for found in cloud.images(name="by sdk", is_protected=True, sort_key="name", sort_dir="asc")] == [id]
    cloud.add_tag(id, "sdk")
    assert [found.id for found in cloud.images(tag="sdk")] == [id]
    cloud.remove_tag(id, "sdk")
    admin.deactivate_image(id)
    with pytest.raises(openstack.exceptions.InvalidResponse, match="mismatch"):
        cloud.download_image(id)
    admin.reactivate_image(id)
    with pytest.raises(openstack.exceptions.ForbiddenException):
        cloud.delete_image(id)
    cloud.update_image(id, is_protected=False)
    cloud.delete_image(id)
    assert cloud.find_image("by sdk") is None


def test_versions_are_found_from_either_address(house: House) -> None:
    session = keystoneauth1.session.Session(auth=keystoneauth1.token_endpoint.Token(house.url, "unused"))
    for address in (house.url, f"{house.url}/versions", f"{house.url}/v2", f"{house.url}/v2/"):
        found = keystoneauth1.discover.Discover(session, address).version_data()
        assert {version["url"] for version in found} == {f"{house.url}/v2/"}
        assert [version["version"] for version in found if version["raw_status"] == "CURRENT"] == [(2, 18)]


def test_the_command_line_of_openstack(house: House) -> None:
    """Transcript: `openstack image show`."""
    id, content = house.upload("weed")
    shown = orjson.loads(house.run("openstack", "image", "show", id, "-f", "json"))
    assert (shown["status"], shown["size"], shown["properties"]["os_hash_algo"]) == ("active", len(content), "sha256")


# -- what no client sends


def test_patches_that_race(house: House) -> None:
    """Of patches that were decided on the same state one counts, the others are told; none is half done."""

    async def race() -> None:
        async with aiohttp.ClientSession() as session:
            api = Api(house.url, session, house.brokers.token())
            path = ok(await api.post("/v2/images", {"name": "raced", "count": "0"}), 201)["self"]
            sent = [
                api.send("PATCH", path, [{"op": "add", "path": f"/p{number}", "value": "x"}], headers={"Content-Type": PATCH})
                for number in range(20)
            ]
            answers = await asyncio.gather(*sent)
            assert {answer.status for answer in answers} <= {200, 409}
            won = {f"p{number}" for number, answer in enumerate(answers) if answer.status == 200}
            image = ok(await api.get(path))
            assert won == {name for name in image if name.startswith("p") and name[1:].isdigit()}
            assert won

    asyncio.run(race())
