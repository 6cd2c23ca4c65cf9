"""`broker import glance`: takes over the images of a running Glance, with their ids, where their bytes already lie."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import click
from rich.console import Console
from rich.progress import Progress

from broker import errors
from broker.cli import exits
from broker.cli.connection import Connection, connected, print_json
from broker.cli.display import print_table
from broker.cli.glance_source import Glance
from broker.cli.takeover import Location, Planned, plan
from broker.client.answers import Image
from broker.client.api import Broker
from broker.client.trouble import ClientError
from broker.model import Store
from broker.units import size_text


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one image: ``new``, ``known``, ``changed``, ``left out`` or ``failed`` (before ``--apply``: ``to do``), and why."""

    image: Planned
    outcome: str
    detail: str = ""


@click.group(name="import")
def command() -> None:
    """Take over what another service keeps."""


@command.command()
@click.option("--cloud", help="The cloud in clouds.yaml; else OS_CLOUD and the other OS_* variables, where credentials belong.")
@click.option("--map", "maps", multiple=True, metavar="URL=STORE", help="Locations that begin so are below this store. Again for more.")
@click.option("--image", "only", multiple=True, metavar="ID", help="Only this image. Again for more.")
@click.option("--apply", is_flag=True, help="Do it. Without this nothing is changed anywhere.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line: each image, then the total.")
@connected
def glance(connection: Connection, cloud: str | None, maps: tuple[str, ...], only: tuple[str, ...], apply: bool, as_json: bool) -> None:
    """Take over a Glance's images: ids, owners, visibility, members, properties, and the locations that registered stores have.

    No byte moves: the broker looks at each object where it lies, and compares it with what Glance says of it. Run it again as often as
    needed; what is there stays. Ends with 1 when an image was left out or failed. The token has to be an administrator's, here and there.
    """
    mapped = dict(_mapping(text) for text in maps)
    done = exits.run(_import(connection, cloud, mapped, frozenset(only), apply, as_json), "run it again: what is done stays")
    _show(done, apply, as_json)
    if any(each.outcome in ("left out", "failed") for each in done):
        raise SystemExit(exits.FAILED)


def _mapping(text: str) -> tuple[str, str]:
    beginning, separator, store = text.rpartition("=")
    if not separator or "://" not in beginning or not store:
        raise click.UsageError("--map takes URL=STORE, such as swift+config://ref1/glance=swift-1")
    if "@" in beginning:
        raise click.UsageError("--map takes a URL without user and password: those of locations are dropped before they are compared")
    return beginning, store


async def _import(
    connection: Connection, cloud: str | None, mapped: Mapping[str, str], only: frozenset[str], apply: bool, quiet: bool
) -> list[Done]:
    source = await asyncio.to_thread(Glance, cloud)
    async with connection.open() as broker:
        stores = [_store(document) async for document in broker.stores()]
        for name in mapped.values():
            if name not in {store.name for store in stores}:
                raise ClientError(f"no store is called {name}", "broker ls stores lists them")
        images = await asyncio.to_thread(lambda: [image for image in source.images() if not only or image["id"] in only])
        done = []
        with Progress(console=Console(stderr=True), disable=quiet) as bar:
            task = bar.add_task("images", total=len(images))
            for image in images:
                done.append(await _one(broker, plan(image, stores, mapped), apply))
                bar.advance(task)
        return done


def _store(shown: Any) -> Store:
    known = {name: shown.document[name] for name in ("internal_endpoint", "settings") if name in shown.document}
    return Store(id=0, name=shown.name, kind=shown.kind, site=shown.site, endpoint=shown.endpoint, **known)


async def _one(broker: Broker, image: Planned, apply: bool) -> Done:
    if image.reason:
        return Done(image, "left out", image.reason)
    try:
        known = await _known(broker, image)
        if not apply:
            return Done(image, "to do" if known is None else "known")
        return await _carry_out(broker, image, known)
    except errors.BrokerError as error:
        return Done(image, "failed", f"{error.detail or error.title}{f' ({error.field})' if error.field else ''}")


async def _known(broker: Broker, image: Planned) -> Image | None:
    try:
        return await broker.image(UUID(image.id))
    except errors.NotFound:
        return None


async def _carry_out(broker: Broker, image: Planned, known: Image | None) -> Done:
    """Make what is missing, in an order in which each step can be done again."""
    id, notes, changed = UUID(image.id), [], False
    now = known or await broker.create_image(image.request)
    if image.deactivated and now.status in ("queued", "active"):  # before it has bytes that somebody could get
        now = await broker.change_image(id, {"status": "deactivated"}, now.etag or "*")
        changed = True
    if image.members:
        there = {member["member"]: member["status"] for member in await broker.members(id)}
        for project, status in image.members.items():
            if project not in there:
                await broker.add_member(id, project)
                changed = True
            if status != there.get(project, "pending"):
                await broker.answer_member(id, project, status)
                changed = True
    registered = {(each.store, each.key) for blob in now.blobs.values() async for each in broker.blob_replicas(blob.id)}
    for location in image.locations:
        if (location.store, location.key) not in registered:
            now, note = await _bring(broker, image, location, now)
            notes += note
            changed = True
    notes += [f"no store has {url}" for url in image.unmapped]
    return Done(image, "new" if known is None else "changed" if changed else "known", "; ".join(notes))


async def _bring(broker: Broker, image: Planned, location: Location, now: Image) -> tuple[Image, list[str]]:
    """Make an object the image's bytes, or one more replica of them. The image as it is then, and what has to be said of it."""
    format, place = image.request.get("disk_format", "raw"), {"store": location.store, "key": location.key}
    notes: list[str] = []
    if format in now.blobs and now.status != "queued":
        await broker.register_replica(now.blobs[format].id, place)
        return now, notes
    try:
        await broker.adopt_object(now.id, {"format": format, **place, **({"digests": image.digests} if image.digests else {})})
    except errors.Unverifiable:
        await broker.adopt_object(now.id, {"format": format, **place})
        notes.append(f"{location.store} tells no digest that can be compared with Glance's")
    return await broker.image(now.id), notes


def _show(done: list[Done], apply: bool, as_json: bool) -> None:
    outcomes = [each.outcome for each in done]
    totals = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    if as_json:
        for each in done:
            stores = [location.store for location in each.image.locations]
            print_json(
                {"image": each.image.id, "outcome": each.outcome, "stores": stores, "unmapped": each.image.unmapped, "detail": each.detail}
            )
        print_json({"total": totals, "applied": apply})
        return
    rows = [_row(each) for each in done]
    print_table(("id", "name", "size", "outcome", "stores", "detail"), rows)
    told = ", ".join(f"{number} {outcome}" for outcome, number in totals.items()) or "no images"
    click.echo(told if apply else f"{told}; nothing was changed, --apply does it", err=True)


def _row(done: Done) -> tuple[object, ...]:
    image = done.image
    stores = " ".join(location.store for location in image.locations)
    detail = done.detail or "; ".join(f"no store has {url}" for url in image.unmapped)
    return image.id, image.name, size_text(image.size) if image.size else "", done.outcome, stores, detail
