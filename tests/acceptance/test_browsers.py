"""A real browser: a page of another origin asks the broker for a ticket, reads the store by fetch, and follows a link, which is saved
under the name that the URL was signed with. What it fetches by a redirect comes from no origin, and the store refuses that."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
from pathlib import Path

import aiohttp
from aiohttp import web

from broker.model import Role
from broker.sign.token import TokenSigner, generate_key
from tests.parts import storeside
from tests.parts.broker import Api, broker_on
from tests.parts.chromium import browser
from tests.parts.cluster import disk_store, ok, put, s3_client
from tests.parts.condition import until
from tests.parts.process import free_ports
from tests.parts.seaweedfs import S3Part

NAME = 'mein "Bild" – образ.raw'

PAGE = """(async () => {
  const answer = await fetch(%(broker)s + "/v1/tickets", {
    method: "POST",
    headers: {"Authorization": "Bearer " + %(token)s, "Content-Type": "application/json"},
    body: JSON.stringify({operation: "download", image: %(image)s, filename: %(name)s}),
  });
  const ticket = await answer.json();
  const bytes = await (await fetch(ticket.sources.find(source => source.store === "weed").url)).arrayBuffer();
  const disk = await fetch(ticket.sources.find(source => source.store === "disk").url, {headers: {"Range": "bytes=0-9", "X-Any": "1"}});
  const part = [disk.status, disk.headers.get("Content-Range"), (await disk.arrayBuffer()).byteLength];
  const redirected = fetch(%(broker)s + "/v1/images/" + %(image)s + "/content", {headers: {"Authorization": "Bearer " + %(token)s}});
  const content = await redirected.then(() => "read", () => "refused");
  const digest = Array.from(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)), b => b.toString(16).padStart(2, "0"));
  const seen = [answer.status, answer.headers.get("X-Request-Id") !== null, content, digest.join(""), part.join(" ")];
  location.href = ticket.sources.find(source => source.store === "weed").url;
  return JSON.stringify(seen);
})().catch(error => "failed: " + error)"""


async def test_a_page_fetches_and_a_link_is_saved_under_its_name(database: str, seaweedfs: S3Part, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    origin = f"http://127.0.0.1:{port}"
    bucket, client = "browsers", s3_client(seaweedfs)
    await asyncio.to_thread(client.create_bucket, Bucket=bucket)
    rule = {"AllowedOrigins": [origin], "AllowedMethods": ["GET"], "AllowedHeaders": ["*"]}
    await asyncio.to_thread(client.put_bucket_cors, Bucket=bucket, CORSConfiguration={"CORSRules": [rule]})
    content, saved = secrets.token_bytes(100_000), tmp_path / "saved"
    async with (
        broker_on(database, tmp_path, {"http": {"cors_origins": [origin]}}) as broker,
        aiohttp.ClientSession() as session,
        browser(tmp_path / "chromium") as page,
        contextlib.AsyncExitStack() as parts,
    ):
        admin, member = (Api(broker.url, session, broker.token(role)) for role in (Role.ADMIN, Role.MEMBER))
        ok(await admin.post("/v1/sites", {"path": "eu"}), 201)
        store = {
            "name": "weed", "kind": "s3", "site": "eu", "endpoint": seaweedfs.endpoint, "internal": True,
            "credential": broker.credential("weed", seaweedfs.credential), "settings": {"bucket": bucket, "region": seaweedfs.region},
        }  # fmt: skip
        ok(await admin.post("/v1/stores", store), 201)
        starting = storeside.start(
            tmp_path / "disk", audience="disk", signer=TokenSigner([generate_key("ES256", 0)], broker.url),
            keys=f"{broker.url}/.well-known/jwks.json", options=["--cors-origin", origin],
        )  # fmt: skip
        disk = await asyncio.to_thread(parts.enter_context, starting)
        ok(await admin.post("/v1/stores", disk_store(disk, site="eu")), 201)
        image = (await put(member, session, content, "weed", "disk"))["image"]
        empty = web.Application()
        empty.router.add_get("/", _blank)
        runner = web.AppRunner(empty)
        await runner.setup()
        parts.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await page.tell("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(saved))
        await page.open(f"{origin}/")
        values = {"broker": broker.url, "token": broker.token(), "image": image, "name": NAME}
        script = PAGE % {name: json.dumps(value) for name, value in values.items()}
        told = await page.tell("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert json.loads(told["result"]["value"]) == [
            201,
            True,
            "refused",
            hashlib.sha256(content).hexdigest(),
            "206 bytes 0-9/100000 10",
        ], (told, page.messages)
        assert any("redirected from" in message and "CORS" in message for message in page.messages), page.messages
        await until(lambda: any(file.read_bytes() == content for file in saved.glob("*.raw")), "nothing was saved")
        (file,) = saved.glob("*.raw")
        assert file.name == NAME.replace('"', "_")  # what no file system everywhere takes


async def _blank(request: web.Request) -> web.Response:
    return web.Response(text="<!doctype html><title>page</title>", content_type="text/html")
