"""Paths and volumes: what an endpoint and a key may be, what a handle says, and which two are one place."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import cast
from urllib.parse import unquote

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid, StoreUnavailable
from broker.model import Store
from broker.sign.token import TokenSigner, generate_key
from broker.stores import base, registry
from broker.stores.handed import HandedStore
from broker.stores.path import PathStore
from broker.stores.probe import probe
from broker.stores.rbd import RbdStore
from broker.stores.settings import same_place

SIGNER = TokenSigner([generate_key("ES256", time.time() - 60)], "http://broker.test")
SESSION = cast(aiohttp.ClientSession, None)
MOUNT = Store(1, "nfs", "path", "eu/az1", "file:///srv/images")
POOL = Store(2, "ceph", "rbd", "eu/az1", "rbd://11111111-2222-3333-4444-555555555555/images")


def opened(store: Store) -> base.Store:
    return registry.open_store(store, {}, SIGNER, SESSION)


@pytest.mark.parametrize(
    ("kind", "endpoint"),
    [
        ("path", "file:///"), ("path", "file:////"), ("path", "file://host/srv"), ("path", "file:///srv/../etc"), ("path", "file:///srv/./x"),
        ("path", "file:///srv//x"), ("path", "file:///srv%2F..%2Fetc"), ("path", "file:///srv/%00"), ("path", "file:///srv/%0a"),
        ("path", "file:///srv/%ff"), ("path", "file:///srv?x"), ("path", "file:///srv#x"), ("path", "http://srv/x"), ("path", "srv/x"),
        ("path", f"file:///{'x' * 256}"), ("rbd", "rbd://images"), ("rbd", "rbd://11111111-2222-3333-4444-555555555555"),
        ("rbd", "rbd://11111111-2222-3333-4444-555555555555/a/b"), ("rbd", "rbd://11111111-2222-3333-4444-555555555555/a b"),
        ("rbd", "file:///srv/images"), ("http", "file:///srv/images"), ("s3", "file:///etc"), ("swift", "rbd://x/y"), ("http", "rbd://x/y"),
    ],
)  # fmt: skip
def test_an_endpoint_that_names_no_such_place_is_refused(kind: str, endpoint: str) -> None:
    with pytest.raises(Invalid) as error:
        opened(Store(1, "x", kind, "eu", endpoint))
    assert (error.value.field, bool(error.value.expected)) == ("endpoint", True)


def test_settings_are_refused() -> None:
    for store in (MOUNT, POOL):
        with pytest.raises(Invalid, match=r"settings\.prefix|no such setting"):
            opened(replace(store, settings={"prefix": "x/"}))


@pytest.mark.parametrize(
    ("store", "key", "url"),
    [
        (MOUNT, "a/disk.raw", "file:///srv/images/a/disk.raw"),
        (replace(MOUNT, endpoint="file:///srv/my%20images/"), "ü #?%.raw", "file:///srv/my%20images/%C3%BC%20%23%3F%25.raw"),
        (POOL, "debian@v1", "rbd://11111111-2222-3333-4444-555555555555/images/debian@v1"),
    ],
)
def test_a_handle_is_a_name_that_ends_with_its_ticket(store: Store, key: str, url: str) -> None:
    driver = opened(store)
    assert isinstance(driver, HandedStore)
    driver.check_key(key)
    handle = driver.sign_get(key, 2000.0, 1000.0)
    assert handle == ("GET", url, {}, 2000.0)
    assert isinstance(driver, base.SignsAlike)


@pytest.mark.parametrize(
    ("store", "key"),
    [
        (MOUNT, ".."), (MOUNT, "a/../../etc"), (MOUNT, "/etc/passwd"), (MOUNT, "a//b"), (MOUNT, "./a"), (MOUNT, ""), (MOUNT, "a/"),
        (MOUNT, "a\nb"), (MOUNT, "a\0b"), (MOUNT, "x" * 256), (MOUNT, "ü" * 128),
        (POOL, "debian"), (POOL, "debian@"), (POOL, "@v1"), (POOL, "a/b@v1"), (POOL, "a@b@c"), (POOL, "a b@v1"), (POOL, f"{'x' * 129}@v1"),
    ],
)  # fmt: skip
def test_a_key_that_leaves_its_place_is_refused(store: Store, key: str) -> None:
    driver = opened(store)
    assert isinstance(driver, HandedStore)
    with pytest.raises(Invalid) as error:
        driver.check_key(key)
    assert error.value.field == "key"


@given(st.text(min_size=1, max_size=60))
def test_whatever_key_is_taken_stays_below_the_directory(key: str) -> None:
    driver = PathStore(MOUNT)
    try:
        driver.check_key(key)
    except Invalid:
        return
    path = unquote(driver.sign_get(key, 2.0, 1.0).url.removeprefix("file://"))
    assert path == f"/srv/images/{key}"
    assert not {"", ".", ".."} & set(path[1:].split("/"))


async def test_the_broker_neither_looks_nor_writes_nor_deletes_there() -> None:
    for driver in (PathStore(MOUNT), RbdStore(POOL)):
        for attempt in (driver.stat("k"), driver.delete("k"), driver.seal("a", "b", {}), driver.parts("k", "u"), driver.clock_skew()):
            with pytest.raises(StoreUnavailable, match="only agents can"):
                await attempt
        probed = await probe(driver, MOUNT, SESSION, 0.0)
        assert (probed.abilities.reads, probed.abilities.writes, probed.steps[0].result) == (False, False, None)


@pytest.mark.parametrize(
    ("site", "endpoint", "same"),
    [
        ("eu/az1", "file:///srv/images", True), ("eu/az1", "file:///srv/images/", True), ("eu", "file:///srv/images", True),
        ("eu/az1/rack1", "file:///srv/images", True), ("eu/az2", "file:///srv/images", False), ("eu/az1", "file:///srv/other", False),
    ],
)  # fmt: skip
def test_one_path_is_one_place_where_one_site_is_within_the_other(site: str, endpoint: str, same: bool) -> None:
    other = Store(3, "other", "path", site, endpoint)
    assert same_place(MOUNT, other) is same_place(other, MOUNT) is same
