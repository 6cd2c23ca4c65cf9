"""Sources worked out by way and blob are those of the ranking, and their texts say what they are."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import rank
from broker.accept import Reason, Request
from broker.catalog.compact import CompactBlob
from broker.model import Abilities, Exposure, Operation, Store
from broker.paths import Load
from broker.service import places, ways

NOW = 10_000.0
POLICY = rank.Policy()
PLAIN = Request(Operation.DOWNLOAD, "eu/az1", proven_site="eu/az1")
REPLICA = "01900000-0000-7000-8000-00000000000{}"


def store(number: int, **changes: Any) -> Store:
    fields = {"abilities": Abilities(reads=True), "cost": number / 10, "read_slots": 5} | changes
    site, endpoint = fields.pop("site", f"eu/az{number}"), fields.pop("endpoint", "http://s")
    return Store(number, f"s{number}", "s3", site, endpoint, **fields)


def context(*stores: Store, active: int = 0, seed: int = 7) -> Any:
    by_id = {each.id: each for each in stores}
    memory = SimpleNamespace(store_by_id=by_id.get, read_loads={each.name: Load(active=active) for each in stores})
    counted: list[Reason] = []
    metrics = SimpleNamespace(exclusion=counted.append, counted=counted)
    return SimpleNamespace(memory=memory, policy=SimpleNamespace(rank=POLICY), rng=Random(seed), metrics=metrics)


def blob(*numbers: int, state: str = "active", size: int | None = 5 << 30) -> CompactBlob:
    rows = tuple((number, f"k/{number}", REPLICA.format(number), state, "acme") for number in numbers)
    return CompactBlob(str(UUID(int=1)), size, "{}", rows, ())


def outlooks() -> rank.Outlooks:
    return rank.Outlooks("eu/az1", {}, POLICY, NOW)


@given(
    st.integers(0, 10**6),
    st.lists(st.none() | st.integers(1, 10**9), min_size=1, max_size=5),
    st.integers(0, 9),
    st.none() | st.integers(1, 1 << 50),
)
def test_plain_sources_are_those_of_the_ranking(seed: int, bandwidths: list[int | None], active: int, size: int | None) -> None:
    stores = [store(number, read_bandwidth=bandwidth) for number, bandwidth in enumerate(bandwidths)]
    asked, one = blob(*range(len(stores)), size=size), context(*stores, active=active, seed=seed)
    plain = ways.plain_sources(one, asked, PLAIN, outlooks())
    ranking = rank.rank(
        Request(Operation.DOWNLOAD, "eu/az1", size),
        ways.candidates(one, asked),
        outlooks(),
        one.memory.read_loads,
        POLICY,
        NOW,
        Random(seed),
    )
    ranked = ways.ranked_sources(one, ranking, outlooks())
    assert plain is not None
    assert [(s.store, s.key, s.replica, s.seconds, s.weight) for s in plain] == [
        (s.store, s.key, s.replica, s.seconds, s.weight) for s in ranked
    ]


def test_a_source_is_recorded_and_shown_as_it_was_ranked() -> None:
    one = context(store(1, read_bandwidth=1000), active=3)
    (source,) = ways.plain_sources(one, blob(1), PLAIN, outlooks()) or ()
    (recorded,) = places.recorded(orjson.loads(f"[{source.record(True, 4)}]"))
    assert recorded[:4] == (1, REPLICA.format(1), True, 4)
    assert (recorded.rate, recorded.basis, recorded.weight) == (250.0, "prior", 1.0)
    assert recorded.seconds == pytest.approx((5 << 30) / 250, rel=1e-6)
    shown = orjson.loads(source.show(1, "standby", '"url":"u"'))
    (candidate,) = ways.candidates(one, blob(1))
    place = recorded.place(candidate, "standby")
    assert shown == {"rank": 1, "state": "standby", **places.describe(place, place, 1.0), "url": "u"}


def test_a_way_is_made_anew_when_the_load_of_its_store_has_changed() -> None:
    one, known = context(store(1, read_bandwidth=1000), store(2, read_slots=None)), outlooks()
    assert ways.plain_sources(one, blob(1, 2), PLAIN, known) is not None
    before = dict(known.ways)
    one.memory.read_loads = {"s1": Load(active=9), "s2": Load(active=9)}
    assert ways.plain_sources(one, blob(1, 2), PLAIN, known) is not None
    assert known.ways[2] is before[2] and known.ways[1] is not before[1]
    assert known.ways[1].prospect.rate == 100.0


@pytest.mark.parametrize(
    "against",
    [{"enabled": False}, {"exposure": Exposure.SERVICE}, {"abilities": Abilities()}, {"read_slots": 0}],
    ids=lambda against: next(iter(against)),
)
def test_where_something_is_against_a_replica_each_is_looked_at(against: dict[str, Any]) -> None:
    assert ways.plain_sources(context(store(1), store(2, **against)), blob(1, 2), PLAIN, outlooks()) is None


def test_replicas_that_are_not_active_or_at_unknown_stores_are_looked_at() -> None:
    assert ways.plain_sources(context(store(1)), blob(1, state="unsealed"), PLAIN, outlooks()) is None
    assert ways.plain_sources(context(store(1)), blob(1, 2), PLAIN, outlooks()) is None
    assert [candidate.store for candidate in ways.candidates(context(store(1)), blob(1, 2))] == ["s1"]
    assert ways.plain_sources(context(store(1)), blob(), PLAIN, outlooks()) == []


@given(st.permutations(range(1, 7)), st.sets(st.integers(1, 6)), st.booleans())
def test_what_is_mounted_elsewhere_is_passed_over_and_counted(numbers: list[int], mounts: set[int], private: bool) -> None:
    """On every host there may be a copy: none of the others' costs this client more than a look."""
    exposure = Exposure.SERVICE if private else Exposure.PUBLIC
    mounted = [store(number, site=f"eu/host{number}", endpoint="file:///srv", exposure=exposure) for number in sorted(mounts)]
    one = context(*mounted, *(store(number) for number in numbers if number not in mounts))
    found = ways.plain_sources(one, blob(*numbers), PLAIN, outlooks())
    if len(mounts) == len(numbers):
        assert found is None  # then each is looked at, and why is told
        return
    assert found is not None
    assert sorted((source.store, source.key) for source in found) == sorted((f"s{n}", f"k/{n}") for n in numbers if n not in mounts)
    assert one.metrics.counted == [Reason.PRIVATE if private else Reason.NOT_MOUNTED] * len(mounts)
    assert sum(source.weight for source in found) == pytest.approx(1)
    # Where the client may be at one of them, each is looked at.
    here = PLAIN._replace(proven_site=f"eu/host{min(mounts)}", sees_private=True) if mounts else PLAIN
    assert (ways.plain_sources(one, blob(*numbers), here, outlooks()) is None) is bool(mounts)
