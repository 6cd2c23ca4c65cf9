"""Swift TempURL: a URL that allows one method on one object, or on a prefix, until an instant.

What it binds and what not (OpenStack Swift, middleware ``tempurl``): method (GET and PUT allow HEAD too), path or prefix,
expiry, optionally the client's network. Nothing about the content. `filename` and `inline` are not signed.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from typing import Literal
from urllib.parse import quote

from broker.sign.mac import Mac

Digest = Literal["sha256", "sha512"]

_PLAIN = re.compile(r"[A-Za-z0-9_.~/-]*\Z").match
"""Paths that `quote` leaves as they are."""


@lru_cache(maxsize=256)
def _mac(key: str, digest: Digest) -> Mac:
    return Mac(key.encode(), digest)


def temp_url(
    method: str,
    endpoint: str,
    path: str,
    key: str,
    expires_at: float,
    *,
    digest: Digest = "sha256",
    ip_range: str | None = None,
    prefix: str | None = None,
    filename: str | None = None,
    inline: bool = False,
) -> str:
    """A signed URL for `path` (``/v1/AUTH_x/container/object``, not quoted) at `endpoint` (``scheme://host[:port]``).

    `key` is one of the account's or container's Temp-URL keys; `expires_at` is rounded down to whole seconds. `prefix`,
    when given, is the beginning of the object's name, and the URL then allows every object that begins so (``""``: the
    whole container). `filename` and `inline` set the Content-Disposition of the answer.
    Raises `ValueError` when `path` names no object, or one outside `prefix`.
    """
    parts = path.split("/", 4)
    if len(parts) != 5 or parts[0] or not all(parts[1:]):
        raise ValueError("path must be /v1/ACCOUNT/CONTAINER/OBJECT")
    signed_path = path
    if prefix is not None:
        if not parts[4].startswith(prefix):
            raise ValueError("path must begin with the prefix")
        signed_path = f"prefix:/{parts[1]}/{parts[2]}/{parts[3]}/{prefix}"
    expires = int(expires_at)
    network = "" if ip_range is None else f"ip={ip_range}\n"
    mac, message = _mac(key, digest), f"{network}{method}\n{expires}\n{signed_path}".encode()
    if digest == "sha256":
        signature = mac.hexdigest(message)
    else:  # only understood in this form; its hex is taken for one too long
        signature = f"sha512:{base64.urlsafe_b64encode(mac.digest(message)).decode().rstrip('=')}"
    url = f"{endpoint}{path if _PLAIN(path) else quote(path)}?temp_url_sig={signature}&temp_url_expires={expires}"
    if ip_range is not None:
        url += f"&temp_url_ip_range={quote(ip_range, safe=':./')}"
    if prefix is not None:
        url += f"&temp_url_prefix={quote(prefix)}"
    if filename is not None:
        url += f"&filename={quote(filename, safe='')}"
    if inline:
        url += "&inline"
    return url
