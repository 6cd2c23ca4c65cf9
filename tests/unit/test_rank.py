"""The order of places: what an estimate is made of, how the draw shares, and that nothing is lost on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.accept import Candidate, Reason, Request, is_offered_to_all
from broker.model import Abilities, Exposure, Operation, ReplicaState
from broker.paths import IDLE, Load, PathAverage
from broker.rank import Averages, Estimate, Loads, Outlooks, Policy, Ranking, draw, estimate, outlook, prospect, rank, size_up, weigh

NOW = 10_000.0
GB = 10**9
CLIENT = "eu/az1/rack3"
POLICY = Policy()
PLAIN = Policy(exploration=0.0)
STORE = Candidate("s1", "eu/az1", "https", Abilities(reads=True, writes=True), observes=frozenset({"md5"}))
DOWNLOAD = Request(Operation.DOWNLOAD, site=CLIENT, size=GB)
UPLOAD = DOWNLOAD._replace(operation=Operation.UPLOAD)


def average(rate: float | None, *, weight: float = 10.0, success: float = 1.0, setup: float | None = 0.5, at: float = NOW) -> PathAverage:
    """A path on which `weight` reports told this."""
    known = 0.0 if setup is None else weight
    busy = 0.0 if rate is None else 10.0 * weight
    return PathAverage(weight, success * weight, (rate or 0.0) * busy, busy, known, (setup or 0.0) * known, at)


def estimated(
    averages: Averages | None = None,
    *,
    site: str | None = CLIENT,
    size: int = GB,
    load: Load = IDLE,
    policy: Policy = POLICY,
    store_site: str = STORE.site,
    **changes: Any,
) -> Estimate:
    store = replace(STORE, site=store_site, **changes)
    return estimate(outlook(site, store, averages or {}, policy, NOW), store, size, {store.store: load}, policy)


def ranked(
    *candidates: Candidate, request: Request = DOWNLOAD, averages: Averages | None = None, loads: Loads | None = None,
    policy: Policy = POLICY, seed: int | Random = 1,
) -> Ranking:  # fmt: skip
    rng = seed if isinstance(seed, Random) else Random(seed)
    return rank(request, candidates, Outlooks(request.site, averages or {}, policy, NOW), loads or {}, policy, NOW, rng)


def first_draws(*candidates: Candidate, averages: Averages, policy: Policy = POLICY, request: Request = DOWNLOAD) -> Counter[str]:
    """Who came first in 2,000 draws."""
    rng = Random(7)
    return Counter(
        ranked(*candidates, request=request, averages=averages, policy=policy, seed=rng).sources[0].candidate.store for _ in range(2000)
    )


def named(*names: str, **changes: Any) -> list[Candidate]:
    return [replace(STORE, store=name, **changes) for name in names]


# What an estimate is made of


@pytest.mark.parametrize(
    ("site", "store_site", "rate", "setup"),
    [
        ("eu/az1", "eu/az1", 1e9, 0.001),
        ("eu/az1/rack3", "eu/az1", 800e6, 0.002),
        ("eu/az1", "eu/az2", 500e6, 0.005),
        ("eu", "us", 20e6, 0.2),
        (None, "eu", 20e6, 0.2),
        ("a/b/c/d/e/f/g/h", "a/2/3/4/5/6/7/8", 20e6, 0.2),
    ],
)
def test_unknown_paths_have_a_prior_by_distance(site: str | None, store_site: str, rate: float, setup: float) -> None:
    found = estimated(site=site, store_site=store_site)
    assert (found.rate, found.setup_seconds, found.basis, found.evidence) == (rate, setup, "prior", 0.0)
    assert found.seconds == pytest.approx(setup + GB / rate)
    assert found.success == POLICY.prior_success


@pytest.mark.parametrize(
    ("known", "basis", "rate"),
    [
        ({CLIENT: average(1e8)}, "measured", 1e8),
        ({CLIENT: average(1e8), "eu/az1": average(2e8), "eu": average(3e8)}, "measured", 1e8),
        ({"eu/az1": average(2e8), "eu": average(3e8)}, "wider-site:eu/az1", 2e8),
        ({"eu": average(3e8)}, "wider-site:eu", 3e8),
        ({"": average(4e8)}, "wider-site:", 4e8),
        ({"us": average(5e8)}, "prior", 800e6),
        ({CLIENT: average(1e8, weight=0.4), "eu": average(3e8)}, "wider-site:eu", 3e8),
        ({CLIENT: average(1e8, weight=0.4)}, "prior", 800e6),
        ({CLIENT: average(1e8, weight=1.0, at=NOW - 600)}, "measured", 1e8),
        ({CLIENT: average(1e8, weight=1.0, at=NOW - 601)}, "prior", 800e6),
        ({CLIENT: average(1e8, weight=1.0, at=NOW - 601), "eu": average(3e8)}, "wider-site:eu", 3e8),
        ({CLIENT: average(None), "eu": average(3e8)}, "wider-site:eu", 3e8),
        ({CLIENT: average(0.0)}, "prior", 800e6),
    ],
)
def test_the_nearest_evidence_tells(known: dict[str, PathAverage], basis: str, rate: float) -> None:
    found = estimated({(site, "s1"): value for site, value in known.items()})
    assert found.basis == basis
    assert found.rate == pytest.approx(rate)
    assert (found.evidence > 0) == (basis != "prior")


@pytest.mark.parametrize(
    ("known", "active", "rate"),
    [
        ({CLIENT: 5e9}, 40, 5e9),  # measured: contention is in it already
        ({"": 5e9}, 0, 800e6),  # clients elsewhere may be nearer to the store: no better than the prior
        ({"": 1e6}, 0, 1e6),  # but worse
        ({}, 3, 800e6),  # as many as are believed to fit
        ({}, 7, 400e6),  # more share what four would get
        ({"": 1e6}, 59, 1e6),
        ({"": 5e9}, 63, 50e6),
    ],
)
def test_an_unmeasured_way_is_no_better_than_its_prior_and_shared(known: dict[str, float], active: int, rate: float) -> None:
    averages = {(site, "s1"): average(value) for site, value in known.items()}
    assert estimated(averages, load=Load(active=active)).rate == pytest.approx(rate)


def test_another_stores_path_tells_nothing() -> None:
    assert estimated({(CLIENT, "s2"): average(1.0)}).basis == "prior"


def test_an_outlook_is_worked_out_once() -> None:
    averages = {(CLIENT, "s1"): average(1e8)}
    outlooks = Outlooks(CLIENT, averages, POLICY, NOW)
    first = outlooks.of(STORE)
    averages.clear()
    assert outlooks.of(STORE) is first
    assert first == outlook(CLIENT, STORE, {(CLIENT, "s1"): average(1e8)}, POLICY, NOW)


def test_measured_numbers_add_up() -> None:
    found = estimated({(CLIENT, "s1"): average(1e8, setup=0.5)})
    assert found.seconds == pytest.approx(0.5 + 10)
    assert found.evidence == 10.0


def test_setup_comes_from_the_prior_where_nobody_told_it() -> None:
    found = estimated({(CLIENT, "s1"): average(1e8, setup=None)})
    assert found.rate == pytest.approx(1e8)
    assert found.setup_seconds == 0.002


def test_a_path_known_by_failures_alone_tells_its_success() -> None:
    found = estimated({(CLIENT, "s1"): average(None, success=0.0), ("eu", "s1"): average(1e8, success=1.0)})
    assert found.success < 0.2
    assert found.rate == pytest.approx(1e8)


@pytest.mark.parametrize(
    ("bandwidth", "active", "rate"),
    [(None, 0, 1e8), (None, 50, 1e8), (200_000_000, 0, 1e8), (200_000_000, 1, 1e8), (200_000_000, 3, 5e7), (50_000_000, 0, 5e7)],
)
def test_bandwidth_is_shared_by_those_under_way(bandwidth: int | None, active: int, rate: float) -> None:
    assert estimated({(CLIENT, "s1"): average(1e8)}, load=Load(active), bandwidth=bandwidth).rate == pytest.approx(rate)


@pytest.mark.parametrize(("weight", "success", "least", "most"), [(1, 0.0, 0.6, 0.7), (100, 0.0, 0.05, 0.05), (100, 1.0, 0.99, 1.0)])
def test_success_needs_evidence(weight: float, success: float, least: float, most: float) -> None:
    assert least <= estimated({(CLIENT, "s1"): average(1e8, weight=weight, success=success)}).success <= most


def test_failures_and_cost_count_in_the_score_only() -> None:
    good = estimated({(CLIENT, "s1"): average(1e8)})
    shaky = estimated({(CLIENT, "s1"): average(1e8, success=0.5)})
    dear = estimated({(CLIENT, "s1"): average(1e8)}, cost=1.0)
    assert good.seconds == shaky.seconds == dear.seconds
    assert dear.score == pytest.approx(2 * good.score)
    assert shaky.score == pytest.approx(shaky.seconds / shaky.success)
    assert shaky.score > 1.5 * good.score


RATES = st.floats(1e3, 1e10)


@given(st.integers(0, 10**15), st.integers(0, 10**15), RATES)
def test_more_bytes_take_longer(one: int, other: int, rate: float) -> None:
    one, other = sorted((one, other))
    averages = {(CLIENT, "s1"): average(rate)}
    assert estimated(averages, size=one).score <= estimated(averages, size=other).score


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 10**10), RATES)
def test_more_transfers_under_way_take_longer(one: int, other: int, bandwidth: int, rate: float) -> None:
    one, other = sorted((one, other))
    averages = {(CLIENT, "s1"): average(rate)}
    quiet, busy = (estimated(averages, load=Load(active), bandwidth=bandwidth) for active in (one, other))
    assert quiet.score <= busy.score


@given(RATES, RATES)
def test_a_faster_path_takes_no_longer(one: float, other: float) -> None:
    one, other = sorted((one, other))
    assert estimated({(CLIENT, "s1"): average(one)}).score >= estimated({(CLIENT, "s1"): average(other)}).score * (1 - 1e-9)


# How the draw shares


def test_near_equals_share() -> None:
    averages = {(CLIENT, "a"): average(1.00e8), (CLIENT, "b"): average(1.02e8), (CLIENT, "c"): average(0.98e8)}
    firsts = first_draws(*named("a", "b", "c"), averages=averages)
    assert all(550 <= firsts[name] <= 790 for name in "abc"), firsts


@pytest.mark.parametrize("weight", [0.6, 10.0, 1000.0])
def test_far_worse_is_first_rarely_but_not_never(weight: float) -> None:
    averages = {(CLIENT, "good"): average(1e8), (CLIENT, "bad"): average(1e7, weight=weight)}
    firsts = first_draws(*named("good", "bad"), averages=averages)
    assert 5 <= firsts["bad"] <= 100, firsts


def test_what_nobody_measured_is_explored_and_what_is_known_to_be_bad_is_not() -> None:
    far = [replace(STORE, store="new", site="us"), replace(STORE, store="known", site="us")]
    averages = {(CLIENT, "good"): average(1e9), (CLIENT, "known"): average(2e6, weight=1000)}
    firsts = first_draws(*named("good"), *far, averages=averages)
    assert 15 <= firsts["new"] <= 60, firsts
    assert firsts["known"] <= 3, firsts


def test_twice_the_time_is_a_quarter_as_likely() -> None:
    averages = {(CLIENT, "good"): average(1e8, setup=0), (CLIENT, "half"): average(5e7, setup=0)}
    weights = {s.candidate.store: s.weight for s in ranked(*named("good", "half"), averages=averages, policy=PLAIN).sources}
    assert weights == {"good": pytest.approx(0.8), "half": pytest.approx(0.2)}


def test_preferred_is_likelier() -> None:
    averages = {(CLIENT, "good"): average(2e8), (CLIENT, "wanted"): average(1e8)}
    request = DOWNLOAD._replace(prefer=frozenset({"wanted"}))
    assert first_draws(*named("good", "wanted"), averages=averages)["wanted"] < 600
    assert first_draws(*named("good", "wanted"), averages=averages, request=request)["wanted"] > 1500


def test_a_failure_lowers_a_store_for_others() -> None:
    averages = {(CLIENT, "a"): average(1e8), (CLIENT, "b"): average(1e8, success=0.3)}
    firsts = first_draws(*named("a", "b"), averages=averages)
    assert 0 < firsts["b"] < 400, firsts


def test_one_candidate_needs_no_draw() -> None:
    (only,) = ranked(STORE).sources
    assert only.weight == 1.0
    assert draw([1.0], Random(1)) == [0]


def test_the_same_random_numbers_give_the_same_order() -> None:
    candidates = named(*"abcdef")
    assert ranked(*candidates, seed=5) == ranked(*candidates, seed=5)


def test_the_worst_share_is_still_drawn() -> None:
    assert sorted(draw([1.0, 0.0, 0.0], Random(3))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("request_", "candidate", "reserved", "ratio"),
    [
        ({}, {}, 0, 1.0),
        ({"digests": frozenset({"md5"})}, {}, 0, 1.0),
        ({"digests": frozenset({"sha256"})}, {}, 0, 0.25),
        ({"digests": frozenset({"sha256", "md5"})}, {}, 0, 1.0),
        ({}, {"capacity": 100 * GB}, 50 * GB, 1.0),
        ({}, {"capacity": 100 * GB}, 95 * GB, 0.5),
        ({}, {"capacity": 100 * GB}, 99 * GB, 0.1),
        ({"size": None}, {"capacity": 10**6 * GB}, 10**6 * GB - 1, 0.01),
        ({"prefer": frozenset({"s1"})}, {}, 0, 20.0),
    ],
)
def test_destinations_by_what_they_check_and_hold(request_: dict[str, Any], candidate: dict[str, Any], reserved: int, ratio: float) -> None:
    plain = replace(STORE, store="plain", observes=frozenset({"md5", "sha256"}))
    ranking = ranked(
        replace(STORE, **candidate), plain, request=UPLOAD._replace(**request_), loads={"s1": Load(reserved=reserved)}, policy=PLAIN
    )
    weights = {s.candidate.store: s.weight for s in ranking.sources}
    assert weights["s1"] / weights["plain"] == pytest.approx(ratio)


def test_an_upload_of_unknown_size_is_estimated_with_one() -> None:
    (only,) = ranked(STORE, request=UPLOAD._replace(size=None)).sources
    assert only.estimate.seconds == pytest.approx(0.002 + (1 << 30) / 800e6)


def test_exploration_is_a_share_of_all_draws() -> None:
    """Nothing is known of either: 5 % of draws are even, the others go by the score alone."""
    near, far = (Estimate(score, 1.0, 0.0, 1.0, score, "prior", 0.0) for score in (1.0, 1e6))
    assert weigh([near, far], None, POLICY) == pytest.approx([0.975, 0.025])


def test_equal_estimates_have_equal_shares() -> None:
    one = Estimate(0.0, 1.0, 0.0, 1.0, 0.0, "prior", 0.0)
    assert weigh([one, one], None, POLICY) == [0.5, 0.5]


# Nothing is lost on the way


def test_private_exclusions_are_kept_apart() -> None:
    private, corrupt = replace(STORE, store="node7", exposure=Exposure.SERVICE), replace(STORE, store="s9", state=ReplicaState.CORRUPT)
    ranking = ranked(private, corrupt, STORE)
    assert [s.candidate.store for s in ranking.sources] == ["s1"]
    assert ranking.excluded == [(corrupt, Reason.CORRUPT)]
    assert ranking.hidden == [(private, Reason.PRIVATE)]
    assert len(ranked(private, request=DOWNLOAD._replace(sees_private=True)).sources) == 1


def test_nothing_to_rank() -> None:
    assert ranked() == ([], [], [], [])
    assert ranked(replace(STORE, enabled=False)).sources == []


CANDIDATES = st.lists(
    st.builds(
        replace,
        st.just(STORE),
        store=st.sampled_from("abcdefgh"),
        site=st.sampled_from(["eu/az1/rack3", "eu/az2", "us"]),
        exposure=st.sampled_from(list(Exposure)),
        enabled=st.booleans(),
        state=st.sampled_from(list(ReplicaState)),
        slots=st.sampled_from([None, 0, 4]),
        bandwidth=st.sampled_from([None, 0, 1, GB]),
        cost=st.floats(0, 1e6),
        capacity=st.sampled_from([None, 1, 100 * GB]),
    ),
    max_size=12,
)
LOADS = st.dictionaries(st.sampled_from("abcdefgh"), st.builds(Load, active=st.integers(0, 10**6), reserved=st.integers(0, 10**12)))
AVERAGES = st.dictionaries(
    st.tuples(st.sampled_from([CLIENT, "eu/az1", "eu", ""]), st.sampled_from("abcdefgh")),
    st.builds(
        average,
        st.none() | st.floats(1e-3, 5e10),
        weight=st.floats(0, 1e6),
        success=st.floats(0, 1),
        setup=st.none() | st.floats(0, 1e5),
        at=st.floats(0, 2 * NOW),
    ),
)


@given(CANDIDATES, AVERAGES, LOADS, st.sampled_from([DOWNLOAD, UPLOAD, DOWNLOAD._replace(avoid=frozenset("ab"))]), st.integers(0, 10**6))
def test_every_candidate_is_ranked_or_has_a_reason(
    candidates: list[Candidate], averages: dict[tuple[str, str], PathAverage], loads: dict[str, Load], request: Request, seed: int
) -> None:
    """Invariant 10: the three lists together are the candidates, each once."""
    ranking = ranked(*candidates, request=request, averages=averages, loads=loads, seed=seed)
    told = [s.candidate for s in ranking.sources] + [e.candidate for e in ranking.excluded + ranking.hidden]
    assert Counter(map(id, told)) == Counter(map(id, candidates))
    assert all(isinstance(e.reason, Reason) for e in ranking.excluded)
    assert all(e.candidate.exposure is Exposure.PUBLIC for e in ranking.excluded)
    if ranking.sources:
        assert sum(s.weight for s in ranking.sources) == pytest.approx(1.0)
        assert all(s.weight >= 0 and s.estimate.seconds >= 0 and 0 < s.estimate.success <= 1 for s in ranking.sources)
        assert not any(s.candidate.store in request.avoid for s in ranking.sources)


@given(CANDIDATES, AVERAGES, LOADS, st.booleans(), st.sampled_from(["", "acme"]), st.integers(0, 10**6))
def test_what_is_offered_to_all_needs_no_acceptance(
    candidates: list[Candidate], averages: dict[tuple[str, str], PathAverage], loads: dict[str, Load], sees: bool, project: str, seed: int
) -> None:
    """Candidates that nothing is against may be sized up and drawn at once, for whomever: the decision is the same."""
    request = DOWNLOAD._replace(sees_private=sees, project=project, size=7 << 30)
    open_ = [each for candidate in candidates if is_offered_to_all(each := replace(candidate, project="acme"))]
    assert not request.is_choosy
    outlooks = Outlooks(CLIENT, averages, POLICY, NOW)
    prospects = [prospect(outlooks.of(candidate), candidate, loads, POLICY) for candidate in open_]
    seconds, shares = size_up(prospects, request.size, POLICY) if prospects else ([], [])
    drawn = [(open_[i], seconds[i], shares[i]) for i in draw(shares, Random(seed))]
    ranking = ranked(*open_, request=request, averages=averages, loads=loads, seed=seed)
    assert drawn == [(source.candidate, source.estimate.seconds, source.weight) for source in ranking.sources]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 10**6))
def test_a_draw_is_a_permutation(shares: list[float], seed: int) -> None:
    assert sorted(draw(shares, Random(seed))) == list(range(len(shares)))


def test_a_doubted_store_sinks_for_everyone_and_is_explored() -> None:
    """However well the path to it is known. Without doubt nothing changes."""
    known = {(CLIENT, "a"): average(1e9, weight=100), (CLIENT, "b"): average(5e8, weight=100)}
    found = {}
    for doubt in (0.0, 0.5, 0.9, 1.0):
        outlooks = Outlooks(CLIENT, known, POLICY, NOW, {"a": doubt} if doubt else {})
        ranking = rank(DOWNLOAD._replace(size=100 * GB), named("a", "b"), outlooks, {}, POLICY, NOW, Random(7))
        found[doubt] = next(source for source in ranking.sources if source.candidate.store == "a")
    assert found[0.0].weight > 0.7 > found[0.5].weight > found[0.9].weight > found[1.0].weight > 0
    assert found[1.0].estimate.success == POLICY.success_floor
    assert [found[doubt].estimate.evidence for doubt in (0.0, 0.5, 1.0)] == [100, 50, 0]
