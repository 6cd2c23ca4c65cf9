"""DRS 1.5 as its clients meet it: ids, objects, bundles, access, bulk requests, and every error in its shape.

Stores and blobs are rows in the catalogue; the stores' credentials are made up, since signing needs no network.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import aiohttp
import pytest
import pytest_asyncio
from yarl import URL

from broker.model import new_id
from broker.web.drs.handlers import MAX_BULK
from tests.parts.broker import Api, Reply, RunningBroker, broker_on
from tests.parts.condition import until
from tests.parts.postgres import Postgres

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = "/ga4gh/drs/v1"
OBJECTS = f"{BASE}/objects"
ISSUER = "https://id.example.org"
DIGESTS = {"sha256": "ab" * 32, "md5": "cd" * 16}
_numbers = itertools.count(1)
SETTINGS = {"auth": {"issuers": [{"issuer": ISSUER, "audience": "broker"}]}}


@dataclass
class Desk:
    """A broker, its catalogue, and a member of the project ``demo`` who asks."""

    broker: RunningBroker
    api: Api

    async def sql(self, statement: str, *values: Any) -> Any:
        return await self.broker.context.db.fetchval(statement, *values)

    async def store(self, name: str, *, slots: int | None = None, exposure: str = "public", enabled: bool = True) -> int:
        id = await self.sql(
            """INSERT INTO stores (name, kind, site, endpoint, settings, credential, abilities, exposure, enabled)
               VALUES ($1, 's3', 'eu/az1', $2, $3, 's3', $4, $5, $6) RETURNING id""",
            f"{name}-{next(_numbers)}", f"https://{name}.example", {"bucket": "images"}, {"reads": True, "observes": ["sha256"]},
            exposure, enabled,
        )  # fmt: skip
        await self.sql("INSERT INTO slots (store_id, direction, slots) VALUES ($1, 'read', $2), ($1, 'write', NULL)", id, slots)
        await self.sql("INSERT INTO spaces (store_id) VALUES ($1)", id)
        await self.broker.context.memory.reload_stores()
        return int(id)

    async def blob(self, *stores: int, size: int | None = 1000, digests: dict[str, str] = DIGESTS) -> str:
        blob = new_id()
        state = "queued" if size is None else "active"
        await self.sql("INSERT INTO blobs (id, size, digests, state) VALUES ($1, $2, $3, $4)", blob, size, digests, state)
        for store in stores:
            await self.sql(
                """INSERT INTO replicas (id, blob_id, store_id, key, state, project, subject, observed_by, observed_strength, observed_at)
                   VALUES ($1, $2, $3, $4, 'active', 'owner', 'u', 'broker', 'md5', now())""",
                new_id(), blob, store, f"{blob}/{store}",
            )  # fmt: skip
        return str(blob)

    async def image(self, *, name: str = "i", visibility: str = "public", status: str = "active", **blobs: str) -> str:
        """An image of the project ``owner`` with these blobs by format."""
        image = new_id()
        await self.sql(
            "INSERT INTO images (id, name, project, subject, visibility, status) VALUES ($1, $2, 'owner', 'u', $3, $4)",
            image, name, visibility, status,
        )  # fmt: skip
        for format, blob in blobs.items():
            await self.sql("INSERT INTO image_blobs VALUES ($1, $2, $3)", image, format, UUID(blob))
        return str(image)

    async def replica(self, blob: str, store: int) -> str:
        return str(await self.sql("SELECT id FROM replicas WHERE blob_id = $1 AND store_id = $2", UUID(blob), store))

    async def bulk(self, ids: list[str], **more: Any) -> Reply:
        return await self.api.post(OBJECTS, {"bulk_object_ids": ids, **more})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def desk(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    """One for all tests of this file, each with stores and blobs of its own."""
    place = tmp_path_factory.mktemp("drs")
    async with broker_on(postgres.create(), place, SETTINGS) as broker, aiohttp.ClientSession() as session:
        broker.credential("s3", {"access_key": "AKIDTEST", "secret_key": "not-very-secret"})
        desk = Desk(broker, Api(broker.url, session, broker.token()))
        await desk.sql("INSERT INTO sites (path) VALUES ('eu/az1')")
        yield desk


def error(reply: Reply, status: int) -> str:
    """The message of an error in DRS's shape."""
    assert (reply.status, reply.headers["Content-Type"]) == (status, "application/json"), reply.body
    assert reply.body.keys() == {"msg", "status_code"} and reply.body["status_code"] == status
    return str(reply.body["msg"])


