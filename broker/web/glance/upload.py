"""PUT of an image's bytes: told how to bring them, since none passes through the broker.

A redirect would lose them: the bodies that python-glanceclient and Nova send are streams, of which a store that is redirected to gets
nothing, and takes that for an object of 0 bytes.
"""

from __future__ import annotations

from broker.errors import Conflict
from broker.web.call import Answer, Call
from broker.web.glance.images import found

__all__ = ["glance_upload_image"]

_HOW = (
    "The broker carries no bytes. Ask for an upload ticket (POST /v1/tickets with this image, or `broker put`), "
    "or send your requests to an edge that carries them to a store."
)


async def glance_upload_image(call: Call) -> Answer:
    await found(call)
    raise Conflict(_HOW)
