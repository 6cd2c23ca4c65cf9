"""Single tickets: how many the broker answers in a second, as a share of what a bare aiohttp handler answers.

Cases: ``hmac`` (S3 and Swift signatures), ``es256`` (three fresh tokens), ``shared`` (tokens shared in their stretch of time),
``cold`` (no blob in memory), ``naive`` (PyJWT, botocore and pool queries in every request). 3 signed sources in every answer.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack

import orjson

from tests.bench.load import Mix, Run, line, median
from tests.bench.stage import Stage, naive_server, on_stage, post

RUNS, SECONDS, WARM_SECONDS, REQUESTS = 5, 3.0, 3.0, 30_000
HOT = 400 << 20
SHARED = "[policy.uploads]\nshare_bucket_seconds = 300.0\n"


def main() -> None:
    if "--help" in sys.argv:
        sys.exit(__doc__)
    only = set(sys.argv[1:])
    on_stage("hmac", lambda stage: measure(stage, [case for case in ("hmac", "cold", "naive") if not only or case in only]))
    on_stage("tokens", lambda stage: measure(stage, [case for case in ("es256", "shared") if not only or case in only]))


def measure(stage: Stage, cases: list[str]) -> None:
    """All cases of one catalogue and the comparator, in turn, several times."""
    if not cases:
        return
    requests = stage.tickets(REQUESTS)
    with ExitStack() as stack:
        up = {case: stack.enter_context(serve(stage, case)) for case in cases}
        answers = {case: post(port, requests[0]) for case, (port, _) in up.items()}
        for case, answer in answers.items():
            assert len(orjson.loads(answer)["sources"]) == 3, (case, answer)
        bare = stack.enter_context(stage.bare(answers[cases[0]]))
        mix = stack.enter_context(Mix(requests))
        for port, pid in (*up.values(), bare):
            mix.run(port, pid, WARM_SECONDS)
        runs: dict[str, list[Run]] = {case: [] for case in cases}
        bare_runs: list[Run] = []
        for _ in range(RUNS):
            bare_runs.append(mix.run(*bare, SECONDS))
            for case in cases:
                runs[case].append(mix.run(*up[case], SECONDS))
        for case in cases:
            line("tickets", case, median(runs[case]), median(bare_runs))


def serve(stage: Stage, case: str) -> AbstractContextManager[tuple[int, int]]:
    """The server of one case."""
    if case == "naive":
        return naive_server(stage)
    return stage.broker(case, 0 if case == "cold" else HOT, SHARED if case == "shared" else "")


if __name__ == "__main__":
    main()
