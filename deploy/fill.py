#!/usr/bin/env python3
"""Fill in one of the templates of deploy/: ``fill.py TEMPLATE NAME=VALUE... > FILE``.

A template has ``@NAME@`` where a value belongs, and says at its top which there are. Missing and unknown names are errors, and
so are values that could end a quoted text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

_PLACE = re.compile(r"@([A-Z]+)@")
_VALUE = re.compile(r"[A-Za-z0-9._~:/\[\]-]+\Z")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The text with its values. Raises `ValueError` that names what is missing, unknown or not acceptable."""
    wanted = set(_PLACE.findall(template))
    for name in sorted(wanted ^ values.keys()):
        raise ValueError(f"{name} is missing" if name in wanted else f"there is no {name} in this template")
    for name, value in values.items():
        if not _VALUE.match(value):
            raise ValueError(f"{name} may have letters, digits and . _ ~ : / [ ] - only")
    return _PLACE.sub(lambda place: values[place[1]], template)


def main() -> None:
    if len(sys.argv) < 2 or not all("=" in argument for argument in sys.argv[2:]):
        sys.exit("usage: fill.py TEMPLATE NAME=VALUE... > FILE")
    try:
        values = dict(argument.split("=", 1) for argument in sys.argv[2:])
        sys.stdout.write(fill(Path(sys.argv[1]).read_text(encoding="utf-8"), values))
    except (OSError, ValueError) as error:
        sys.exit(f"fill.py: {error}")


if __name__ == "__main__":
    main()
