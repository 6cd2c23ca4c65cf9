"""A catalogue is dropped and made again from SeaweedFS, Swift and storeside; what somebody else wrote there is not believed."""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from yarl import URL

from broker.client.api import Broker
from broker.client.upload import Offer, upload
from broker.storeside.listing import PATH, SUBJECT
from tests.parts.cluster import (
    Brokers,
    disk_of,
    disk_store,
    fetch,
    new_upload,
    ok,
    put,
    register,
    s3_client,
    s3_store,
    said,
    send,
    swift_store,
)  # fmt: skip
from tests.parts.generations import generation, run_json
from tests.parts.postgres import Postgres
from tests.parts.process import free_ports
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart
from tests.parts.swift import SwiftPart

MEBIBYTE = 1 << 20
SETTINGS = f"[policy.uploads]\nsingle_put_limit = {MEBIBYTE}\nmin_part_size = {5 * MEBIBYTE}\n"
LARGE = random.Random(3).randbytes(5 * MEBIBYTE + 4321)
STORES = ("weed", "swift", "disk")


@dataclass
class Scene:
    """Where everything is; a broker after another comes and goes."""

    postgres: Postgres
    place: Path
    port: int
    seaweedfs: S3Part
    swift: SwiftPart
    prefix: str

    def specs(self, brokers: Brokers, disk: Any) -> list[dict[str, Any]]:
        weed, swift = s3_store(brokers, self.seaweedfs), swift_store(brokers, self.swift)
        for spec in (weed, swift):
            spec["settings"]["prefix"] = self.prefix
        return [weed, swift, disk_store(disk)]


