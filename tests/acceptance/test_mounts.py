"""Shared mounts and volumes (M20, M21): what lies where the broker cannot look is observed by agents, offered only where a token or a
network proves that it is mounted, and read without the network."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from broker.client.api import Broker
from broker.client.download import Downloaded, download
from broker.client.sources import Wanted
from broker.model import Role
from broker.sign.token import TokenSigner, generate_key
from tests.parts import storeside
from tests.parts.broker import Api, RunningBroker, broker_on
from tests.parts.cluster import new_upload, ok, said, send
from tests.parts.process import find_program

HERE, ELSEWHERE = "eu/az1", "eu/az2"
FSID = "11111111-2222-3333-4444-555555555555"
CONTENT = secrets.token_bytes(3 << 20)
FILE = {"schemes": ["https", "http", "file"]}


@dataclass
class House:
    """A broker, a file server on the network, and a directory that all machines of `HERE` have."""

    broker: RunningBroker
    session: aiohttp.ClientSession
    mount: Path
    blob: str = ""

    def token(self, role: Role = Role.MEMBER, site: str | None = None) -> str:
        return self.broker.token(role, "demo", "alice", site=site)

    def api(self, role: Role = Role.MEMBER, site: str | None = None) -> Api:
        return Api(self.broker.url, self.session, self.token(role, site))

    async def offered(self, api: Api, **wishes: Any) -> tuple[dict[str, str], dict[str, str]]:
        """The URLs of a ticket by store, and why others are not in it. What is mounted elsewhere is told to who asks why, no ticket."""
        ticket = ok(await api.post("/v1/tickets", {"operation": "download", "blob": self.blob, **wishes}), 201)
        urls = {source["store"]: source["url"] for source in ticket["sources"]}
        why = ok(await api.post("/v1/tickets:explain", {"operation": "download", "blob": self.blob, **wishes}))
        out, told = ({each["store"]: each["reason"] for each in found["excluded"]} for found in (why, ticket))
        assert (told, set(urls)) == (
            {store: reason for store, reason in out.items() if reason != "not-mounted"},
            {each["store"] for each in why["candidates"]},
        )
        return urls, out

    async def register(self, key: str, content: bytes = CONTENT, **fields: Any) -> Any:
        """An agent's word on a file at the mount."""
        observed = {"size": len(content), "digests": {"sha256": hashlib.sha256(content).hexdigest()}}
        body = {"store": "nfs", "key": key, "observed": observed, **fields}
        return await self.api(Role.SERVICE).post(f"/v1/blobs/{self.blob}/replicas", body)

    async def get(self, target: Path, site: str | None = HERE, **wanted: Any) -> Downloaded:
        async with Broker(self.broker.url, self.token(site=site)) as broker:
            return await download(broker, Wanted(blob=UUID(self.blob), **wanted), target)


@pytest.fixture
async def house(database: str, tmp_path: Path) -> AsyncIterator[House]:
    mount, objects = tmp_path / "mount", tmp_path / "objects"
    mount.mkdir()
    objects.mkdir()
    async with broker_on(database, tmp_path) as broker, aiohttp.ClientSession() as session:
        house = House(broker, session, mount)
        admin = house.api(Role.ADMIN)
        starting = storeside.start(
            objects, audience="disk", signer=TokenSigner([generate_key("ES256", 0)], broker.url),
            keys=f"{broker.url}/.well-known/jwks.json",
        )  # fmt: skip
        disk = await asyncio.to_thread(starting.__enter__)
        for site in (HERE, ELSEWHERE):
            ok(await admin.post("/v1/sites", {"path": site}), 201)
        for store in (
            {"name": "disk", "kind": "http", "site": ELSEWHERE, "endpoint": disk.url, "internal": True},
            {"name": "nfs", "kind": "path", "site": HERE, "endpoint": f"file://{mount}"},
        ):
            ok(await admin.post("/v1/stores", store), 201)
        member = house.api()
        refused = (await member.post("/v1/tickets", new_upload(CONTENT, only=["nfs"]))).body["excluded"]
        assert {each["store"]: each["reason"] for each in refused} == {"nfs": "not-writable", "disk": "avoided"}
        ticket = ok(await member.post("/v1/tickets", new_upload(CONTENT)), 201)
        assert ticket["excluded"] == []
        assert await send(session, ticket["destinations"][0], CONTENT) == 201
        house.blob = ok(await member.post(f"/v1/tickets/{ticket['id']}/commit", said(CONTENT)))["blob"]["id"]
        yield house
        await asyncio.to_thread(starting.__exit__, None, None, None)


