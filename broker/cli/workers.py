"""`broker serve --workers N`: several processes that share the port, under one that starts them again when they die.

Rules
- The kernel spreads connections over the workers (SO_REUSEPORT). The first one also does the background work.
- A worker that dies is started again, later each time if it dies at once. One that cannot even start ends all, with its exit code.
- Workers end with their parent, however that ends: they see the end of their standard input.
- The parent answers for all of them on the operator's listener, asking each on a socket that only it can reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import structlog
from aiohttp import web

from broker import app, config, metric_sums, metrics, systemd
from broker.metric_sums import Families
from broker.web.listeners import STOP_SECONDS, listening

READY_SECONDS = 60.0
"""A worker that does not answer in this time has failed to start."""

ASK_SECONDS = 5.0
"""A worker that does not tell its metrics in this time is counted as it was when last asked."""

STEADY_SECONDS = 10.0
"""A worker that lived so long is started again at once; others wait, twice as long each time, at most `LONGEST_WAIT_SECONDS`."""

LONGEST_WAIT_SECONDS = 30.0

_log = structlog.get_logger(__name__)


class CannotStart(Exception):
    """A worker ended before it was ready, with this exit code; it has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a worker ended with {code}")
        self.code = code


async def serve(settings: config.Settings, arguments: Sequence[str], workers: int, stop: asyncio.Event) -> None:
    """Run workers until `stop` is set; `arguments` are those of ``broker serve`` for each.

    Raises `CannotStart`, and what `app.running` does.
    """
    if settings.http.listen.port == 0:
        raise config.ConfigError("http.listen: workers need a port to share; 0 would give each its own")
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(app.database_url(settings))
        await app.prepare_schema(settings, url)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-workers-")))  # for its owner alone
        siblings = [Worker(number, place / f"{number}.sock", arguments) for number in range(workers)]
        ending = asyncio.create_task(stop.wait())
        running = [asyncio.create_task(worker.keep_running(stop)) for worker in siblings]
        try:
            ready = asyncio.create_task(_all_ready(siblings))
            await asyncio.wait({ready, ending, *running}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                async with listening(web.Server(Summary(siblings).handle, access_log=None), settings.http.metrics_listen) as listens:
                    if settings.http.tls_certificate is not None:
                        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, siblings)
                    systemd.notify("READY=1")
                    _log.info("ready", workers=workers, api=str(settings.http.listen), metrics=str(listens or "none"))
                    await asyncio.wait([ending, *running], return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            for task in running:
                if task.done():
                    task.result()
        finally:
            systemd.notify("STOPPING=1")
            _log.info("stopping")
            stop.set()
            await asyncio.gather(*running, return_exceptions=True)


def _reload(siblings: Sequence[Worker]) -> None:
    for worker in siblings:
        worker.reload()


async def _all_ready(siblings: Sequence[Worker]) -> None:
    for worker in siblings:
        await worker.ready.wait()


class Worker:
    """One process, and the next one when it dies."""

    def __init__(self, number: int, socket: Path, arguments: Sequence[str]) -> None:
        self.number = number
        self.ready = asyncio.Event()
        self._socket = socket
        self._arguments = [*arguments, "--worker-socket", str(socket)]
        if number > 0 and "--only" not in arguments:
            self._arguments += ["--only", "api"]
        self._process: asyncio.subprocess.Process | None = None
        self._ended: Families = {}
        self._last: Families = {}

    async def keep_running(self, stop: asyncio.Event) -> None:
        """Until `stop`. Raises `CannotStart` when the first process does not become ready."""
        loop, wait = asyncio.get_running_loop(), 1.0
        while not stop.is_set():
            began = loop.time()
            code = await self._run_once(stop)
            if stop.is_set():
                return
            if not self.ready.is_set():
                raise CannotStart(code)
            self._ended, self._last = metric_sums.add(self._ended, metric_sums.without_gauges(self._last)), {}
            wait = 1.0 if loop.time() - began >= STEADY_SECONDS else min(2 * wait, LONGEST_WAIT_SECONDS)
            _log.error("a worker died and is started again", worker=self.number, code=code, wait_seconds=wait)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await stop.wait()

    def reload(self) -> None:
        """Have it read its certificate again."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGHUP)

    async def _run_once(self, stop: asyncio.Event) -> int:
        """One process from its start to its end; its exit code."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "broker.cli.main", "serve", *self._arguments, stdin=asyncio.subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},  # the parent speaks to systemd
        )  # fmt: skip
        self._process = process
        ended = asyncio.create_task(process.wait())
        watch, stopped = asyncio.create_task(self._become_ready()), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([ended, watch, stopped], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([ended, stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            stopped.cancel()
            if not ended.done():
                process.send_signal(signal.SIGTERM)
                await asyncio.wait([ended], timeout=2 * STOP_SECONDS)
            if not ended.done():
                process.kill()
        return await ended

    async def _become_ready(self) -> None:
        async with asyncio.timeout(READY_SECONDS):
            while await self.ask("/healthz") is None:
                await asyncio.sleep(0.05)
        self.ready.set()

    async def ask(self, path: str) -> tuple[int, str] | None:
        """What the process answers, status and text; ``None`` when it does not."""
        timeout = aiohttp.ClientTimeout(total=ASK_SECONDS)
        try:
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self._socket)), timeout=timeout) as session,
                session.get(f"http://worker{path}") as response,
            ):
                return response.status, await response.text()
        except (aiohttp.ClientError, OSError):
            return None

    async def metrics(self) -> Families:
        """Of this process and those before it."""
        told = await self.ask("/metrics")
        if told is not None and told[0] == 200:
            self._last = metric_sums.read(told[1])
        return metric_sums.add(self._ended, self._last)


class Summary:
    """The operator's listener: metrics of all workers, and whether one of them can serve."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    async def handle(self, request: web.BaseRequest) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, headers={"Allow": "GET, HEAD"})
        if request.path == "/metrics":
            sums: Families = {}
            for found in await asyncio.gather(*(worker.metrics() for worker in self._workers)):
                sums = metric_sums.add(sums, found)
            return web.Response(body=metric_sums.render(sums), headers={"Content-Type": metrics.CONTENT_TYPE})
        if request.path == "/healthz":
            told = await asyncio.gather(*(worker.ask("/healthz") for worker in self._workers))
            well = sum(answer is not None and answer[0] == 200 for answer in told)
            return web.json_response({"workers": len(told), "well": well}, status=200 if well else 503)
        return web.Response(status=404)
