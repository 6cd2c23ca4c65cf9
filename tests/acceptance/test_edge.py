"""Unmodified clients of Glance bring and fetch images through deploy/nginx/edge.conf: byte for byte, committed when the client is told
so, and no token of theirs gets to a store."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import aiohttp
import asyncpg
import glanceclient  # type: ignore[import-untyped]
import openstack
import pytest
import requests
from glanceclient import exc

from broker.model import Role
from broker.service import carried
from tests.parts import edge, names, tls_front, traffic, wiretap
from tests.parts.authority import Authority
from tests.parts.broker import Api
from tests.parts.cluster import SITE, Brokers, brokers_on, disk_of, disk_store, s3_store, swift_store
from tests.parts.condition import wait_for
from tests.parts.edge import EdgePart
from tests.parts.postgres import Postgres
from tests.parts.process import find_program
from tests.parts.seaweedfs import S3Part
from tests.parts.swift import SwiftPart
from tests.parts.wiretap import Wiretap

PROGRAM = Path(__file__).parents[1] / "parts" / "image_service.py"
MEBIBYTE = 1 << 20
CONTENT = random.Random(5).randbytes(3 * MEBIBYTE + 17)
MD5, SHA256 = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()
STORES = ("weed", "swift", "disk", "weak")
"""The last one takes no body whose length it is not told first."""
UNLUCKY = "unlucky"
"""A project whose clients are kept from stores that have failed them."""
COOKIE, SERVICE = "session-cookie-of-a-client", "token-of-a-service"


@dataclass(frozen=True)
class House:
    """A broker behind an edge, and stores with a tap before each: those of `STORES`, which are not trusted with tokens, one that is
    (``trusted``), and one whose certificate is somebody else's (``forged``, with the tap of ``swift``)."""

    brokers: Brokers
    edge: EdgePart
    taps: Mapping[str, Wiretap]
    tokens: list[str] = field(default_factory=list)

    def token(self, role: Role | str = Role.MEMBER, project: str = "demo") -> str:
        self.tokens.append(self.brokers.token(role, project))
        return self.tokens[-1]

    @property
    def glance(self) -> Any:
        return self.glance_of("demo")

    def glance_of(self, project: str) -> Any:
        return glanceclient.Client("2", endpoint=self.edge.url, token=self.token(project=project))

    def new(self, project: str = "demo") -> str:
        """An image that waits for its bytes."""
        made = self.glance_of(project).images.create(name="image", disk_format="raw", container_format="bare")
        assert made.status == "queued"
        id: str = made.id
        return id

    def status(self, id: str, project: str = "demo") -> str:
        found: str = self.glance_of(project).images.get(id).status
        return found

    def run(self, sql: str, id: str | None = None) -> Any:
        """A value of the catalogue."""

        async def ask() -> Any:
            connection = await asyncpg.connect(self.brokers.database)
            try:
                return await connection.fetchval(sql, *([] if id is None else [UUID(id)]))
            finally:
                await connection.close()

        return asyncio.run(ask())

    def ends_soon(self, id: str) -> bool:
        """Whether the image's upload was cut short."""
        seconds = self.run("SELECT extract(epoch FROM expires_at - now()) FROM uploads WHERE image_id = $1 ORDER BY id DESC LIMIT 1", id)
        return bool(seconds <= carried.PAUSE_SECONDS)

    def reported(self, id: str) -> tuple[str, int] | None:
        """Outcome and bytes of the last report on a download of the image."""
        sql = (
            "SELECT array[r.outcome, r.bytes::text] FROM reports r JOIN tickets t ON t.id = r.ticket_id"
            " WHERE t.image_id = $1 AND t.operation = 'download' ORDER BY r.at DESC LIMIT 1"
        )
        found = self.run(sql, id)
        return None if found is None else (found[0], int(found[1]))

    def released(self, id: str) -> bool:
        """Whether the one ticket that the image was to be read by is given back."""
        return self.run("SELECT state FROM tickets WHERE image_id = $1 AND operation = 'download'", id) == "released"

    @contextmanager
    def opened(self, store: str) -> Iterator[None]:
        """The store takes uploads until the block ends."""

        async def set_to(writable: bool) -> None:
            async with aiohttp.ClientSession() as session:
                admin = Api(self.brokers.running[0].url, session, self.brokers.token(Role.ADMIN))
                found = await admin.get(f"/v1/stores/{store}")
                assert (await admin.patch(f"/v1/stores/{store}", {"writable": writable}, found.etag)).status == 200

        asyncio.run(set_to(True))
        yield
        asyncio.run(set_to(False))

    def no_leak(self) -> None:
        """No store was sent anything that only the broker may see, since this was asked last."""
        for name in STORES:
            tap = self.taps[name]
            for secret in (*self.tokens, *self.brokers.secrets, COOKIE, SERVICE):
                assert not tap.has(secret), f"{name} was sent a client's token or cookie"
            for header in ("x-auth-token", "x-service-token", "authorization", "cookie", "edge-ticket", "edge-url"):
                assert not tap.has_field(header), f"{name} was sent {header}"
            tap.forget()
        logs = "".join(log.read_text() for log in self.edge.logs)
        for secret in (*self.tokens, COOKIE, SERVICE, "X-Amz-Signature", "temp_url_sig"):
            assert secret not in logs


