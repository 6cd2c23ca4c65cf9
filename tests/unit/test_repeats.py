"""Which requests count as come again: only while the ticket before is neither reported nor forgotten, and not all the time."""

from __future__ import annotations

import pytest

from broker.model import new_id
from broker.service import repeats
from broker.service.repeats import PAUSE_SECONDS, Repeats

ID = new_id()
BLOB, OTHER = str(ID), str(new_id())


def tickets(noted: Repeats) -> list[str]:
    return [asked.ticket for asked in noted.take()]


def test_the_ticket_before_is_told_once() -> None:
    noted = Repeats()
    noted.note("c", BLOB, "t1", "a", 0)
    assert noted.take() == []
    noted.note("c", BLOB, "t2", "b", 1)
    assert [tuple(asked) for asked in noted.take()] == [("t1", "a")]
    assert noted.take() == []


def test_other_blobs_and_other_clients_are_other_requests() -> None:
    noted = Repeats()
    for client, blob in (("c", BLOB), ("c", OTHER), ("d", BLOB)):
        noted.note(client, blob, "t", "a", 0)
    assert noted.take() == []


def test_what_is_settled_is_no_repetition() -> None:
    noted = Repeats()
    noted.note("c", BLOB, "t1", "a", 0)
    noted.settled("c", ID)
    noted.settled("c", ID)
    noted.note("c", BLOB, "t2", "a", 1)
    assert noted.take() == []


@pytest.mark.parametrize(("pause", "told"), [(PAUSE_SECONDS - 0.1, ["t1"]), (PAUSE_SECONDS, ["t1", "t2"])])
def test_who_asks_all_the_time_says_no_more(pause: float, told: list[str]) -> None:
    noted = Repeats()
    for number, now in enumerate((0.0, 0.0, pause), 1):
        noted.note("c", BLOB, f"t{number}", "a", now + 1000)
    assert tickets(noted) == told


def test_memory_is_bounded_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "ASKED", 3)
    noted = Repeats()
    for number in range(8):
        noted.note(f"c{number}", BLOB, f"t{number}", "a", 1000)
    for number in range(8):
        noted.note(f"c{number}", BLOB, "again", "a", 2000)
    told = tickets(noted)
    assert set(told) <= {"t3", "t4", "t5", "t6", "t7"}
    assert len(noted._asked) + len(noted._before) <= 6


def test_hints_that_nobody_takes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "WAITING", 2)
    noted = Repeats()
    for number in range(5):
        for ticket in ("first", "again"):
            noted.note(f"c{number}", BLOB, ticket, "a", 1000)
    assert tickets(noted) == ["first", "first"]


def test_where_somebody_was_sent_is_known_for_a_while() -> None:
    noted = Repeats()
    noted.note("c", BLOB, "t1", "a", 0, until=100)
    assert noted.earlier("c", BLOB, 99) == "a"
    assert noted.earlier("c", BLOB, 100) is None
    assert (noted.earlier("c", OTHER, 1), noted.earlier("d", BLOB, 1)) == (None, None)
    noted.note("c", BLOB, "t2", "b", 1, until=101)
    assert noted.earlier("c", BLOB, 2) == "b"
    noted.settled("c", ID)
    assert noted.earlier("c", BLOB, 2) is None
