"""Opens a registered store with the module for its kind: one of ours, or a third party's by entry point (M21).

A third party's package declares an entry point in the group ``broker.stores``; its name is the kind, its object a callable
``(store, credential, signer, session)`` that returns a `base.Store`. It cannot replace one of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from types import MappingProxyType
from urllib.parse import urlsplit

import aiohttp

from broker import model
from broker.errors import Invalid
from broker.sign.token import TokenSigner
from broker.stores import base
from broker.stores.http import HttpStore
from broker.stores.s3 import S3Store
from broker.stores.swift import SwiftStore

GROUP = "broker.stores"

Credential = Mapping[str, str]
Opener = Callable[[model.Store, Credential, TokenSigner, aiohttp.ClientSession], base.Store]


def _open_s3(store: model.Store, credential: Credential, signer: TokenSigner, session: aiohttp.ClientSession) -> base.Store:
    return S3Store(store, credential, session)


def _open_swift(store: model.Store, credential: Credential, signer: TokenSigner, session: aiohttp.ClientSession) -> base.Store:
    return SwiftStore(store, credential, session)


def _open_http(store: model.Store, credential: Credential, signer: TokenSigner, session: aiohttp.ClientSession) -> base.Store:
    return HttpStore(store, signer, session)


_OWN: Mapping[str, Opener] = MappingProxyType({"s3": _open_s3, "swift": _open_swift, "http": _open_http})
_NO_CREDENTIAL: Credential = MappingProxyType({})


def kinds() -> list[str]:
    """Every kind of store that can be opened here."""
    return sorted({*_OWN, *entry_points(group=GROUP).names})


def open_store(
    store: model.Store, credentials: Mapping[str, Credential], signer: TokenSigner, session: aiohttp.ClientSession
) -> base.Store:
    """The store behind a registration. `credentials` are all that the broker has, by the name that registrations use.

    Raises `Invalid` when the kind or the credential is unknown, or an endpoint or a setting is wrong.
    """
    _check_address(store.endpoint, "endpoint")
    if store.internal_endpoint is not None:
        _check_address(store.internal_endpoint, "internal_endpoint")
    opener = _OWN.get(store.kind) or _third_party(store.kind)
    if opener is None:
        raise Invalid(f"there is no kind of store called {store.kind[:64]}", field="kind", expected="one of " + ", ".join(kinds()))
    if store.credential is None:
        return opener(store, _NO_CREDENTIAL, signer, session)
    if store.credential not in credentials:
        raise Invalid(
            f"store {store.name}: the broker has no such credential", field="credential", expected="a name from the broker's credentials"
        )
    return opener(store, credentials[store.credential], signer, session)


def _check_address(endpoint: str, field: str) -> None:
    """Raise `Invalid` for a host in broken brackets or a port that is none, whatever the kind of store makes of the rest."""
    try:
        _ = urlsplit(endpoint).port
    except ValueError:
        raise Invalid("This is no address.", field=field, expected="scheme://host[:port]") from None


@lru_cache(maxsize=64)
def _third_party(kind: str) -> Opener | None:
    found = entry_points(group=GROUP, name=kind)
    return next(iter(found)).load() if found else None