@pytest.fixture(scope="module")
def house(
    postgres: Postgres, seaweedfs: S3Part, swift: SwiftPart, rclone: S3Part, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    place = tmp_path_factory.mktemp("edge")
    with ExitStack() as stack:
        brokers = stack.enter_context(brokers_on(postgres.create(), place / "broker", 1))
        disk = stack.enter_context(disk_of(brokers, place / "disk"))
        endpoints = (seaweedfs.endpoint, swift.endpoint, disk.url, rclone.endpoint)
        taps = {name: stack.enter_context(wiretap.listening(endpoint)) for name, endpoint in zip(STORES, endpoints, strict=True)}
        trusted = taps["trusted"] = stack.enter_context(wiretap.listening(seaweedfs.endpoint))
        ours, theirs = Authority(place / "ours"), Authority(place / "theirs")
        right, wrong = (
            "https://swift.test:"
            + str(stack.enter_context(tls_front.start(place / who, taps["swift"].url, authority.issue("swift", "swift.test"))))
            for who, authority in (("right", ours), ("wrong", theirs))
        )
        resolver = stack.enter_context(names.serving())
        # The broker goes past the taps: what it says to stores by itself is its own affair.
        stores = [
            s3_store(brokers, seaweedfs, "weed", endpoint=taps["weed"].url, internal_endpoint=seaweedfs.endpoint),
            swift_store(brokers, swift, "swift", endpoint=right, internal_endpoint=swift.endpoint),
            _apart(swift_store(brokers, swift, "forged", endpoint=wrong, internal_endpoint=swift.endpoint)),
            _apart(s3_store(brokers, seaweedfs, "trusted", endpoint=trusted.url, internal_endpoint=seaweedfs.endpoint), tokens="trusted"),
            disk_store(disk, endpoint=taps["disk"].url, internal_endpoint=disk.url),
            s3_store(brokers, rclone, "weak", endpoint=taps["weak"].url, internal_endpoint=rclone.endpoint),
        ]
        asyncio.run(_register(brokers, *stores))
        for tap in taps.values():
            tap.forget()  # the probes of the registration
        yield House(
            brokers,
            stack.enter_context(edge.start(place / "edge", brokers.running[0].url, resolver=resolver, trusted=ours.certificate)),
            taps,
        )


def _apart(store: dict[str, Any], **settings: str) -> dict[str, Any]:
    """The store with a prefix of its own, more settings, and closed until a test opens it."""
    return {**store, "writable": False, "settings": {**store["settings"], "prefix": f"{store['name']}/", **settings}}


async def _register(brokers: Brokers, *stores: Mapping[str, Any]) -> None:
    async with aiohttp.ClientSession() as session:
        admin = Api(brokers.running[0].url, session, brokers.token(Role.ADMIN))
        assert (await admin.post("/v1/sites", {"path": SITE})).status == 201
        for store in stores:
            made = await admin.post("/v1/stores", store)
            assert made.status == 201, made.body


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("size", [None, len(CONTENT)], ids=["chunked", "sized"])
def test_glanceclient(house: House, store: str, size: int | None) -> None:
    id, glance, before = house.new(), house.glance, house.taps[store].received
    glance.images.upload(id, io.BytesIO(CONTENT), image_size=size, backend=store)
    image = glance.images.get(id)
    assert (image.status, image.size, image.checksum) == ("active", len(CONTENT), MD5)
    assert (image.os_hash_algo, image.os_hash_value) == (("sha256", SHA256) if store == "disk" else (None, None))
    assert house.taps[store].received - before >= len(CONTENT)
    assert b"".join(glance.images.data(id)) == CONTENT
    wait_for(lambda: house.reported(id) == ("ok", len(CONTENT)), "the download was not reported")
    with pytest.raises(exc.HTTPConflict, match="active to saving"):
        glance.images.upload(id, io.BytesIO(CONTENT[::-1]))
    assert b"".join(glance.images.data(id)) == CONTENT
    house.no_leak()


def test_openstacksdk(house: House, tmp_path: Path) -> None:
    (tmp_path / "image.raw").write_bytes(CONTENT)
    cloud = openstack.connection.Connection(
        auth_type="admin_token", auth={"endpoint": house.edge.url, "token": house.token()}, image_endpoint_override=house.edge.url
    )
    made = cloud.create_image("by-sdk", filename=str(tmp_path / "image.raw"), disk_format="raw", container_format="bare", wait=True)
    assert made is not None
    image = cloud.image.get_image(made.id)
    assert (image.status, image.size, image.checksum) == ("active", len(CONTENT), MD5)
    cloud.image.download_image(image.id, output=str(tmp_path / "down.raw"), stream=True)
    assert (tmp_path / "down.raw").read_bytes() == CONTENT
    cloud.delete_image(image.id)
    house.no_leak()


@pytest.mark.parametrize("which", ["nova", "cinder"])
def test_the_image_services_of_nova_and_cinder(house: House, which: str, tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(CONTENT)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), which, house.edge.url, str(tmp_path / "content")],
        env={**os.environ, "TOKEN": house.token()}, cwd=tmp_path, capture_output=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "before": "queued", "after": "active", "size": len(CONTENT), "checksum": MD5, "properties": {"os_type": "linux"}, "listed": True,
        "sha256": SHA256, "left": 0,
    }  # fmt: skip
    house.no_leak()


