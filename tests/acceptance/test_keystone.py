"""A real Keystone, its real tokens, and a broker: who is let in as what, for how long, and what happens when Keystone is away."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import webob
from keystoneauth1 import service_token
from keystoneauth1 import session as keystone_session
from keystoneauth1.identity import v3
from keystonemiddleware.auth_token import AuthProtocol

from tests.parts.broker import Api, BrokerProcess, broker_on, serve
from tests.parts.condition import until
from tests.parts.keystone import KeystonePart
from tests.parts.postgres import Postgres
from tests.parts.process import find_program

README = (Path(__file__).resolve().parents[2] / "README.rst").read_text()


def settings_of_the_readme(url: str) -> str:
    """Its example with another URL, and what makes tests fast and talkative."""
    (example,) = re.findall(r'^   \[auth\.keystone\]\n   url = "[^"]+"\n', README, re.MULTILINE)
    mine = re.sub(r'"[^"]+"', f'"{url}"', example.replace("   ", ""))
    return mine + 'recheck_seconds = 1\n[log]\nlevel = "debug"\nformat = "json"\n'


def credential_of_the_readme(password: str) -> dict[str, str]:
    (example,) = re.findall(r'^   (\{"username": "broker".*?\})$', README, re.MULTILINE | re.DOTALL)
    entries: dict[str, str] = orjson.loads(example)
    return entries | {"password": password}


@dataclass
class House:
    """A broker whose people are Keystone's."""

    keystone: KeystonePart
    broker: BrokerProcess


