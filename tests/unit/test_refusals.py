"""How many refused tokens are looked at: by address, in all, and who is let through all the same."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

import pytest

from broker import metrics
from broker.buckets import Buckets, Rate
from broker.errors import Forbidden, TooManyRefusals, Unauthenticated, Unavailable
from broker.model import Principal, Role
from broker.web import refusals
from broker.web.refusals import Refusals, claimed_subject, network_of

ALICE = Principal("alice", "demo", Role.MEMBER, 1e10)


def token(subject: str, signature: str = "good") -> str:
    payload = base64.urlsafe_b64encode(json.dumps({"iss": "http://i", "sub": subject}).encode()).decode().rstrip("=")
    return f"Bearer eyJ9.{payload}.{signature}"


@dataclass
class Bench:
    """`Refusals` with a clock of ours; tokens whose signature is ``good`` are."""

    now: float = 1000.0
    looked_at: int = 0

    def __post_init__(self) -> None:
        self.metrics = metrics.create()
        self.refusals = Refusals(self.metrics, Rate(3, 0.5), lambda: self.now, together=Rate(8, 1))

    async def authenticate(self, header: str) -> Principal:
        self.looked_at += 1
        if header.endswith(".away"):
            raise Unavailable()
        if header.endswith(".poor"):
            raise Forbidden()
        if not header.endswith(".good"):
            raise Unauthenticated()
        return ALICE

    async def send(self, address: str, header: str) -> str:
        """What happened: ``ok``, the type of the problem."""
        try:
            await self.refusals.check(address, header, self.authenticate)
        except (Unauthenticated, Forbidden, TooManyRefusals, Unavailable) as error:
            return error.type if isinstance(error, TooManyRefusals) == (error.retry_after is not None) else "unexpected"
        return "ok"


@pytest.mark.parametrize("kind", ["bad", "poor"])
async def test_after_so_many_refused_tokens_of_an_address_none_is_looked_at_until_it_has_waited(kind: str) -> None:
    bench = Bench()
    first = [await bench.send("192.0.2.1", token("mallory", kind)) for _ in range(3)]
    assert set(first) <= {"unauthenticated", "forbidden"}
    assert [await bench.send("192.0.2.1", token("mallory", kind)) for _ in range(5)] == ["too-many-refusals"] * 5
    assert bench.looked_at == 3
    assert await bench.send("192.0.2.2", token("bob")) == "ok", "another address"
    bench.now += 2
    assert await bench.send("192.0.2.1", token("mallory", kind)) == first[0]
    assert await bench.send("192.0.2.1", token("mallory", kind)) == "too-many-refusals"


async def test_good_tokens_and_issuers_that_are_away_take_nothing() -> None:
    bench = Bench()
    for number in range(50):
        assert await bench.send("192.0.2.1", token(f"user-{number}")) == "ok"
        assert await bench.send("192.0.2.1", token("bob", "away")) == "unavailable"
    assert len(bench.refusals._addresses) == 0


async def test_who_was_accepted_renews_its_token_beside_an_attacker() -> None:
    """Behind one address: a known subject is let through, out of a bucket of its own, and a new one has to wait."""
    bench = Bench()
    assert await bench.send("192.0.2.1", token("alice")) == "ok"
    while await bench.send("192.0.2.1", token("mallory", "bad")) != "too-many-refusals":
        pass
    for _ in range(20):
        assert await bench.send("192.0.2.1", token("alice")) == "ok"
        assert await bench.send("192.0.2.1", token("mallory", "bad")) == "too-many-refusals"
    assert await bench.send("192.0.2.1", token("new")) == "too-many-refusals"
    looked_at = bench.looked_at
    for _ in range(50):  # who knows a subject can empty its bucket, and no more
        await bench.send("192.0.2.1", token("alice", "bad"))
    assert bench.looked_at - looked_at == refusals.SUBJECT.burst


async def test_many_addresses_together_are_bounded_too() -> None:
    bench = Bench()
    outcomes = [await bench.send(f"198.51.100.{number}", token("x", "bad")) for number in range(20)]
    assert outcomes == ["unauthenticated"] * 8 + ["too-many-refusals"] * 12
    assert bench.looked_at == 8
    bench.now += 1
    assert await bench.send("198.51.100.99", token("x")) == "ok"
    text = bench.metrics.render().decode()
    assert 'broker_tokens_unchecked_total{reason="all"} 12.0' in text


async def test_who_has_many_addresses_shuts_out_strangers_alone() -> None:
    """Else a /48 of IPv6 and 200 invented tokens a second would keep everybody's new tokens from being looked at."""
    bench = Bench()
    assert await bench.send("192.0.2.1", token("alice")) == "ok"
    for number in range(20):
        await bench.send(f"2001:db8:0:{number:x}::1", token("x", "bad"))
    assert await bench.send("2001:db8:0:ffff::1", token("new")) == "too-many-refusals"
    assert await bench.send("192.0.2.1", token("bob")) == "ok", "a subject never seen, where somebody was accepted"
    assert await bench.send("192.0.2.1", "Bearer opaque.good") == "ok", "a token that names nobody"
    assert [await bench.send("192.0.2.1", token("x", "bad")) for _ in range(4)] == ["unauthenticated"] * 3 + ["too-many-refusals"]
    for number in range(refusals.MAX_KEPT + 10):
        bench.now += 1
        await bench.send(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", token("alice"))
    assert len(bench.refusals._from) == refusals.MAX_KEPT


def test_what_is_kept_is_bounded() -> None:
    buckets = Buckets(Rate(2, 1), lambda: 0.0, size=100)
    for number in range(1000):
        buckets.take(number)
    assert len(buckets) == 100


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"), ("2001:db8:1:2:ffff::1", "2001:db8:1:2::"),
        ("2001:db8:1:3::1", "2001:db8:1:3::"), ("::ffff:192.0.2.1", "192.0.2.1"), ("", ""), ("unix", "unix"),
    ],
)  # fmt: skip
def test_networks(address: str, network: str) -> None:
    assert network_of(address) == network


@pytest.mark.parametrize("header", ["", "Bearer x", "Bearer a.b.c", "Bearer a.!!.c", "Bearer a.W10.c", "Bearer a.bnVsbA.c", "Bearer é.é.é"])
def test_what_names_no_subject(header: str) -> None:
    assert claimed_subject(header) is None


def test_who_is_named() -> None:
    assert claimed_subject(token("alice")) == ("http://i", "alice")
