"""The bytes of an image for clients that follow redirects or read Metalinks."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from multidict import CIMultiDict

from broker import errors
from broker.model import new_ids
from broker.service import blobs, locate, negotiate
from broker.service.asked import parsed
from broker.web import redirect
from broker.web.call import Answer, Call

__all__ = ["get_image_content"]

SOURCES = 5
"""Sources that are named when the request does not say how many."""


async def get_image_content(call: Call) -> Answer:
    call.context.pace.count(call.client.principal.project, 1)
    image = await locate.find_image(call.context, call.client, call.path["image"])
    format = locate.choose_format(image, [call.query["format"]] if "format" in call.query else None)
    name = redirect.file_name(image.name, format, call.path["image"])
    ticket = await _ticket(call, format, call.query.get("filename", name))
    sources = redirect.openable(ticket)
    if not sources:
        raise errors.NoSource("No source can be opened by its URL alone; ask POST /v1/tickets, which tells the header fields too.")
    if not redirect.wants_metalink(call.headers.get("Accept")):
        return Answer(302, None, redirect.redirect(sources, ticket["blob"]["digests"]))
    blob = await blobs.get_blob(call.context, call.client, UUID(ticket["blob"]["id"]))
    document = redirect.metalink(sources, blob, name)
    return Answer(200, document, CIMultiDict({"Content-Type": redirect.METALINK, "Cache-Control": "no-store", "Vary": "Accept"}))


async def _ticket(call: Call, format: str, filename: str) -> dict[str, Any]:
    """The ticket that this request stands for, as POST /v1/tickets would answer it."""
    asked: dict[str, Any] = {
        "operation": "download", "image": call.path["image"], "formats": [format], "count": call.query.get("count", SOURCES),
        "filename": filename, "once": True,
    }  # fmt: skip
    if "site" in call.query:
        asked["site"] = call.query["site"]
    return parsed(await negotiate.download(call.context, call.client, asked, new_ids(1, call.context.clock())[0]))
