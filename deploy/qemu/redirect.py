"""An image as a disk that QEMU's curl driver opens, on whatever store it lies: each read is redirected to a signed URL.

    python deploy/qemu/redirect.py IMAGE [--format FORMAT] [--prefer STORE] [--port PORT]

prints one URL on this machine, http://127.0.0.1:PORT/SECRET, and answers there until it is ended. The machine's bytes come from the stores.

Why not give QEMU a signed URL itself: QEMU before it had ``force-range`` opens with HEAD, which the signature of an S3 GET does not allow;
a URL ends while the machine runs on; and it names one store.

Rules
- HEAD is answered here: the size is the ticket's. GET is a 307 to the ticket's present source, signed again when its URL is about to end.
- No byte of the image passes. A range that is asked for again at once has probably failed: one byte is asked of the store, and where that
  does not come either, the broker is told and the next source takes over. A machine with ``rerror=stop`` asks again when continued.
- What a source delivered is not seen here, so no source is praised; the lease is renewed while there are reads, and given back at the end.
- Who knows the URL may read the image, as with a signed URL: it holds a secret of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets

import aiohttp
import click
from aiohttp import web
from yarl import URL

from broker.cli import exits
from broker.cli.connection import Connection, connected, resolve
from broker.client.progress import Progress
from broker.client.sources import Seat, Sources, Wanted
from broker.client.trouble import ClientError
from broker.client.wire import StoreTrouble
from broker.errors import BrokerError

LOOK_SECONDS = 5.0
"""How long a store may take for the byte that shows whether it is there; QEMU gives a read as long."""


class Disk:
    """One image and the source that its reads are sent to now."""

    def __init__(self, sources: Sources, size: int, session: aiohttp.ClientSession) -> None:
        self.size = size
        self._sources = sources
        self._session = session
        self._seat: Seat | None = None
        self._asked = ""
        self._lock = asyncio.Lock()

    async def where(self, asked: str) -> str:
        """The URL for a read of the range `asked`. Raises `TransferFailed` when no source is left, and what the broker says."""
        async with self._lock:
            if self._seat is not None and asked == self._asked and not await self._delivers(self._seat):
                self._sources.give_up(self._seat, "failed", "does not deliver")
                self._seat = None
            self._asked = asked
            while True:
                seat = self._seat = self._seat or await self._sources.next()
                if seat is None:
                    await self._sources.renew()
                    continue
                try:
                    url, _ = await self._sources.handle(seat)
                except StoreTrouble:  # the ticket has ended: the source has done nothing wrong
                    seat.state, self._seat = "ended", None
                    continue
                self._sources.keep(seat)
                self._sources.progressed()
                return url

    async def _delivers(self, seat: Seat) -> bool:
        with contextlib.suppress(StoreTrouble, aiohttp.ClientError, TimeoutError):
            url, headers = await self._sources.handle(seat)
            asking = self._session.get(URL(url, encoded=True), headers={**headers, "Range": "bytes=0-0"}, allow_redirects=False)
            async with asyncio.timeout(LOOK_SECONDS), asking as answer:
                return answer.status == 206 and len(await answer.read()) == 1
        return False


async def serve(connection: Connection, image: str, formats: tuple[str, ...], prefer: tuple[str, ...], port: int) -> None:
    async with connection.open() as broker, aiohttp.ClientSession() as session:
        named = await resolve(broker, image)
        wanted = Wanted(named.image, named.blob, formats, prefer=prefer)
        ticket = await broker.download_ticket(image=wanted.image, blob=wanted.blob, formats=formats, prefer=prefer)
        if ticket.blob.size is None:
            raise ClientError("the ticket names a blob without a size")
        sources = Sources(broker, ticket, wanted, ticket.blob.size, LOOK_SECONDS, Progress())
        disk, path = Disk(sources, ticket.blob.size, session), "/" + secrets.token_urlsafe(24)

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.method == "HEAD":
                told = web.StreamResponse(headers={"Accept-Ranges": "bytes"})
                told.content_length = disk.size
                await told.prepare(request)
                return told
            try:
                return web.Response(status=307, headers={"Location": await disk.where(request.headers.get("Range", ""))})
            except (ClientError, BrokerError) as error:
                click.echo(f"no source: {error}", err=True)
                return web.Response(status=503, text="no source; ask again\n")

        application = web.Application()
        application.router.add_get(path, answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port)
            await site.start()
            click.echo(f"http://127.0.0.1:{runner.addresses[0][1]}{path}")
            await asyncio.Event().wait()  # until somebody ends this program
        finally:
            await runner.cleanup()
            await sources.settle(abandoned=True)


@click.command()
@click.argument("image")
@click.option("--format", "formats", multiple=True, help="A format that will do, best first; may be repeated.")
@click.option("--prefer", multiple=True, metavar="STORE", help="Rather from this store; may be repeated.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Where to listen, on 127.0.0.1; by default where there is room.")
@connected
def main(connection: Connection, image: str, formats: tuple[str, ...], prefer: tuple[str, ...], port: int) -> None:
    """Let QEMU read IMAGE (a name or id, or a blob's id) from its stores by the URL that is printed."""
    exits.run(serve(connection, image, formats, prefer, port))


if __name__ == "__main__":
    main()
