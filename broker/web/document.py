"""Documents of identity services (OIDC issuers, Keystone): small, and not packed.

Rules: no more is read than the limit; what is packed is refused, since a few kilobytes could become many.
"""

from __future__ import annotations

import aiohttp

MAX_DOCUMENT_BYTES = 256 << 10

PLAIN_JSON = {"Accept": "application/json", "Accept-Encoding": "identity"}
"""Headers that ask for such a document."""


async def read_document(response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer. Raises `ValueError` when it is packed or too large."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("the document is packed")
    content = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        content += chunk
        if len(content) > MAX_DOCUMENT_BYTES:
            raise ValueError("the document is too large")
    return bytes(content)
