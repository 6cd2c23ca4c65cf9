"""A store is doubted by everyone only after several voices that have nothing to do with each other, and not for long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.suspicion import Words, doubt

FADING = st.floats(0, 1)
NAMES = st.sampled_from("abcdef")
WORDS = st.lists(st.builds(Words, NAMES, NAMES, FADING, FADING), max_size=40)


def failing(*where: str, fresh: float = 1.0) -> list[Words]:
    """Fresh failures, each named by network and project in two letters."""
    return [Words(network, project, fresh, 0.0) for network, project in where]


def served(*where: str) -> list[Words]:
    return [Words(network, project, 0.0, 1.0) for network, project in where]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 0.0),
        (failing("ax"), 0.0),
        (failing("ax") * 100, 0.0),  # many machines of one network and project are one voice
        (failing("ax", "bx"), 0.0),  # two networks of one project
        (failing("ax", "by"), 0.5),  # two networks, and two projects
        (failing("ax", "ay", "az"), 0.5),  # one network, three projects
        (failing("ax", "bx", "cx"), 0.5),  # three networks, one project
        (failing("ax", "by", "cz"), 0.9),
        (failing("ax", "by", "cz", "dw"), 0.95),
        (failing("ax", "by", "cz", fresh=0.5), 0.3),  # a half-life later
        (failing("ax", "by", "cz", fresh=0.25), 0.0),
        (failing("ax", "by") + served("cx"), 0.4),
        (failing("ax", "by") + served("cx", "dx", "ey", "fz"), 0.15),
        (served("ax", "by", "cz"), 0.0),
    ],
)
def test_doubt(words: list[Words], expected: float) -> None:
    assert doubt(words) == expected


@given(WORDS)
def test_a_doubt_is_a_share(words: list[Words]) -> None:
    assert 0.0 <= doubt(words) <= 1.0


@given(WORDS, NAMES)
def test_one_network_with_one_project_is_never_enough(words: list[Words], name: str) -> None:
    assert doubt([word._replace(network=name, project=name) for word in words]) == 0.0


@given(WORDS, NAMES, NAMES, FADING)
def test_another_success_never_adds_to_the_doubt(words: list[Words], network: str, project: str, fresh: float) -> None:
    assert doubt([*words, Words(network, project, 0.0, fresh)]) <= doubt(words)


@given(WORDS)
def test_time_alone_ends_every_doubt(words: list[Words]) -> None:
    """12 networks and projects at most: after four half-lives without news nothing is left of it."""
    kept = 2**-4
    assert doubt([word._replace(failed=word.failed * kept, delivered=word.delivered * kept) for word in words]) == 0.0
