"""Handles for reading: one for all who ask at about the same time, wherever it holds nothing of who asked."""

from __future__ import annotations

import itertools
from datetime import datetime
from typing import Any, ClassVar

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors, metrics
from broker.model import Handle
from broker.service.reads import LONGEST_STEP_SECONDS, Reads, until, url_step_seconds

NOW = 1_700_000_000.5


class Tokens:
    """A store whose handles differ each time."""

    kind: ClassVar[str] = "http"

    def __init__(self) -> None:
        self.signed = itertools.count()

    def sign_get(self, key: str, expires_at: float, now: float, filename: str | None = None) -> Handle:
        if expires_at <= now:
            raise errors.StoreUnavailable("too late")
        name = "" if filename is None else f"&{filename}"
        return Handle("GET", f"http://s/{key}?{next(self.signed)}{name}", {}, float(int(expires_at)))


class Alike(Tokens):
    """A store whose URLs hold nothing of their own."""

    kind = "s3"
    reads_by = 0


def reads(driver: Any) -> Reads:
    return Reads(lambda name: driver, metrics.create().signing_seconds)


def url(read: str) -> str:
    return str(orjson.loads(f"{{{read}}}")["url"])


def end(read: str) -> float:
    return datetime.fromisoformat(orjson.loads(f"{{{read}}}")["expires_at"]).timestamp()


def test_urls_alike_are_signed_once() -> None:
    kept = reads(Alike())
    assert kept.sign("a", "k", until(NOW + 600, NOW, 0)) == kept.sign("a", "k", until(NOW + 601, NOW + 1, 0))
    assert url(kept.sign("a", "l", until(NOW + 600, NOW, 0))) != url(kept.sign("a", "k", until(NOW + 600, NOW, 0)))


def test_a_url_is_forgotten_with_what_it_was_signed_with() -> None:
    driver = Alike()
    kept = reads(driver)
    first = url(kept.sign("a", "k", until(NOW + 600, NOW, 0)))
    driver.reads_by = 1
    second = url(kept.sign("a", "k", until(NOW + 600, NOW, 0)))
    kept.forget()
    assert len({first, second, url(kept.sign("a", "k", until(NOW + 600, NOW, 0)))}) == 3


def test_a_file_name_is_told_to_who_asked_for_it_and_to_nobody_else() -> None:
    kept = reads(Alike())
    ends = until(NOW + 600, NOW, 0)
    plain = url(kept.sign("a", "k", ends))
    named = [url(kept.sign("a", "k", ends, name)) for name in ("one", "other", "one")]
    assert [each.partition("&")[2] for each in named] == ["one", "other", "one"]
    assert url(kept.sign("a", "k", ends)) == plain and "&" not in plain


def test_tokens_are_shared_only_where_policy_says_so() -> None:
    kept = reads(Tokens())
    assert url(kept.sign("a", "k", until(NOW + 600, NOW, 0))) != url(kept.sign("a", "k", until(NOW + 600, NOW, 0)))
    shared = kept.sign("a", "k", until(NOW + 600, NOW, 300))
    assert shared == kept.sign("a", "k", until(NOW + 601, NOW + 1, 300))
    assert end(shared) % 300 == 0 and NOW + 300 <= end(shared) <= NOW + 600


def test_what_would_end_before_the_step_is_signed_for_one() -> None:
    kept = reads(Tokens())
    assert end(kept.sign("a", "k", until(NOW + 10, NOW, 3600))) == int(NOW + 10)
    with pytest.raises(errors.StoreUnavailable):
        kept.sign("a", "k", until(NOW - 1, NOW, 3600))


@given(st.floats(0, 1e6))
def test_a_step_costs_at_most_an_eighth_of_the_life(life: float) -> None:
    step = url_step_seconds(life)
    assert 1 <= step <= LONGEST_STEP_SECONDS and (step == 1 or step <= life / 8)


def test_what_is_kept_stays_bounded_when_dropped_stretches_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.service.reads.KEPT", 100)
    kept = reads(Alike())
    for number in range(5000):
        life = 600 + 64 * (number % 7)
        kept.sign(f"store{number % 5}", f"key{number}", until(NOW + life, NOW, 0))
    held = sum(len(stretch) for reader in kept._readers.values() for stretch in reader.stretches.values())
    assert 0 < held <= 100
