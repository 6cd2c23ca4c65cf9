"""Blobs over the API: to look at. They come with uploads and registrations and go with the last image that needs them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from broker import errors, permit
from broker.catalog import blobs, views
from broker.catalog.connect import reachable
from broker.catalog.views import BlobView
from broker.model import Client
from broker.service.context import Context
from broker.service.summary import summary


async def get_blob(context: Context, client: Client, id: UUID) -> dict[str, Any]:
    """One blob, with its piece digests and the images through which this principal may list it. Raises `NotFound`."""
    view = await readable(context, client, id)
    blob = await blobs.get(context.db, id)
    if blob is None:
        raise errors.NotFound("No such blob.")
    shown = summary(blob)
    if blob.pieces is not None:
        shown["pieces"] = {"length": blob.pieces.length, "algorithm": blob.pieces.algorithm, "digests": list(blob.pieces.digests)}
    listed = (image for image in view.images if permit.lists_image(client.principal, image))
    shown["images"] = [{"image": str(image.id), "format": image.format} for image in listed]
    return shown


async def readable(context: Context, client: Client, id: UUID) -> BlobView:
    """The blob as the catalogue has it now, if this principal may read it. Raises `NotFound`."""
    with reachable():
        (view,) = await views.blobs(context.db, [id])
    if view is None or not permit.may_read_blob(client.principal, view.images):
        raise errors.NotFound("No such blob.")
    return view