async def test_objects(desk: Desk) -> None:
    stores = [
        await desk.store("near"),
        await desk.store("far"),
        await desk.store("off", enabled=False),
        await desk.store("x", exposure="service"),
    ]
    blob = await desk.blob(*stores)
    image = await desk.image(name="chr 1", raw=blob)
    replies = [await desk.api.get(f"{OBJECTS}/{id}") for id in (blob, image)] + [
        await desk.api.post(f"{OBJECTS}/{image}", {"expand": True})
    ]
    shown, *others = [reply.body for reply in replies]
    for each in others:  # but for the order of access methods, which is drawn
        assert each | {"access_methods": shown["access_methods"]} == shown
    assert (shown["id"], shown["self_uri"], shown["aliases"]) == (blob, f"drs://127.0.0.1/{blob}", [image])
    assert (shown["name"], shown["size"], shown["mime_type"]) == ("chr_1.raw", 1000, "application/octet-stream")
    assert shown["checksums"] == [{"type": "sha-256", "checksum": "ab" * 32}, {"type": "md5", "checksum": "cd" * 16}]
    assert {method["access_id"] for method in shown["access_methods"]} == {await desk.replica(blob, store) for store in stores[:2]}
    for method in shown["access_methods"]:  # nothing is signed before it is asked for
        assert method == {"type": "https", "access_id": method["access_id"], "region": "eu/az1"}
    assert await desk.sql("SELECT count(*) FROM tickets WHERE blob_id = $1", UUID(blob)) == 0


async def test_an_image_with_several_formats_is_a_bundle(desk: Desk) -> None:
    first, second = await desk.blob(await desk.store("a")), await desk.blob(size=2000, digests={"md5": "0" * 32})
    image = await desk.image(name="disk.raw", raw=first, qcow2=second)
    shown = (await desk.api.get(f"{OBJECTS}/{image}?expand=true")).body
    assert shown == (await desk.api.get(f"{OBJECTS}/{image}")).body
    assert (shown["id"], shown["size"], shown["name"]) == (image, 3000, "disk.raw") and "access_methods" not in shown
    # DrsObject.checksums: of the members' checksums, sorted and joined; of the algorithms that all of them have.
    together = hashlib.md5(("0" * 32 + "cd" * 16).encode()).hexdigest()
    assert shown["checksums"] == [{"type": "md5", "checksum": together}]
    assert [(each["name"], each["id"]) for each in shown["contents"]] == [("disk.raw.qcow2", second), ("disk.raw", first)]
    assert error(await desk.api.get(f"{OBJECTS}/{image}/access/{new_id()}"), 404)


async def test_what_is_no_object(desk: Desk) -> None:
    gone = "00000000-0000-4000-8000-000000000000"
    for path, status in {
        gone: 404, gone.replace("0", "A").upper(): 404, "a%2Fb": 404, f"{gone}%2Faccess%2Fx": 404, "drs.42%3Aabc": 404, "drs.42:abc": 404,
        "x" * 255: 404, "x" * 256: 400, "%ff": 400, "%00": 404, "..%2f..%2fetc": 404, "a/b": 404, f"{gone}/access": 404,
        f"{gone}/access/": 404, f"{gone}/access/a%2Fb": 404, f"{gone}/access/{'x' * 256}": 400, f"{gone}?expand=maybe": 400,
        f"{gone}?extra=1": 400,
    }.items():  # fmt: skip
        assert error(await desk.api.get(f"{OBJECTS}/{path}"), status), path
    assert "UUID" in error(await desk.api.get(f"{OBJECTS}/drs.42:abc"), 404)
    blob = await desk.blob(await desk.store("a"))
    private = await desk.image(visibility="private", raw=blob)
    for id in (private, blob, await desk.blob()):
        for path in (id, f"{id}/access/x"):
            assert error(await desk.api.get(f"{OBJECTS}/{path}"), 404) == error(await desk.api.get(f"{OBJECTS}/{gone}"), 404)
    withheld = await desk.image(status="deactivated", raw=blob)  # M16
    assert error(await desk.api.get(f"{OBJECTS}/{withheld}"), 403)
    assert error(await desk.api.get(f"{OBJECTS}/{blob}"), 404)
    await desk.sql("UPDATE images SET vetting = 'pending' WHERE id = $1", UUID(withheld))  # what nobody approved is shown to nobody
    fresh = await desk.blob(await desk.store("b"))
    shared = await desk.image(visibility="private", raw=fresh)
    await desk.sql("UPDATE images SET shared = true WHERE id = $1", UUID(shared))
    for id in (withheld, shared, fresh):
        await until(lambda id=id: _is(desk, id, 404))
    await desk.sql("INSERT INTO image_members (image_id, project) VALUES ($1, 'demo')", UUID(shared))
    for id in (shared, fresh):
        await until(lambda id=id: _is(desk, id, 200))
    assert error(await desk.api.get(f"{OBJECTS}/{await desk.image()}"), 404) == "The image has no bytes yet."
    for bytes_of in (await desk.blob(size=None), await desk.blob(digests={})):
        assert error(await desk.api.get(f"{OBJECTS}/{await desk.image(raw=bytes_of)}"), 404)


