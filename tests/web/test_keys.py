"""Signing keys over HTTP: the published set and its caching, rotation, revocation, and that several brokers agree."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

from broker.sign.rotation import Terms
from tests.parts.broker import Api, Reply, RunningBroker, broker_on
from tests.parts.condition import until

SET = "/.well-known/jwks.json"
SHORT = {"keys": {"overlap_seconds": 2, "rotate_after_seconds": 0}}


@pytest.fixture
def admin(api: Api, broker: RunningBroker) -> Api:
    return api.as_(broker.token("admin", ttl=86_400))


@pytest.fixture
async def pair(database: str, tmp_path: Path) -> AsyncIterator[tuple[RunningBroker, RunningBroker]]:
    """Two brokers on one database, with a short overlap. They name themselves alike, as they must."""
    settings = {**SHORT, "http": {"public_url": "http://broker.test"}}
    async with broker_on(database, tmp_path, settings) as one, broker_on(database, tmp_path, settings) as other:
        yield one, other


def by_state(reply: Reply) -> dict[str, str]:
    """Keys by what they are doing."""
    assert reply.status == 200, reply.body
    return {key["state"]: key["id"] for key in reply.body["keys"]}


def kids(document: Mapping[str, Any]) -> set[str]:
    return {key["kid"] for key in document["keys"]}


def signs(broker: RunningBroker) -> str:
    """The key that this broker signs with now."""
    now = time.time()
    kid: str = jwt.get_unverified_header(broker.context.keys.signer.sign_claims({"exp": now + 60}, now))["kid"]
    return kid


async def test_the_key_set_is_cached_for_less_than_the_overlap_and_told_once(api: Api) -> None:
    anonymous = api.as_(None)
    first = await anonymous.get(SET)
    assert first.headers["Cache-Control"] == f"public, max-age={Terms().max_age_seconds}" == "public, max-age=60"
    for known in (first.etag, f"W/{first.etag}", f'"other", {first.etag}', "*"):
        again = await anonymous.get(SET, If_None_Match=known)
        assert (again.status, again.body, again.etag) == (304, None, first.etag)
        assert again.headers["Cache-Control"] == first.headers["Cache-Control"]
    assert (await anonymous.get(SET, If_None_Match='"other"')).body == first.body
    assert (await anonymous.get(SET, If_None_Match="x" * 1001)).status == 400


async def test_the_set_is_the_same_at_every_broker(pair: tuple[RunningBroker, RunningBroker], session: aiohttp.ClientSession) -> None:
    one, other = [await Api(broker.url, session, None).get(SET) for broker in pair]
    assert (one.body, one.etag) == (other.body, other.etag)


@pytest.mark.parametrize("role", ["reader", "member", "service"])
async def test_only_administrators_see_and_change_keys(api: Api, broker: RunningBroker, role: str) -> None:
    somebody = api.as_(broker.token(role))
    kid = signs(broker)
    assert [reply.status for reply in (await somebody.get("/v1/keys"), await somebody.post("/v1/keys", {}))] == [403, 403]
    assert (await somebody.delete(f"/v1/keys/{kid}")).status == 403
    assert (await api.as_(None).get("/v1/keys")).status == 401
    assert signs(broker) == kid


async def test_no_private_half_is_shown(admin: Api) -> None:
    for key in (await admin.get("/v1/keys")).body["keys"]:
        assert key.keys() == {"id", "algorithm", "state", "created_at", "signs_from", "signs_until", "kept_until", "revoked_at"}


async def test_a_rotation_waits_for_the_overlap_and_a_second_one_for_the_first(admin: Api, broker: RunningBroker) -> None:
    before = by_state(await admin.get("/v1/keys"))
    after = by_state(await admin.post("/v1/keys", {}))
    assert (after["signing"], after["scheduled"]) == (before["signing"], before["standby"])
    assert after["standby"] not in before.values()
    assert signs(broker) == before["signing"]
    assert kids((await admin.get(SET)).body) == set(after.values())
    second = await admin.post("/v1/keys", {})
    assert (second.status, second.body["type"]) == (409, "/problems/conflict")
    assert before["standby"] in second.body["detail"]
    assert 0 < second.body["retry_after"] <= 901
    assert by_state(await admin.get("/v1/keys")) == after


async def test_a_retry_rotates_once(admin: Api) -> None:
    first = await admin.post("/v1/keys", {}, Idempotency_Key="once")
    assert (await admin.post("/v1/keys", {}, Idempotency_Key="once")).body == first.body
    assert (await admin.post("/v1/keys", {"algorithm": "RS256"}, Idempotency_Key="once")).status == 422


@pytest.mark.parametrize("algorithm", ["HS256", "none", "es256", "", None, 1, ["ES256"]])
async def test_an_algorithm_that_there_is_not(admin: Api, algorithm: object) -> None:
    refused = await admin.post("/v1/keys", {"algorithm": algorithm})
    assert (refused.status, refused.body["type"], refused.body["field"]) == (400, "/problems/invalid-field", "algorithm")
    assert "ES256" in refused.body["expected"]
    assert "scheduled" not in by_state(await admin.get("/v1/keys"))


async def test_an_unknown_field(admin: Api) -> None:
    assert (await admin.post("/v1/keys", {"algoritm": "ES256"})).status == 400


@pytest.mark.parametrize(
    ("kid", "status"), [("nobody", 404), ("a" * 128, 404), ("a" * 129, 400), ("..%2Fx", 400), ("%00", 400), ("a b", 400)]
)
async def test_a_key_that_there_is_not(admin: Api, broker: RunningBroker, kid: str, status: int) -> None:
    before = by_state(await admin.get("/v1/keys"))
    assert (await admin.delete(f"/v1/keys/{kid.replace(' ', '%20')}")).status == status
    assert by_state(await admin.get("/v1/keys")) == before


async def test_a_rotation_reaches_every_broker_and_no_bearer_token_is_refused(
    pair: tuple[RunningBroker, RunningBroker], session: aiohttp.ClientSession
) -> None:
    one, other = pair
    old = Api(other.url, session, one.token("admin"))
    first = signs(one)
    for algorithm in (None, "RS256", "EdDSA", None):
        found = await Api(one.url, session, one.token("admin")).post("/v1/keys", {"algorithm": algorithm} if algorithm else {})
        assert found.status == 200, found.body
        wanted = max((key for key in found.body["keys"] if key["state"] in ("scheduled", "signing")), key=lambda key: key["signs_from"])[
            "id"
        ]
        await until(lambda wanted=wanted: signs(one) == wanted == signs(other))  # type: ignore[misc]
        fresh = one.token("admin")
        assert jwt.get_unverified_header(fresh)["kid"] == wanted
        assert (await Api(other.url, session, fresh).get("/v1/keys")).status == 200
        assert (await old.get("/v1/keys")).status == 200
    states = by_state(await old.get("/v1/keys"))
    assert "retired" in states
    assert first in kids((await old.get(SET)).body)


async def test_a_revoked_key_is_dead_at_every_broker(pair: tuple[RunningBroker, RunningBroker], session: aiohttp.ClientSession) -> None:
    one, other = pair
    token = one.token("admin", ttl=86_400)
    here, there = Api(one.url, session, token), Api(other.url, session, token)
    assert [(await api.get("/v1/images")).status for api in (here, there)] == [200, 200]  # both remember the token now
    before = by_state(await here.get("/v1/keys"))
    answer = by_state(await here.delete(f"/v1/keys/{before['signing']}"))
    answered = time.monotonic()
    assert (answer["revoked"], answer["signing"]) == (before["signing"], before["standby"])
    # This broker knew at once,
    assert (await here.get("/v1/images")).status == 401
    assert signs(one) == before["standby"]
    assert before["signing"] not in kids((await here.get(SET)).body)
    # the other one hears of it.
    await until(lambda: signs(other) == before["standby"])
    print(f"the other broker signed with another key {time.monotonic() - answered:.3f} s after the answer")
    assert before["signing"] not in kids((await there.get(SET)).body)
    assert (await there.get("/v1/images")).status == 401
    assert (await Api(other.url, session, one.token("admin")).delete(f"/v1/keys/{before['signing']}")).status == 404  # dead already


async def test_when_every_key_is_revoked_there_are_new_ones(
    pair: tuple[RunningBroker, RunningBroker], session: aiohttp.ClientSession
) -> None:
    one, other = pair
    seen = set()
    for _ in range(4):
        seen.add(signs(one))
        assert (await Api(one.url, session, one.token("admin")).delete(f"/v1/keys/{signs(one)}")).status == 200
        states = by_state(await Api(one.url, session, one.token("admin")).get("/v1/keys"))
        assert {states["signing"], states["standby"]} == kids((await Api(one.url, session, None).get(SET)).body)
    assert len(seen) == 4
    await until(lambda: signs(other) == signs(one))


async def test_old_keys_are_rotated_by_themselves(database: str, tmp_path: Path, session: aiohttp.ClientSession) -> None:
    settings = {"keys": {"overlap_seconds": 2, "rotate_after_seconds": 2}}
    async with broker_on(database, tmp_path, settings) as broker:
        first = signs(broker)
        await until(lambda: signs(broker) != first)
        second = signs(broker)
        await until(lambda: signs(broker) not in (first, second))
        assert {first, second} < kids((await Api(broker.url, session, None).get(SET)).body)


async def test_what_may_be_outdated_is_not_published(api: Api, broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = broker.context.keys.terms.overlap_seconds
    monkeypatch.setattr(type(broker.context.memory), "unread_seconds", lambda _: overlap)
    assert (await api.get(SET)).status == 200
    monkeypatch.setattr(type(broker.context.memory), "unread_seconds", lambda _: overlap + 1)
    assert (await api.get(SET)).status == 503


async def test_changes_are_logged_with_who_asked(admin: Api, capfd: pytest.CaptureFixture[str]) -> None:
    state = by_state(await admin.post("/v1/keys", {}))
    await admin.delete(f"/v1/keys/{state['standby']}")
    said = "".join(capfd.readouterr())
    assert "signing keys rotated" in said
    assert "signing key revoked" in said
    assert state["standby"] in said
    assert "alice" in said
