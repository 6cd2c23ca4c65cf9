"""Tokens of a Keystone that does all that a real one does not: it hangs, lies, redirects, is flooded."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from broker import config, metrics
from broker.credentials import CredentialError, Credentials
from broker.errors import Forbidden, Unauthenticated, Unavailable
from broker.model import Role
from broker.web import keystone as asking
from broker.web import keystone_tokens as remembering
from broker.web.keystone import Keystone, KeystoneAway, read
from broker.web.keystone_tokens import KeystoneTokens
from tests.parts.broker import Api, broker_on
from tests.web.fake_keystone import FakeKeystone, described, fake

__all__ = ["fake"]

ROLES = config.Keystone("").roles
PASSWORD = "the-brokers-own-password"


def credentials(place: Path, **entries: str) -> Credentials:
    file = place / "keystone.json"
    file.write_bytes(orjson.dumps(entries or {"username": "broker", "password": PASSWORD, "project_name": "service"}))
    file.chmod(0o600)
    return Credentials(place)


@pytest.fixture
async def tokens(fake: FakeKeystone, session: aiohttp.ClientSession, tmp_path: Path) -> AsyncIterator[KeystoneTokens]:
    counts = metrics.create()
    made = KeystoneTokens(Keystone(config.Keystone(fake.url), credentials(tmp_path), session, counts), 60.0, counts)
    yield made
    await made.close()


class Clock:
    """The monotonic clock, put forward by tests."""

    def __init__(self, tokens: KeystoneTokens) -> None:
        self.ahead = 0.0
        tokens._monotonic = lambda: time.monotonic() + self.ahead


def outcomes(tokens: KeystoneTokens) -> dict[str, float]:
    return {labels[0]: value for labels, value in tokens._metrics.keystone_tokens._values.items()}


async def test_a_token_is_asked_about_once(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    fake.tokens["t"] = described("member", "reader")
    assert tokens.known("t") is None
    principal = await tokens.authenticate("t")
    assert (principal.subject, principal.project, principal.role, principal.site) == ("u1", "p1", Role.MEMBER, None)
    assert tokens.known("t") is principal
    assert await tokens.authenticate("t") is principal
    assert (fake.asked["t"], fake.logins) == (1, 1)
    assert outcomes(tokens) == {"accepted": 1, "remembered": 2}


async def test_a_revoked_token_lives_no_longer_than_the_bound(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    clock = Clock(tokens)
    fake.tokens["t"] = described("member")
    await tokens.authenticate("t")
    del fake.tokens["t"]
    clock.ahead = 59
    assert tokens.known("t") is not None
    clock.ahead = 60
    assert tokens.known("t") is None
    with pytest.raises(Unauthenticated):
        await tokens.authenticate("t")


@pytest.mark.usefixtures("patience")
async def test_the_bound_counts_from_before_the_question(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    """Else a token that is revoked while Keystone's answer travels would live longer."""
    clock = Clock(tokens)
    fake.tokens["t"] = described("member")
    fake.hold = asyncio.Event()
    asking_ = asyncio.create_task(tokens.authenticate("t"))
    while not fake.asked["t"]:
        await asyncio.sleep(0.01)
    clock.ahead = 30
    fake.hold.set()
    await asking_
    clock.ahead = 60
    assert tokens.known("t") is None


