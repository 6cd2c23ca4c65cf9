"""``python -m tests.attacks.fuzz [--examples 1000000] [--parser NAME]…``: atheris (libFuzzer with coverage) on everything in `parsers`.

The inputs are shared out among the parsers, each in a process of its own; a crash ends with the input that caused it. Exit code 1 then.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

INSTALL = "pip install atheris"
MAX_LENGTH = 5000
_AT_ONCE = 2
_DONE = re.compile(r"Done (\d+) runs in")


def hunt(name: str, examples: int) -> tuple[int, str]:
    """Fuzz one parser in a process of its own: how many inputs it took, and what went wrong."""
    command = [sys.executable, "-m", "tests.attacks.fuzz", "--child", "--parser", name, "--examples", str(examples)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    done = _DONE.search(ended.stderr)
    taken = int(done[1]) if done else 0
    return taken, "" if ended.returncode == 0 and taken >= examples else (ended.stdout + ended.stderr)[-3000:]


def child(name: str, examples: int) -> None:
    """In the process of its own: never returns."""
    try:
        import atheris
    except ImportError:
        sys.exit(f"atheris is not installed; install it with: {INSTALL}")
    with atheris.instrument_imports(include=["broker"]):
        from tests.attacks.parsers import PARSERS
    chosen = PARSERS[name]
    with tempfile.TemporaryDirectory() as place:
        for number, seed in enumerate(chosen.seeds):
            Path(place, str(number)).write_bytes(seed)
        options = [f"-runs={examples}", f"-max_len={MAX_LENGTH}", "-seed=1", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=0"]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={place}/", place], chosen.take)
        atheris.Fuzz()


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.attacks.fuzz", description=__doc__)
    options.add_argument("--examples", type=int, default=1_000_000, help="inputs in all")
    options.add_argument("--parser", action="append", help="one of them; all otherwise")
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:  # before anything of ours is imported, so that it can be instrumented
        child(given.parser[0], given.examples)
    from tests.attacks.parsers import PARSERS

    names = given.parser or list(PARSERS)
    share = -(-given.examples // len(names))
    began = time.monotonic()
    with ThreadPoolExecutor(_AT_ONCE) as slots:
        found = dict(zip(names, slots.map(lambda name: hunt(name, share), names), strict=True))
    for name, (taken, trouble) in found.items():
        print(f"{name}: {taken} inputs, {'no crash' if not trouble else 'CRASH'}")
        if trouble:
            print(trouble)
    crashes, taken = sum(bool(trouble) for _, trouble in found.values()), sum(taken for taken, _ in found.values())
    print(f"{taken} inputs on {len(found)} parsers, {crashes} crashes, in {time.monotonic() - began:.0f} s")
    return int(crashes > 0)


if __name__ == "__main__":
    sys.exit(main())
