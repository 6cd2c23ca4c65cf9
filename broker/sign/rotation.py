"""Which key signs, which are published, and what a rotation or a revocation changes. Pure: the keys and the time are arguments.

The life of a key (POSIX seconds):

* It is published from `created_at` on, first as a **standby** that signs nothing (`signs_from` is infinite).
* It signs from `signs_from` until `signs_until`, when the next one takes over: at each instant one key signs.
* It is published until `kept_until`, which nothing that it signed outlives; or until `revoked_at`.

Rules:

* A key signs only after it was published for `Terms.overlap_seconds`: a verifier whose view of the keys is not older than that knows
  every key that signs. Only a revocation may be quicker, and there is a standby so that it seldom has to be.
* There is always a standby. A rotation promotes it and makes another one.
* A revoked key neither signs nor is published, from that instant on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from broker.sign.token import Algorithm

LEAD_SECONDS = 2.0
"""A key takes over so long after it was decided, when every broker has heard of it (invariant 5)."""

CLOCKS_SECONDS = 300.0
"""A key that has to sign at once signs from this much before now: the clocks of other brokers may be behind."""

MARGIN_SECONDS = 60.0
"""Keys are kept for so long after the last token has ended: for brokers and verifiers whose clocks differ."""

READING_SECONDS = 5.0
"""A verifier reads the keys within this time, or not at all (broker.storeside.jwks)."""

MAX_AGE_SECONDS = 60
"""The key set is never cached for longer."""


class State(StrEnum):
    """What a key is doing."""

    STANDBY = "standby"
    """Published, ready to take over."""
    SCHEDULED = "scheduled"
    """Published, takes over at `signs_from`."""
    SIGNING = "signing"
    RETIRED = "retired"
    """Published for the tokens that it signed."""
    ENDED = "ended"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Life:
    """A key's life. `tokens_until` is the end of the last bearer token that it is known to have signed."""

    id: str
    algorithm: Algorithm
    created_at: float
    signs_from: float = math.inf
    signs_until: float = math.inf
    kept_until: float = math.inf
    tokens_until: float = -math.inf
    revoked_at: float = math.inf

    def state(self, now: float) -> State:
        """What the key is doing at `now`."""
        if self.revoked_at <= now:
            return State.REVOKED
        if self.kept_until <= now:
            return State.ENDED
        if self.signs_until <= now:
            return State.RETIRED
        if self.signs_from <= now:
            return State.SIGNING
        return State.STANDBY if math.isinf(self.signs_from) else State.SCHEDULED


@dataclass(frozen=True, slots=True)
class Terms:
    """What an operator decides. `longest_token_seconds` is how long a transfer token may live; `rotate_after_seconds` is 0 for never."""

    overlap_seconds: float = 900.0
    rotate_after_seconds: float = 90 * 86400.0
    longest_token_seconds: float = 3600.0

    @property
    def max_age_seconds(self) -> int:
        """For how long the key set may be cached. With it a verifier may still wait `refresh_seconds` between readings."""
        return max(1, int(min(MAX_AGE_SECONDS, self.overlap_seconds / 4)))

    @property
    def refresh_seconds(self) -> float:
        """How often a verifier has to read the keys at least, so that it knows each one before it signs."""
        return self.overlap_seconds - self.max_age_seconds - LEAD_SECONDS - READING_SECONDS


