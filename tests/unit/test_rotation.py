"""Which key signs and which are published: tables, and what holds after any sequence of rotations and revocations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.sign import rotation
from broker.sign.rotation import LEAD_SECONDS, MARGIN_SECONDS, Life, New, Plan, State, Terms, UnderWay
from broker.sign.token import NoSigningKey, TokenSigner, generate_key

NOW = 1_000_000.0
TERMS = Terms(overlap_seconds=900, rotate_after_seconds=86_400, longest_token_seconds=3600)

CURRENT = Life("current", "ES256", NOW - 50_000, NOW - 40_000)
STANDBY = Life("standby", "ES256", NOW - 40_000)
FRESH = Life("fresh", "ES256", NOW - 100)
RETIRED = Life("retired", "ES256", NOW - 90_000, NOW - 80_000, NOW - 40_000, NOW + 10)
SCHEDULED = Life("scheduled", "ES256", NOW - 100, NOW + 800)
LEAVING = replace(CURRENT, signs_until=NOW + 800, kept_until=NOW + 800 + 3600 + MARGIN_SECONDS)


@pytest.mark.parametrize(
    ("life", "state"),
    [
        (STANDBY, State.STANDBY),
        (SCHEDULED, State.SCHEDULED),
        (replace(SCHEDULED, signs_from=NOW), State.SIGNING),
        (CURRENT, State.SIGNING),
        (LEAVING, State.SIGNING),
        (replace(CURRENT, signs_until=NOW, kept_until=NOW + 1), State.RETIRED),
        (RETIRED, State.RETIRED),
        (replace(RETIRED, kept_until=NOW), State.ENDED),
        (replace(CURRENT, revoked_at=NOW), State.REVOKED),
        (replace(RETIRED, kept_until=NOW, revoked_at=NOW), State.REVOKED),
    ],
)
def test_state(life: Life, state: State) -> None:
    assert life.state(NOW) is state


def test_published_are_all_but_the_dead() -> None:
    dead = [replace(CURRENT, id="revoked", revoked_at=NOW), replace(RETIRED, id="ended", kept_until=NOW)]
    assert [life.id for life in rotation.published([STANDBY, RETIRED, CURRENT, SCHEDULED, *dead], NOW)] == [
        "retired", "current", "standby", "scheduled",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lives", "age", "due"),
    [
        ([CURRENT, STANDBY], 40_000.1, False),
        ([CURRENT, STANDBY], 40_000, True),
        ([CURRENT, STANDBY], 0, False),  # never
        ([LEAVING, SCHEDULED], 1000, False),  # it is under way
        ([STANDBY], 1000, False),  # nothing signs: that is for `complete`
    ],
)
def test_due(lives: Sequence[Life], age: float, due: bool) -> None:
    assert rotation.due(lives, NOW, replace(TERMS, rotate_after_seconds=age)) is due


@pytest.mark.parametrize(
    ("lives", "plan"),
    [
        ([], Plan(made=(New("RS256", NOW - 300), New("RS256")))),
        ([CURRENT], Plan(made=(New("ES256"),))),
        ([CURRENT, STANDBY], Plan()),
        ([LEAVING, SCHEDULED], Plan(made=(New("ES256"),))),
        ([LEAVING, SCHEDULED, STANDBY], Plan()),
        ([RETIRED, STANDBY], Plan((replace(STANDBY, signs_from=NOW - 300),), (New("ES256"),))),
        ([FRESH, STANDBY], Plan((replace(STANDBY, signs_from=NOW - 300),))),
        ([SCHEDULED, STANDBY], Plan((replace(SCHEDULED, signs_from=NOW - 300),))),
        ([replace(CURRENT, revoked_at=NOW)], Plan(made=(New("RS256", NOW - 300), New("RS256")))),
    ],
)
def test_complete(lives: Sequence[Life], plan: Plan) -> None:
    assert rotation.complete(lives, NOW, "RS256") == plan


def retired(at: float, until: float | None = None) -> Life:
    return replace(CURRENT, signs_until=at, kept_until=(until or at + 3600) + MARGIN_SECONDS)


def test_a_standby_that_all_know_takes_over_at_once() -> None:
    begins = NOW + LEAD_SECONDS
    plan = rotation.rotate([CURRENT, STANDBY], NOW, TERMS)
    assert plan == Plan((replace(STANDBY, signs_from=begins), retired(begins)), (New("ES256"),))


def test_a_fresh_standby_waits_until_all_know_it() -> None:
    begins = FRESH.created_at + 900
    assert rotation.rotate([CURRENT, FRESH], NOW, TERMS) == Plan((replace(FRESH, signs_from=begins), retired(begins)), (New("ES256"),))


def test_another_algorithm_waits_for_the_overlap_and_the_standby_ends() -> None:
    begins = NOW + 900
    ended = replace(STANDBY, signs_from=NOW, signs_until=NOW, kept_until=NOW)
    plan = rotation.rotate([CURRENT, STANDBY], NOW, TERMS, "RS256")
    assert plan == Plan((ended, retired(begins)), (New("RS256", begins), New("RS256")))


def test_a_key_is_kept_for_the_longest_bearer_token_that_it_signed() -> None:
    lasting = replace(CURRENT, tokens_until=NOW + 30 * 86_400)
    plan = rotation.rotate([lasting, STANDBY], NOW, TERMS)
    assert plan.changed[-1].kept_until == NOW + 30 * 86_400 + MARGIN_SECONDS


def test_a_second_rotation_waits_for_the_first() -> None:
    with pytest.raises(UnderWay) as caught:
        rotation.rotate([LEAVING, SCHEDULED, STANDBY], NOW, TERMS)
    assert caught.value.life == SCHEDULED


@pytest.mark.parametrize(
    ("lives", "kid", "changed", "made"),
    [
        ([CURRENT, STANDBY], "current", [replace(CURRENT, revoked_at=NOW), replace(STANDBY, signs_from=NOW - 300)], (New("ES256"),)),
        ([CURRENT, STANDBY], "standby", [replace(STANDBY, revoked_at=NOW)], (New("ES256"),)),
        ([CURRENT, STANDBY, RETIRED], "retired", [replace(RETIRED, revoked_at=NOW)], ()),
        ([CURRENT], "current", [replace(CURRENT, revoked_at=NOW)], (New("ES256", NOW - 300), New("ES256"))),  # the last one
        (  # its heir does not wait
            [LEAVING, SCHEDULED, STANDBY], "current",
            [replace(LEAVING, revoked_at=NOW), replace(SCHEDULED, signs_from=NOW - 300)], (),
        ),
        (  # who was to retire goes on
            [LEAVING, SCHEDULED, STANDBY], "scheduled",
            [replace(SCHEDULED, revoked_at=NOW), CURRENT], (),
        ),
    ],
)  # fmt: skip
def test_revoke(lives: Sequence[Life], kid: str, changed: list[Life], made: tuple[New, ...]) -> None:
    assert rotation.revoke(lives, kid, NOW) == Plan(tuple(changed), made)


@pytest.mark.parametrize("kid", ["nobody", "revoked", "ended"])
def test_what_is_dead_cannot_be_revoked(kid: str) -> None:
    dead = [replace(CURRENT, id="revoked", revoked_at=NOW - 1), replace(RETIRED, id="ended", kept_until=NOW)]
    with pytest.raises(KeyError):
        rotation.revoke([CURRENT, STANDBY, *dead], kid, NOW)


@pytest.mark.parametrize(("overlap", "max_age"), [(2, 1), (20, 5), (240, 60), (900, 60), (604_800, 60)])
def test_the_key_set_is_cached_for_less_than_the_overlap(overlap: float, max_age: int) -> None:
    terms = Terms(overlap_seconds=overlap)
    assert terms.max_age_seconds == max_age
    assert terms.refresh_seconds == overlap - max_age - 7


# -- any history

STEPS = st.lists(
    st.tuples(
        st.floats(0.1, 5000).map(lambda seconds: round(seconds, 1)),
        st.sampled_from(
            ["tick", "tick", "rotate", "rotate RS256", "revoke signing", "revoke standby", "revoke scheduled", "revoke retired"]
        ),
        st.floats(1, 20_000),
    ),
    max_size=25,
)
OVERLAP = 600.0
LIMITS = Terms(overlap_seconds=OVERLAP, rotate_after_seconds=7000, longest_token_seconds=2000)


class History:
    """The keys over time, as the catalogue would hold them."""

    def __init__(self) -> None:
        self.now = NOW
        self.lives: tuple[Life, ...] = ()
        self.views: list[tuple[float, tuple[Life, ...]]] = []
        self.count = 0
        self.carry_out(rotation.complete(self.lives, self.now, "ES256"))

    def carry_out(self, plan: Plan) -> None:
        changed = {life.id: life for life in plan.changed}
        made = []
        for new in plan.made:
            self.count += 1
            made.append(Life(f"key-{self.count}", new.algorithm, self.now, new.signs_from))
        self.lives = (*(changed.get(life.id, life) for life in self.lives), *made)
        self.views.append((self.now, self.lives))

    def as_of(self, instant: float) -> tuple[Life, ...]:
        """What the catalogue held at an instant."""
        return next((lives for at, lives in reversed(self.views) if at <= instant), self.views[0][1])

    def do(self, what: str) -> None:
        verb, _, which = what.partition(" ")
        if verb == "tick":
            due = rotation.due(self.lives, self.now, LIMITS)
            self.carry_out(rotation.rotate(self.lives, self.now, LIMITS) if due else rotation.complete(self.lives, self.now, "ES256"))
        elif verb == "rotate":
            with contextlib.suppress(UnderWay):
                self.carry_out(rotation.rotate(self.lives, self.now, LIMITS, "RS256" if which else None))
        else:
            found = [life for life in self.lives if life.state(self.now) == which]
            if found:
                self.carry_out(rotation.revoke(self.lives, found[0].id, self.now))


@settings(max_examples=400, deadline=None)
@given(STEPS, st.floats(0, 1), st.floats(0, OVERLAP))
def test_whoever_read_the_keys_within_the_overlap_knows_what_signs(steps: list[tuple[float, str, float]], when: float, age: float) -> None:
    """At any instant of a token's life, a verifier whose view is at most the overlap old can verify it, unless its key was revoked; and
    but for a revocation without a standby that all knew, that holds from the first moment."""
    history = History()
    signed: list[tuple[Life, float, float]] = []
    for seconds, what, bearer in steps:
        history.now += seconds
        history.do(what)
        current = rotation.signing(history.lives, history.now)
        assert current is not None
        assert rotation.in_state(history.lives, history.now, State.STANDBY), "no standby"
        assert len(rotation.in_state(history.lives, history.now, State.SIGNING)) == 1
        signed.append((current, history.now, history.now + LIMITS.longest_token_seconds))
        ends_at = history.now + bearer  # what `broker token create` signs, and notes
        kept = replace(current, tokens_until=max(current.tokens_until, ends_at + MARGIN_SECONDS))
        if not math.isinf(kept.kept_until):
            kept = replace(kept, kept_until=max(kept.kept_until, ends_at + MARGIN_SECONDS))
        history.carry_out(Plan((kept,)))
        signed.append((current, history.now, ends_at))
    for key, at, ends_at in signed:
        instant = at + when * (ends_at - at)
        last = next(life for life in history.as_of(instant) if life.id == key.id)
        if last.revoked_at <= instant:
            assert key.id not in {life.id for life in rotation.published(history.as_of(instant), instant)}
            continue
        seen = instant - age
        in_time = key.signs_from >= key.created_at + OVERLAP or seen >= key.created_at
        if in_time and seen >= NOW:
            assert key.id in {life.id for life in rotation.published(history.as_of(seen), seen)}


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_the_signer_takes_the_key_that_was_decided(steps: list[tuple[float, str, float]]) -> None:
    history = History()
    private = generate_key("ES256", 0)
    for seconds, what, _ in steps:
        history.now += seconds
        history.do(what)
        alive = [life for life in history.lives if life.state(history.now) not in (State.REVOKED, State.ENDED)]
        keys = [
            replace(private, id=life.id, activates_at=life.signs_from, retires_at=life.signs_until, expires_at=life.kept_until)
            for life in alive
        ]
        current = rotation.signing(history.lives, history.now)
        assert current is not None
        made = TokenSigner(keys, "issuer").sign_claims({"exp": history.now + LIMITS.longest_token_seconds}, history.now)
        assert jwt.get_unverified_header(made)["kid"] == current.id


def test_without_a_key_nothing_is_signed() -> None:
    with pytest.raises(NoSigningKey):
        TokenSigner((), "issuer").sign_claims({"exp": 1}, 0)