async def _is(desk: Desk, id: str, status: int) -> bool:
    return (await desk.api.get(f"{OBJECTS}/{id}")).status == status


async def test_access(desk: Desk) -> None:
    stores = [await desk.store("a"), await desk.store("b", slots=1), await desk.store("off", enabled=False)]
    stores.append(await desk.store("vault", exposure="service"))
    blob, other = await desk.blob(*stores), await desk.blob(stores[0])
    image = await desk.image(name="é", raw=blob)
    await desk.image(raw=other)
    first, second, off, private = [await desk.replica(blob, store) for store in stores]
    for id in (blob, image):
        access = (await desk.api.get(f"{OBJECTS}/{id}/access/{first}")).body
        assert access.keys() == {"url"} and urlsplit(access["url"]).hostname == "a.example"
        assert parse_qs(urlsplit(access["url"]).query)["response-content-disposition"] == [f'attachment; filename="{image}.raw"']
    assert (await desk.api.post(f"{OBJECTS}/{image}/access/{second}", {"passports": []})).status == 200
    busy = await desk.api.get(f"{OBJECTS}/{image}/access/{second}")  # DRS's way to say: come again
    assert error(busy, 202) and int(busy.headers["Retry-After"]) >= 1
    wrong = [await desk.api.get(f"{OBJECTS}/{id}/access/{access}") for id, access in
             ((blob, off), (blob, private), (blob, str(new_id())), (other, first), (image, "x"))]  # fmt: skip
    assert len({error(reply, 404) for reply in wrong}) == 1  # M13: a private replica answers as none
    service = desk.api.as_(desk.broker.token("service"))
    assert len((await service.get(f"{OBJECTS}/{blob}")).body["access_methods"]) == 3
    assert (await service.get(f"{OBJECTS}/{blob}/access/{private}")).status == 200


async def test_bulk(desk: Desk) -> None:
    store = await desk.store("a", slots=2)
    blobs = [await desk.blob(store) for _ in range(3)]
    images = [await desk.image(raw=blob) for blob in blobs]
    withheld, gone = await desk.image(status="deactivated", raw=blobs[0]), str(new_id())
    body = (await desk.bulk([*images, blobs[0], blobs[0], withheld, gone, "a/b"])).body
    assert body["summary"] == {"requested": 8, "resolved": 5, "unresolved": 3}
    assert [each["id"] for each in body["resolved_drs_object"]] == [*blobs, blobs[0], blobs[0]]
    assert body["unresolved_drs_objects"] == [
        {"error_code": 403, "object_ids": [withheld]}, {"error_code": 404, "object_ids": [gone, "a/b"]},
    ]  # fmt: skip
    assert (await desk.bulk([])).body["summary"] == {"requested": 0, "resolved": 0, "unresolved": 0}
    assert (await desk.bulk([gone] * MAX_BULK)).body["summary"]["unresolved"] == MAX_BULK
    assert str(MAX_BULK) in error(await desk.bulk([gone] * (MAX_BULK + 1)), 413)

    accesses = [
        {"bulk_object_id": image, "bulk_access_ids": [await desk.replica(blob, store)]} for image, blob in zip(images, blobs, strict=True)
    ]
    asked = [*accesses, {"bulk_object_id": images[0], "bulk_access_ids": ["x"]}]
    body = (await desk.api.post(f"{OBJECTS}/access", {"bulk_object_access_ids": asked})).body
    assert body["summary"] == {"requested": 4, "resolved": 2, "unresolved": 2}  # two slots
    assert [each["drs_object_id"] for each in body["resolved_drs_object_access_urls"]] == images[:2]
    assert [each["drs_access_id"] for each in body["resolved_drs_object_access_urls"]] == [
        access["bulk_access_ids"][0] for access in accesses[:2]
    ]  # fmt: skip
    assert {each["error_code"]: each["object_ids"] for each in body["unresolved_drs_objects"]} == {404: images[:1], 429: images[2:]}
    for count, status in ((MAX_BULK, 200), (MAX_BULK + 1, 413)):
        wanted = {"bulk_object_access_ids": [{"bulk_object_id": gone, "bulk_access_ids": ["x"] * count}]}
        assert (await desk.api.post(f"{OBJECTS}/access", wanted)).status == status


