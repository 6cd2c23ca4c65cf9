"""Which bytes a download is about: the blob that is named, or an image's in the formats that will do, if the client may read it.

Images and blobs come from memory while that is fresh (`broker.service.hot`), many by one look-up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from broker import errors, formats
from broker.catalog.compact import CompactBlob
from broker.model import Client, Image, Vetting
from broker.permit import may_read_blob, may_read_image, may_see_image
from broker.service.context import Context
from broker.service.hot import Hot, Known


class Target(NamedTuple):
    """The blob that a request means, and the image and format by which it was named."""

    blob: CompactBlob
    image_id: UUID | None = None
    format: str | None = None


async def blobs_of(
    hot: Hot | Known, client: Client, requests: Sequence[Mapping[str, Any]]
) -> list[Target | list[Target] | errors.BrokerError]:
    """Which blob each request means, if this principal may read it; those of several formats where the client can convert."""
    images = [request for request in requests if "image" in request]
    by_image = await _choose_blobs(hot, client, images) if images else iter(())
    named: list[Any] = [(request["blob"], None, None) if "blob" in request else next(by_image) for request in requests]
    several = [choice for choice in named if isinstance(choice, list)]
    ids = [choice[0] for choice in named if isinstance(choice, tuple)]
    found = iter(await hot.blobs([*ids, *(each[0] for choice in several for each in choice)] if several else ids))
    for index, choice in enumerate(named):
        if isinstance(choice, tuple):
            _, image_id, format = choice
            blob = next(found)
            readable = blob is not None and (image_id is not None or blob.read_by_all or may_read_blob(client.principal, blob.images))
            named[index] = Target(blob, image_id, format) if blob is not None and readable else errors.NotFound("No such blob.")
    for choice in several:
        choice[:] = [Target(blob, image_id, format) for _, image_id, format in choice if (blob := next(found)) is not None]
    return named


async def _choose_blobs(
    hot: Hot | Known, client: Client, requests: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, UUID, str] | list[tuple[str, UUID, str]] | errors.BrokerError]:
    """Blob id, image id and format of each request that names an image; of every format that will do where the client can convert."""
    chosen: list[Any] = []
    images = await hot.images([request["image"] for request in requests])
    for request, found in zip(requests, images, strict=True):
        try:
            image = readable_image(client, found)
            if "convert" in request:
                chosen.append([(str(image.blobs[format]), image.id, format) for format in acceptable_formats(image, request)])
                continue
            format = choose_format(image, request.get("formats"))
            chosen.append((str(image.blobs[format]), image.id, format))
        except errors.BrokerError as error:
            chosen.append(error)
    return iter(chosen)


async def find_image(context: Context, client: Client, id: str) -> Image:
    """The image as tickets for it find it. Raises `NotFound`, `Forbidden`, `Unavailable`."""
    return readable_image(client, (await context.memory.hot.images([id]))[0])


def readable_image(client: Client, image: Image | None) -> Image:
    """The image, if the client may read it. Raises `NotFound`, `Forbidden`."""
    if image is None or not may_see_image(client.principal, image):
        raise errors.NotFound("No such image.")
    if not may_read_image(client.principal, image):
        raise errors.Forbidden(_WITHHELD.get(image.vetting, "The image is deactivated."))
    return image


_WITHHELD: Mapping[Vetting | None, str] = {
    Vetting.PENDING: "The image waits for an administrator's approval.",
    Vetting.REJECTED: "An administrator has rejected the image.",
}


def choose_format(image: Image, wanted: Sequence[str] | None) -> str:
    """The first format that the client asked for and the image has; the first of all when it did not ask. Raises `NoSource`."""
    for format in wanted or sorted(image.blobs):
        if format in image.blobs:
            return format
    raise _no_format(image)


def acceptable_formats(image: Image, request: Mapping[str, Any]) -> list[str]:
    """The formats of the image that a request takes as they are or to convert. Raises `NoSource`, and `Invalid` for a request
    that says only what it converts."""
    if "formats" not in request:
        raise errors.Invalid(
            "Convert into which format?", field="formats", expected="the formats that are taken as they are, with `convert`"
        )
    found = formats.acceptable(image.blobs, request["formats"], request["convert"])
    if not found:
        raise _no_format(image)
    return found


def _no_format(image: Image) -> errors.NoSource:
    if not image.blobs:
        return errors.NoSource("The image has no bytes yet; upload them first.")
    have = ", ".join(sorted(image.blobs))
    return errors.NoSource(f"The image has none of the formats asked for; it has {have}.", field="formats", expected=have)
