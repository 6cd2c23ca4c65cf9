"""The file name that a store tells with what it sends: Content-Disposition (RFC 6266) for a signed URL to ask for.

Rules:

* The field says ``attachment`` always: what is uploaded is nobody's page.
* A name of plain characters stands in quotes. For any other there is a plain stand-in as well (RFC 6266 appendix D), and the name
  itself in UTF-8, percent-encoded (RFC 8187). So the field is ASCII, and nothing in a name can end it or begin another.
"""

from __future__ import annotations

import re
from urllib.parse import quote

_NOT_PLAIN = re.compile(r"[^A-Za-z0-9 !#$&()+,.;=@\[\]^_`{}~-]")


def attachment(filename: str) -> str:
    """The field's value for a file of this name."""
    plain = _NOT_PLAIN.sub("_", filename)
    field = f'attachment; filename="{plain}"'
    # RFC 8187 section 3.2.1: attr-char stands for itself; fewer do here.
    return field if plain == filename else f"{field}; filename*=UTF-8''{quote(filename, safe='')}"
