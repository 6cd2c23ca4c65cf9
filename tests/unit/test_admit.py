"""Who gets leases: never more than slots, the best first, another replica when one is full, and a loop that ends."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.admit import (
    Admitted,
    Offer,
    Policy,
    has_slot,
    lease_seconds,
    next_wants,
    retry_seconds,
    settle,
    ticket_seconds,
    worth_a_slot,
)
from broker.paths import Load

POLICY = Policy()


def offers(*stores: tuple[str, int | None]) -> list[Offer]:
    return [Offer(name, slots, 10.0) for name, slots in stores]


def active(**counts: int) -> dict[str, Load]:
    return {name: Load(count) for name, count in counts.items()}


@pytest.mark.parametrize(
    ("slots", "leases", "fits"),
    [(None, 10**6, True), (1, 0, True), (1, 1, False), (0, 0, False), (2, 5, False), (10, 9, True)],
)
def test_has_slot(slots: int | None, leases: int, fits: bool) -> None:
    assert has_slot(slots, Load(leases)) == fits


ABC = offers(("a", 2), ("b", 2), ("c", None))


@pytest.mark.parametrize(
    ("listed", "loads", "parallel", "granted", "refused", "wants"),
    [
        pytest.param(ABC, {}, 1, (), (), ("a",), id="the best one"),
        pytest.param(ABC, {}, 2, (), (), ("a", "b"), id="as many as asked"),
        pytest.param(ABC, {}, 9, (), (), ("a", "b", "c"), id="never more than there are"),
        pytest.param(ABC, active(a=2), 1, (), (), ("b",), id="a full one is passed over"),
        pytest.param(ABC, active(a=2, b=3, c=99), 2, (), (), ("c",), id="no slots is never full"),
        pytest.param(ABC, {}, 1, ("a",), (), (), id="enough"),
        pytest.param(ABC, {}, 2, ("a",), ("b",), ("c",), id="refused: the next"),
        pytest.param(ABC, {}, 1, (), ("a", "b", "c"), (), id="all refused"),
        pytest.param(ABC[:2], active(a=2, b=2), 1, (), (), ("a",), id="believed full: ask all the same"),
        pytest.param(ABC[:2], active(a=2, b=2), 1, (), ("a",), ("b",), id="believed full: the next"),
        pytest.param(ABC[:2], active(b=2), 2, ("a",), (), (), id="one granted: leave the full ones alone"),
        pytest.param(offers(("a", 2), ("a", 2), ("b", 1)), {}, 2, (), (), ("a", "b"), id="one lease per store"),
        pytest.param(offers(("a", 1), ("a", 1)), active(a=1), 2, (), (), ("a",), id="one lease per full store"),
        pytest.param([], {}, 1, (), (), (), id="nothing offered"),
    ],
)
def test_next_wants(
    listed: list[Offer], loads: dict[str, Load], parallel: int, granted: tuple[str, ...], refused: tuple[str, ...], wants: tuple[str, ...]
) -> None:
    assert next_wants(listed, loads, parallel, granted, refused) == wants


@pytest.mark.parametrize(
    ("seconds", "worth"),
    [
        ([], []),
        ([10], [10]),
        ([10, 29, 31], [10, 29]),
        ([31, 10, 29], [31, 10, 29]),  # the first of the draw always is: else nothing would be explored
        ([29, 31, 10], [29, 10]),
    ],
)
def test_who_can_wait_takes_no_slot_that_is_far_slower(seconds: list[float], worth: list[float]) -> None:
    assert [offer.seconds for offer in worth_a_slot([Offer(str(n), 1, x) for n, x in enumerate(seconds)], POLICY)] == worth


@pytest.mark.parametrize(
    ("granted", "count", "admission"),
    [
        (("a",), 3, Admitted((0,), (1, 2))),
        (("b",), 3, Admitted((1,), (0, 2))),
        (("c", "a"), 3, Admitted((0, 2), (1,))),
        (("b",), 1, Admitted((1,), ())),
        (("a", "b"), 1, Admitted((0, 1), ())),
        ((), 3, None),
    ],
)
def test_settle(granted: tuple[str, ...], count: int, admission: Admitted | None) -> None:
    assert settle(ABC, granted, count) == admission


def test_a_second_replica_on_a_leased_store_stands_by() -> None:
    assert settle(offers(("a", 1), ("a", 1)), ("a",), 3) == Admitted((0,), (1,))


@pytest.mark.parametrize(
    ("turns", "seconds"),
    [([7.0, 9.0], 7), ([None, 3.0], 3), ([None], 10), ([], 10), ([0.0], 1), ([5000.0], 120)],
)
def test_retry_seconds(turns: list[float | None], seconds: float) -> None:
    assert retry_seconds(turns, POLICY) == seconds


@pytest.mark.parametrize(
    ("estimate", "seconds"),
    [(0.0, 60), (19.0, 60), (100.0, 300), (7200.0, 21600), (1e9, 21600), (math.inf, 21600), (math.nan, 21600), (-5.0, 60)],
)
def test_a_lease_follows_the_estimate_within_bounds(estimate: float, seconds: float) -> None:
    assert lease_seconds(estimate, POLICY) == seconds


@pytest.mark.parametrize(("estimates", "seconds"), [([], 300), ([1.0], 300), ([1.0, 200.0, 5.0], 600), ([1e9], 43_200)])
def test_a_ticket_lives_for_its_slowest_source(estimates: list[float], seconds: float) -> None:
    assert ticket_seconds([Offer("a", None, estimate) for estimate in estimates], POLICY) == seconds


OFFERS = st.lists(st.builds(Offer, st.sampled_from("abcdef"), st.none() | st.integers(0, 3), st.just(10.0)), max_size=8).map(
    lambda listed: [Offer(o.store, {x.store: x.slots for x in listed}[o.store], o.seconds) for o in listed]
)
COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 4))


@given(OFFERS, COUNTS, COUNTS, st.lists(st.integers(1, 4), max_size=6))
def test_leases_never_exceed_slots(listed: list[Offer], leased: dict[str, int], believed: dict[str, int], tickets: list[int]) -> None:
    """Invariant 3 in small: whatever the broker believes, a database that checks slots stays within them, and the loop ends."""
    slots = {offer.store: offer.slots for offer in listed}
    stands = dict(leased)
    loads = active(**believed)
    for parallel in tickets:
        granted: list[str] = []
        refused: list[str] = []
        rounds = 0
        while wants := next_wants(listed, loads, parallel, granted, refused):
            rounds += 1
            assert rounds <= len(slots)
            assert len(set(wants)) == len(wants) <= parallel - len(granted)
            assert not set(wants) & {*granted, *refused}
            for store in wants:
                if has_slot(slots[store], Load(stands.get(store, 0))):
                    stands[store] = stands.get(store, 0) + 1
                    granted.append(store)
                else:
                    refused.append(store)
        for store, limit in slots.items():
            assert limit is None or stands.get(store, 0) <= max(limit, leased.get(store, 0))
        could = any(has_slot(slots[store], Load(stands.get(store, 0))) for store in slots)
        assert granted or not could, "a slot was free and nobody got it"
        settled = settle(listed, granted, 3)
        if settled is None:
            assert not granted
        else:
            assert {listed[index].store for index in settled.active} == set(granted)
            assert not set(settled.active) & set(settled.standby)
            assert len(settled.standby) <= max(0, 3 - len(settled.active))
