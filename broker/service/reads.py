"""What reads replicas: handles, signed and ready to be shown. One serves all who ask, wherever it holds nothing of who asked.

Rules
- A URL for reading that holds nothing of its own (`stores.base.SignsAlike`) is kept for everyone; so is a transfer token
  where policy lets many share it. Both end on a step of the clock, so that those who ask at about the same time get the same.
- What is kept goes when the store, its credential or the keys change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import orjson

from broker.metrics import Times
from broker.model import Handle
from broker.service.instants import instant
from broker.stores.base import SignsAlike
from broker.stores.base import Store as Driver

KEPT = 50_000
"""Handles kept at most, about 1 KB each; those that were signed first go first, since they end first."""

LONGEST_STEP_SECONDS = 64
"""A URL that is kept for everyone ends on a multiple of a step, which is at most this and at most an eighth of its life."""


class Read(NamedTuple):
    """A handle for reading: its end, and the members of a JSON object that show it."""

    expires_at: float
    shown: bytes


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
        self._alike: dict[str, SignsAlike | None] = {}
        self._kept: OrderedDict[tuple[str, str, int, int], Read] = OrderedDict()

    def forget(self) -> None:
        """A store, a credential or a key has changed."""
        self._alike.clear()
        self._kept.clear()

    def sign(self, store: str, key: str, until: Until) -> Read:
        """What reads `key` of a store. Raises `errors.StoreUnavailable`."""
        try:
            alike = self._alike[store]
        except KeyError:
            driver = self._driver(store)
            alike = self._alike[store] = driver if isinstance(driver, SignsAlike) else None
        now, at, ends_at, tokens_at = until
        if alike is not None:
            by = alike.reads_by
        elif tokens_at is not None and self._driver(store).kind == "http":
            ends_at, by = tokens_at, 0
        else:
            return self._sign(store, key, at, now)
        if ends_at <= now:
            return self._sign(store, key, at, now)
        read = self._kept.get((store, key, ends_at, by))
        if read is None:
            read = self._kept[store, key, ends_at, by] = self._sign(store, key, ends_at, now)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return read

    def _sign(self, store: str, key: str, expires_at: float, now: float) -> Read:
        driver = self._driver(store)
        began = perf_counter()
        handle = driver.sign_get(key, expires_at, now)
        self._signing_seconds.observe(perf_counter() - began, driver.kind)
        return Read(handle.expires_at, orjson.dumps(show(handle))[1:-1])


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
