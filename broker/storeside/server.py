"""``broker-storeside``: serve a directory to whoever holds a token of the broker's.

One process, one event loop (asyncio's own: it sends files by sendfile). SIGTERM and SIGINT stop it: it accepts no more
connections and gives transfers under way some time to end. SIGHUP reads the TLS certificate again. Metrics and health have a
listener of their own. With TLS the kernel cannot send files by itself: a front does better.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from broker.storeside.application import Application, plain
from broker.storeside.connection import Server
from broker.storeside.cors import Cors, is_origin
from broker.storeside.counted import Counted
from broker.storeside.disk import Tree
from broker.storeside.gate import Gate
from broker.storeside.jwks import KeySource
from broker.storeside.limits import Limits
from broker.storeside.refused import Refused

_log = logging.getLogger("broker.storeside")

_LAST_SECONDS = 5.0
"""For the answers to leave, once every request is done or the grace is over."""

_FORGET_SECONDS = 3600.0

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Options:
    """How to serve. `tls` holds the files of the certificate and of its key."""

    listen: Address
    audience: str
    issuer: str
    metrics: Address | None = None
    tls: tuple[Path, Path] | None = None
    grace_seconds: float = 30.0
    limits: Limits = field(default_factory=Limits)
    cors: Cors = field(default_factory=Cors)


async def serve(tree: Tree, keys: KeySource, options: Options) -> None:
    """Serve until SIGTERM or SIGINT. Raises `OSError` when an address cannot be listened on or the certificate not be read."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    context = None
    if options.tls is not None:
        context = _tls(options.tls)
        loop.add_signal_handler(signal.SIGHUP, _reload, context, options.tls)
    if not await keys.first():
        _log.warning("no keys yet: everything is refused until they can be read")
    # aiohttp's own lines on malformed requests might hold tokens.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL + 1)
    counted = Counted(keys, tree.root)
    gate = Gate(keys, audience=options.audience, issuer=options.issuer)
    application = Application(tree, gate, options.limits, counted, options.cors)
    connections = Server(application, options.limits, counted, handshakes=context is not None)
    runner = web.ServerRunner(connections, shutdown_timeout=_LAST_SECONDS)
    watched = web.ServerRunner(web.Server(_Watch(keys, counted), access_log=None), shutdown_timeout=_LAST_SECONDS)
    listener: asyncio.Server | None = None
    tasks = [asyncio.create_task(keys.run()), asyncio.create_task(_forget(application))]
    try:
        await watched.setup()
        await runner.setup()
        listener = await loop.create_server(
            connections, *options.listen, ssl=context, backlog=min(options.limits.connections, 1024),
            ssl_handshake_timeout=None if context is None else options.limits.head_seconds,
        )  # fmt: skip
        if options.metrics is not None:
            await web.TCPSite(watched, *options.metrics).start()
        _log.info("serving on %s:%d as %s", *options.listen, options.audience)
        await stop.wait()
        # aiohttp's own stop would drop what arrives of bodies, so that no upload could end.
        listener.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(application.idle(), options.grace_seconds)
    finally:
        if listener is not None:
            listener.close()
        await runner.cleanup()
        await watched.cleanup()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forget(application: Application) -> None:
    while True:
        await asyncio.to_thread(application.forget, time.time())
        await asyncio.sleep(_FORGET_SECONDS)


class _Watch:
    """``/metrics``, and ``/healthz``: 503 while there are no keys to verify with."""

    def __init__(self, keys: KeySource, counted: Counted) -> None:
        self._keys = keys
        self._counted = counted

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/metrics":
            return plain(200, generate_latest(self._counted.registry), {"Content-Type": CONTENT_TYPE_LATEST})
        if request.path != "/healthz":
            return plain(404)
        try:
            self._keys.keys()
        except Refused as refused:
            return plain(refused.status, f"{refused.reason}\n".encode(), {"Content-Type": "text/plain"})
        return plain(200, b"ok\n", {"Content-Type": "text/plain"})


def _tls(files: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*files)
    return context


