"""One image in several formats (M19): a client that can convert gets the one that it can use soonest, and is told why."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from tests.parts.broker import Api, Reply, broker_on
from tests.web.test_tickets import S3, SITES, Desk

GB = 10**9
CONVERT = {"formats": ["raw"], "convert": {"qcow2": 200_000_000, "vmdk": 1_000_000}}


@pytest.fixture
async def desk(database: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with broker_on(database, tmp_path) as broker, aiohttp.ClientSession() as session:
        broker.credential("s3", S3)
        desk = Desk(broker, Api(broker.url, session, broker.token(site="eu/az1")))
        for site in SITES:
            await desk.db.execute("INSERT INTO sites (path) VALUES ($1)", site)
        yield desk


async def image_with(desk: Desk, **formats: tuple[int, int]) -> str:
    """A public image with these formats, each with a store and a size."""
    image = ""
    for format, (store, size) in formats.items():
        blob = await desk.blob(store, size=size)
        if not image:
            image = await desk.image_of(blob)
            await desk.db.execute("UPDATE image_blobs SET format = $2 WHERE blob_id = $1", UUID(blob), format)
        else:
            await desk.db.execute("UPDATE image_blobs SET image_id = $2, format = $3 WHERE blob_id = $1", UUID(blob), UUID(image), format)
    await desk.broker.context.memory.catch_up()
    return image


async def ask(desk: Desk, image: str, path: str = "/v1/tickets", api: Api | None = None, **wishes: Any) -> Reply:
    return await (api or desk.api).post(path, {"operation": "download", "image": image, **wishes})


async def test_the_format_that_can_be_used_soonest_is_given_and_explained(desk: Desk) -> None:
    near, far = await desk.store("near", slots=1), await desk.store("far", site="us")
    image = await image_with(desk, raw=(far, 10 * GB), qcow2=(near, 2 * GB), vmdk=(near, GB))
    # Without `convert` the first format that the image has counts, as ever.
    assert [(await ask(desk, image, **wishes)).body["format"] for wishes in ({"formats": ["raw"]}, {"formats": ["vdi", "raw"]})] == [
        "raw"
    ] * 2
    before = (await ask(desk, image, "/v1/tickets:explain", **CONVERT)).body
    given = await ask(desk, image, **CONVERT)
    assert (given.status, given.body["format"], given.body["conversion"]["seconds"]) == (201, "qcow2", 10.0), given.body
    assert given.body["blob"]["size"] == 2 * GB
    considered = given.body["conversion"]["formats"]
    assert [each["format"] for each in considered] == ["qcow2", "raw", "vmdk"]
    assert [each["conversion_seconds"] for each in considered] == [10.0, 0.0, 1000.0]
    totals = [each["seconds"] + each["conversion_seconds"] for each in considered]
    assert totals == sorted(totals)
    assert (before["format"], before["conversion"], before["candidates"][0]["store"]) == ("qcow2", given.body["conversion"], "near")
    # It is recorded, and told again.
    ticket = given.body["id"]
    assert (await desk.api.get(f"/v1/tickets/{ticket}")).body["why"]["formats"] == considered
    assert (await desk.api.post(f"/v1/tickets/{ticket}/refresh")).body["conversion"] == given.body["conversion"]
    # Now the near store is full: what has room comes first, without waiting.
    await desk.broker.context.memory.catch_up()
    second = (await ask(desk, image, **CONVERT)).body
    assert (second["format"], second["conversion"]["seconds"]) == ("raw", 0.0)
    assert {each["format"]: each["full"] for each in second["conversion"]["formats"]} == {"raw": False, "qcow2": True, "vmdk": True}
    assert (await ask(desk, image, "/v1/tickets:explain", **CONVERT)).body["format"] == "raw"
    # A client that converts fast at a site beside the raw one decides otherwise.
    there = desk.api.as_(desk.broker.token(site="us"))
    assert (await ask(desk, image, api=there, **CONVERT)).body["format"] == "raw"


async def test_a_batch_of_such_requests_and_what_is_refused(desk: Desk) -> None:
    near = await desk.store("near")
    image, hidden = (
        await image_with(desk, raw=(near, 10 * GB), qcow2=(near, GB)),
        await image_with(desk, qcow2=(await desk.store("off"), GB)),
    )
    await desk.db.execute("UPDATE stores SET enabled = false WHERE name = 'off'")
    await desk.broker.context.memory.reload_stores()
    one = {"operation": "download", "image": image, **CONVERT}
    plain = {"operation": "download", "image": image, "formats": ["qcow2"]}
    none = {"operation": "download", "image": hidden, **CONVERT}
    other = {"operation": "download", "image": image, "formats": ["vdi"], "convert": {"vhdx": 1}}
    into = {"operation": "download", "image": image, "convert": {"qcow2": 1}}
    results = (await desk.api.post("/v1/tickets:batch", {"tickets": [one, plain, none, other, into, one]})).body["tickets"]
    assert [result.get("format") for result in results] == ["qcow2", "qcow2", None, None, None, "qcow2"]
    assert ["conversion" in result for result in results] == [True, False, False, False, False, True]
    assert results[2]["excluded"] == [{"store": "off", "reason": "disabled"}]
    assert (results[3]["field"], results[4]["field"]) == ("formats", "formats")
    for convert, field in (({"qcow2": 0}, "convert.qcow2"), ({"Q": 1}, "convert"), ({"qcow2": "fast"}, "convert.qcow2")):
        reply = await ask(desk, image, formats=["raw"], convert=convert)
        assert (reply.status, reply.body["field"].startswith(field), bool(reply.body["expected"])) == (400, True, True), reply.body
    many = {f"f{number}": 1 for number in range(17)}
    assert (await ask(desk, image, formats=["raw"], convert=many)).status == 400
    del many["f16"]
    assert (await ask(desk, image, formats=["raw"], convert=many)).body["format"] == "raw"
