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
from broker.stores.handed import HandedStore
from broker.stores.http import HttpStore
from broker.stores.path import PathStore
from broker.stores.rbd import RbdStore
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


def _open_path(store: model.Store, credential: Credential, signer: TokenSigner, session: aiohttp.ClientSession) -> base.Store:
    return PathStore(store)


def _open_rbd(store: model.Store, credential: Credential, signer: TokenSigner, session: aiohttp.ClientSession) -> base.Store:
    return RbdStore(store)


_OWN: Mapping[str, Opener] = MappingProxyType(
    {"s3": _open_s3, "swift": _open_swift, "http": _open_http, "path": _open_path, "rbd": _open_rbd}
)
_HANDED: Mapping[str, type[HandedStore]] = MappingProxyType({kind.kind: kind for kind in (PathStore, RbdStore)})
_NO_CREDENTIAL: Credential = MappingProxyType({})


def kinds() -> list[str]:
    """Every kind of store that can be opened here."""
    return sorted({*_OWN, *entry_points(group=GROUP).names})


def is_handed(kind: str) -> bool:
    """Whether the broker cannot open stores of this kind (`broker.stores.handed`)."""
    return kind in _HANDED


def open_store(
    store: model.Store, credentials: Mapping[str, Credential], signer: TokenSigner, session: aiohttp.ClientSession
) -> base.Store:
    """The store behind a registration. `credentials` are all that the broker has, by the name that registrations use.

    Raises `Invalid` when the kind or the credential is unknown, or an endpoint or a setting is wrong.
    """
    _check_address(store.kind, store.endpoint, "endpoint")
    if store.internal_endpoint is not None:
        _check_address(store.kind, store.internal_endpoint, "internal_endpoint")
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


def _check_address(kind: str, endpoint: str, field: str) -> None:
    """Raise `Invalid` for a host in broken brackets, a port that is none, or the scheme of another kind, whatever the kind of store
    makes of the rest."""
    handed = _HANDED.get(kind)
    try:
        parts = urlsplit(endpoint)
        _ = parts.port
        fits = parts.scheme in (handed.schemes if handed else ("https", "http"))
    except ValueError:
        fits = False
    if not fits:
        expected = f"{handed.schemes[0]}://…" if handed else "http(s)://host[:port]"
        raise Invalid(f"This is no address of a store of kind {kind[:64]}.", field=field, expected=expected) from None


@lru_cache(maxsize=64)
def _third_party(kind: str) -> Opener | None:
    found = entry_points(group=GROUP, name=kind)
    return next(iter(found)).load() if found else None