@pytest.mark.parametrize("header", ["X-Auth-Token: {}", "Authorization: Bearer {}"])
def test_curl_with_every_token_there_is(house: House, header: str, tmp_path: Path) -> None:
    id, url = house.new(), house.edge.url
    (tmp_path / "content").write_bytes(CONTENT)
    curl: list[str | Path] = [
        find_program("curl", "apt-get install curl"),
        "-sf",
        "--location",
        "-H",
        header.format(house.token()),
        "-b",
        f"a={COOKIE}",
    ]
    curl += ["-H", f"X-Service-Token: {SERVICE}", "-H", "Edge-Url: http://127.0.0.1:1/elsewhere", "-H", "Edge-Ticket: none"]
    put = [*curl, "-H", "Content-Type: application/octet-stream", "-T", tmp_path / "content", f"{url}/v2/images/{id}/file"]
    subprocess.run(put, check=True, timeout=120)
    subprocess.run([*curl, "-o", tmp_path / "down", f"{url}/v2/images/{id}/file"], check=True, timeout=120)
    assert (tmp_path / "down").read_bytes() == CONTENT
    subprocess.run([*curl, "-o", tmp_path / "part", "-r", "5-14", f"{url}/v2/images/{id}/file"], check=True, timeout=120)
    assert (tmp_path / "part").read_bytes() == CONTENT[5:15]
    house.no_leak()


