"""A blob as every answer of the API shows it."""

from __future__ import annotations

from typing import Any

from broker.model import Blob


def summary(blob: Blob) -> dict[str, Any]:
    """A blob as tickets show it."""
    return {"id": str(blob.id), "size": blob.size, "digests": blob.digests, "state": blob.state}