async def test_who_may_ask_is_told_to_everyone_and_nothing_else_is(desk: Desk) -> None:
    nobody, blob = desk.api.as_(None), await desk.blob(await desk.store("a"))
    private = await desk.image(visibility="private", raw=blob)
    told = {"supported_types": ["BearerAuth", "BasicAuth"], "bearer_auth_issuers": [desk.broker.url, ISSUER]}
    gone = str(new_id())
    for id in (private, gone):
        reply = await nobody.send("OPTIONS", f"{OBJECTS}/{id}")
        assert (reply.status, reply.body) == (200, {"drs_object_id": id, **told})
    assert error(await nobody.send("OPTIONS", f"{OBJECTS}/a%2Fb"), 404)
    body = (await nobody.send("OPTIONS", OBJECTS, {"bulk_object_ids": [private, gone, "?"]})).body
    assert body["resolved_drs_object"] == [{"drs_object_id": id, **told} for id in (private, gone)]
    assert body["unresolved_drs_objects"] == [{"error_code": 404, "object_ids": ["?"]}]
    assert error(await nobody.send("OPTIONS", OBJECTS, {"bulk_object_ids": [gone] * (MAX_BULK + 1)}), 413)
    info = (await nobody.get(f"{BASE}/service-info")).body
    assert (info["type"]["artifact"], info["drs"]["maxBulkRequestLength"]) == ("drs", MAX_BULK)
    for method, path in (("GET", f"{OBJECTS}/{gone}"), ("POST", OBJECTS), ("GET", f"{OBJECTS}/{gone}/access/x")):
        refused = await nobody.send(method, path)
        assert error(refused, 401) and refused.headers["WWW-Authenticate"].startswith("Bearer")


async def test_bad_requests(desk: Desk) -> None:
    path = f"{OBJECTS}/{new_id()}"
    passport = {"passports": ["eyJhbGciOiJub25lIn0.e30."]}
    for reply in (
        await desk.api.post(path, passport), await desk.api.post(f"{path}/access/x", passport), await desk.bulk([], **passport),
        await desk.api.post(f"{OBJECTS}/access", {"bulk_object_access_ids": [], **passport}),
    ):  # fmt: skip
        text = error(reply, 400)
        assert "passports" in text and "bearer" in text and "eyJ" not in text
    for method, where, body, status, word in (
        ("POST", path, b"{", 400, "JSON"), ("POST", path, b'{"expand": 5}', 400, "expand"),
        ("POST", OBJECTS, b"{}", 400, "bulk_object_ids"),
        ("POST", OBJECTS, b'{"bulk_object_ids": [5]}', 400, "bulk_object_ids.0"), ("POST", OBJECTS, b"[" * 5000, 400, "JSON"),
        ("POST", OBJECTS, b" " * 262145, 413, "262144"), ("POST", f"{OBJECTS}/access", b'{"bulk_object_access_ids": [{}]}', 400, "missing"),
        ("GET", OBJECTS, None, 405, ""), ("DELETE", path, None, 405, ""), ("PUT", f"{BASE}/service-info", None, 405, ""),
        ("GET", f"{BASE}/nothing", None, 404, ""), ("GET", BASE, None, 404, ""),
    ):  # fmt: skip
        assert word in error(await desk.api.send(method, where, raw=body), status), (method, where)
    assert error(await desk.api.send("POST", path, raw=b"{}", headers={"Content-Type": "text/plain"}), 415)
    assert (await desk.api.send("POST", path, raw=b'{"unknown": 1}')).status == 404  # the specification lets bodies have further fields
    async with aiohttp.ClientSession() as session:  # as the compliance suite does: a GET with a body
        url, headers = URL(f"{desk.broker.url}{path}", encoded=True), {"Authorization": f"Bearer {desk.broker.token()}"}
        for sent, connection in ((b"{}", "close"), (None, None)):
            async with session.get(url, data=sent, headers=headers) as answer:
                assert (answer.status, answer.headers.get("Connection")) == (404, connection)