def test_a_store_that_cannot_prove_its_name_is_sent_nothing(house: House) -> None:
    id, glance, before = house.new(), house.glance, house.taps["swift"].received
    with house.opened("forged"), pytest.raises(exc.HTTPBadGateway):
        glance.images.upload(id, io.BytesIO(CONTENT), backend="forged")
    assert (house.status(id), house.taps["swift"].received) == ("queued", before)


def test_only_to_a_store_that_is_trusted_clients_are_redirected(house: House) -> None:
    id, glance, trusted = house.new(), house.glance, house.taps["trusted"]
    with house.opened("trusted"):
        glance.images.upload(id, io.BytesIO(CONTENT), backend="trusted")
    assert not trusted.has(house.tokens[-1]) and not trusted.has_field("x-auth-token")
    assert b"".join(glance.images.data(id)) == CONTENT
    assert trusted.has_field("x-auth-token")  # so such clients do, and that is why the others carry


def test_a_store_that_cannot_be_read_is_said_to_have_failed(house: House) -> None:
    id, glance = house.new(f"{UNLUCKY}-too"), house.glance_of(f"{UNLUCKY}-too")
    glance.images.upload(id, io.BytesIO(CONTENT), backend="weed")
    house.taps["weed"].is_away = True
    try:
        with pytest.raises(exc.HTTPServiceUnavailable, match="ask again"):
            glance.images.data(id)
    finally:
        house.taps["weed"].is_away = False
    wait_for(lambda: house.reported(id) == ("failed", 0), "the failure was not reported")


@pytest.mark.parametrize("store", ["weed", "swift", "disk"])
def test_a_range_that_the_image_has_not_is_no_fault_of_the_store(house: House, store: str) -> None:
    """Whoever goes on with a download that is whole asks for one, and would be kept from the store for a while."""
    id, glance = house.new(), house.glance
    glance.images.upload(id, io.BytesIO(CONTENT), backend=store)
    size = len(CONTENT)

    def ask(range: str) -> tuple[int, str, bytes]:
        headers = {"X-Auth-Token": house.token(), "Range": range}
        with requests.get(f"{house.edge.url}/v2/images/{id}/file", headers=headers, timeout=120) as answer:
            return answer.status_code, answer.headers["Content-Type"], answer.content

    status, type, body = ask(f"bytes={size}-")
    assert (status, type, json.loads(body)["error"]["code"]) == (416, "application/json", 416)
    wait_for(lambda: house.released(id), "the ticket was not released")
    assert house.reported(id) is None
    assert ask("bytes=1-2") == (206, "application/octet-stream", CONTENT[1:3])
    assert ask("bytes=-2") == (206, "application/octet-stream", CONTENT[-2:])
    for whole in ("bytes=0-1,5-6", "bytes=x", "bytes=-", "items=0-1", "bytes=" + "0-1," * 2000):
        assert ask(whole) == (200, "application/octet-stream", CONTENT)


