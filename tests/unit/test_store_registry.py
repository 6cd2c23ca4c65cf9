"""Which module opens a store, and what is said when none does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any, cast

import aiohttp
import pytest

from broker.errors import Invalid
from broker.model import Store
from broker.sign.token import TokenSigner, generate_key
from broker.stores import registry
from broker.stores.exchange import Answer, skew
from broker.stores.http import HttpStore, _repr_digests
from broker.stores.s3 import S3Store
from broker.stores.swift import SwiftStore

SIGNER = TokenSigner([generate_key("ES256", time.time() - 60)], "http://broker.test")
SESSION = cast(aiohttp.ClientSession, None)
CREDENTIALS = {
    "s3": {"access_key": "a", "secret_key": "b"},
    "swift": {"temp_url_key": "k", "auth_url": "http://h/auth/v1.0", "user": "u", "key": "x"},
}


def open_plain(store: Store, credential: Mapping[str, str], signer: TokenSigner, session: Any) -> Any:
    return ("third party", store.name, dict(credential))


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = EntryPoints([EntryPoint("tape", f"{__name__}:open_plain", registry.GROUP), EntryPoint("s3", "evil:open", registry.GROUP)])
    monkeypatch.setattr(registry, "entry_points", entries.select)
    registry._third_party.cache_clear()


@pytest.mark.parametrize(
    ("kind", "settings", "cls"),
    [("s3", {"bucket": "b"}, S3Store), ("swift", {"account": "a", "container": "c"}, SwiftStore), ("http", {}, HttpStore)],
)
@pytest.mark.usefixtures("third_party")
def test_own_kinds_cannot_be_replaced(kind: str, settings: dict[str, str], cls: type) -> None:
    credential = kind if kind in CREDENTIALS else None
    store = Store(1, "one", kind, "x", "http://h", settings=settings, credential=credential)
    assert type(registry.open_store(store, CREDENTIALS, SIGNER, SESSION)) is cls


@pytest.mark.parametrize(("kind", "settings"), [("s3", {"bucket": "b"}), ("swift", {"account": "a", "container": "c"}), ("http", {})])
def test_every_kind_can_be_allowed_to_take_uploads_though_it_enforces_nothing(kind: str, settings: dict[str, str]) -> None:
    store = Store(1, "one", kind, "x", "http://h", settings=settings, credential=kind if kind in CREDENTIALS else None)
    for said in ("allowed", "refused"):
        registry.open_store(replace(store, settings={**settings, "weak_uploads": said}), CREDENTIALS, SIGNER, SESSION)
    with pytest.raises(Invalid) as error:
        registry.open_store(replace(store, settings={**settings, "weak_uploads": "yes"}), CREDENTIALS, SIGNER, SESSION)
    assert (error.value.field, error.value.expected) == ("settings.weak_uploads", "allowed or refused")


@pytest.mark.usefixtures("third_party")
def test_a_third_party_kind() -> None:
    store = Store(1, "one", "tape", "x", "http://h", credential="s3")
    opened: Any = registry.open_store(store, CREDENTIALS, SIGNER, SESSION)
    assert opened == ("third party", "one", CREDENTIALS["s3"])
    assert registry.kinds() == ["http", "path", "rbd", "s3", "swift", "tape"]


@pytest.mark.parametrize(
    ("store", "field"),
    [
        (Store(1, "one", "nfs", "x", "http://h"), "kind"),
        (Store(1, "one", "s3", "x", "http://h", settings={"bucket": "b"}, credential="other"), "credential"),
        (Store(1, "one", "s3", "x", "http://h", settings={"bucket": "b"}), "credential"),
        (Store(1, "one", "http", "x", "http://h", settings={"bucket": "b"}), "settings.bucket"),
        *((Store(1, "one", kind, "x", "http://[::1", credential=kind), "endpoint") for kind in ("s3", "swift", "http")),
        (Store(1, "one", "http", "x", "http://h:99999"), "endpoint"),
        (Store(1, "one", "http", "x", "http://h", internal_endpoint="http://h:port"), "internal_endpoint"),
    ],
)
def test_what_cannot_be_opened(store: Store, field: str) -> None:
    with pytest.raises(Invalid) as error:
        registry.open_store(store, CREDENTIALS, SIGNER, SESSION)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("text", "digests"),
    [
        ("", {}),
        (
            "sha-256=:ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=:",
            {"sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        ),
        ("md5=:kAFQmDzST7DWlj99KOF/cg==:, unknown=:AAAA:", {"md5": "900150983cd24fb0d6963f7d28e17f72"}),
        ("sha-256=ungWv48Bz", {}),
        ("sha-256=:AAAA:", {}),
        ("sha-256=:A:", {}),
        ("sha-256=:****:", {}),
    ],
)
def test_repr_digest(text: str, digests: dict[str, str]) -> None:
    assert _repr_digests(text) == digests


@pytest.mark.parametrize(
    ("date", "seconds"),
    [("Sun, 06 Nov 1994 08:49:37 GMT", 0.0), ("Sun, 06 Nov 1994 08:50:37 GMT", 60.0), ("yesterday", None), ("", None)],
)
def test_skew(date: str, seconds: float | None) -> None:
    assert skew(Answer(200, {"Date": date}, b""), 784111777.5) == seconds
