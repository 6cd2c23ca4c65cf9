"""Tickets for 100 blobs in one request: blobs a second, as a multiple of the requests a bare aiohttp handler answers.

Cases as in ``tickets``; ``ratio`` is blobs per bare request.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import orjson

from tests.bench.load import Mix, Run, line, median
from tests.bench.stage import Stage, on_stage, post
from tests.bench.tickets import RUNS, SECONDS, WARM_SECONDS, serve

BLOBS, REQUESTS = 100, 1000


def main() -> None:
    if "--help" in sys.argv:
        sys.exit(__doc__)
    only = set(sys.argv[1:])
    on_stage("hmac", lambda stage: measure(stage, [case for case in ("hmac", "cold") if not only or case in only]))
    on_stage("tokens", lambda stage: measure(stage, [case for case in ("es256", "shared") if not only or case in only]))


def measure(stage: Stage, cases: list[str]) -> None:
    """All cases of one catalogue, and the comparator that answers one ticket a request, in turn, several times."""
    if not cases:
        return
    batches, singles = stage.batches(REQUESTS, BLOBS), stage.tickets(1000)
    with ExitStack() as stack:
        up = {case: stack.enter_context(serve(stage, case)) for case in cases}
        for case, (port, _) in up.items():
            answered = orjson.loads(post(port, batches[0]))["tickets"]
            assert len(answered) == BLOBS and all(len(ticket["sources"]) == 3 for ticket in answered), case
        bare = stack.enter_context(stage.bare(post(next(iter(up.values()))[0], singles[0])))
        many, one = stack.enter_context(Mix(batches)), stack.enter_context(Mix(singles))
        for port, pid in up.values():
            many.run(port, pid, WARM_SECONDS, 8)
        runs: dict[str, list[Run]] = {case: [] for case in cases}
        bare_runs: list[Run] = []
        for _ in range(RUNS):
            bare_runs.append(one.run(*bare, SECONDS))
            for case in cases:
                runs[case].append(many.run(*up[case], SECONDS, 32))
        for case in cases:
            line("batch", case, median(runs[case]), median(bare_runs), BLOBS)


if __name__ == "__main__":
    main()
