"""Conditions and ranges of a request (RFC 9110 sections 13 and 14). Pure.

* If-Match compares strongly, If-None-Match weakly; If-Unmodified-Since and If-Modified-Since count only without them. A date that
  cannot be read is no condition.
* If-Range takes an entity tag. A date is never strong enough here, so with one the whole is sent.
* One range is served. Several ranges, overlapping or not, other units, and what cannot be read are ignored: the whole is sent, once, so
  no request can ask for more bytes than the object has. A range that begins behind the end is 416.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime

from broker.storeside.refused import Refused
from broker.storeside.target import Headers, pairs

_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{1,18})?|-([0-9]{1,18}))\Z")
_TAG = re.compile(r'\s*(W/)?("[^"]*")\s*(?:,|\Z)')


def http_date(instant: float) -> str:
    """As Last-Modified says it, in whole seconds."""
    return format_datetime(datetime.fromtimestamp(int(instant), UTC), usegmt=True)


class Conditions:
    """The conditional fields of a request."""

    def __init__(self, headers: Headers) -> None:
        self._fields: dict[str, str] = {}
        for name, value in pairs(headers):
            if name.startswith("if-") or name == "range":
                self._fields[name] = f"{self._fields[name]}, {value}" if name in self._fields else value

    def check(self, method: str, etag: str, modified_at: float) -> bool:
        """Whether `method` is to be done on an object with `etag`; if not, it is answered 304. Raises `Refused` (412)."""
        if "if-match" in self._fields:
            met = _matches(self._fields["if-match"], etag, weakly=False)
        else:
            since = _date(self._fields.get("if-unmodified-since"))
            met = since is None or int(modified_at) <= since
        if not met:
            raise Refused(412, "the object is another one", {"ETag": etag})
        if "if-none-match" in self._fields:
            if not _matches(self._fields["if-none-match"], etag, weakly=True):
                return True
            if method not in ("GET", "HEAD"):
                raise Refused(412, "the object is this one", {"ETag": etag})
            return False
        since = _date(self._fields.get("if-modified-since"))
        return method not in ("GET", "HEAD") or since is None or int(modified_at) > since

    @property
    def want_an_object(self) -> bool:
        """Whether they can only be met by an object that is there (for a PUT, which makes a new one)."""
        return "if-match" in self._fields

    def span(self, etag: str, size: int) -> tuple[int, int] | None:
        """First byte and count of a single range, or nothing when the whole is to be sent. Raises `Refused` (416)."""
        match = _RANGE.match(self._fields.get("range", "").strip().lower())
        if match is None or self._fields.get("if-range", etag).strip() != etag:
            return None
        if match[3] is not None:
            count = min(int(match[3]), size)
            first = size - count
        else:
            first = int(match[1])
            last = size - 1 if match[2] is None else min(int(match[2]), size - 1)
            if match[2] is not None and int(match[2]) < first:
                return None
            count = last - first + 1
        if count <= 0:
            raise Refused(416, "the range is beyond the object", {"Content-Range": f"bytes */{size}"})
        return first, count


def _matches(field: str, etag: str, *, weakly: bool) -> bool:
    """Whether a list of entity tags has `etag`, which is a strong one."""
    return field.strip() == "*" or any(tag == etag and (weakly or not weak) for weak, tag in _tags(field))


def _tags(field: str) -> Sequence[tuple[str, str]]:
    return _TAG.findall(field)


def _date(field: str | None) -> float | None:
    if field is None:
        return None
    try:
        return parsedate_to_datetime(field).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
