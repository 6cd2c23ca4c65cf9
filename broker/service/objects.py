"""Blobs and images under one kind of id, with the places where their bytes could be read now: what a DRS object is rendered from.

Rules
- An id is that of a blob, which is one sequence of bytes for ever, or of an image, which stands for the blobs that it has.
- Nothing is leased, recorded or signed here. Places come in the order that a ticket would have, drawn by share; who asks sees none that a
  ticket would not name to him, except that what failed him a moment ago stays: he asks what there is.
- What a principal may not read does not exist; a deactivated image that he may see is forbidden, as tickets for it are.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from broker import accept, errors, rank
from broker.catalog.compact import CompactBlob
from broker.model import Client, Direction, Image, Operation
from broker.permit import lists_image, may_read_blob
from broker.service import locate, ways
from broker.service.context import Context

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_NOTHING = "No such object."
_STRETCH = 31
"""After so many of a batch, and one, whoever waits for the processor has a turn."""


class Part(NamedTuple):
    """The bytes of one format of an image, or of a blob that was asked for itself: then there need be no `image`."""

    blob: CompactBlob
    image: Image | None
    format: str | None
    images: tuple[str, ...]
    """Ids of the images with it that who asks may list."""


class Found(NamedTuple):
    """What an id stands for: `parts` by format, one of a blob. `image` only where the id is an image's."""

    id: str
    image: Image | None
    parts: tuple[Part, ...]


def is_id(text: str) -> bool:
    """Whether anything can have this id: a UUID in canonical form."""
    return _ID.match(text) is not None


async def find(context: Context, client: Client, ids: Sequence[str]) -> list[Found | errors.BrokerError]:
    """What each id stands for, in order, or why the client gets nothing of it: `NotFound`, `Forbidden`. Raises only `Unavailable`."""
    hot = context.memory.hot
    known = list({id: None for id in ids if is_id(id)})
    found_blobs, found_images = await asyncio.gather(hot.blobs(known), hot.images(known))
    blobs, images = dict(zip(known, found_blobs, strict=True)), dict(zip(known, found_images, strict=True))
    by_image = [str(blob) for image in found_images if image is not None for blob in image.blobs.values()]
    by_blob = [listed[0] for blob in found_blobs if blob is not None and (listed := _listed(client, blob))]
    parts = dict(zip(by_image, await hot.blobs(by_image), strict=True))
    names = dict(zip(by_blob, await hot.images(by_blob), strict=True))
    results: list[Found | errors.BrokerError] = []
    for id in ids:
        try:
            if (blob := blobs.get(id)) is not None:
                results.append(_of_blob(client, blob, names))
            else:
                results.append(_of_image(client, images.get(id), parts))
        except errors.BrokerError as error:
            results.append(error)
    return results


def _of_blob(client: Client, blob: CompactBlob, names: Mapping[str, Image | None]) -> Found:
    if not may_read_blob(client.principal, blob.images):
        raise errors.NotFound(_NOTHING)
    listed = _listed(client, blob)
    image = names.get(listed[0]) if listed else None
    format = next((each.format for each in blob.images if image is not None and each.id == image.id), None)
    return Found(blob.id, None, (Part(blob, image, format, listed),))


def _of_image(client: Client, image: Image | None, parts: Mapping[str, CompactBlob | None]) -> Found:
    try:
        image = locate.readable_image(client, image)
    except errors.NotFound:  # in the words for a blob: the two cannot be told apart
        raise errors.NotFound(_NOTHING) from None
    found = [
        Part(blob, image, format, _listed(client, blob))
        for format, id in sorted(image.blobs.items())
        if (blob := parts.get(str(id))) is not None
    ]
    if not found:
        raise errors.NotFound("The image has no bytes yet.")
    return Found(str(image.id), image, tuple(found))


def _listed(client: Client, blob: CompactBlob) -> tuple[str, ...]:
    return tuple(sorted(str(each.id) for each in blob.images if lists_image(client.principal, each)))


async def places(context: Context, client: Client, blobs: Iterable[CompactBlob], schemes: frozenset[str]) -> list[list[accept.Candidate]]:
    """For each blob its replicas that this client could be sent to and that open by one of the `schemes`, in the order to try them."""
    now, principal = context.clock(), client.principal
    ask = accept.Request(
        Operation.DOWNLOAD, client.site, None, principal.project, principal.sees_private_stores, schemes=schemes, proven_site=client.site
    )  # fmt: skip
    outlooks = context.memory.outlooks(Direction.READ, client.site, context.policy.rank, now)
    answer: list[list[accept.Candidate]] = []
    for index, blob in enumerate(blobs):
        if index & _STRETCH == _STRETCH:
            await asyncio.sleep(0)
        loads = context.memory.read_loads
        asked = ask._replace(size=blob.size)
        ranking = rank.rank(asked, ways.candidates(context, blob), outlooks, loads, context.policy.rank, now, context.rng)
        answer.append([source.candidate for source in ranking.sources])
    return answer