@pytest.fixture(scope="module")
def house(keystone: KeystonePart, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    place = tmp_path_factory.mktemp("broker")
    write_credential(place / "data" / "credentials", credential_of_the_readme(keystone.passwords["broker"]))
    keystone.user("alice", {"a": ["member"]})
    keystone.user("bob", {"b": ["member"]})
    keystone.user("nova", {"service": ["service"]})
    database = postgres.create()
    with serve(database, place, settings=settings_of_the_readme(keystone.url)) as broker:
        yield House(keystone, broker)
    postgres.drop(database)


def write_credential(directory: Path, entries: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "keystone.json"
    file.touch(mode=0o600)
    file.write_bytes(orjson.dumps(entries))


@pytest.fixture
def api(house: House, session: aiohttp.ClientSession) -> Api:
    """The broker's API without a token."""
    return Api(house.broker.url, session, None)


async def status(api: Api, token: str, service: str | None = None) -> int:
    headers = {"X_Auth_Token": token} | ({"X_Service_Token": service} if service is not None else {})
    return (await api.get("/v1/images?limit=1", **headers)).status


async def is_refused(api: Api, token: str, service: str | None = None) -> bool:
    return await status(api, token, service) == 401


async def outcomes(house: House, session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get(f"{house.broker.metrics_url}/metrics") as response:
        text = await response.text()
    return {name: float(count) for name, count in re.findall(r'broker_keystone_tokens_total\{outcome="([a-z-]+)"\} (\S+)', text)}


@pytest.mark.parametrize(
    ("role", "makes_images", "makes_sites"), [("reader", 403, 403), ("member", 201, 403), ("service", 201, 403), ("admin", 201, 201)]
)
async def test_roles(house: House, api: Api, role: str, makes_images: int, makes_sites: int) -> None:
    house.keystone.user(f"{role}-1", {"roles": [role]})
    token = house.keystone.token(f"{role}-1", "roles")
    assert (await api.post("/v1/images", {"name": role}, X_Auth_Token=token)).status == makes_images
    assert (await api.post("/v1/sites", {"path": f"by-{role}"}, X_Auth_Token=token)).status == makes_sites
    assert await status(api, token) == 200


async def test_a_role_that_is_unknown_here(house: House, api: Api) -> None:
    house.keystone.user("observer", {"roles": ["observer"]})
    refused = await api.get("/v1/images", X_Auth_Token=house.keystone.token("observer", "roles"))
    assert (refused.status, refused.body["type"], refused.body["detail"]) == (
        403, "/problems/forbidden", "The token has no role that is known here.",
    )  # fmt: skip


async def test_projects_do_not_see_each_others_private_images(house: House, api: Api) -> None:
    alice, bob = house.keystone.token("alice", "a"), house.keystone.token("bob", "b")
    made = await api.post("/v1/images", {"name": "of-alice"}, X_Auth_Token=alice)
    assert (made.status, made.body["project"]) == (201, house.keystone.project("a"))
    path = f"/v1/images/{made.body['id']}"
    assert (await api.get(path, X_Auth_Token=alice)).status == 200
    assert (await api.get(path, X_Auth_Token=bob)).status == 404
    assert (await api.get("/v1/images?name=of-alice", X_Auth_Token=bob)).body["images"] == []
    assert (await api.get(path, X_Auth_Token=house.keystone.token("admin", "admin"))).status == 200


async def test_scopes(house: House, api: Api) -> None:
    assert (
        await api.post("/v1/sites", {"path": "by-system"}, X_Auth_Token=house.keystone.token("admin", system_scope="all"))
    ).status == 201
    admin = house.keystone.users.get("admin") or house.keystone.ask("GET", "/users?name=admin")["users"][0]["id"]
    house.keystone.ask("PUT", f"/domains/default/users/{admin}/roles/{house.keystone.role('admin')}")
    for token in (house.keystone.token("admin", domain_id="default"), house.keystone.token("admin", unscoped=True)):
        refused = await api.get("/v1/images", X_Auth_Token=token)
        assert (refused.status, refused.body["detail"]) == (403, "The token is not scoped to a project.")


async def test_a_trust_gives_what_was_delegated(house: House, api: Api) -> None:
    keystone = house.keystone
    trust = {
        "trustor_user_id": keystone.users["alice"], "trustee_user_id": keystone.users["bob"], "project_id": keystone.project("a"),
        "impersonation": False, "roles": [{"name": "reader"}],
    }  # fmt: skip
    made = keystone.ask_as(keystone.session("alice", "a"), "POST", "/OS-TRUST/trusts", {"trust": trust})
    token = keystone.token("bob", trust_id=made["trust"]["id"])
    assert await status(api, token) == 200
    assert (await api.post("/v1/images", {"name": "x"}, X_Auth_Token=token)).status == 403


def application_credential(keystone: KeystonePart, user: str, project: str, **more: Any) -> dict[str, str]:
    entry = {"name": secrets.token_hex(4), "secret": secrets.token_urlsafe(16), **more}
    path = f"/users/{keystone.users[user]}/application_credentials"
    made = keystone.ask_as(keystone.session(user, project), "POST", path, {"application_credential": entry})["application_credential"]
    return {"application_credential_id": made["id"], "application_credential_secret": made["secret"]}


async def test_application_credentials(house: House, api: Api) -> None:
    """They work, unless rules of their own restrict them: those name requests to other services."""
    rules = [{"path": "/v2/images", "method": "GET", "service": "image"}]
    for more, expected in (({}, 200), ({"access_rules": rules}, 401)):
        plugin = v3.ApplicationCredential(f"{house.keystone.url}/v3", **application_credential(house.keystone, "alice", "a", **more))
        assert await status(api, plugin.get_token(keystone_session.Session())) == expected


async def test_a_broker_may_log_in_by_application_credential(
    keystone: KeystonePart, database: str, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    write_credential(tmp_path / "named", application_credential(keystone, "broker", "service", roles=[{"name": "service"}]))
    keystone.user("carol", {"c": ["reader"]})
    settings = {"credentials_dir": str(tmp_path / "named"), "auth": {"keystone": {"url": f"{keystone.url}/v3"}}}
    async with broker_on(database, tmp_path, settings) as broker:
        assert await status(Api(broker.url, session, None), keystone.token("carol", "c")) == 200


async def test_a_revoked_token_is_dead_within_the_bound(house: House, api: Api, session: aiohttp.ClientSession) -> None:
    token, other = house.keystone.token("alice", "a"), house.keystone.token("alice", "a")
    before = await outcomes(house, session)
    for _ in range(20):
        assert await status(api, token) == 200
    after = await outcomes(house, session)
    assert after.get("remembered", 0) > before.get("remembered", 0)
    house.keystone.revoke(token)
    await until(lambda: is_refused(api, token))
    assert await status(api, other) == 200


@pytest.mark.parametrize("what", ["user", "project"])
async def test_who_is_disabled_is_out(house: House, api: Api, what: str) -> None:
    user = house.keystone.user(f"left-{what}", {f"closed-{what}": ["member"]})
    token = house.keystone.token(f"left-{what}", f"closed-{what}")
    assert await status(api, token) == 200
    path = f"/users/{user}" if what == "user" else f"/projects/{house.keystone.project(f'closed-{what}')}"
    house.keystone.ask("PATCH", path, {what: {"enabled": False}})
    await until(lambda: is_refused(api, token))


async def test_a_role_that_is_taken_back(house: House, api: Api) -> None:
    user = house.keystone.user("demoted", {"d": ["member", "reader"]})
    token = house.keystone.token("demoted", "d")
    assert (await api.post("/v1/images", {"name": "x"}, X_Auth_Token=token)).status == 201
    house.keystone.ask("DELETE", f"/projects/{house.keystone.project('d')}/users/{user}/roles/{house.keystone.role('member')}")
    await until(lambda: _may_not_write(api, token))


async def _may_not_write(api: Api, token: str) -> bool:
    return (await api.post("/v1/images", {"name": "x"}, X_Auth_Token=token)).status in (401, 403)


async def test_nobody_invents_a_token(house: House, api: Api) -> None:
    token = house.keystone.token("alice", "a")
    changed = token[:60] + ("A" if token[60] != "A" else "B") + token[61:]
    for invented in (changed, token[:-1], token + "A", "gAAAAAB" + "A" * 170, "a" * 255, "a" * 8000):
        assert await status(api, invented) == 401, invented
    assert (await api.as_(token).get("/v1/images")).status == 401


@pytest.fixture(scope="module")
def brief(house: House) -> str:
    """A token of alice that soon ends."""
    with house.keystone.giving_tokens_for(2) as other:
        return other.token("alice", "a")


async def test_an_expired_token_with_a_service_behind_it(house: House, api: Api, brief: str) -> None:
    token = brief
    await until(lambda: is_refused(api, token))
    nova, bob = house.keystone.token("nova", "service"), house.keystone.token("bob", "b")
    assert await status(api, token, nova) == 200
    assert await status(api, token, bob) == 401
    assert await status(api, token) == 401
    assert await status(api, nova, token) == 401
    made = await api.post("/v1/images", {"name": "late"}, X_Auth_Token=token, X_Service_Token=nova)
    assert made.body["project"] == house.keystone.project("a")
    assert (await api.post("/v1/sites", {"path": "late"}, X_Auth_Token=token, X_Service_Token=nova)).status == 403
    house.keystone.revoke(nova)
    await until(lambda: is_refused(api, token, nova))


def test_as_nova_asks(house: House) -> None:
    """keystoneauth1's own way to send a user's token with a service's."""
    keystone = house.keystone
    user = v3.Token(f"{keystone.url}/v3", keystone.token("alice", "a"), project_id=keystone.project("a"))
    wrapped = service_token.ServiceTokenAuthWrapper(user_auth=user, service_auth=keystone.session("nova", "service").auth)
    session = keystone_session.Session(auth=wrapped)
    session.session.trust_env = False
    answer = session.get(f"{house.broker.url}/v1/images")
    assert answer.status_code == 200
    assert "X-Service-Token" in answer.request.headers


def middleware(keystone: KeystonePart) -> AuthProtocol:
    """What Nova, Cinder and Glance put before themselves."""

    def inside(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"in"]

    settings = {
        "auth_type": "password", "auth_url": keystone.url, "username": "broker", "password": keystone.passwords["broker"],
        "user_domain_name": "Default", "project_name": "service", "project_domain_name": "Default",
        "www_authenticate_uri": keystone.url, "service_token_roles": "service", "service_token_roles_required": True,
        "token_cache_time": -1, "http_connect_timeout": 30,
    }  # fmt: skip
    return AuthProtocol(inside, settings)


def lets_in(protocol: AuthProtocol, token: str, service: str | None) -> bool:
    request = webob.Request.blank("/v2/images", headers={"X-Auth-Token": token})
    if service is not None:
        request.headers["X-Service-Token"] = service
    return bool(request.get_response(protocol).status_int == 200)


async def test_as_keystonemiddleware_decides(house: House, api: Api, brief: str) -> None:
    """Every kind of token with every kind of service token: the broker lets in whom OpenStack's own services let in."""
    keystone = house.keystone
    await until(lambda: is_refused(api, brief))
    revoked = keystone.token("alice", "a")
    keystone.revoke(revoked)
    kinds = {
        "good": keystone.token("alice", "a"), "service": keystone.token("nova", "service"), "admin": keystone.token("admin", "admin"),
        "expired": brief, "revoked": revoked, "invented": "gAAAAAB" + "A" * 170,
    }  # fmt: skip
    protocol = middleware(keystone)
    decided = {}
    for name, token in kinds.items():
        for with_, service in {"none": None, **kinds}.items():
            theirs = await asyncio.to_thread(lets_in, protocol, token, service)
            decided[name, with_] = theirs
            assert (await status(api, token, service) == 200) is theirs, (name, with_)
    assert decided["good", "none"]
    assert decided["expired", "service"]
    assert sum(decided.values()) == 7


def test_by_command(house: House, tmp_path: Path) -> None:
    """``OS_TOKEN=… broker ls``, as the README shows it."""
    environment = {name: value for name, value in os.environ.items() if name != "BROKER_TOKEN"}
    environment |= {"BROKER_URL": house.broker.url, "XDG_CONFIG_HOME": str(tmp_path), "OS_TOKEN": house.keystone.token("alice", "a")}
    program = find_program("broker", "pip install -e '.[test]'")
    done = subprocess.run([program, "ls", "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program, "ls"], env=environment | {"OS_TOKEN": "invented"}, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr


async def test_keystone_killed_and_back(house: House, api: Api) -> None:
    known, fresh = house.keystone.token("alice", "a"), house.keystone.token("bob", "b")
    assert await status(api, known) == 200
    with house.keystone.away():
        away = await api.get("/v1/images", X_Auth_Token=fresh)
        assert (away.status, away.headers["Retry-After"]) == (503, "1")
        await until(lambda: _is_away(api, known))
        assert (await api.as_(await asyncio.to_thread(house.broker.token)).get("/v1/images")).status == 200
    await until(lambda: _works(api, fresh))
    assert await status(api, known) == 200


async def test_keystone_hangs(house: House, api: Api) -> None:
    fresh = house.keystone.token("bob", "b")
    with house.keystone.hanging():
        assert await status(api, fresh) == 503
    await until(lambda: _works(api, fresh))


async def _is_away(api: Api, token: str) -> bool:
    return await status(api, token) == 503


async def _works(api: Api, token: str) -> bool:
    return await status(api, token) == 200


async def test_no_secret_is_told(house: House, session: aiohttp.ClientSession) -> None:
    """After all that went before in this module."""
    async with session.get(f"{house.broker.metrics_url}/metrics") as response:
        metrics = await response.text()
    log = house.broker.log.read_text()
    assert "Keystone cannot be asked" in log
    assert "Keystone answers again" in log
    for text in (log, metrics):
        assert "gAAAA" not in text
        assert not [user for user, password in house.keystone.passwords.items() if password in text]
