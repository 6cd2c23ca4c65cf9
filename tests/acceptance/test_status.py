"""The status page as a person reads it, in a headless Chromium, of a busy broker with real stores."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from broker.model import Role
from tests.parts.broker import Api
from tests.parts.chromium import Browser, browser
from tests.parts.cluster import Brokers, brokers_on, disk_of, disk_store, ok, put, register, s3_store
from tests.parts.postgres import Postgres
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart

CONTENT = random.Random(5).randbytes(3 << 20)
SHOTS = os.environ.get("STATUS_SHOTS")
"""A directory to keep screenshots in, for people who change the page."""


@dataclass(frozen=True)
class House:
    brokers: Brokers
    weed: S3Part
    disk: StoresidePart


@pytest.fixture
def house(postgres: Postgres, seaweedfs: S3Part, tmp_path: Path) -> Iterator[House]:
    with brokers_on(postgres.create(), tmp_path, 1) as brokers, disk_of(brokers, tmp_path / "disk", "disk-1") as disk:
        yield House(brokers, seaweedfs, disk)


async def settle_in(house: House, session: aiohttp.ClientSession) -> None:
    """Two sites; two stores that work, one of them with few slots, one that is closed later, and a private one."""
    brokers, disk = house.brokers, house.disk
    admin = brokers.api(session, Role.ADMIN)
    for site, networks in (("eu/az1", ["127.0.0.0/8"]), ("eu/az2", [])):
        ok(await admin.post("/v1/sites", {"path": site, "networks": networks}), 201)
    closed, secret = [
        {**disk_store(disk, name, site="eu/az2"), "settings": {"audience": disk.audience, "prefix": name}} for name in ("closed", "secret")
    ]
    await register(
        brokers, s3_store(brokers, house.weed, read_slots=40, capacity=1 << 40), disk_store(disk, "disk-1", read_slots=4, write_slots=2),
        closed, {**secret, "exposure": "service"},
    )  # fmt: skip


async def make_busy(brokers: Brokers, session: aiohttp.ClientSession) -> str:
    """An image, and what may happen around it: uploads, downloads that went well, badly and slowly, transfers under way, a full store,
    a closed one, hostile names."""
    member = brokers.api(session)
    admin = brokers.api(session, Role.ADMIN)
    first = await put(member, session, CONTENT, "weed", "disk-1", image={"name": "debian-12"})
    bold = await put(member, session, CONTENT + b"x", "weed", "disk-1", image={"name": "<b>bold</b> & co"})
    image = first["image"]
    for number in range(24):
        fails = number % 8 == 7
        api = brokers.api(session, subject=f"unlucky-{number}" if fails else ("alice", "bob")[number % 2])
        ticket = ok(await api.post("/v1/tickets", {"operation": "download", "image": image}), 201)
        source = ticket["sources"][0]
        body = {"store": source["store"], "outcome": "ok", "bytes": len(CONTENT)}
        body["seconds"] = source["estimate"]["seconds"] * (0.6, 0.9, 1.1, 1.4, 3.0)[number % 5]
        if fails:
            body = {"store": source["store"], "outcome": "failed", "bytes": 0, "seconds": 1, "detail": "reset"}
        assert (await api.post(f"/v1/tickets/{ticket['id']}/report", body)).status == 204
    for number in range(4):
        asked = {"operation": "download", "image": bold["image"] if number == 0 else image, "avoid": ["weed"]}
        ok(await node_of(brokers, session, number).post("/v1/tickets", asked), 201)
    carol = brokers.api(session, subject="carol")
    ok(await carol.post("/v1/tickets", {"operation": "upload", "image": {"name": "new"}, "size": 5 << 30}), 201)
    closed = await admin.get("/v1/stores/closed")
    ok(await admin.patch("/v1/stores/closed", {"enabled": False}, closed.etag))
    return str(image)


def node_of(brokers: Brokers, session: aiohttp.ClientSession, number: int) -> Api:
    """A compute node."""
    token = brokers.token(subject=f"node-{number}")
    return Api(brokers.running[0].url, session, token, {"X-Client-Instance": f"node-{number}"})


async def until_seen(page: Browser, url: str, word: str) -> None:
    """Open the page until it has that word."""
    await page.open(url)
    async with asyncio.timeout(60):
        while word not in await page.text():
            await page.open(url)


@contextlib.asynccontextmanager
async def waiters(brokers: Brokers, session: aiohttp.ClientSession, image: str) -> AsyncIterator[None]:
    """Two nodes that wait for a slot on the full store."""
    asked = {"operation": "download", "image": image, "avoid": ["weed"], "wait": 60}
    tasks = [asyncio.create_task(node_of(brokers, session, number).post("/v1/tickets", asked)) for number in (4, 5)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def sign_in(page: Browser, url: str, token: str) -> None:
    await page.open(url)
    await page.click("#token")
    await page.type(token)
    before = page.loads
    await page.press("Enter", 13, "\r")
    await page.loaded(before)


async def test_a_person_signs_in_reads_and_signs_out(house: House, tmp_path: Path) -> None:
    brokers = house.brokers
    async with aiohttp.ClientSession() as session, browser(tmp_path / "chromium") as page:
        await settle_in(house, session)
        image = await make_busy(brokers, session)
        url = brokers.running[0].url
        await page.look(1280)
        await page.open(f"{url}/")
        assert await page.text("h2") == "Sign in to see its status"
        await shot(page, "sign-in")
        await sign_in(page, f"{url}/", "nonsense")
        assert "not accepted" in await page.text('[role="alert"]')
        await sign_in(page, f"{url}/", brokers.token(Role.ADMIN, subject="root"))
        assert await page.script("location.href") == f"{url}/"
        page.messages.clear()

        async with waiters(brokers, session, image):
            await reads(page, url)
        before = page.loads
        await page.click(".viewer button")
        await page.loaded(before)
        assert await page.text("h2") == "Sign in to see its status"
        await sign_in(page, f"{url}/", brokers.token(Role.MEMBER, subject="bob"))
        text = await page.text()
        assert "secret" not in text
        assert "alice" not in text
        assert "Your last reports" in text


async def reads(page: Browser, url: str) -> None:
    """What an administrator looks for, and how it looks."""
    await until_seen(page, f"{url}/?refresh=off", "Priority")
    text = await page.text()
    for word in (
        "weed",
        "disk-1",
        "closed",
        "disabled",
        "debian-12",
        "<b>bold</b> & co",
        "4 of 4",
        "node-2 at 127.0.0.1",
        "failed",
    ):
        assert word in text, (word, text)
    assert await page.script("[...document.querySelectorAll('h2')].map(each => each.innerText).join()") == (
        "Stores by site,Transfers under way,Waiting for a slot,What transfers took, against the estimate,Worst paths,"
        "Why the last tickets chose what they chose"
    )
    assert await page.script("document.querySelectorAll('svg path.dots').length") >= 2
    assert await page.script("getComputedStyle(document.querySelector('rect.good')).fill") != "rgb(0, 0, 0)"  # the style is in force
    await readable(page)
    await page.click("section:last-of-type details:nth-of-type(2) summary")
    assert "Not offered: weed (avoided)." in await page.text("section:last-of-type details:nth-of-type(2)")
    assert not [each for each in page.requested if not each.startswith((url, "data:"))]
    assert not page.messages


async def readable(page: Browser) -> None:
    """At every width and in both lights nothing sticks out, and text stands out from what is behind it (WCAG 2.2, 1.4.3 and 1.4.10)."""
    for width in (1280, 640, 390, 320):
        for dark in (False, True):
            await page.look(width, dark=dark)
            if width in (1280, 390):
                await shot(page, f"{width}-{'dark' if dark else 'light'}")
            assert await page.script("document.documentElement.scrollWidth") <= width, await page.script(WIDEST)
            assert await page.script(OVERLAPPING) == []
            contrasts = await page.script(CONTRASTS)
            assert contrasts["least"] >= 4.5, contrasts
    await page.look(1280)


WIDEST = """[...document.querySelectorAll('body *')].map(each => [each.getBoundingClientRect().right, each.outerHTML.slice(0, 200)])
    .sort((a, b) => b[0] - a[0]).slice(0, 5)"""

OVERLAPPING = """[...document.querySelectorAll('td, tbody th, p, summary')].filter(each => each.scrollWidth > each.clientWidth)
    .map(each => each.innerText)"""

CONTRASTS = """(() => {
    const light = text => {
        const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
        const [r, g, b] = text.match(/[\\d.]+/g).map(each => linear(each / 255));
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (colour !== 'rgba(0, 0, 0, 0)') return colour;
        }
        return 'rgb(255, 255, 255)';
    };
    let found = {least: 99};
    for (const element of document.querySelectorAll('body *')) {
        if (![...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue;
        const [one, other] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
        const contrast = (one + .05) / (other + .05);
        if (contrast < found.least) found = {least: contrast, text: element.innerText};
    }
    return found;
})()"""


async def shot(page: Browser, name: str) -> None:
    if SHOTS is not None:
        await page.screenshot(Path(SHOTS) / f"status-{name}.png")
