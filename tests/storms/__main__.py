"""``python -m tests.storms NAME [OPTIONS]``: JSON lines with what was seen, then a line for people; exits 1 when a promise was broken.

``leases`` proves invariant 3: four brokers on one PostgreSQL, two of which are killed or stopped at any time.
``knee`` lets slots adapt to a store whose throughput has a knee that moves.
``million`` lets a project ask for a million tickets while another one asks for single ones.
``private`` compares how long answers about a private store and about none take.
``volumes`` clones a volume of a Ceph cluster and shares the blocks of a file, by tickets; needs root.
``dashboards`` runs every expression of deploy/prometheus and deploy/grafana on a Prometheus that looks at a busy broker.
"""

from __future__ import annotations

import importlib
import sys

NAMES = ("leases", "knee", "dashboards", "million", "private", "volumes")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m tests.storms {{{'|'.join(NAMES)}}} [--help]")
    name = sys.argv.pop(1)
    importlib.import_module(f"tests.storms.{name}").main()


if __name__ == "__main__":
    main()