async def test_nothing_is_remembered_beyond_its_end(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    clock = Clock(tokens)
    fake.tokens["t"] = described("member", lives=20)
    await tokens.authenticate("t")
    assert tokens.known("t") is not None
    clock.ahead = 21
    assert tokens.known("t") is None


@pytest.mark.parametrize("minutes", [-10, 10])
async def test_clocks_that_differ_shut_nobody_out(tokens: KeystoneTokens, fake: FakeKeystone, minutes: int) -> None:
    """Keystone decides whether a token has ended; ours decides only for how long that is remembered, and never beyond the bound."""
    tokens._clock = lambda: time.time() + 60 * minutes
    clock = Clock(tokens)
    fake.tokens["t"] = described("member", lives=300)
    await tokens.authenticate("t")
    assert (tokens.known("t") is None) is (minutes > 0)
    assert (await tokens.authenticate("t")).subject == "u1"
    clock.ahead = 60
    assert tokens.known("t") is None


@pytest.mark.parametrize(
    ("token", "role", "project"),
    [
        (described("reader"), Role.READER, "p1"),
        (described("member", "reader"), Role.MEMBER, "p1"),
        (described("service", "member"), Role.SERVICE, "p1"),
        (described("manager", "member", "reader", "admin"), Role.ADMIN, "p1"),
        (described("admin", "member", is_admin_project=False), Role.MEMBER, "p1"),
        (described("admin", "member", is_admin_project=True), Role.ADMIN, "p1"),
        (described("admin", project=None, system={"all": True}), Role.ADMIN, "system"),
        (described("member", **{"OS-TRUST:trust": {"id": "t", "impersonation": True}}), Role.MEMBER, "p1"),
        (described("member", application_credential={"id": "a", "restricted": True}), Role.MEMBER, "p1"),
    ],
)
def test_roles_and_scopes(token: dict[str, Any], role: Role, project: str) -> None:
    principal = read(token, ROLES).principal
    assert principal is not None
    assert (principal.role, principal.project) == (role, project)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (described("manager"), "no role"),
        (described(), "no role"),
        (described("admin", is_admin_project=False), "no role"),
        (described("member", project=None), "not scoped to a project"),
        (described("admin", project=None, domain={"id": "default"}), "not scoped to a project"),
        (described("member", project=None, system={"all": True}), "not scoped to a project"),
        (described("member", application_credential={"id": "a", "access_rules": [{"service": "image"}]}), "access rules"),
    ],
)
async def test_a_token_that_allows_nothing(tokens: KeystoneTokens, fake: FakeKeystone, token: dict[str, Any], words: str) -> None:
    fake.tokens["t"] = token
    for _ in range(2):
        with pytest.raises(Forbidden) as error:
            await tokens.authenticate("t")
        assert words in error.value.detail
    assert fake.asked["t"] == 1
    assert tokens.known("t") is None


@pytest.mark.parametrize(
    "token",
    [
        {}, described("member", user=None), described("member", user={"id": "a\nb"}), described("member", user={"id": 5}),
        {**described("member"), "project": {"id": ""}}, described("member", roles=None), described("member", roles={}),
        described("member", expires_at=None), described("member", expires_at="soon"), described("member", expires_at="2030-01-01T00:00:00"),
    ],
)  # fmt: skip
def test_what_describes_no_token(token: dict[str, Any]) -> None:
    with pytest.raises(KeystoneAway):
        read(token, ROLES)


def test_roles_may_have_other_names() -> None:
    mapped = read(described("creator"), {"creator": Role.MEMBER}).principal
    assert mapped is not None
    assert mapped.role is Role.MEMBER
    assert read(described("member"), {"creator": Role.MEMBER}).principal is None
    assert read(described("member", roles=[5, {"name": {}}, {"name": "member"}]), ROLES).principal is not None


@pytest.mark.parametrize("behaviour", ["down", "redirect", "huge", "packed", "html", "another", "forbids", "refuses the broker"])
async def test_a_keystone_that_misbehaves(tokens: KeystoneTokens, fake: FakeKeystone, behaviour: str) -> None:
    fake.tokens["t"] = described("member")
    fake.behaviour = behaviour
    with pytest.raises(Unavailable) as error:
        await tokens.authenticate("t")
    assert error.value.retry_after
    assert fake.url not in str(error.value.problem())
    fake.behaviour = "good"
    if behaviour != "refuses the broker":
        assert (await tokens.authenticate("t")).subject == "u1"


