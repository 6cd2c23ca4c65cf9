"""Promises are bounded: for each project, so that nobody who calls itself many takes the others', and for all."""

from __future__ import annotations

from broker.model import Direction
from broker.service.promises import MOST_OF_PROJECT, MOST_PROMISES, Promise, Promises
from broker.turns import Contender


def give(promises: Promises, who: str, project: str) -> None:
    promises.give(who, Promise(1, Direction.READ, Contender(who, project, 1.0, 1.0, 100.0), 5.0, 105.0))


def promised(promises: Promises) -> list[str]:
    return [contender.id for contender in promises.open(1, Direction.READ, "", 100.0)]


def test_a_project_has_so_many_and_takes_none_of_another() -> None:
    promises = Promises()
    give(promises, "other", "b")
    for n in range(MOST_OF_PROJECT + 1):
        give(promises, f"a{n}", "a")
    left = promised(promises)
    assert len(left) == MOST_OF_PROJECT + 1
    assert left[0] == "other" and "a0" not in left and "a1" in left
    give(promises, "a1", "a")  # again: nobody else has to go
    assert len(promised(promises)) == MOST_OF_PROJECT + 1


def test_all_together_have_so_many() -> None:
    promises = Promises()
    for n in range(MOST_PROMISES + 1):
        give(promises, str(n), f"p{n}")
    assert len(promised(promises)) == MOST_PROMISES
    assert promises.open(1, Direction.READ, "", 108.0) == []
    assert not promises
