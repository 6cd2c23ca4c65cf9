"""What the commands that talk to a broker have in common: how it is reached, what an argument names, how JSON is printed."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import click
import orjson

from broker.client.answers import Image
from broker.client.api import PATIENCE_SECONDS, Broker
from broker.client.trouble import ClientError
from broker.errors import NotFound

Value = TypeVar("Value")
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Connection:
    """How the broker is reached."""

    url: str | None
    token_file: Path | None
    wait: float

    def open(self) -> Broker:
        return Broker(self.url, token_file=self.token_file, patience=self.wait)

    async def ask(self, work: Callable[[Broker], Awaitable[Value]]) -> Value:
        """What `work` makes of the broker."""
        async with self.open() as broker:
            return await work(broker)


_URL = click.option("--url", help="The broker; else BROKER_URL, else http://127.0.0.1:8080.")
_TOKEN_FILE = click.option(
    "--token-file", type=click.Path(path_type=Path),
    help="File with the token; else BROKER_TOKEN, OS_TOKEN (of Keystone), or ~/.config/transfer-broker/token.",
)  # fmt: skip
_WAIT = click.option(
    "--wait", type=click.FloatRange(0, 86400), default=PATIENCE_SECONDS, show_default=True,
    help="Seconds to try again while the broker is busy or away.",
)  # fmt: skip


def connected(function: Command) -> Command:
    """Adds the options --url, --token-file and --wait; the command gets a `Connection` as ``connection``."""

    def wrapped(*arguments: Any, url: str | None, token_file: Path | None, wait: float, **options: Any) -> Any:
        return function(*arguments, connection=Connection(url, token_file, wait), **options)

    wrapped.__doc__ = function.__doc__
    wrapped.__name__ = function.__name__
    wrapped.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (_WAIT, _TOKEN_FILE, _URL):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


class Ambiguous(ClientError):
    """A name stands for several images."""


@dataclass(frozen=True, slots=True)
class Named:
    """What an argument stands for: one of the two is set."""

    image: UUID | None = None
    blob: UUID | None = None
    name: str = ""


def as_uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


async def resolve(broker: Broker, text: str) -> Named:
    """An image's id or name, or a blob's id. Raises `NotFound`, or `Ambiguous` when several images have that name."""
    id = as_uuid(text)
    if id is not None:
        try:
            return Named(image=id, name=(await broker.image(id)).name)
        except NotFound:
            await broker.blob(id)
            return Named(blob=id, name=str(id))
    found = [image async for image in broker.images(name=text)]
    if not found:
        raise NotFound(f"no image is named {text!r}")
    if len(found) > 1:
        some = ", ".join(str(image.id) for image in found[:5])
        raise Ambiguous(f"{len(found)} images are named {text!r}: {some}", "use the id of one of them")
    return Named(image=found[0].id, name=found[0].name)


async def image_named(broker: Broker, text: str) -> Image:
    """The image of that id or name. Raises `NotFound`, `Ambiguous`."""
    named = await resolve(broker, text)
    if named.image is None:
        raise NotFound(f"{as_uuid(text)} is a blob, no image")
    return await broker.image(named.image)


def print_json(document: Any) -> None:
    """One JSON document, indented on a terminal, on one line off it."""
    indent = orjson.OPT_INDENT_2 if sys.stdout.isatty() else 0
    click.echo(orjson.dumps(document, option=indent, default=_plain).decode())


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(type(value).__name__)
