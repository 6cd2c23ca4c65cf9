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
from random import Random

INSTALL = "pip install atheris"
MAX_LENGTH = 5000
_AT_ONCE = 2
_WORDS = (
    b"%2e",
    b"%2f",
    b"%5c",
    b"%00",
    b"%25",
    b"..",
    b"//",
    b"/./",
    b"\\",
    b"?",
    b"#",
    b"&",
    b";",
    b"token=",
    b"Bearer ",
    b"\r\n",
    b"\x00",
    b"\xff",
    b"\xc3\xbc",
    b'"alg"',
    b"none",
    b'"kid"',
    b'"exp"',
    b"1e400",
    b"null",
    b"true",
    b"-1",
    b"9007199254740993",
    b'{"',
    b'":',
    b"[",
    b"]}",
    b"eyJ",
    b"=",
    b":=:",
    b"::ffff:",
    b"[::1]",
    b"127.0.0.1",
    b"http://",
    b"https://",
    b"@",
    b":65536",
    b"<!DOCTYPE",
    b"<![CDATA[",
    b"&#0;",
    b"</Part>",
    b"GMT",
    b"bytes=",
)
"""What parsers stumble over."""

_DONE = re.compile(r"Done (\d+) runs in")


def hunt(name: str, examples: int) -> tuple[int, str]:
    """Fuzz one parser in a process of its own: how many inputs it took, and what went wrong."""
    command = [sys.executable, "-m", "tests.attacks.fuzz", "--child", "--parser", name, "--examples", str(examples)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    done = _DONE.search(ended.stderr)
    taken = int(done[1]) if done else 0
    return taken, "" if ended.returncode == 0 and taken >= examples else (ended.stdout + ended.stderr)[-3000:]


def edited(content: bytes, random: Random) -> bytes:
    """`content` with some words put in, bytes replaced, and stretches taken out or doubled."""
    for _ in range(random.randint(1, 5)):
        at, length = random.randint(0, len(content)), random.randint(0, 8)
        stretch = content[at : at + length]
        more = random.choice((random.choice(_WORDS), random.randbytes(1), stretch * 2, b""))
        content = content[:at] + more + content[at + random.choice((0, 1, length)) :]
    return content


def child(name: str, examples: int) -> None:
    """In the process of its own: never returns."""
    try:
        import atheris
    except ImportError:
        sys.exit(f"atheris is not installed; install it with: {INSTALL}")
    atheris.enabled_hooks.add("str")
    with atheris.instrument_imports(include=["broker"]):
        from tests.attacks.parsers import PARSERS
    chosen = PARSERS[name]
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place, "corpus")
        corpus.mkdir()
        for number, seed in enumerate(chosen.seeds):
            Path(corpus, str(number)).write_bytes(seed)
        options = [f"-runs={examples}", f"-max_len={MAX_LENGTH}", "-len_control=0", "-seed=1", "-timeout=20"]
        command = [sys.argv[0], *options, f"-artifact_prefix={place}/", str(corpus)]

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            # Half of all inputs are near an honest one: what differs only within a regular expression covers no new line.
            random = Random(seed)
            honest = random.random() < 0.5
            return edited(random.choice(chosen.seeds), random)[:most] if honest else atheris.Mutate(data, most)

        atheris.Setup(command, chosen.take, custom_mutator=mutate)
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
