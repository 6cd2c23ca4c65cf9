"""``python -m tests.bench NAME [OPTIONS]``: one JSON line for each figure, the comparator measured in the same run, interleaved.

``tickets`` and ``batch`` measure the broker beside a bare aiohttp handler, ``client`` our client beside curl, aria2 and
rclone, ``fronts`` servers with and without verification of tokens, ``fairness`` how projects
share slots and whether ``Retry-After`` comes true, ``simulate`` our ranking beside other policies,
``storm`` a real boot storm. ``inside`` shows what a ticket costs by function.
"""

from __future__ import annotations

import importlib
import sys

NAMES = ("tickets", "batch", "inside", "client", "fronts", "fairness", "simulate", "storm")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m tests.bench {{{'|'.join(NAMES)}}} [--help]")
    name = sys.argv.pop(1)
    importlib.import_module(f"tests.bench.{name}").main()


if __name__ == "__main__":
    main()
