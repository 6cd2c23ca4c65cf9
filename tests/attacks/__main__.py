"""``python -m tests.attacks [--kind KIND]… [--attack TEXT]… [--verbose] [--write]``: carries out the attack table and
prints what is not as stated; ``--write`` puts the result into the README."""

from __future__ import annotations

import argparse
import sys

from tests.attacks import table
from tests.attacks.columns import COLUMNS

parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
parser.add_argument("--kind", action="append", choices=list(COLUMNS), help="one kind of store; all of them otherwise")
parser.add_argument("--attack", action="append", default=[], help="only attacks with this in their name")
parser.add_argument("--verbose", action="store_true", help="print every cell")
parser.add_argument("--write", action="store_true", help="write the whole table into README.rst")
given = parser.parse_args()
sys.exit(table.main(given.kind or list(COLUMNS), given.attack, verbose=given.verbose, write=given.write))