def test_without_the_edge_no_store_is_reached(house: House) -> None:
    id, glance = house.new(), house.glance
    direct = glanceclient.Client("2", endpoint=house.brokers.running[0].url, token=house.token())
    with pytest.raises(exc.HTTPConflict, match="ticket"):
        direct.images.upload(id, io.BytesIO(b"small"))
    glance.images.upload(id, io.BytesIO(CONTENT), backend="weed")
    before = {name: tap.received for name, tap in house.taps.items()}
    with pytest.raises(exc.HTTPConflict, match="trusted with tokens"):
        direct.images.data(id)
    assert {name: tap.received for name, tap in house.taps.items()} == before


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", f"Content-Length: {len(CONTENT)}"])
def test_a_cut_connection_leaves_the_image_as_it_was(house: House, framing: str) -> None:
    id = house.new()
    host = urlsplit(house.edge.url)
    with socket.create_connection((host.hostname, host.port)) as line:
        head = f"PUT /v2/images/{id}/file HTTP/1.1\r\nHost: edge\r\nX-Auth-Token: {house.token()}\r\n{framing}\r\n"
        line.sendall(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode())
        line.sendall(f"{MEBIBYTE:x}\r\n".encode() + CONTENT[:MEBIBYTE] + b"\r\n" if "chunked" in framing else CONTENT[:MEBIBYTE])
        wait_for(lambda: house.status(id) == "saving", "it is not being saved")
        with pytest.raises(exc.HTTPConflict):
            house.glance.images.upload(id, io.BytesIO(CONTENT))
    # Nova would go on with the rest of its stream now.
    wait_for(lambda: house.ends_soon(id), "the broker was not told")
    with pytest.raises(exc.HTTPConflict):
        house.glance.images.upload(id, io.BytesIO(CONTENT[MEBIBYTE:]))
    house.run("UPDATE uploads SET expires_at = now() WHERE image_id = $1", id)
    assert house.status(id) == "queued"
    house.glance.images.upload(id, io.BytesIO(CONTENT))
    assert b"".join(house.glance.images.data(id)) == CONTENT
    house.no_leak()


def test_a_store_that_goes_away_leaves_the_image_queued(house: House) -> None:
    id, glance = house.new(UNLUCKY), house.glance_of(UNLUCKY)
    for tap in house.taps.values():
        tap.is_away = True
    try:
        with pytest.raises(exc.HTTPBadGateway, match="from their beginning"):
            glance.images.upload(id, io.BytesIO(CONTENT))
        assert house.status(id, UNLUCKY) == "queued"
        assert house.run("SELECT outcome FROM reports ORDER BY at DESC LIMIT 1") == "failed"
    finally:
        for tap in house.taps.values():
            tap.is_away = False


BAD: Mapping[str, tuple[int, str, dict[str, str]]] = {
    "a type of its own": (415, "application/octet-stream", {"Content-Type": "text/plain"}),
    "no type": (415, "application/octet-stream", {"Content-Type": ""}),
    "a size that is none": (400, "X-Openstack-Image-Size", {"x-openstack-image-size": "many"}),
    "a size below zero": (400, "X-Openstack-Image-Size", {"x-openstack-image-size": "-1"}),
    "another size than the body's": (400, "x-openstack-image-size", {"x-openstack-image-size": "6"}),
    "a store that is none": (400, "x-image-meta-store", {"X-Image-Meta-Store": "nowhere"}),
    "no token": (401, "token", {"X-Auth-Token": ""}),
    "a wrong token": (401, "token", {"X-Auth-Token": "eyJ.x.y"}),
    "two tokens": (400, "X-Auth-Token", {"Authorization": "Bearer x"}),
}


async def _nothing() -> AsyncIterator[bytes]:
    """A body of unknown length that ends before it begins."""
    for part in ():
        yield part