@dataclass(frozen=True, slots=True)
class New:
    """A key to be made."""

    algorithm: Algorithm
    signs_from: float = math.inf


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written: `changed` keys as they are from now on, and `made` ones."""

    changed: tuple[Life, ...] = ()
    made: tuple[New, ...] = ()


class UnderWay(Exception):
    """Another key is about to take over; a second rotation has to wait until it did. Its `life` says when."""

    def __init__(self, life: Life) -> None:
        super().__init__("a rotation is under way")
        self.life = life


def in_state(lives: Iterable[Life], now: float, *states: State) -> list[Life]:
    """Those that are in one of `states`, the longest published first."""
    return sorted((life for life in lives if life.state(now) in states), key=lambda life: (life.created_at, life.id))


def published(lives: Iterable[Life], now: float) -> list[Life]:
    """The keys that verifiers are told of."""
    return in_state(lives, now, State.STANDBY, State.SCHEDULED, State.SIGNING, State.RETIRED)


def signing(lives: Iterable[Life], now: float) -> Life | None:
    """The key that signs at `now`: of several the one that took over last."""
    return max(in_state(lives, now, State.SIGNING), key=lambda life: (life.signs_from, life.id), default=None)


def due(lives: Sequence[Life], now: float, terms: Terms) -> bool:
    """Whether the signing key is so old that the standby should take over."""
    current = signing(lives, now)
    if current is None or not terms.rotate_after_seconds or in_state(lives, now, State.SCHEDULED):
        return False
    return now - current.signs_from >= terms.rotate_after_seconds


def complete(lives: Sequence[Life], now: float, algorithm: Algorithm) -> Plan:
    """What is missing: a key that signs (of `algorithm`, when there is no other to go by), and a standby."""
    current = signing(lives, now)
    waiting = in_state(lives, now, State.SCHEDULED, State.STANDBY)
    if current is not None:
        return Plan() if any(life.state(now) is State.STANDBY for life in waiting) else Plan(made=(New(current.algorithm),))
    if not waiting:
        return Plan(made=(New(algorithm, now - CLOCKS_SECONDS), New(algorithm)))
    # A scheduled one was to take over anyway; a standby was published for longer.
    heir = next((life for life in waiting if life.state(now) is State.SCHEDULED), waiting[0])
    promoted = replace(heir, signs_from=now - CLOCKS_SECONDS)
    spare = any(life is not heir and life.state(now) is State.STANDBY for life in waiting)
    return Plan((promoted,), () if spare else (New(heir.algorithm),))


def rotate(lives: Sequence[Life], now: float, terms: Terms, algorithm: Algorithm | None = None) -> Plan:
    """Let another key take over, of `algorithm` (by default that of the key that signs): the standby, at once when it was published
    for long enough, else as soon as that is so.

    Raises `UnderWay`.
    """
    scheduled = in_state(lives, now, State.SCHEDULED)
    if scheduled:
        raise UnderWay(scheduled[0])
    current = signing(lives, now)
    if current is None:
        return complete(lives, now, algorithm or "ES256")
    wanted = algorithm or current.algorithm
    changed: list[Life] = []
    made = [New(wanted)]
    standby = in_state(lives, now, State.STANDBY)
    heir = next((life for life in standby if life.algorithm == wanted), None)
    begins = max(now + LEAD_SECONDS, terms.overlap_seconds + (now if heir is None else heir.created_at))
    if heir is None:
        made.insert(0, New(wanted, begins))
    else:
        changed.append(replace(heir, signs_from=begins))
    # A standby that signed nothing is needed by nobody.
    changed += [replace(life, signs_from=now, signs_until=now, kept_until=now) for life in standby if life is not heir]
    changed.append(_retired(current, begins, terms))
    return Plan(tuple(changed), tuple(made))


def revoke(lives: Sequence[Life], id: str, now: float) -> Plan:
    """End a key at once. If it signed, the one that was to take over does so now, else the standby.

    Raises `KeyError` when there is no such key, or it has ended or was revoked before.
    """
    victim = next((life for life in published(lives, now) if life.id == id), None)
    if victim is None:
        raise KeyError(id)
    others = [life for life in lives if life.id != id]
    resumed: dict[str, Life] = {}
    if victim.state(now) is State.SCHEDULED:  # the one that was to retire goes on
        resumed = {life.id: replace(life, signs_until=math.inf, kept_until=math.inf) for life in in_state(others, now, State.SIGNING)}
    rest = complete([resumed.get(life.id, life) for life in others], now, victim.algorithm)
    return Plan((replace(victim, revoked_at=now), *resumed.values(), *rest.changed), rest.made)


def _retired(life: Life, at: float, terms: Terms) -> Life:
    """The key, which signs until `at`, kept for all that it signed or will have signed."""
    return replace(life, signs_until=at, kept_until=max(at + terms.longest_token_seconds, life.tokens_until) + MARGIN_SECONDS)
