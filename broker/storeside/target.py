"""What a request names, and the token that it carries. Pure; the one rule for the file server and every adapter.

The path of a target is percent-decoded once, and is refused (400) when anybody on the way could read it otherwise:

* it begins with ``/`` and holds no fragment, no bad escape and nothing but UTF-8;
* no segment is empty, ``.`` or ``..``, so there is no ``//`` and no slash at the end;
* nothing in it is a control character or a backslash, written out or escaped, and no slash is escaped (``%2F``);
* decoded, it holds no second escape (``%`` and two hexadecimal digits), which another decoding would change.

Other spellings of the same characters (``%61`` for ``a``) name the same path (RFC 3986 section 6.2.2.2). The query holds one
``token`` and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import parse_qsl, unquote_to_bytes

from broker.storeside.refused import Refused, unproven

MAX_TARGET_LENGTH = 8192
"""Of path and query together, as they are sent (characters)."""

Headers = Mapping[str, str] | Iterable[tuple[str, str]]
"""Fields of a request: a mapping (a multidict gives a repeated field more than once) or pairs."""

_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HIDDEN_SEPARATOR = re.compile(r"%(?:2[Ff]|5[Cc])")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\]")


def read_target(raw: str) -> tuple[str, str]:
    """The percent-decoded path and the query of an origin-form target. Raises `Refused` (400, 414)."""
    if len(raw) > MAX_TARGET_LENGTH:
        raise Refused(414, "the request's target is too long")
    path, _, query = raw.partition("?")
    if not raw.isascii() or "#" in raw or _BAD_ESCAPE.search(path) or _HIDDEN_SEPARATOR.search(path):
        raise Refused(400, "the request's target is malformed")
    try:
        decoded = unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise Refused(400, "the path is not UTF-8") from None
    check_path(decoded)
    return decoded, query


def check_path(path: str) -> None:
    """Raises `Refused` (400) for a decoded path that could be read in two ways."""
    if not path.startswith("/") or _FORBIDDEN.search(path) or _ESCAPE.search(path) or not {"", ".", ".."}.isdisjoint(path[1:].split("/")):
        raise Refused(400, "the path names no object, or could be read in two ways")


def pairs(headers: Headers) -> list[tuple[str, str]]:
    """The fields one by one, names in lower case."""
    items = headers.items() if isinstance(headers, Mapping) else headers
    return [(name.lower(), value) for name, value in items]


def read_token(query: str, headers: Headers) -> str:
    """The one token of a request. Raises `Refused`: 401 when there is none, 400 when there are more, or anything else in the query."""
    tokens = []
    try:
        fields = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=2, separator="&")
    except ValueError:
        raise Refused(400, "the query may hold one token, nothing else") from None
    for name, value in fields:
        if name != "token":
            raise Refused(400, "the query may hold a token, nothing else")
        tokens.append(value)
    for name, value in pairs(headers):
        if name == "authorization":
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer":  # another scheme is meant for somebody else
                tokens.append(token.strip(" "))
    if not tokens:
        raise unproven("a token is required", "missing")
    if len(tokens) > 1:
        raise Refused(400, "more than one token")
    return tokens[0]
