"""``broker-storeside``: serve a directory to whoever holds a token of the broker's.

One process, one event loop (asyncio's own: it sends files by sendfile). SIGTERM and SIGINT stop it: it accepts no more
connections and gives transfers under way some time to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from pathlib import Path

import click
from aiohttp import web

from broker.storeside.application import Application, Server
from broker.storeside.disk import Tree
from broker.storeside.jwks import KeySource
from broker.storeside.receive import READ_BYTES

_log = logging.getLogger("broker.storeside")

_LAST_SECONDS = 5.0
"""For the answers to leave, once every request is done or the grace is over."""


async def serve(tree: Tree, keys: KeySource, host: str, port: int, *, audience: str, issuer: str, grace_seconds: float) -> None:
    """Serve until SIGTERM or SIGINT. Raises `OSError` when the address cannot be listened on."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if not await keys.first():
        _log.warning("no keys yet: everything is refused until they can be read")
    # No access log: its lines would hold tokens; so might aiohttp's on malformed requests. Bodies are stored as they come,
    # so aiohttp must not undo a Content-Encoding.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL + 1)
    application = Application(tree, keys, audience=audience, issuer=issuer)
    server = Server(application, access_log=None, read_bufsize=READ_BYTES, auto_decompress=False)
    runner = web.ServerRunner(server, shutdown_timeout=_LAST_SECONDS)
    await runner.setup()
    refreshing = asyncio.create_task(keys.run())
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        _log.info("serving on %s:%d as %s", host, port, audience)
        await stop.wait()
        # aiohttp's own stop would drop what arrives of bodies, so that no upload could end.
        await site.stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(application.idle(), grace_seconds)
    finally:
        await runner.cleanup()
        refreshing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await refreshing


def _address(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise click.BadParameter("must be HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--root",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory of the objects. Must support hard links.",
)
@click.option(
    "--listen", default="127.0.0.1:8480", show_default=True, callback=_address, help="HOST:PORT to listen on. TLS is a front's work."
)
@click.option("--audience", required=True, help="This store's name, as the broker knows it: tokens for others are refused.")
@click.option("--issuer", required=True, help="The broker's URL, exactly as it stands in its tokens (iss).")
@click.option(
    "--jwks",
    required=True,
    metavar="URL|FILE",
    help="Where the broker's public keys are, for instance https://broker/.well-known/jwks.json.",
)
@click.option(
    "--refresh",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Seconds between readings of the keys: how long a revoked key lives.",
)
@click.option(
    "--keep",
    default=86400.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Seconds for which known keys serve on while the broker is away.",
)
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds that transfers get to end when the server is stopped.",
)
def main(root: Path, listen: tuple[str, int], audience: str, issuer: str, jwks: str, refresh: float, keep: float, grace: float) -> None:
    """Serve the files under a directory to holders of transfer tokens.

    Every request needs a token that the broker signed for this store, this path and this method; it is checked here, offline,
    against the broker's public keys. Objects are written atomically, never overwritten, and their length and digest are
    enforced as the token says. The server keeps its own files in ROOT/.broker, which no request reaches.

    Register it at the broker: broker store add NAME --kind http --endpoint http://HOST:PORT
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        tree = Tree(root)
    except OSError as error:
        raise click.ClickException(f"{root} cannot be used: {error.strerror}") from None
    try:
        keys = KeySource(jwks, refresh_seconds=refresh, keep_seconds=keep)
        asyncio.run(serve(tree, keys, *listen, audience=audience, issuer=issuer, grace_seconds=grace))
    except OSError as error:
        raise click.ClickException(f"cannot listen on {listen[0]}:{listen[1]}: {error.strerror}") from None
    finally:
        tree.close()


if __name__ == "__main__":
    main()
