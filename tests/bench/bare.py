"""The comparator: an aiohttp application with one POST route that parses the request and answers a dict of a given size.

Access log off, uvloop, one process: ``python -m tests.bench.bare PORT ANSWER_FILE``. The answer is dumped anew each time.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import orjson
import uvloop
from aiohttp import web


def main() -> None:
    port, answer = int(sys.argv[1]), orjson.loads(Path(sys.argv[2]).read_bytes())

    async def handle(request: web.Request) -> web.Response:
        orjson.loads(await request.read())
        return web.Response(body=orjson.dumps(answer), content_type="application/json")

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/{path:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        print("ready", flush=True)
        await asyncio.Event().wait()

    uvloop.run(serve())


if __name__ == "__main__":
    main()
