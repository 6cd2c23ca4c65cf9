"""Another account for programs that root starts in tests: ``nobody``, where that one can get at this checkout at all."""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path

from broker import embedded


def other_account() -> str | None:
    """``nobody``; none for who is not root and cannot choose, and where the checkout, its packages or its interpreter are root's alone."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    places = (Path(sys.executable), Path(sys.executable).resolve(), Path(embedded.__file__), embedded.wheel_binaries())
    return nobody.pw_name if all(embedded._obstacle(path.parent, nobody) is None for path in places) else None