@pytest.fixture
def scene(postgres: Postgres, seaweedfs: S3Part, swift: SwiftPart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (port,) = free_ports(1)
    return Scene(postgres, tmp_path, port, seaweedfs, swift, f"rebuild-{secrets.token_hex(4)}/")


async def _fill(brokers: Brokers, place: Path) -> dict[str, tuple[str, bytes]]:
    """Images in one PUT and in parts at every store; one with a copy at each. Gives id and bytes by name."""
    made: dict[str, tuple[str, bytes]] = {}
    source = place / "large.raw"
    source.write_bytes(LARGE)
    async with aiohttp.ClientSession() as session, Broker(brokers.issuer, brokers.token()) as broker:
        api = brokers.api(session)
        for number, store in enumerate(STORES):
            content = random.Random(number).randbytes(3000)
            done = await put(api, session, content, store, image={"name": f"small {store} ü", "visibility": "community"})
            made[f"small {store} ü"] = done["image"], content
            # Nothing is declared before the bytes are there: the digests come with the commit.
            sent = await upload(broker, source, Offer(image={"name": f"large {store}"}, format="qcow2", only=(store,)))
            made[f"large {store}"] = str(sent.image), LARGE
        everywhere = b"everywhere" * 99
        done = await put(api, session, everywhere, *STORES, image={"name": "everywhere"})
        made["everywhere"] = done["image"], everywhere
    return made


async def _downloads(brokers: Brokers, made: dict[str, tuple[str, bytes]]) -> dict[str, set[str]]:
    """Every image, as its project downloads it from each source; the stores by name of the image."""
    found: dict[str, set[str]] = {}
    async with aiohttp.ClientSession() as session:
        api = brokers.api(session)
        for name, (id, content) in made.items():
            ticket = ok(await api.post("/v1/tickets", {"operation": "download", "image": id, "count": 5}), 201)
            assert ticket["blob"]["digests"]["sha256"] == hashlib.sha256(content).hexdigest()
            for source in ticket["sources"]:
                assert await fetch(session, source) == content
            found[name] = {source["store"] for source in ticket["sources"]}
    return found


async def _images(brokers: Brokers) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        listed = ok(await brokers.api(session, "admin").get("/v1/images"))["images"]
    return {image["id"]: image for image in listed}


async def _rows(database: str) -> dict[str, int]:
    connection = await asyncpg.connect(database)
    try:
        return {table: await connection.fetchval(f"SELECT count(*) FROM {table}") for table in ("images", "blobs", "replicas")}
    finally:
        await connection.close()


def test_a_lost_catalogue_comes_back(scene: Scene) -> None:
    first = scene.postgres.create()
    with generation(first, scene.place, scene.port, SETTINGS) as brokers, disk_of(brokers, scene.place / "disk") as disk:
        asyncio.run(register(brokers, *scene.specs(brokers, disk)))
        made = asyncio.run(_fill(brokers, scene.place))
        asyncio.run(_forge(brokers, scene, made))
    scene.postgres.drop(first)
    second = scene.postgres.create()
    with generation(second, scene.place, scene.port, SETTINGS) as brokers, disk_of(brokers, scene.place / "disk") as disk:
        asyncio.run(register(brokers, *scene.specs(brokers, disk)))
        would = run_json(brokers, "rebuild")
        assert would[-1]["total"] == {"images": 7, "blobs": 7, "replicas": 9, "missing": 0, "conflicts": 0, "applied": False}
        assert asyncio.run(_rows(second)) == {"images": 0, "blobs": 0, "replicas": 0}
        did = run_json(brokers, "rebuild", "--apply")
        assert did[-1]["total"] == would[-1]["total"] | {"applied": True}
        seen = {line["store"]: line for line in did if "store" in line}
        assert {name: seen[name]["recovered"] for name in STORES} == dict.fromkeys(STORES, 3)
        assert all(seen[name]["forged"] >= 1 for name in STORES), seen
        assert asyncio.run(_rows(second)) == {"images": 7, "blobs": 7, "replicas": 9}
        again = run_json(brokers, "rebuild", "--apply")
        assert again[-1]["total"]["replicas"] == again[-1]["total"]["missing"] == 0
        assert all(line["known"] == 3 for line in again if "store" in line)
        found = asyncio.run(_downloads(brokers, made))
        assert found["everywhere"] == set(STORES)
        images = asyncio.run(_images(brokers))
        assert {images[id]["name"] for id, _ in made.values()} == set(made)
        assert {image["visibility"] for image in images.values()} == {"private"}
        assert {image["project"] for image in images.values()} == {"demo"}


async def _forge(brokers: Brokers, scene: Scene, made: dict[str, tuple[str, bytes]]) -> None:
    """What somebody may try who can write at the stores: records of his own making, and others' records on objects of his."""
    async with aiohttp.ClientSession() as session:
        member = brokers.api(session, project="thief", subject="eve")
        weed = s3_client(scene.seaweedfs)
        listed = weed.list_objects_v2(Bucket=scene.seaweedfs.bucket, Prefix=scene.prefix)["Contents"]
        records = [weed.head_object(Bucket=scene.seaweedfs.bucket, Key=item["Key"])["Metadata"] for item in listed]
        stolen = next(record for record in records if "record-1" in record)
        assert made["everywhere"][0] not in str(stolen), "who may read an object reads nothing in its record"
        # By the bucket's own keys: another's record on other bytes, and words of his own.
        for key, metadata in (("stolen", stolen), ("own", {"record-1": "gAAAAABinvented", "blob": stolen["blob"]})):
            weed.put_object(Bucket=scene.seaweedfs.bucket, Key=scene.prefix + key, Body=b"mine", Metadata=metadata)
        # By upload tickets, whose headers he leaves out, changes or adds to; one at a time, since slots and names are his own.
        for store in ("swift", "disk"):
            ticket = ok(await member.post("/v1/tickets", {**new_upload(b"mine", "x"), "only": [store]}), 201)
            (place,) = ticket["destinations"]
            prefix = "X-Object-Meta-" if store == "swift" else "X-Broker-Meta-"
            theirs = {f"{prefix}{name}": value for name, value in stolen.items() if name.startswith("record")}
            mine = {name: value for name, value in place["headers"].items() if "record" not in name.lower()}
            assert await send(session, {**place, "headers": {**mine, **theirs}}, b"mine") == 201
            if store == "disk":
                ok(await member.post(f"/v1/tickets/{ticket['id']}/commit", said(b"mine")))


async def test_only_a_broker_that_says_so_lists_what_a_file_server_has(storeside_part: StoresidePart) -> None:
    part = storeside_part
    async with aiohttp.ClientSession() as session:
        for claims, status in (({}, 404), ({"subject": SUBJECT}, 200)):
            url = URL(part.signed("GET", PATH, **claims), encoded=True)
            async with session.get(url) as answer:
                assert answer.status == status, await answer.text()
            async with session.head(url) as answer:  # so it is never taken for an object
                assert answer.status == 404
        async with session.get(part.url + PATH) as answer:
            assert answer.status == 401
