"""`broker store`: register, probe, change, list and forget stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from broker.cli import exits
from broker.cli.connection import Connection, connected, print_json
from broker.cli.display import print_table
from broker.cli.ls import store_row
from broker.cli.show import flattened
from broker.client.answers import Store
from broker.client.api import Broker

Command = TypeVar("Command", bound=Callable[..., Any])

_CLEARED = "none"
_SETTINGS = (
    "s3: bucket, region, style; swift: account, container, segments_container, digest; http: audience; each: prefix, weak_uploads, cache. "
    "May be repeated."
)


class _Limit(click.ParamType[Any]):
    """A number, or ``none`` for no limit."""

    name = "number|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == _CLEARED:
            return _CLEARED
        try:
            return int(value)
        except ValueError:
            self.fail("a whole number, or none", param, ctx)


class _Range(click.ParamType[Any]):
    """MIN-MAX, or ``none``."""

    name = "min-max|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int] | str:
        if value == _CLEARED:
            return _CLEARED
        least, _, most = str(value).partition("-")
        try:
            return {"min": int(least), "max": int(most)}
        except ValueError:
            self.fail("MIN-MAX, such as 4-64, or none", param, ctx)


def _fields(function: Command) -> Command:
    """The options that `add` and `set` share."""
    for option in reversed(
        (
            click.option("--internal-endpoint", help="The same store as the broker reaches it; none: the same address."),
            click.option(
                "--internal/--external", default=None, help="Whether the broker may open private and loopback addresses for it."
            ),
            click.option("--setting", "settings", multiple=True, metavar="NAME=VALUE", help=_SETTINGS),
            click.option("--credential", help="Name of an entry in the broker's credentials directory; none: no credential."),
            click.option("--exposure", type=click.Choice(["public", "service"]), help="Who may learn that it exists."),
            click.option("--enabled/--disabled", default=None, help="Whether tickets may name it."),
            click.option("--writable/--read-only", default=None, help="Whether uploads may go there."),
            click.option("--cost", type=float, help="0 and more; a dearer store is ranked lower."),
            click.option("--read-slots", type=_Limit(), help="Reads at once; none: no limit."),
            click.option("--write-slots", type=_Limit(), help="Writes at once; none: no limit."),
            click.option("--read-adaptive", type=_Range(), help="Let the broker find the best number of reads at once, between these."),
            click.option("--write-adaptive", type=_Range(), help="The same for writes."),
            click.option("--read-bandwidth", type=_Limit(), help="Bytes per second in all; none: unknown."),
            click.option("--write-bandwidth", type=_Limit(), help="Bytes per second in all; none: unknown."),
            click.option("--capacity", type=_Limit(), help="Bytes that may be filled; none: unknown."),
            click.option("--json", "as_json", is_flag=True, help="The store as JSON."),
        )
    ):  # fmt: skip
        function = option(function)
    return function


def _body(options: Mapping[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for name, value in options.items():
        if name == "settings":
            pairs = [pair.partition("=") for pair in value]
            if any(not key or not sign for key, sign, _ in pairs):
                raise click.UsageError("--setting takes NAME=VALUE")
            if pairs:
                body["settings"] = {key: text for key, _, text in pairs}
        elif value is not None:
            body[name] = None if value == _CLEARED else value
    return body


@click.group()
def command() -> None:
    """Register, probe, change and list stores."""


@command.command()
@click.argument("name")
@click.option("--kind", required=True, help="s3, swift, http (tokens; broker-storeside), path (a mount), or rbd.")
@click.option("--site", required=True, help="Where it is, such as eu/az1.")
@click.option("--endpoint", required=True, help="scheme://host[:port] as clients reach it; file:///DIRECTORY or rbd://FSID/POOL.")
@_fields
@connected
def add(connection: Connection, name: str, as_json: bool, **options: Any) -> None:
    """Register the store NAME. It is probed at once: what it enforces decides what it is used for."""
    body = {"name": name, **_body(options)}
    show(exits.run(connection.ask(lambda broker: broker.create_store(body))), as_json)


@command.command("set")
@click.argument("name")
@click.option("--site", help="Where it is.")
@click.option("--endpoint", help="scheme://host[:port] as clients reach it; file:///DIRECTORY or rbd://FSID/POOL.")
@_fields
@connected
def change(connection: Connection, name: str, as_json: bool, **options: Any) -> None:
    """Change the store NAME. Fewer slots drain first."""
    body = _body(options)
    if not body:
        raise click.UsageError("nothing to change: give at least one option")

    async def work(broker: Broker) -> Store:
        return await broker.change_store(name, body, (await broker.store(name)).etag or "")

    show(exits.run(connection.ask(work)), as_json)


@command.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@connected
def probe(connection: Connection, name: str, as_json: bool) -> None:
    """Look again at what the store NAME really enforces."""
    show(exits.run(connection.ask(lambda broker: broker.probe_store(name))), as_json)


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@connected
def show_one(connection: Connection, name: str, as_json: bool) -> None:
    """Show the store NAME and what its last probe saw."""
    show(exits.run(connection.ask(lambda broker: broker.store(name))), as_json)


@command.command("list")
@click.option("--site", help="Stores at this site.")
@click.option("--kind", help="Stores of this kind.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")
@connected
def list_all(connection: Connection, site: str | None, kind: str | None, as_json: bool) -> None:
    """List stores."""

    async def work(broker: Broker) -> list[Store]:
        return [store async for store in broker.stores(site=site, kind=kind)]

    stores = exits.run(connection.ask(work))
    if as_json:
        for store in stores:
            print_json(store.document)
        return
    print_table(("name", "kind", "site", "endpoint", "exposure", "use"), map(store_row, stores))


@command.command()
@click.argument("name")
@connected
def remove(connection: Connection, name: str) -> None:
    """Forget the store NAME; it must hold no replicas."""

    async def work(broker: Broker) -> None:
        await broker.delete_store(name, (await broker.store(name)).etag or "")

    exits.run(connection.ask(work))


def show(store: Store, as_json: bool) -> None:
    """A store, its abilities, and the steps of its probe."""
    if as_json:
        print_json(store.document)
        return
    fields = {key: value for key, value in store.document.items() if key not in ("probe", "abilities")}
    print_table(("field", "value"), flattened(fields), f"store {store.name}")
    abilities = store.document.get("abilities")
    if abilities:
        print_table(("ability", "seen"), flattened(abilities))
    steps = store.document.get("probe")
    if steps:
        print_table(("probe", "result", "detail"), [(step["name"], step["result"], step.get("detail", "")) for step in steps])