async def test_refusals_are_glances(house: House) -> None:
    """In Glance's shape, whatever is wrong; the image waits for its bytes as before."""
    id, none = house.new(), "00000000-0000-4000-8000-000000000000"
    bare = house.glance.images.create(name="without formats").id
    theirs = {"X-Auth-Token": house.token(project="other")}
    cases = [(f"{id}/file", wrong) for wrong in BAD.values()]
    cases += [
        (f"{none}/file", (404, "No such image", {})),
        ("no-uuid/file", (404, "No such image", {})),
        (f"{id}/file", (404, "No such image", theirs)),
        (f"{id}/file", (403, "reader", {"X-Auth-Token": house.token(Role.READER)})),
        (f"{bare}/file", (400, "disk_format, container_format", {})),
        (f"{bare}/stage", (400, "disk_format, container_format", {})),
        (f"{id}/file", (400, "0 bytes", {"empty": "yes"})),
        (f"{id}/file", (400, "0 bytes", {"empty": "in chunks"})),
    ]
    async with aiohttp.ClientSession(skip_auto_headers=("Content-Type",)) as session:
        for path, (status, words, more) in cases:
            headers = {"X-Auth-Token": house.token(), "Content-Type": "application/octet-stream", **more}
            body = {"": b"12345", "yes": b"", "in chunks": _nothing()}[headers.pop("empty", "")]
            sent = {name: value for name, value in headers.items() if value}
            async with session.put(f"{house.edge.url}/v2/images/{path}", data=body, headers=sent) as answer:
                told = await answer.json()
                assert (answer.status, told["error"]["code"]) == (status, status), (path, more, told)
                assert words in told["error"]["message"], (more, told)
        async with session.post(f"{house.edge.url}/edge/uploads/end", headers={"Edge-Ticket": f"{none}.x"}) as answer:
            assert answer.status == 404
        async with session.post(f"{house.brokers.running[0].url}/edge/uploads/end", headers={"Edge-Ticket": f"{none}.x"}) as answer:
            assert answer.status == 404
        async with session.post(f"{house.brokers.running[0].url}/edge/uploads/fail?by=me") as answer:
            assert answer.status == 400
    assert house.status(id) == "queued"


def test_glance_direct(house: House) -> None:
    id, glance = house.new(), house.glance
    glance.images.stage(id, io.BytesIO(CONTENT))
    assert house.status(id) == "uploading"
    with pytest.raises(exc.HTTPForbidden, match="queued"):  # bytes that came as one format would be told to be another
        glance.images.update(id, disk_format="qcow2")
    glance.images.update(id, name="renamed")
    glance.images.image_import(id, "glance-direct")
    wait_for(lambda: house.status(id) == "active", "it was not imported")
    assert b"".join(glance.images.data(id)) == CONTENT
    house.no_leak()


def test_a_size_that_was_not_kept(house: House) -> None:
    id, glance = house.new(), house.glance
    with pytest.raises(exc.HTTPConflict, match="differ"):
        glance.images.upload(id, io.BytesIO(CONTENT), image_size=len(CONTENT) + 1)
    with pytest.raises(exc.HTTPBadRequest):
        glance.images.upload(id, io.BytesIO(b""))
    assert house.status(id) == "queued"
    glance.images.upload(id, io.BytesIO(CONTENT), image_size=len(CONTENT))
    assert house.status(id) == "active"


def test_bytes_pass_the_broker_by(house: House, tmp_path: Path) -> None:
    size, broker, content = 48 * MEBIBYTE, house.brokers.running[0], tmp_path / "content"
    content.write_bytes(CONTENT[:MEBIBYTE] * (size // MEBIBYTE))
    traffic.check(broker.pid, broker.url, house.token())
    before, moved = sum(traffic.carried(broker.pid)), sum(tap.received for tap in house.taps.values())
    id, glance = house.new(), house.glance
    curl = [find_program("curl", "apt-get install curl"), "-sf", "-H", f"X-Auth-Token: {house.token()}", "-T", str(content)]
    url = f"{house.edge.url}/v2/images/{id}/file"
    subprocess.run([*curl, "-H", "Content-Type: application/octet-stream", url], check=True, timeout=120)
    assert b"".join(glance.images.data(id)) == content.read_bytes()
    assert sum(tap.received for tap in house.taps.values()) - moved >= size
    assert sum(traffic.carried(broker.pid)) - before < MEBIBYTE
