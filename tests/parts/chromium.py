"""A headless Chromium (Debian's ``chromium``), told what to do over the DevTools protocol: what a person would do, and screenshots.

The protocol is JSON over a web socket, which aiohttp speaks; a driver would be one more program beside the browser.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.parts.process import find_program, running

_SECONDS = 60.0


class Browser:
    """One page of a browser. Every method waits for what it did."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._last = 0
        self.messages: list[str] = []
        """What the page's console and its security policy complained of."""
        self.requested: list[str] = []
        """Every URL that was asked for."""
        self.loads = 0

    async def tell(self, method: str, **parameters: Any) -> Any:
        """One command; its result."""
        self._last += 1
        number = self._last
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            if (message := await self._next()).get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    async def _next(self) -> Any:
        message = await self._socket.receive_json(timeout=_SECONDS)
        told = message.get("params", {})
        match message.get("method"):
            case "Log.entryAdded":
                self.messages.append(told["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.messages.append(str(told))
            case "Network.requestWillBeSent":
                self.requested.append(told["request"]["url"])
            case "Page.loadEventFired":
                self.loads += 1
        return message

    async def start(self) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.tell(f"{domain}.enable")

    async def open(self, url: str) -> None:
        """Go to `url`, as from the address bar."""
        before = self.loads
        await self.tell("Page.navigate", url=url)
        await self.loaded(before)

    async def loaded(self, before: int) -> None:
        """Wait until one page more than `before` has been loaded."""
        async with asyncio.timeout(_SECONDS):
            while self.loads <= before:
                await self._next()

    async def script(self, expression: str) -> Any:
        """What an expression comes to in the page (as a developer's console would say, whatever the page's policy)."""
        found = await self.tell("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def text(self, selector: str = "body") -> str:
        """The text that a person sees."""
        return str(await self.script(f"document.querySelector({selector!r}).innerText"))

    async def type(self, text: str) -> None:
        """Type into what has the focus."""
        await self.tell("Input.insertText", text=text)

    async def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key, for instance ``Enter`` (13, ``\\r``) or ``Tab`` (9)."""
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        await self.tell("Input.dispatchKeyEvent", type="keyDown", **about)
        await self.tell("Input.dispatchKeyEvent", type="keyUp", **about)

    async def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        await self.script(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        corner = await self.script(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        at = {"x": corner[0], "y": corner[1], "button": "left", "clickCount": 1}
        await self.tell("Input.dispatchMouseEvent", type="mousePressed", **at)
        await self.tell("Input.dispatchMouseEvent", type="mouseReleased", **at)

    async def look(self, width: int, *, dark: bool = False) -> None:
        """A window of that width, for somebody who likes it dark or light."""
        await self.tell("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.tell("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self, file: Path) -> None:
        """The whole page, as PNG."""
        shot = await self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.asynccontextmanager
async def browser(place: Path) -> AsyncIterator[Browser]:
    """A browser with a fresh profile in `place`."""
    program = find_program("chromium", "apt-get install chromium")
    place.mkdir(parents=True, exist_ok=True)
    port_file = place / "DevToolsActivePort"
    arguments = [
        program, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={place}", "--no-first-run", "--disable-gpu",
        "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-extensions",
        "--hide-scrollbars", "--force-color-profile=srgb", *(["--no-sandbox"] if os.getuid() == 0 else []), "about:blank",
    ]  # fmt: skip

    def is_written() -> bool:
        return port_file.exists() and len(port_file.read_text().splitlines()) == 2  # the port, and a path

    with running(arguments, log=place / "chromium.log", ready=is_written, environment={"HOME": str(place)}):
        port = port_file.read_text().splitlines()[0]
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(await _page(session, port), max_msg_size=64 << 20) as socket,
        ):
            opened = Browser(socket)
            await opened.start()
            yield opened


async def _page(session: aiohttp.ClientSession, port: str) -> str:
    """Where the browser's first page listens."""
    async with asyncio.timeout(_SECONDS):
        while True:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                for each in await response.json():
                    if each["type"] == "page":
                        return str(each["webSocketDebuggerUrl"])
            await asyncio.sleep(0.05)
