"""Small servers as operators would write them behind our adapters: objects in memory that are never overwritten.

Each is a program's module: ``STORE_KEYS`` is the file of the key set, ``STORE_AUDIENCE`` and ``STORE_ISSUER`` what tokens must say.
"""

from __future__ import annotations

import os

KEYS = os.environ.get("STORE_KEYS", "")
AUDIENCE = os.environ.get("STORE_AUDIENCE", "")
ISSUER = os.environ.get("STORE_ISSUER", "")

OBJECTS: dict[str, bytes] = {}


def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """What a request that was let in comes to."""
    if method == "PUT":
        if path in OBJECTS:
            return 412, b""
        OBJECTS[path] = body
        return 201, b""
    if path not in OBJECTS:
        return 404, b""
    if method == "DELETE":
        del OBJECTS[path]
        return 204, b""
    return (200, OBJECTS[path]) if method in ("GET", "HEAD") else (405, b"")
