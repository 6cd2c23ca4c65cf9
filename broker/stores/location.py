"""Which registered store an object's URL names, and under which key; and the URL of a key. Pure: nothing is opened or resolved.

A location is (registered store, key), never a URL from a user (invariant 9), so a URL is only ever compared with what administrators
registered. Rules

- Scheme, host and port are those of the store's endpoint; the path goes on below its bucket, container or base, at a slash.
- Schemes are those of OpenStack's glance_store: ``s3://`` (either transport), ``s3+http(s)://``, ``swift://`` (https),
  ``swift+http(s)://``; and ``http(s)://`` for a store of any kind. What follows host and port is the path by HTTP: of Swift
  ``/v1/ACCOUNT/CONTAINER/KEY``, of S3 ``/BUCKET/KEY``, whatever the style, or ``/KEY`` at the bucket's own host.
- One spelling: ASCII, percent-decoded once, no user, query, fragment, empty or dot segment, control character, backslash or escaped slash.
- The address that the broker itself uses is known only to those who may see it, and never shown.
- Where stores lie within each other, the innermost has the object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlsplit

from broker.errors import Invalid
from broker.model import Store

MAX_URL_LENGTH = 8192
"""Characters: a key of 1,024 bytes, each escaped, an endpoint, and room."""

_PORTS = {"http": 80, "https": 443}
_SCHEMES = {
    "http": (None, "http"),
    "https": (None, "https"),
    "s3": ("s3", None),
    "s3+http": ("s3", "http"),
    "s3+https": ("s3", "https"),
    "swift": ("swift", "https"),
    "swift+http": ("swift", "http"),
    "swift+https": ("swift", "https"),
}
"""Scheme to the kind of store and the transport that it asks for; ``None``: any."""

_KINDS = ("http", "s3", "swift")
_PLAIN = re.compile(r"[!-\[\]-~]+\Z")  # printable ASCII but for the space and the backslash
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%(?:2[Ff]|5[Cc])")
_EXPECTED = "the URL of an object below the endpoint, and the bucket, container or prefix, of a registered store"


class Location(NamedTuple):
    """An object at a store."""

    store: Store
    key: str


class _Place(NamedTuple):
    """Below which address a store keeps its objects; `path` is decoded and ends where keys begin."""

    transport: str
    host: str
    port: int
    path: str


def locate(url: str, stores: Iterable[Store], *, internal: bool = False, field: str = "url") -> Location:
    """The store among `stores` (those that whoever asks may know) and the key that `url` names.

    `internal`: also by the addresses that only the broker uses. Raises `Invalid` for `field`; the text never quotes the URL, which
    may hold a password.
    """
    kind, transport, host, port, path = _read(url, field)
    found: Location | None = None
    deepest = -1
    for store in stores:
        if kind not in (None, store.kind):
            continue
        for place in _places(store, internal=internal):
            if (
                place.host != host
                or place.port != (port or _PORTS[transport or place.transport])
                or transport not in (None, place.transport)
            ):
                continue
            if len(place.path) > deepest and path.startswith(place.path) and len(path) > len(place.path):
                found, deepest = Location(store, path[len(place.path) :]), len(place.path)
    if found is None:
        raise Invalid("No registered store has this location.", field=field, expected=_EXPECTED)
    return found


def url_of(store: Store, key: str) -> str | None:
    """The URL that names `key` of `store` by the endpoint that clients use; ``None`` for kinds whose objects have none."""
    place = next(_places(store), None)
    if place is None:
        return None
    scheme = place.transport if store.kind == "http" else f"{store.kind}+{place.transport}"
    host = f"[{place.host}]" if ":" in place.host else place.host
    port = "" if place.port == _PORTS[place.transport] else f":{place.port}"
    return f"{scheme}://{host}{port}{quote(place.path + key, safe='/~')}"


def _read(url: str, field: str) -> tuple[str | None, str | None, str, int | None, str]:
    """Kind, transport, host, port and decoded path of a URL that can be read in one way. Raises `Invalid`."""
    if len(url) > MAX_URL_LENGTH or _PLAIN.match(url) is None:
        raise Invalid("This is no URL.", field=field, expected=f"a URL in ASCII, at most {MAX_URL_LENGTH} characters, others escaped")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Invalid("This is no URL.", field=field, expected="scheme://host[:port]/path") from None
    if parts.scheme not in _SCHEMES:
        raise Invalid("Objects are not named by this scheme.", field=field, expected="one of " + ", ".join(sorted(_SCHEMES)))
    if "@" in parts.netloc:
        raise Invalid("The URL holds a user: the broker has its own credentials.", field=field, expected="a URL without user and password")
    if "?" in url or "#" in url:
        raise Invalid("The URL holds a query or a fragment.", field=field, expected="a URL that ends with the key; ? is %3F, # is %23")
    if not host:
        raise Invalid("The URL has no host.", field=field, expected="scheme://host[:port]/path")
    if _BAD_ESCAPE.search(parts.path):
        raise Invalid("The path can be read in two ways.", field=field, expected="no escaped slash or backslash, no % that escapes nothing")
    try:
        path = unquote_to_bytes(parts.path).decode()
    except UnicodeDecodeError:
        raise Invalid("The path is no UTF-8.", field=field, expected="percent-encoded UTF-8") from None
    if not path.isprintable() or not {"", ".", ".."}.isdisjoint(path[1:].split("/")):
        raise Invalid("The path can be read in two ways.", field=field, expected="no empty or dot segments, no control characters")
    return *_SCHEMES[parts.scheme], host, port, path


def _places(store: Store, *, internal: bool = False) -> Iterator[_Place]:
    """Where the objects of a store are, the way that is shown first."""
    if store.kind not in _KINDS:
        return
    prefix = store.settings.get("prefix", "")
    for endpoint in (store.endpoint, store.internal_endpoint if internal else None):
        try:
            parts = urlsplit(endpoint or "")
            host, port, transport = parts.hostname, parts.port, parts.scheme
        except ValueError:
            continue
        if not host or transport not in _PORTS:
            continue
        base = unquote_to_bytes(parts.path.rstrip("/")).decode(errors="replace")
        port = port or _PORTS[transport]
        if store.kind == "s3":
            bucket = store.settings.get("bucket", "")
            yield _Place(transport, host, port, f"{base}/{bucket}/{prefix}")
            if store.settings.get("style") == "virtual":
                yield _Place(transport, f"{bucket}.{host}".lower(), port, f"{base}/{prefix}")
        elif store.kind == "swift":
            settings = store.settings
            yield _Place(transport, host, port, f"{base}/v1/{settings.get('account', '')}/{settings.get('container', '')}/{prefix}")
        else:
            yield _Place(transport, host, port, f"{base}/{prefix}")