async def test_a_keystone_that_hangs(tokens: KeystoneTokens, fake: FakeKeystone, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given a bounded time; then there is a pause in which nobody waits for it."""
    clock = Clock(tokens)
    fake.tokens["t"] = described("member")
    await tokens.authenticate("t")
    monkeypatch.setattr(remembering, "ASK_SECONDS", 0.5)
    fake.hold = asyncio.Event()
    with pytest.raises(Unavailable):
        await tokens.authenticate("other")
    with pytest.raises(Unavailable):
        await tokens.authenticate("another")
    assert tokens.known("t") is not None
    assert fake.asked["another"] == 0
    fake.hold.set()
    monkeypatch.setattr(remembering, "ASK_SECONDS", 60.0)
    clock.ahead = remembering.AWAY_SECONDS
    with pytest.raises(Unauthenticated):
        await tokens.authenticate("other")


async def test_known_tokens_outlive_an_outage_by_the_bound_alone(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    clock = Clock(tokens)
    fake.tokens["t"] = described("member")
    await tokens.authenticate("t")
    fake.behaviour = "down"
    clock.ahead = 59
    assert (await tokens.authenticate("t")).subject == "u1"
    clock.ahead = 60
    with pytest.raises(Unavailable):
        await tokens.authenticate("t")
    fake.behaviour = "good"
    assert (await tokens.authenticate("t")).subject == "u1"


async def test_a_refused_login_is_not_repeated(
    tokens: KeystoneTokens, fake: FakeKeystone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keystone may lock an account after some; a changed credential is tried at once."""
    monkeypatch.setattr(remembering, "AWAY_SECONDS", 0.0)
    fake.tokens["t"] = described("member")
    fake.behaviour = "refuses the broker"
    for _ in range(3):
        with pytest.raises(Unavailable):
            await tokens.authenticate("t")
    assert fake.logins == 1
    fake.behaviour = "good"
    credentials(tmp_path, username="broker", password=PASSWORD + "-2", project_name="service")
    assert (await tokens.authenticate("t")).subject == "u1"
    assert fake.logins == 2


async def test_the_brokers_own_token_is_renewed(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    fake.tokens |= {"a": described("member"), "b": described("member"), "c": described("member")}
    await tokens.authenticate("a")
    fake.own = "revoked"
    await tokens.authenticate("b")
    assert fake.logins == 2
    fake.own_lives = 0.0
    fake.own = "revoked again"
    await tokens.authenticate("c")
    with pytest.raises(Unauthenticated):
        await tokens.authenticate("d")
    assert fake.logins == 4


@pytest.mark.parametrize(
    "entries",
    [{"username": "broker"}, {"username": "broker", "password": PASSWORD}, {"application_credential_id": "x"}, {"other": PASSWORD}],
)
def test_a_credential_that_lacks_something(tmp_path: Path, entries: dict[str, str]) -> None:
    with pytest.raises(CredentialError) as error:
        asking.login(credentials(tmp_path, **entries).read("keystone"))
    assert PASSWORD not in str(error.value)


async def test_without_a_credential_nobody_gets_in(fake: FakeKeystone, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    counts = metrics.create()
    tokens = KeystoneTokens(Keystone(config.Keystone(fake.url), Credentials(tmp_path), session, counts), 60.0, counts)
    with pytest.raises(Unavailable):
        await tokens.authenticate("t")


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for a busy machine, where the test itself holds Keystone's answers back."""
    monkeypatch.setattr(remembering, "ASK_SECONDS", 60.0)
    monkeypatch.setattr(remembering, "LINE_SECONDS", 60.0)


@pytest.mark.usefixtures("patience")
async def test_invented_tokens_are_no_flood(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    """Few are asked about at once, the same one once; who finds too many waiting is told to come again."""
    fake.hold = asyncio.Event()
    same = [asyncio.create_task(tokens.authenticate("same")) for _ in range(50)]
    others = [asyncio.create_task(tokens.authenticate(f"invented-{number}")) for number in range(500)]
    while fake.at_once < remembering.AT_ONCE:
        await asyncio.sleep(0.01)
    busy, _ = await asyncio.wait(others, return_when=asyncio.FIRST_EXCEPTION)
    assert busy
    fake.hold.set()
    ended = await asyncio.gather(*same, *others, return_exceptions=True)
    kinds = Counter(type(error) for error in ended)
    assert fake.most_at_once == remembering.AT_ONCE
    assert fake.asked["same"] == 1
    assert sum(fake.asked.values()) == remembering.MAX_UNDER_WAY
    assert kinds == {Unauthenticated: 50 + remembering.MAX_UNDER_WAY - 1, Unavailable: 500 - remembering.MAX_UNDER_WAY + 1}
    before = sum(fake.asked.values())
    for _ in range(20):
        with pytest.raises(Unauthenticated):
            await tokens.authenticate("same")
    assert sum(fake.asked.values()) == before
    assert outcomes(tokens)["refused-before"] == 20


async def test_a_line_that_does_not_move(tokens: KeystoneTokens, fake: FakeKeystone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits too long is told to come again, and nobody says of Keystone that it is away."""
    monkeypatch.setattr(remembering, "ASK_SECONDS", 60.0)
    monkeypatch.setattr(remembering, "LINE_SECONDS", 0.2)
    fake.hold = asyncio.Event()
    first = [asyncio.create_task(tokens.authenticate(f"invented-{number}")) for number in range(remembering.AT_ONCE)]
    while fake.at_once < remembering.AT_ONCE:
        await asyncio.sleep(0.01)
    with pytest.raises(Unavailable):
        await tokens.authenticate("late")
    assert tokens._trouble is None
    fake.hold.set()
    ended = await asyncio.gather(*first, return_exceptions=True)
    assert {type(error) for error in ended} == {Unauthenticated}


@pytest.mark.usefixtures("patience")
async def test_a_flood_does_not_keep_known_people_out(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    clock = Clock(tokens)
    fake.tokens["t"] = described("member")
    await tokens.authenticate("t")
    fake.hold = asyncio.Event()
    flood = [asyncio.create_task(tokens.authenticate(f"invented-{number}")) for number in range(400)]
    while fake.at_once < remembering.AT_ONCE:
        await asyncio.sleep(0.01)
    clock.ahead = 60
    again = asyncio.create_task(tokens.authenticate("t"))
    while fake.asked["t"] < 2:
        await asyncio.sleep(0.01)
    fake.hold.set()
    assert (await again).subject == "u1"
    await asyncio.gather(*flood, return_exceptions=True)


@pytest.mark.usefixtures("patience")
async def test_who_gives_up_does_not_end_the_question_of_others(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    fake.tokens["t"] = described("member")
    fake.hold = asyncio.Event()
    first, second = (asyncio.create_task(tokens.authenticate("t")) for _ in range(2))
    while not fake.asked["t"]:
        await asyncio.sleep(0.01)
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    fake.hold.set()
    assert (await second).subject == "u1"
    assert fake.asked["t"] == 1


async def test_memory_is_bounded(tokens: KeystoneTokens, fake: FakeKeystone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembering, "MAX_REMEMBERED", 10)
    for number in range(15):
        fake.tokens[f"t{number}"] = described("member")
        await tokens.authenticate(f"t{number}")
        with pytest.raises(Unauthenticated):
            await tokens.authenticate(f"invented{number}")
    assert (len(tokens._seen), len(tokens._refused), len(tokens._asking)) == (10, 10, 0)


@pytest.mark.parametrize("text", ["", "a b", "a\x00", "é", "a" * 8001, "a\r\nX-Evil: 1", "a,b"])
async def test_what_cannot_be_a_token_is_not_asked_about(tokens: KeystoneTokens, fake: FakeKeystone, text: str) -> None:
    with pytest.raises(Unauthenticated):
        await tokens.authenticate(text)
    assert not fake.asked


async def test_the_longest_token(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    fake.tokens["a" * 8000] = described("member")
    assert (await tokens.authenticate("a" * 8000)).subject == "u1"


async def test_a_service_token_lets_an_expired_one_pass_and_adds_no_right(tokens: KeystoneTokens, fake: FakeKeystone) -> None:
    fake.tokens |= {"user": described("reader", lives=-100), "service": described("service", "admin", project="services")}
    principal = await tokens.authenticate("user", "service")
    assert (principal.role, principal.project) == (Role.READER, "p1")
    assert tokens.known("user", "service") is principal
    assert tokens.known("user") is None
    assert fake.queries[-1] == "nocatalog&allow_expired=1"
    assert fake.queries[0] == "nocatalog"


@pytest.mark.parametrize("roles", [["member"], ["admin"], []])
async def test_a_service_token_without_the_role_is_refused(tokens: KeystoneTokens, fake: FakeKeystone, roles: list[str]) -> None:
    fake.tokens |= {"user": described("member"), "service": described(*roles)}
    with pytest.raises(Unauthenticated):
        await tokens.authenticate("user", "service")
    assert tokens.known("user", "service") is None
    assert fake.asked["user"] == 0
    with pytest.raises(Unauthenticated):
        await tokens.authenticate("user", "invented")


async def test_a_browser_signs_in_with_a_token_of_keystone(
    fake: FakeKeystone, database: str, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    settings = {"auth": {"keystone": {"url": f"{fake.url}/v3"}}, "credentials_dir": str(tmp_path)}
    credentials(tmp_path)
    fake.tokens |= {"good": described("admin"), "domain": described("admin", project=None)}
    html = {"Accept": "text/html"}
    async with broker_on(database, tmp_path, settings) as broker:
        async with session.get(broker.url, headers=html) as response:
            assert 'value="keystone"' in await response.text()
        for token, kind, status in (
            ("good", "keystone", 303),
            ("good", "bearer", 401),
            ("bad", "keystone", 401),
            ("domain", "keystone", 403),
        ):
            form = {"token": token, "kind": kind}
            async with session.post(broker.url, data=form, headers=html, allow_redirects=False) as response:
                assert (response.status, "Set-Cookie" in response.headers) == (status, status == 303), (token, kind)
        async with session.get(broker.url, headers={**html, "X-Auth-Token": "good"}) as response:
            assert "role admin" in await response.text()


async def test_over_http(fake: FakeKeystone, database: str, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    settings = {"auth": {"keystone": {"url": f"{fake.url}/v3"}}, "credentials_dir": str(tmp_path)}
    credentials(tmp_path)
    fake.tokens |= {"good": described("member"), "domain": described("admin", project=None), "service": described("service")}
    async with broker_on(database, tmp_path, settings) as broker:
        api = Api(broker.url, session, None)
        assert (await api.get("/v1/images", X_Auth_Token="good")).status == 200
        assert (await api.get("/v1/images", X_Auth_Token="good", X_Service_Token="service")).status == 200
        for headers in (
            {"X_Auth_Token": "bad"},
            {"X_Auth_Token": ""},
            {"X_Auth_Token": "good", "X_Service_Token": "good"},
            {"X_Service_Token": "service"},
        ):
            refused = await api.get("/v1/images", **headers)
            assert (refused.status, refused.body["type"]) == (401, "/problems/unauthenticated"), headers
            assert "WWW-Authenticate" in refused.headers
        scoped = await api.get("/v1/images", X_Auth_Token="domain")
        assert (scoped.status, scoped.body["detail"]) == (403, "The token is not scoped to a project.")
        both = await api.as_(broker.token()).get("/v1/images", X_Auth_Token="good")
        assert (both.status, both.body["field"]) == (400, "X-Auth-Token")
        own = broker.token()
        forged = own[:-8] + "AAAAAAAA"
        for token, answer in ((own, 200), (forged, 401)):  # a bearer token of ours is nobody else's to know
            assert (await api.get("/v2/images", X_Auth_Token=token)).status == answer
            assert fake.asked[token] == 0
        assert (await api.get("/v2/images", X_Auth_Token="bad")).body["error"]["code"] == 401
        fake.behaviour = "down"
        away = await api.get("/v1/images", X_Auth_Token="other")
        assert (away.status, away.body["type"], away.headers["Retry-After"]) == (503, "/problems/unavailable", "1")
        assert (await api.get("/v1/images", X_Auth_Token="good")).status == 200
        assert (await api.as_(broker.token()).get("/v1/images")).status == 200


async def test_a_token_in_use_is_asked_about_again_beside_an_attacker(
    fake: FakeKeystone, database: str, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Behind one address somebody invents tokens until none is looked at; those in use go on, until Keystone revokes them."""
    settings = {
        "auth": {"refusals_per_minute": 3, "keystone": {"url": fake.url, "recheck_seconds": 1}}, "credentials_dir": str(tmp_path)
    }  # fmt: skip
    credentials(tmp_path)
    fake.tokens |= {"user": described("member"), "service": described("service"), "poor": described()}
    async with broker_on(database, tmp_path, settings) as broker:
        api = Api(broker.url, session, None)

        async def status(token: str, **more: str) -> int:
            return (await api.get("/v1/images", X_Auth_Token=token, **more)).status

        assert await status("user") == 200
        assert await status("user", X_Service_Token="service") == 200
        assert await status("poor") == 403
        number = 0
        while await status(f"invented-{number}") != 429:
            number += 1
        asked = fake.asked["user"]
        async with asyncio.timeout(60):
            while fake.asked["user"] < asked + 2:
                assert await status("user") == 200
                assert await status("user", X_Service_Token="service") == 200
                await asyncio.sleep(0.1)
        for beside in ("invented", "user"):
            assert await status("user", X_Service_Token=beside) in (401, 429)
        del fake.tokens["user"]
        async with asyncio.timeout(60):
            while await status("user") == 200:
                await asyncio.sleep(0.1)
        asked = fake.asked["user"]
        assert await status("user") in (401, 429)
        assert fake.asked["user"] == asked


async def test_without_a_keystone_its_tokens_are_none(api: Api) -> None:
    assert (await api.as_(None).get("/v1/images", X_Auth_Token="good")).status == 401
    assert (await api.get("/v1/images", X_Auth_Token="good")).status == 400
