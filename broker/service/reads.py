"""What reads replicas: handles, signed and ready to be shown. One serves all who ask, wherever it holds nothing of who asked.

Rules
- A URL for reading that holds nothing of its own (`stores.base.SignsAlike`) is kept for everyone; so is a transfer token
  where policy lets many share it. Both end on a step of the clock, so that those who ask at about the same time get the same.
- A URL that tells a file name is made for who asked for that name, and never kept.
- What is kept goes when the store, its credential or the keys change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import orjson

from broker import errors
from broker.metrics import Times
from broker.model import Handle
from broker.service.instants import instant
from broker.stores.base import SignsAlike
from broker.stores.base import Store as Driver

KEPT = 50_000
"""Handles kept at most, about 1 KB each; those with the stretch that was begun first go first, since they end first."""

LONGEST_STEP_SECONDS = 64
"""A URL that is kept for everyone ends on a multiple of a step, which is at most this and at most an eighth of its life."""


class Until(NamedTuple):
    """How long handles made at `now` may live: `at` is the end of those that are made for one client alone."""

    now: float
    at: float
    urls_at: int
    """The end of URLs that are kept for everyone."""
    tokens_at: int | None
    """The end of tokens that many share; ``None`` when each is made afresh."""


class Reads:
    """The handles kept. `driver` gives what signs for a store of that name, or raises `errors.StoreUnavailable`."""

    def __init__(self, driver: Callable[[str], Driver], signing_seconds: Times) -> None:
        self._driver = driver
        self._signing_seconds = signing_seconds
        self._readers: dict[str, _Reader] = {}
        self._stretches: deque[tuple[int, dict[str, str]]] = deque()  # what readers have, with its end; in the order it was begun
        self._count = 0

    def forget(self) -> None:
        """A store, a credential or a key has changed."""
        self._readers.clear()
        self._stretches.clear()
        self._count = 0

    def sign(self, store: str, key: str, until: Until, filename: str | None = None) -> str:
        """What reads `key` of a store: the members of a JSON object that shows a handle. Raises `errors.StoreUnavailable`, also when
        the handle would have ended already. `filename` as of `stores.base.Store.sign_get`."""
        reader = self._readers.get(store)
        if reader is None:
            reader = self._readers[store] = _Reader(self._driver(store))
        now, at, ends_at, tokens_at = until
        by = 0
        if reader.alike is not None:
            if filename is not None:
                return self._sign(reader.driver, key, at, now, filename)[0]
            by = reader.alike.reads_by
        elif tokens_at is not None and reader.has_tokens:
            ends_at = tokens_at
        else:
            return self._sign(reader.driver, key, at, now, filename)[0]
        if ends_at <= now:
            return self._sign(reader.driver, key, at, now)[0]
        stretch = reader.stretches.get((ends_at, by))
        if stretch is None:
            stretch = self._begin(reader, ends_at, by, now)
        shown = stretch.get(key)
        if shown is None:
            shown, ended_at = self._sign(reader.driver, key, ends_at, now)
            if ended_at == ends_at:  # else the credential ends sooner, and may be renewed
                self._keep(stretch, key, shown)
        return shown

    def _begin(self, reader: _Reader, ends_at: int, by: int, now: float) -> dict[str, str]:
        for past in [each for each in reader.stretches if each[0] <= now]:
            del reader.stretches[past]
        while self._stretches and self._stretches[0][0] <= now:
            self._drop_oldest()
        stretch: dict[str, str] = {}
        reader.stretches[ends_at, by] = stretch
        self._stretches.append((ends_at, stretch))
        return stretch

    def _drop_oldest(self) -> None:
        ends_at, stretch = self._stretches.popleft()
        self._count -= len(stretch)
        stretch.clear()
        # Who asks again begins a new one: what came into this one would be counted no more.
        for reader in self._readers.values():
            for key in [key for key, each in reader.stretches.items() if key[0] == ends_at and each is stretch]:
                del reader.stretches[key]

    def _keep(self, stretch: dict[str, str], key: str, shown: str) -> None:
        stretch[key] = shown
        self._count += 1
        while self._count > KEPT and len(self._stretches) > 1:
            self._drop_oldest()
        if self._count > KEPT:  # one store, one stretch: it goes on empty
            self._count = 0
            stretch.clear()

    def _sign(self, driver: Driver, key: str, expires_at: float, now: float, filename: str | None = None) -> tuple[str, float]:
        began = perf_counter()
        handle = driver.sign_get(key, expires_at, now, filename)
        self._signing_seconds.observe(perf_counter() - began, driver.kind)
        if handle.expires_at <= now:
            raise errors.StoreUnavailable("The store's credential has ended.")
        return orjson.dumps(show(handle))[1:-1].decode(), handle.expires_at


class _Reader:
    """One store's driver, and the handles kept for it: by their end and the secret that signed them, then by key."""

    __slots__ = ("alike", "driver", "has_tokens", "stretches")

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.alike = driver if isinstance(driver, SignsAlike) else None
        self.has_tokens = driver.kind == "http"
        self.stretches: dict[tuple[int, int], dict[str, str]] = {}


def show(handle: Handle) -> dict[str, object]:
    """A handle as JSON."""
    return {"method": handle.method, "url": handle.url, "headers": handle.headers, "expires_at": instant(handle.expires_at)}


def until(expires_at: float, now: float, token_step_seconds: int) -> Until:
    """At most until `expires_at`: what is shared ends a step before. `token_step_seconds`: for how long tokens are shared, or 0."""
    at = int(expires_at)
    step = url_step_seconds(expires_at - now)
    return Until(now, expires_at, at // step * step, at // token_step_seconds * token_step_seconds if token_step_seconds else None)


def url_step_seconds(life_seconds: float) -> int:
    """The step on which a URL of that life ends: a power of 2, so that lives nearly the same have the same."""
    return min(1 << max(0, int(life_seconds / 8).bit_length() - 1), LONGEST_STEP_SECONDS)
