"""`broker import glance` takes over the images of a real Glance, which keeps them in a SeaweedFS that the broker has as a store."""

from __future__ import annotations

import asyncio
import io
import json
import random
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import asyncpg
import glanceclient  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner

from broker.cli.main import main
from broker.client.api import Broker
from broker.model import Role
from tests.parts import glance
from tests.parts.broker import Api
from tests.parts.cluster import Brokers, brokers_on, fetch, ok, register, s3_client, s3_store
from tests.parts.postgres import Postgres
from tests.parts.seaweedfs import S3Part

_CLOUDS = """\
clouds:
  old:
    auth_type: none
    image_api_version: "2"
    image_endpoint_override: {url}
"""


def _contents(count: int) -> list[bytes]:
    return [random.Random(f"import {number}").randbytes(90_000 + number) for number in range(count)]


def _fill(old: Any, contents: list[bytes], weed: S3Part) -> dict[str, str]:
    """Images of several kinds, made by Glance's own client; their ids."""
    ids = {}
    for name, content, fields in (
        ("public", contents[0], {"visibility": "public", "os_type": "linux", "protected": True, "tags": ["a"], "min_disk": 3}),
        ("shared", contents[1], {"visibility": "shared", "owner": "p1"}),
        ("off", contents[2], {"visibility": "private", "owner": "p1"}),
        ("hidden", contents[3], {"visibility": "community", "os_hidden": True}),
        ("changed", contents[4], {}),
        ("empty", None, {}),
    ):
        ids[name] = old.images.create(name=name, disk_format="raw", container_format="bare", **fields).id
        if content is not None:
            old.images.upload(ids[name], io.BytesIO(content))
    old.image_members.create(ids["shared"], "friend")
    old.image_members.update(ids["shared"], "friend", "accepted")
    old.images.deactivate(ids["off"])
    # Somebody wrote over it behind Glance's back: its size is right, its bytes are not.
    s3_client(weed).put_object(Bucket=weed.bucket, Key=ids["changed"], Body=contents[5][: len(contents[4])].ljust(len(contents[4]), b"x"))
    return ids


def test_the_images_of_a_glance(postgres: Postgres, seaweedfs: S3Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = _contents(6)
    with glance.start(tmp_path / "glance", seaweedfs) as part, brokers_on(postgres.create(), tmp_path / "brokers", 1) as brokers:
        asyncio.run(register(brokers, s3_store(brokers, seaweedfs)))
        ids = _fill(glanceclient.Client("2", endpoint=part.url, token="none"), contents, seaweedfs)
        (tmp_path / "clouds.yaml").write_text(_CLOUDS.format(url=part.url))
        url = brokers.running[0].url
        for name, value in (
            ("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml")),
            ("OS_CLOUD", "old"),
            ("BROKER_URL", url),
            ("BROKER_TOKEN", brokers.token(Role.ADMIN, "ops")),
        ):
            monkeypatch.setenv(name, value)

        def run(*options: str, code: int) -> dict[str, str]:
            done = CliRunner().invoke(main, ["import", "glance", "--json", *options], catch_exceptions=False)
            assert done.exit_code == code, done.output
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            assert lines[-1]["applied"] == ("--apply" in options)
            told.update({line["image"]: line for line in lines[:-1]})
            return {name: told[id]["outcome"] for name, id in ids.items() if id in told}

        asyncio.run(_sql(brokers, _NOTE_ACTIVE))
        told: dict[str, Any] = {}
        assert run(code=0) == dict.fromkeys(ids, "to do"), "without --apply nothing is done"
        assert asyncio.run(_images(url, brokers.token(Role.ADMIN, "ops"))) == {}
        assert run("--apply", code=1) == {**dict.fromkeys(ids, "new"), "changed": "failed"}
        assert "digests" in told[ids["changed"]]["detail"]
        # As often as needed; a person sees a table, with the reason of what failed.
        again = CliRunner().invoke(main, ["import", "glance", "--apply"], catch_exceptions=False)
        rows = [line.split("\t") for line in again.stdout.splitlines()]
        assert {row[1]: row[3] for row in rows} == {**dict.fromkeys(ids, "known"), "changed": "failed"}
        assert (again.exit_code, again.stderr.splitlines()[-1]) == (1, "5 known, 1 failed")

        images = asyncio.run(_images(url, brokers.token(Role.ADMIN, "ops")))
        assert set(images) == set(ids.values()), "every id is the same"
        first = images[ids["public"]]
        assert first["blobs"]["raw"]["size"] == len(contents[0])
        assert {"md5", "sha512"} <= set(first["blobs"]["raw"]["digests"])
        assert [first[name] for name in ("visibility", "project", "protected", "tags", "min_disk", "properties")] == [
            "public", "demo", True, ["a"], 3, {"os_type": "linux"},
        ]  # fmt: skip
        assert [images[ids[name]]["status"] for name in ids] == ["active", "active", "deactivated", "active", "queued", "queued"]
        assert (images[ids["shared"]]["project"], images[ids["hidden"]]["hidden"]) == ("p1", True)
        ever_active = asyncio.run(_sql(brokers, "SELECT array_agg(DISTINCT id) FROM was_active"))
        assert UUID(ids["public"]) in ever_active
        assert UUID(ids["off"]) not in ever_active, "somebody could have got its bytes meanwhile"
        asyncio.run(_use(brokers, ids, contents))


async def _sql(brokers: Brokers, statement: str) -> Any:
    connection = await asyncpg.connect(brokers.database)
    try:
        return await (connection.fetchval if statement.startswith("SELECT") else connection.execute)(statement)
    finally:
        await connection.close()


_NOTE_ACTIVE = """
CREATE TABLE was_active (id uuid);
CREATE FUNCTION note_active() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO was_active VALUES (NEW.id);
    RETURN NULL;
END $$;
CREATE TRIGGER noted AFTER INSERT OR UPDATE ON images FOR EACH ROW WHEN (NEW.status = 'active') EXECUTE FUNCTION note_active();
GRANT INSERT ON was_active TO PUBLIC;
"""


async def _images(url: str, token: str) -> dict[str, Any]:
    async with Broker(url, token) as broker:
        return {str(image.id): image.document async for image in broker.images()}


def _api(brokers: Brokers, session: aiohttp.ClientSession, project: str) -> Api:
    return Api(brokers.running[0].url, session, brokers.token(Role.MEMBER, project))


async def _use(brokers: Brokers, ids: dict[str, str], contents: list[bytes]) -> None:
    """The bytes come from where they always were, to those who may have them."""
    async with aiohttp.ClientSession() as session:
        for name, project, content in (("public", "anyone", contents[0]), ("shared", "friend", contents[1])):
            api = _api(brokers, session, project)
            ticket = ok(await api.post("/v1/tickets", {"operation": "download", "image": ids[name]}), 201)
            assert await fetch(session, ticket["sources"][0]) == content
        refused = await _api(brokers, session, "p1").post("/v1/tickets", {"operation": "download", "image": ids["off"]})
        assert refused.status in (403, 404, 409), refused.body
        stranger = await _api(brokers, session, "stranger").get(f"/v1/images/{ids['shared']}")
        assert stranger.status == 404
