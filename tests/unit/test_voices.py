"""No voice is heard at wider sites beyond its bound, whatever it says and when; other voices are heard as ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.paths import Contribution
from broker.voices import MOST, heard, moderated, share, voice

WORDS = st.lists(st.tuples(st.floats(0.01, 5), st.floats(0, 1)), max_size=60)
"""Reports weighing so much, and what is left of everything when the next one comes."""


@pytest.mark.parametrize(
    ("before", "added", "expected"),
    [(0, 1, 1.0), (1, 1, 0.5), (2, 1, 0.3), (8, 1, 6 / 110), (1000, 1, 6 / (1002 * 1003)), (0, 0.25, 1.0), (0, 100, 6 / 204)],
)
def test_share(before: float, added: float, expected: float) -> None:
    assert share(before, added) == pytest.approx(expected)


@given(WORDS)
def test_a_voice_is_never_heard_beyond_its_bound(words: list[tuple[float, float]]) -> None:
    own = wider = 0.0
    for added, kept in words:
        wider += added * share(own, added)
        own += added
        assert wider <= heard(own) * (1 + 1e-9) < MOST
        own, wider = own * kept, wider * kept
        assert wider <= heard(own) * (1 + 1e-9)


@given(st.floats(0, 1e6), st.floats(0.01, 1e3))
def test_a_share_is_a_share_and_never_grows(before: float, added: float) -> None:
    assert 0 < share(before + 1, added) < share(before, added) * (1 + 1e-9) <= 1 + 1e-9


@given(st.floats(0, 100), st.floats(0.01, 10), st.integers(1, 50))
def test_at_once_or_one_by_one_no_more_is_heard_than_the_weight_allows(before: float, added: float, count: int) -> None:
    total = count * added
    allowed = (heard(before + total) - heard(before)) * (1 + 1e-6) + 1e-9
    assert sum(added * share(before + n * added, added) for n in range(count)) <= allowed
    assert total * share(before, total) <= allowed


@pytest.mark.parametrize(
    ("address", "place", "network"),
    [
        ("10.1.2.3", "10.1.2.3", "10.1.2.0/24"),
        ("::ffff:10.1.2.3", "10.1.2.3", "10.1.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64", "2001:db8:1:2::/64"),
        ("unix", "unix", "unix"),
    ],
)
def test_where_a_voice_speaks(address: str, place: str, network: str) -> None:
    assert voice("p", "u", address) == (f"p\tu\t{place}", network, "p")


def test_no_two_principals_have_one_voice() -> None:
    assert len({voice(project, subject, "10.0.0.1").name for project, subject in [("a", "b"), ("a/b", ""), ("", "a/b"), ("ab", "")]}) == 4


KNOWN = Contribution(4, 4, 4e9, 40, 4, 2)
"""Four reports of 10 s at 100 MB/s, with a setup of 0.5 s."""


@pytest.mark.parametrize(
    ("told", "known", "heard"),
    [
        (Contribution(1, 1, 1e9, 10, 1, 0.5), KNOWN, Contribution(1, 1, 1e9, 10, 1, 0.5)),
        (Contribution(1, 1, 1e9, 20, 1, 1.0), KNOWN, Contribution(1, 1, 1e9, 20, 1, 1.0)),
        (Contribution(1, 1, 1, 4e4, 1, 3e4), KNOWN, Contribution(1, 1, 5e8, 20, 1, 1.0)),  # slow and long
        (Contribution(1, 1, 1e10, 0.1, 1, 0.0), KNOWN, Contribution(1, 1, 4e7, 0.1, 1, 0.0)),  # fast
        (Contribution(1, 0, 0, 0, 0, 0), KNOWN, Contribution(1, 0, 0, 0, 0, 0)),
        (Contribution(0.5, 0.5, 1e9, 100, 0, 0), KNOWN, Contribution(0.5, 0.5, 2.5e8, 10, 0, 0)),
        (Contribution(1, 1, 1e9, 100, 1, 90), None, Contribution(1, 1, 6e8, 60, 1, 60)),
        (Contribution(1, 1, 1e9, 100, 1, 90), Contribution(3, 0, 0, 0, 0, 0), Contribution(1, 1, 6e8, 60, 1, 60)),
    ],
)
def test_moderated(told: Contribution, known: Contribution | None, heard: Contribution) -> None:
    assert moderated(told, known) == pytest.approx(heard)


@given(
    st.lists(st.tuples(st.floats(1, 1e12), st.floats(0.001, 6e5)), min_size=1, max_size=300),
    st.integers(1, 50),
)
def test_however_a_voice_lies_the_rate_elsewhere_stays_near_what_others_told(lies: list[tuple[float, float]], others: int) -> None:
    """Between N / (N + 6) and ((N + 6) / N)^4 of it, after N reports by others: `MOST` reports of twice the mean time."""
    view = Contribution(others, others, others * 1e9, others * 10.0, 0, 0)
    for number, (bytes, seconds) in enumerate(lies):
        heard = moderated(Contribution(1, 1, bytes, seconds, 0, 0), view)
        part = share(number, 1)
        view = Contribution(*(before + part * more for before, more in zip(view, heard, strict=True)))
    told = view.bytes / view.busy_seconds / 1e8
    assert (others / (others + 6)) ** 2 <= told <= ((others + 6) / others) ** 4
