"""What `python -m tests.attacks.fuzz` does a million times, a hundred times: honest inputs altered, and any bytes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attacks.parsers import PARSERS

EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 3), st.binary(max_size=6)), max_size=6)


def edited(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """`content` with some bytes replaced, put in, or taken out at places."""
    for where, length, more in edits:
        at = where % (len(content) + 1)
        content = content[:at] + more + content[at + length :]
    return content


@pytest.mark.parametrize("name", PARSERS)
def test_honest_inputs(name: str) -> None:
    for seed in PARSERS[name].seeds:
        PARSERS[name].take(seed)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_inputs(name: str, data: st.DataObject) -> None:
    seeds = list(PARSERS[name].seeds)
    content = data.draw(st.one_of(st.builds(edited, st.sampled_from(seeds), EDITS), st.binary(max_size=200)))
    PARSERS[name].take(content)