async def test_an_agent_says_what_lies_there_and_only_who_is_there_is_told(house: House) -> None:
    admin, service, path = house.api(Role.ADMIN), house.api(Role.SERVICE), f"/v1/blobs/{house.blob}/replicas"
    shown = ok(await admin.get("/v1/stores/nfs"))
    assert (shown["writable"], shown["abilities"]["reads"], shown["probe"][0]["result"]) == (False, False, "not tried")
    assert (await admin.patch("/v1/stores/nfs", {"writable": True}, '"1"')).body["field"] == "writable"

    # What is refused, and why.
    key, right = "images/disk.raw", {"size": len(CONTENT), "digests": {"sha256": hashlib.sha256(CONTENT).hexdigest()}}
    for api, body, status, field in (
        (service, {"store": "nfs", "key": key}, 400, "observed"),
        (service, {"store": "disk", "key": key, "observed": right}, 400, "observed"),
        (service, {"store": "nfs", "key": "../etc/passwd", "observed": right}, 400, "key"),
        (service, {"store": "nfs", "key": "/etc/passwd", "observed": right}, 400, "key"),
        (service, {"store": "nfs", "key": f"a/{'x' * 256}", "observed": right}, 400, "key"),
        (service, {"store": "nfs", "key": key, "observed": {"size": 1}}, 400, "observed"),
        (service, {"store": "nfs", "key": key, "observed": right, "deletable": True}, 403, "deletable"),
        (house.api(), {"store": "nfs", "key": "demo/x", "observed": right}, 403, "store"),
    ):
        reply = await api.post(path, body)
        assert (reply.status, reply.body["field"].partition(".")[0]) == (status, field), reply.body
    assert (await house.register(key, CONTENT[:-1])).status == 409
    assert (await service.post(path, {"store": "nfs", "key": key, "observed": {**right, "digests": {"md5": "0" * 32}}})).status == 409
    replica = ok(await house.register(key), 201)
    assert (replica["state"], replica["observed"]["by"], replica["observed"]["strength"]) == ("active", "agent", "sha256")

    # A name is told to who is proven to be there and says that it can open it.
    url, out = f"file://{house.mount}/{key}", {"nfs": "not-mounted"}
    for api, wishes, reason in (
        (house.api(), {}, "not-mounted"),
        (house.api(), {**FILE, "site": HERE}, "not-mounted"),
        (house.api(site=ELSEWHERE), FILE, "not-mounted"),
        (house.api(site="eu"), FILE, "not-mounted"),
        (house.api(site=HERE), {}, "scheme"),
    ):
        urls, out = await house.offered(api, **wishes)
        assert (set(urls), out) == ({"disk"}, {"nfs": reason})
    for site in (HERE, f"{HERE}/rack1/host7"):
        urls, out = await house.offered(house.api(site=site), **FILE)
        assert (urls["nfs"], set(urls), out) == (url, {"nfs", "disk"}, {})
    ok(await admin.patch("/v1/sites/eu%2Faz1", {"networks": ["127.0.0.0/8"]}, '"1"'))
    await house.broker.context.memory.catch_up()
    assert (await house.offered(house.api(), **FILE))[0]["nfs"] == url

    # Where there is nothing else, a ticket tells it too.
    nowhere = await house.api(site=ELSEWHERE).post("/v1/tickets", {"operation": "download", "blob": house.blob, **FILE, "avoid": ["disk"]})
    assert {each["store"]: each["reason"] for each in nowhere.body["excluded"]} == {"disk": "avoided", "nfs": "not-mounted"}

    # A ticket that has it can be refreshed, and what an agent sees later counts.
    ticket = ok(await house.api(site=HERE).post("/v1/tickets", {"operation": "download", "blob": house.blob, **FILE}), 201)
    again = ok(await house.api(site=HERE).post(f"/v1/tickets/{ticket['id']}/refresh"))
    assert "nfs" in {source["store"] for source in again["sources"]}
    id, etag = replica["id"], (await service.get(f"/v1/replicas/{replica['id']}")).etag
    assert (await service.patch(f"/v1/replicas/{id}", {"state": "active"}, etag)).body["field"] == "observed"
    wrong = {"size": len(CONTENT), "digests": {"sha256": "0" * 64}}
    assert (await house.api().patch(f"/v1/replicas/{id}", {"state": "active", "observed": right}, etag)).status == 403
    changed = await service.patch(f"/v1/replicas/{id}", {"state": "active", "observed": wrong}, etag)
    assert (changed.status, changed.body["state"], changed.body["observed"]["by"]) == (200, "corrupt", "agent")
    assert (await house.offered(house.api(site=HERE), **FILE))[1] == {"nfs": "corrupt"}
    back = await service.patch(f"/v1/replicas/{id}", {"state": "active", "observed": right}, changed.etag)
    assert (back.status, back.body["state"]) == (200, "active")

    # M13: a private one is, for members, none, wherever they are.
    ok(await admin.patch("/v1/stores/nfs", {"exposure": "service"}, (await admin.get("/v1/stores/nfs")).etag))
    await house.broker.context.memory.catch_up()
    urls, out = await house.offered(house.api(site=HERE), **FILE)
    assert (set(urls), out) == ({"disk"}, {})
    refused, unknown = [
        await house.api(site=HERE).post(path, {"store": name, "key": "demo/x", "observed": right}) for name in ("nfs", "no")
    ]
    assert (refused.status, refused.body) == (404, unknown.body)
    assert url in (await house.offered(house.api(Role.SERVICE, HERE), **FILE))[0].values()


