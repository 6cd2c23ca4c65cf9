"""Ids in paths. Whoever asks for what is no UUID is told that there is no such thing."""

from __future__ import annotations

from uuid import UUID

from broker.errors import NotFound
from broker.web.call import Call


def image(call: Call) -> UUID:
    """The image in the path. Raises `NotFound` for what is no UUID."""
    try:
        return UUID(call.path["image_id"])
    except ValueError:
        raise NotFound("No such image.") from None
