"""Stores and sites: who writes them, what is refused with nothing created, what others are told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import errors
from broker.catalog import stores
from broker.model import Abilities, Exposure, Store, new_id
from broker.service import sites as site_service
from broker.service import stores as service
from broker.service.idempotency import Claim, claim
from broker.stores.probe import Probed, ProbeStep
from tests.catalog.registry import ADMIN, ALICE, READER, SERVICE, Registry

S3 = {"name": "a", "kind": "s3", "site": "eu", "endpoint": "http://127.0.0.1:1", "settings": {"bucket": "b"}, "read_slots": 4}


def fresh() -> Claim:
    return Claim(new_id())


@pytest.fixture
async def eu(registry: Registry) -> Registry:
    await site_service.create_site(registry.context, ADMIN, {"path": "eu"}, fresh())
    return registry


async def test_a_new_store_is_probed_and_keeps_what_was_seen(eu: Registry) -> None:
    made = await service.create_store(eu.context, ADMIN, S3, fresh())
    assert made.version == 1
    assert made.body["abilities"]["writes"] is True
    assert made.body["abilities"]["observes"] == ()
    assert made.body["probe"] == [{"name": "writing", "result": "yes", "detail": "PUT: 200"}]
    assert (made.body["read_slots"], made.body["write_slots"], made.body["leased_read"], made.body["reserved"]) == (4, None, 0, 0)
    assert made.body["probed_at"] is not None
    known = eu.context.memory.store("a")
    assert known is not None
    assert known.abilities.writes
    assert (await service.get_store(eu.context, ADMIN, "a")).body["settings"] == {"bucket": "b"}


@pytest.mark.parametrize("problem", [errors.StoreUnavailable("store a cannot be reached"), errors.Invalid("no such kind", field="kind")])
async def test_nothing_is_created_when_the_store_cannot_be_opened_or_reached(eu: Registry, problem: errors.BrokerError) -> None:
    eu.told.probed = problem
    with pytest.raises(type(problem)):
        await service.create_store(eu.context, ADMIN, S3, fresh())
    assert await stores.load(eu.db) == []


SAME = [
    {},
    {"endpoint": "HTTP://S3.test:80/", "site": "eu"},
    {"endpoint": "http://elsewhere.test", "internal_endpoint": "http://s3.test"},
    {"settings": {"bucket": "b", "region": "eu-central-1", "style": "virtual", "prefix": ""}},
]
OTHER = [
    {"endpoint": "http://s3.test:8080"},
    {"endpoint": "http://s4.test"},
    {"settings": {"bucket": "c"}},
    {"settings": {"bucket": "b", "prefix": "x/"}},
    {"kind": "swift"},
]


@pytest.mark.parametrize("changed", SAME)
async def test_one_place_is_one_store(eu: Registry, changed: dict[str, Any]) -> None:
    await service.create_store(eu.context, ADMIN, {**S3, "endpoint": "http://s3.test"}, fresh())
    with pytest.raises(errors.Conflict, match="The store a is this place already") as caught:
        await service.create_store(eu.context, ADMIN, {**S3, "endpoint": "http://s3.test", "name": "b", **changed}, fresh())
    assert caught.value.field == "endpoint"
    assert [store.name for store in await stores.load(eu.db)] == ["a"]


@pytest.mark.parametrize("changed", OTHER)
async def test_another_place_is_another_store_until_it_moves_there(eu: Registry, changed: dict[str, Any]) -> None:
    there = {**S3, "endpoint": "http://s3.test"}
    await service.create_store(eu.context, ADMIN, there, fresh())
    other = await service.create_store(eu.context, ADMIN, {**there, "name": "b", **changed}, fresh())
    await service.change_store(eu.context, ADMIN, "a", None, {"cost": 1, "endpoint": there["endpoint"]})
    if "kind" not in changed:
        moved = {"endpoint": there["endpoint"], "settings": {"bucket": "b", "prefix": ""}}
        with pytest.raises(errors.Conflict, match="The store a is this place already"):
            await service.change_store(eu.context, ADMIN, "b", other.version, moved)


async def test_a_store_that_refuses_writing_is_registered_only_as_read_only(eu: Registry) -> None:
    eu.told.probed = Probed(Abilities(), (ProbeStep("writing", False, "PUT: 403"),))
    with pytest.raises(errors.Conflict, match="PUT: 403") as caught:
        await service.create_store(eu.context, ADMIN, S3, fresh())
    assert caught.value.field == "writable"
    assert await stores.load(eu.db) == []
    made = await service.create_store(eu.context, ADMIN, {**S3, "writable": False}, fresh())
    with pytest.raises(errors.Conflict):
        await service.change_store(eu.context, ADMIN, "a", made.version, {"writable": True})


async def test_a_store_needs_an_existing_site(eu: Registry) -> None:
    with pytest.raises(errors.Invalid) as caught:
        await service.create_store(eu.context, ADMIN, {**S3, "site": "eu/az9"}, fresh())
    assert caught.value.field == "site"
    assert eu.told.probes == 0


@pytest.mark.parametrize("client", [ALICE, SERVICE, READER], ids=["member", "service", "reader"])
async def test_only_administrators_write_stores_and_sites(eu: Registry, client: Any) -> None:
    await eu.add_store("there")
    for attempt in (
        service.create_store(eu.context, client, S3, fresh()),
        service.create_store(eu.context, client, {**S3, "name": "there"}, fresh()),
        service.change_store(eu.context, client, "there", 1, {"enabled": False}),
        service.probe_store(eu.context, client, "there"),
        service.delete_store(eu.context, client, "there", 1),
        service.delete_store(eu.context, client, "absent", 1),
        site_service.create_site(eu.context, client, {"path": "x"}, fresh()),
        site_service.change_site(eu.context, client, "eu", 1, {"description": "x"}),
        site_service.delete_site(eu.context, client, "eu", 1),
    ):
        with pytest.raises(errors.Forbidden):
            await attempt
    assert eu.told.probes == 0


async def test_a_private_store_answers_like_none_to_members(registry: Registry) -> None:
    await registry.add_store("open", settings={"bucket": "secret-bucket"})
    await registry.add_store("local", Exposure.SERVICE)
    with pytest.raises(errors.NotFound) as hidden:
        await service.get_store(registry.context, ALICE, "local")
    with pytest.raises(errors.NotFound) as absent:
        await service.get_store(registry.context, ALICE, "absent")
    assert hidden.value.problem() == absent.value.problem()
    seen = (await service.list_stores(registry.context, ALICE, {}))["stores"]
    assert [store["name"] for store in seen] == ["open"]
    assert set(seen[0]) == {"name", "kind", "site", "endpoint", "exposure", "enabled", "writable", "cost"}
    assert [store["name"] for store in (await service.list_stores(registry.context, SERVICE, {}))["stores"]] == ["local", "open"]


async def test_pages_of_stores_follow_each_other(registry: Registry) -> None:
    for name in ("a", "b", "c"):
        await registry.add_store(name)
    first = await service.list_stores(registry.context, ALICE, {"limit": 2})
    assert ([store["name"] for store in first["stores"]], first["next"]) == (["a", "b"], "b")
    last = await service.list_stores(registry.context, ALICE, {"limit": 2, "marker": "b"})
    assert [store["name"] for store in last["stores"]] == ["c"]
    assert "next" not in last
    assert (await service.list_stores(registry.context, ALICE, {"kind": "swift"}))["stores"] == []
    assert (await service.list_stores(registry.context, ALICE, {"site": "e"}))["stores"] == []


async def test_two_who_create_one_name_get_one_store(eu: Registry) -> None:
    outcomes = await asyncio.gather(*(service.create_store(eu.context, ADMIN, S3, fresh()) for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(outcome, errors.Conflict) for outcome in outcomes) == 3
    assert len(await stores.load(eu.db)) == 1


async def test_a_repeated_request_shows_its_store_again(eu: Registry) -> None:
    first = await claim(eu.context, ADMIN, "key-1", "createStore", S3)
    again = await claim(eu.context, ADMIN, "key-1", "createStore", S3)
    assert (first.repeated, again.repeated, first.id) == (False, True, again.id)
    made = await service.create_store(eu.context, ADMIN, S3, first)
    assert await service.create_store(eu.context, ADMIN, S3, again) == made
    with pytest.raises(errors.Conflict):
        await service.create_store(eu.context, ADMIN, {**S3, "cost": 2}, again)
    with pytest.raises(errors.IdempotencyMismatch):
        await claim(eu.context, ADMIN, "key-1", "createStore", {**S3, "cost": 2})
    other = await claim(eu.context, ALICE, "key-1", "createStore", {**S3, "cost": 2})
    assert not other.repeated


async def test_of_two_changes_on_one_version_one_is_refused(registry: Registry) -> None:
    await registry.add_store("a")
    changes = [service.change_store(registry.context, ADMIN, "a", 1, {"cost": cost}) for cost in (1, 2, 3)]
    outcomes = await asyncio.gather(*changes, return_exceptions=True)
    assert sum(isinstance(outcome, errors.PreconditionFailed) for outcome in outcomes) == 2
    assert (await service.get_store(registry.context, ADMIN, "a")).version == 2


async def test_a_change_probes_again_only_when_the_store_is_opened_differently(registry: Registry) -> None:
    await registry.add_store("a", settings={"bucket": "b", "region": "r"}, read_slots=9)
    changed = await service.change_store(registry.context, ADMIN, "a", 1, {"read_slots": 2, "enabled": False, "exposure": "service"})
    assert registry.told.probes == 0
    assert (changed.body["read_slots"], changed.body["enabled"], changed.body["exposure"]) == (2, False, "service")
    changed = await service.change_store(registry.context, ADMIN, "a", 2, {"settings": {"bucket": "c"}})
    assert registry.told.probes == 1
    assert changed.body["settings"] == {"bucket": "c", "region": "r"}
    assert changed.body["abilities"]["writes"] is True
    registry.told.probed = errors.StoreUnavailable("away")
    with pytest.raises(errors.StoreUnavailable):
        await service.change_store(registry.context, ADMIN, "a", changed.version, {"endpoint": "http://127.0.0.1:2", "cost": 5})
    kept = await service.get_store(registry.context, ADMIN, "a")
    assert (kept.body["endpoint"], kept.body["cost"], kept.version) == ("http://127.0.0.1:1", 0, changed.version)


async def test_fewer_slots_than_leases_take_no_lease_away(registry: Registry) -> None:
    await registry.add_store("a", read_slots=5)
    store = (await stores.load(registry.db))[0]
    await registry.db.execute("UPDATE slots SET leased = 4 WHERE store_id = $1 AND direction = 'read'", store.id)
    changed = await service.change_store(registry.context, ADMIN, "a", 1, {"read_slots": 1})
    assert (changed.body["read_slots"], changed.body["leased_read"]) == (1, 4)
    changed = await service.change_store(registry.context, ADMIN, "a", 2, {"read_slots": None})
    assert changed.body["read_slots"] is None


async def test_a_probe_of_a_store_that_changed_meanwhile_is_not_kept(registry: Registry) -> None:
    await registry.add_store("a")
    store = (await stores.load(registry.db))[0]
    await service.change_store(registry.context, ADMIN, "a", 1, {"cost": 1})
    with pytest.raises(errors.PreconditionFailed):
        await stores.record_probe(registry.db, store, [])
    assert (await service.probe_store(registry.context, ADMIN, "a")).body["abilities"]["writes"] is True


async def test_a_store_in_use_is_not_forgotten(registry: Registry) -> None:
    await registry.add_store("a")
    blob = await registry.add_blob()
    await registry.add_image(ALICE, {"raw": blob})
    await registry.add_replica(ALICE, blob, "a", "p/k")
    with pytest.raises(errors.Conflict, match="1 replicas"):
        await service.delete_store(registry.context, ADMIN, "a", None)
    await registry.db.execute("DELETE FROM replicas")
    with pytest.raises(errors.PreconditionFailed):
        await service.delete_store(registry.context, ADMIN, "a", 7)
    await service.delete_store(registry.context, ADMIN, "a", 1)
    assert registry.context.memory.store("a") is None
    with pytest.raises(errors.NotFound):
        await service.delete_store(registry.context, ADMIN, "a", None)


async def test_abilities_that_only_a_newer_broker_knows_are_ignored(registry: Registry) -> None:
    await registry.add_store("a", abilities=Abilities(reads=True, observes=("sha256", "md5")))
    await registry.db.execute("""UPDATE stores SET abilities = abilities || '{"teleports": true}'""")
    assert (await stores.load(registry.db))[0].abilities == Abilities(reads=True, observes=("sha256", "md5"))


@pytest.mark.parametrize("network", ["10.0.0.1/8", "10.0.0.0/33", "::1/64", "1.2.3/24", "300.0.0.0/8"])
async def test_a_network_must_be_canonical(registry: Registry, network: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        await site_service.create_site(registry.context, ADMIN, {"path": "eu", "networks": ["10.0.0.0/8", network]}, fresh())
    assert caught.value.field == "networks.1"
    with pytest.raises(errors.NotFound):
        await site_service.get_site(registry.context, ADMIN, "eu")


async def test_sites_hold_networks_of_which_the_longest_prefix_decides(registry: Registry) -> None:
    await site_service.create_site(registry.context, ADMIN, {"path": "eu/az1", "networks": ["10.0.0.0/8", "fd00::/8"]}, fresh())
    made = await site_service.create_site(registry.context, ADMIN, {"path": "us", "networks": ["10.1.0.0/16"]}, fresh())
    assert registry.context.memory.site_of("10.1.2.3") == "us"
    assert registry.context.memory.site_of("10.2.2.3") == "eu/az1"
    assert registry.context.memory.site_of("fd00::1") == "eu/az1"
    changed = await site_service.change_site(registry.context, ADMIN, "us", made.version, {"description": "west"})
    assert changed.body == {"path": "us", "description": "west", "networks": ["10.1.0.0/16"]}
    assert (await site_service.get_site(registry.context, ALICE, "us")).body["networks"] == []
    with pytest.raises(errors.PreconditionFailed):
        await site_service.change_site(registry.context, ADMIN, "us", made.version, {"networks": []})
    await site_service.change_site(registry.context, ADMIN, "us", None, {"networks": []})
    assert registry.context.memory.site_of("10.1.2.3") == "eu/az1"
    page = await site_service.list_sites(registry.context, ALICE, {"limit": 1})
    assert ([site["path"] for site in page["sites"]], page["next"]) == (["eu/az1"], "eu/az1")


async def test_a_site_stays_while_stores_are_there_or_below(registry: Registry) -> None:
    for path in ("eu", "eu/az1"):
        await site_service.create_site(registry.context, ADMIN, {"path": path}, fresh())
    await stores.insert(registry.db, Store(0, "a", "s3", "eu/az1", "http://x"), [])
    for path in ("eu", "eu/az1"):
        with pytest.raises(errors.Conflict):
            await site_service.delete_site(registry.context, ADMIN, path, 1)
    await service.delete_store(registry.context, ADMIN, "a", 1)
    with pytest.raises(errors.PreconditionFailed):
        await site_service.delete_site(registry.context, ADMIN, "eu", 2)
    await site_service.delete_site(registry.context, ADMIN, "eu", 1)
    with pytest.raises(errors.NotFound):
        await site_service.delete_site(registry.context, ADMIN, "eu", None)


async def test_a_store_of_the_version_before_is_an_internal_one(eu: Registry) -> None:
    """Brokers of the version before are still running: their statement names no `internal` (design, invariant 12)."""
    await service.create_store(eu.context, ADMIN, {**S3, "internal": False, "endpoint": "http://192.0.2.1"}, fresh())
    await eu.db.execute(
        """INSERT INTO stores (name, kind, site, endpoint, internal_endpoint, settings, credential, exposure, enabled, writable, cost,
                               read_bandwidth, write_bandwidth, abilities, probe, probed_at)
           SELECT 'b', kind, site, endpoint, internal_endpoint, settings, credential, exposure, enabled, writable, cost,
                  read_bandwidth, write_bandwidth, abilities, probe, probed_at FROM stores WHERE name = 'a'"""
    )
    assert await eu.db.fetch("SELECT name, internal FROM stores ORDER BY name") == [("a", False), ("b", True)]