async def test_what_is_mounted_is_copied_without_the_network_and_no_link_is_followed(house: House, tmp_path: Path) -> None:
    key = "images/disk.raw"
    file = house.mount / key
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    token = house.token(Role.SERVICE, HERE)
    process = await asyncio.create_subprocess_exec(
        find_program("broker", "pip install -e '.[test]'"), "replica", "register", house.blob, str(file), "--store", "nfs",
        env={**os.environ, "BROKER_URL": house.broker.url, "BROKER_TOKEN": token}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output = (await process.communicate())[0].decode()
    assert (process.returncode, "agent" in output, key in output) == (0, True, True), output

    done = await house.get(tmp_path / "copy.raw", only=["nfs"])
    assert (tmp_path / "copy.raw").read_bytes() == CONTENT
    assert ([(used.store, used.outcome, used.bytes) for used in done.sources], done.verified_by) == (
        [("nfs", "ok", len(CONTENT))],
        "sha256",
    )

    async with Broker(house.broker.url, house.token(site=HERE)) as broker:
        assert {each.store for each in (await broker.explain(blob=UUID(house.blob))).candidates} == {"nfs", "disk"}

    # Who only says that he is here reads from the network.
    done = await house.get(tmp_path / "far.raw", site=None)
    assert [used.store for used in done.sources] == ["disk"]

    # Whatever is wrong with the file, the network serves: gone, a link instead, a directory, other bytes, another size.
    outside = tmp_path / "outside.raw"
    outside.write_bytes(CONTENT)
    seen = set()
    for number, (spoil, told) in enumerate(
        (
            (lambda: file.unlink(), "no such file"),
            (lambda: file.symlink_to(outside), "symbolic link"),
            (lambda: (file.unlink(), file.mkdir()), "no regular file"),
            (lambda: (file.rmdir(), os.mkfifo(file)), "no regular file"),
            (lambda: (file.unlink(), file.write_bytes(CONTENT[:-1])), "bytes instead of"),
            (lambda: (file.unlink(), file.parent.rmdir(), file.parent.symlink_to(tmp_path)), "symbolic link"),
        )
    ):
        spoil()
        target = tmp_path / f"{number}.raw"
        # A failure keeps the mount from whoever was failed for a while: each time somebody else asks, who is sent there first.
        async with Broker(house.broker.url, house.broker.token(Role.MEMBER, "demo", f"m{number}", site=HERE)) as broker:
            done = await download(broker, Wanted(blob=UUID(house.blob), prefer=["nfs"]), target)
        assert target.read_bytes() == CONTENT
        failed = [used.detail for used in done.sources if used.outcome == "failed"]
        assert not failed or told in failed[0], failed
        seen |= set(failed)
        assert "disk" in {used.store for used in done.sources if used.outcome == "ok"}
    assert seen  # the mount comes first with 20 times the weight


async def test_a_file_there_becomes_an_image_or_one_more_format_of_one(house: House, tmp_path: Path) -> None:
    file = house.mount / "other.qcow2"
    file.write_bytes(CONTENT[:1000])
    member, service = house.api(), house.api(Role.SERVICE)
    image = ok(await member.post("/v1/images", {"name": "adopted"}), 201)
    path, seen = f"/v1/images/{image['id']}/blobs", {"size": 1000, "digests": {"sha256": hashlib.sha256(CONTENT[:1000]).hexdigest()}}
    body = {"format": "qcow2", "store": "nfs", "key": "other.qcow2", "observed": seen}
    other = house.api().as_(house.broker.token(Role.SERVICE, "other", "eve"))
    for api, sent, status, field in (
        (service, {**body, "observed": None}, 400, "observed"),
        (service, {name: value for name, value in body.items() if name != "observed"}, 400, "observed"),
        (service, {**body, "digests": {"sha256": "0" * 64}}, 409, None),
        (service, {**body, "digests": {"md5": "0" * 32}}, 409, None),
        (service, {**body, "key": ".."}, 400, "key"),
        (service, {**body, "store": "disk"}, 400, "observed"),
        (member, {**body, "key": "demo/x"}, 403, "store"),
        (other, body, 403, None),
    ):
        reply = await api.post(path, sent)
        assert (reply.status, reply.body.get("field")) == (status, field), reply.body
    assert ok(await member.get(f"/v1/images/{image['id']}"))["blobs"] == {}
    adopted = ok(await service.post(path, body, Idempotency_Key="once"), 201)
    assert ok(await service.post(path, body, Idempotency_Key="once"), 201) == adopted
    assert (adopted["state"], adopted["observed"]["by"], adopted["observed"]["strength"]) == ("active", "agent", "sha256")
    assert (await service.post(path, body)).body["field"] == "format"
    assert (await service.post(path, {**body, "format": "raw"})).body["field"] == "key"
    shown = ok(await member.get(f"/v1/images/{image['id']}"))
    assert (shown["status"], set(shown["blobs"]), shown["blobs"]["qcow2"]["size"]) == ("active", {"qcow2"}, 1000)
    async with Broker(house.broker.url, house.token(site=HERE)) as broker:
        await download(broker, Wanted(image=UUID(image["id"])), tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == CONTENT[:1000]


async def test_a_volume_is_a_name_for_who_is_at_its_cluster(house: House) -> None:
    pool = {"name": "ceph", "kind": "rbd", "site": HERE, "endpoint": f"rbd://{FSID}/images"}
    ok(await house.api(Role.ADMIN).post("/v1/stores", pool), 201)
    assert (await house.register("debian", store="ceph")).body["field"] == "key"
    ok(await house.register("debian@v1", store="ceph"), 201)
    assert (await house.offered(house.api(site=HERE)))[1] == {"ceph": "scheme"}
    urls, _ = await house.offered(house.api(site=HERE), schemes=["rbd"])
    assert urls == {"ceph": f"rbd://{FSID}/images/debian@v1"}
