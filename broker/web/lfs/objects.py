"""The objects of a batch: what a request says of each, and what it is answered (docs/api/batch.md, docs/api/basic-transfers.md).

Rules
- What is wrong with one object is that object's error, in its place; the others go on.
- Codes are those of HTTP. Want of space is 507; a value that cannot be right 422, as the specification has it.
- What a store answers with 401, git-lfs 3.3 asks for again at once and for ever, or asks its user for a password, unless the request had
  an Authorization field; then it asks the broker again. So a token goes there instead of the URL. S3 takes no such field beside a signed
  URL, and answers 403; Swift takes none beside a TempURL where it has an S3 API, and answers 401.
- Where an address and its header fields are enough, the answer says so (``authenticated``), so that nobody is asked for a password for a
  store. An upload does not: what follows it, ``verify``, is asked of the broker again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from broker import errors
from broker.model import Handle
from broker.service.instants import instant
from broker.service.repositories import Result, Wish
from broker.web.lfs.render import message, status

_TOKEN = "?token="

LONGEST_SECONDS = 2_147_483_647
"""The most that ``expires_in`` may say."""

_OID = re.compile(r"[0-9a-f]{64}\Z")


def read(objects: Sequence[Mapping[str, Any]]) -> list[Wish | errors.BrokerError]:
    """What each object is, or what is wrong with it."""
    return [_read(index, entry["oid"], entry["size"]) for index, entry in enumerate(objects)]


def _read(index: int, oid: str, size: int) -> Wish | errors.BrokerError:
    if _OID.match(oid) is None:
        return errors.Invalid("This is no SHA-256.", field=f"objects.{index}.oid", expected="64 hex digits in lower case")
    if size < 0:
        return errors.Invalid("No size is negative.", field=f"objects.{index}.size", expected="bytes, 0 and more")
    return Wish(oid, size)


def show(entry: Mapping[str, Any], result: Result, operation: str, verify: str, now: float) -> dict[str, Any]:
    """The answer for one object. `verify` is where the broker is told that it was put."""
    shown: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
    if isinstance(result, errors.BrokerError):
        return shown | {"error": {"code": status(result), "message": message(result)}}
    if result is None:
        return shown
    actions = {operation: _action(result, now)}
    if operation == "upload":
        return shown | {"actions": actions | {"verify": {"href": verify}}}
    return shown | {"authenticated": True, "actions": actions}


def _action(handle: Handle, now: float) -> dict[str, Any]:
    """What git-lfs is to do. The length of a body is git-lfs's own affair, which knows it as well."""
    url, header = _authorized(handle.url)
    header |= {name: value for name, value in handle.headers.items() if name.lower() != "content-length"}
    action: dict[str, Any] = {"href": url}
    if header:
        action["header"] = header
    left = max(0, min(int(handle.expires_at - now), LONGEST_SECONDS))
    return action | {"expires_in": left, "expires_at": instant(handle.expires_at)}


def _authorized(url: str) -> tuple[str, dict[str, str]]:
    """A signed URL with the Authorization field that goes with it, if any."""
    plain, found, token = url.partition(_TOKEN)
    if found:
        return plain, {"Authorization": f"Bearer {token}"}
    return url, {}