def _reload(context: ssl.SSLContext, files: tuple[Path, Path]) -> None:
    """Of new connections; what cannot be read leaves the old certificate."""
    try:
        context.load_cert_chain(*files)
    except OSError as error:  # ssl.SSLError is one
        _log.warning("the certificate cannot be read (%s); going on with the old one", type(error).__name__)


def _many_files() -> None:
    """As many open files as the system allows: each transfer takes two or three."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _address(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Address | None:
    if text is None:
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise click.BadParameter("must be HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


def _origins(_context: click.Context, _parameter: click.Parameter, origins: tuple[str, ...]) -> tuple[str, ...]:
    if not all(is_origin(origin) for origin in origins):
        raise click.BadParameter("must be http(s)://HOST[:PORT], in lower case and without a slash at the end")
    return origins


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--root",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory of the objects. Must support hard links.",
)
@click.option("--listen", default="127.0.0.1:8480", show_default=True, callback=_address, help="HOST:PORT to listen on.")
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
@click.option("--metrics", metavar="HOST:PORT", callback=_address, help="Where /metrics and /healthz are. By default nowhere.")
@click.option(
    "--tls-cert", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Certificate chain (PEM). SIGHUP reads it again."
)
@click.option(
    "--cors-origin",
    multiple=True,
    metavar="ORIGIN",
    callback=_origins,
    help="http(s)://HOST[:PORT] whose pages browsers let read; may be given several times. By default nobody's.",
)
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its private key (PEM).")
@click.option(
    "--connections",
    default=Limits().connections,
    show_default=True,
    type=click.IntRange(min=1),
    help="At most so many at once; a further one takes the place of the longest idle one, or gets 503.",
)
@click.option(
    "--reads-per-token",
    default=Limits().reads_per_token,
    show_default=True,
    type=click.IntRange(min=0),
    help="Requests at once with one token that reads; more get 429. 0: no limit, for tokens that many share.",
)
@click.option(
    "--writes-per-token",
    default=Limits().writes_per_token,
    show_default=True,
    type=click.IntRange(min=0),
    help="The same for tokens that write or delete.",
)
@click.option(
    "--head-seconds",
    default=Limits().head_seconds,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="For a request's head to be complete, and for an idle connection.",
)
@click.option(
    "--slow-seconds",
    default=Limits().slow_seconds,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="In every stretch as long as this, a client must take or send --slow-bytes.",
)
@click.option("--slow-bytes", default=Limits().slow_bytes, show_default=True, type=click.IntRange(min=1))
def main(
    root: Path,
    listen: Address,
    audience: str,
    issuer: str,
    jwks: str,
    refresh: float,
    keep: float,
    grace: float,
    metrics: Address | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    cors_origin: tuple[str, ...],
    **limits: Any,
) -> None:
    """Serve the files under a directory to holders of transfer tokens.

    Every request needs a token that the broker signed for this store, this path and this method; it is checked here, offline,
    against the broker's public keys. Objects are written atomically, never overwritten, and their length and digest are
    enforced as the token says. The server keeps its own files in ROOT/.broker, which no request reaches.

    Register it at the broker: broker store add NAME --kind http --endpoint http://HOST:PORT
    (and --internal, when that is a private address)
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        tree = Tree(root)
    except OSError as error:
        raise click.ClickException(f"{root} cannot be used: {error.strerror}") from None
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together")
    tls = None if tls_cert is None or tls_key is None else (tls_cert, tls_key)
    _many_files()
    try:
        keys = KeySource(jwks, refresh_seconds=refresh, keep_seconds=keep)
        asyncio.run(serve(tree, keys, Options(listen, audience, issuer, metrics, tls, grace, Limits(**limits), Cors(cors_origin))))
    except ssl.SSLError:
        raise click.ClickException("the certificate and its key cannot be read, or do not belong together") from None
    except OSError as error:
        raise click.ClickException(f"cannot listen: {error.strerror}") from None
    finally:
        tree.close()


if __name__ == "__main__":
    main()
