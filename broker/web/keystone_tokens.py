"""Turns X-Auth-Token and X-Service-Token into a `Principal`: what Keystone said of a token is remembered, but not for long.

Rules

- A token is asked about again after `recheck_seconds`, counted from before the question: a revoked one lives no longer than that,
  and no remembered one outlives its own end by our clock. While Keystone cannot be asked, remembered tokens last until then
  and no longer; all others get 503.
- A service token is valid when it has the role ``service``. It adds no right: the user's token alone says who asks and what is
  allowed. It only lets that token be expired, within Keystone's ``[token] allow_expired_window``. A service token that is
  not valid is refused, whatever the user's is.
- Invented tokens are no load for Keystone: refused ones are remembered for `REFUSED_SECONDS`, requests with the same token share
  one question, at most `AT_ONCE` are asked at a time, at most `MAX_UNDER_WAY` with those that wait, none longer than `LINE_SECONDS`.
  Tokens that were valid before wait in a line of their own, and are not held up by the limit on refusals (`broker.web.refusals`): whoever
  shares an address with an attacker goes on working.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from broker.errors import Forbidden, Unauthenticated, Unavailable
from broker.metrics import Metrics
from broker.model import Principal
from broker.web.auth import MAX_REMEMBERED
from broker.web.keystone import Keystone, KeystoneAway, Validated, is_token

AUTH_TOKEN_HEADER = "X-Auth-Token"
SERVICE_TOKEN_HEADER = "X-Service-Token"
AT_ONCE = 8
MAX_UNDER_WAY = 256
LINE_SECONDS = 5.0
ASK_SECONDS = 5.0
"""A question is answered in this time, the broker's own login included."""
AWAY_SECONDS = 1.0
"""A Keystone that cannot be reached is not asked again for so long."""
REFUSED_SECONDS = 10.0
LOG_SECONDS = 10.0
"""While Keystone cannot be asked, another reason is logged after so long."""

_log = structlog.get_logger(__name__)

_Key = tuple[str, bool]
"""A token, and whether it may be expired."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """An accepted token, believed until an instant of the monotonic clock."""

    token: Validated
    until: float


@dataclass(slots=True)
class _Line:
    """Those who ask Keystone, or wait for that."""

    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    length: int = 0


class KeystoneTokens:
    """The tokens of one Keystone. `close` before the event loop ends."""

    def __init__(
        self,
        keystone: Keystone,
        recheck_seconds: float,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keystone = keystone
        self._recheck_seconds = recheck_seconds
        self._metrics = metrics
        self._clock = clock
        self._monotonic = monotonic
        self._seen: OrderedDict[_Key, _Seen] = OrderedDict()
        self._refused: OrderedDict[_Key, float] = OrderedDict()
        self._asking: dict[_Key, asyncio.Task[Validated | None]] = {}
        self._new, self._again = _Line(), _Line()
        self._away_until = float("-inf")
        self._trouble: str | None = None
        self._logged_at = float("-inf")

    async def close(self) -> None:
        """End what is being asked."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def known(self, token: str, service: str | None = None) -> Principal | None:
        """The principal, if Keystone need not be asked."""
        if service is not None:
            found = self._remembered((service, False))
            if found is None or not found.is_service:
                return None
        remembered = self._remembered((token, service is not None))
        if remembered is None or remembered.principal is None:
            return None
        self._metrics.keystone_tokens.inc("remembered")
        return remembered.principal

    def was_good(self, token: str, service: str | None = None) -> bool:
        """Whether Keystone accepted all of this when it was last asked: to ask again is no look at an invented token."""
        seen, vouching = self._seen.get((token, service is not None)), self._seen.get((service or "", False))
        good = seen is not None and seen.token.principal is not None
        return good and (service is None or (vouching is not None and vouching.token.is_service))

    async def authenticate(self, token: str, service: str | None = None) -> Principal:
        """The principal. Raises `Unauthenticated`, `Forbidden` (no project, no role), `Unavailable` (Keystone cannot be asked)."""
        if service is not None and not (await self._look((service, False), "service-token")).is_service:
            self._metrics.auth_failures.inc("service-token")
            raise Unauthenticated("The service token has not the role service.", field=SERVICE_TOKEN_HEADER)
        found = await self._look((token, service is not None), "keystone-token")
        if found.principal is None:
            self._metrics.auth_failures.inc("role-or-project")
            raise Forbidden(found.why_not)
        return found.principal

    def _remembered(self, key: _Key) -> Validated | None:
        seen = self._seen.get(key)
        if seen is None or self._monotonic() >= seen.until:
            return None
        self._seen.move_to_end(key)
        return seen.token

    async def _look(self, key: _Key, reason: str) -> Validated:
        remembered = self._remembered(key)
        if remembered is not None:
            self._metrics.keystone_tokens.inc("remembered")
            return remembered
        found = await self._ask(key)
        if found is None:
            self._metrics.auth_failures.inc(reason)
            raise Unauthenticated()
        return found

    async def _ask(self, key: _Key) -> Validated | None:
        if not is_token(key[0]):
            return None
        if self._refused.get(key, 0.0) > self._monotonic():
            self._metrics.keystone_tokens.inc("refused-before")
            return None
        task = self._asking.get(key)
        if task is None:
            line = self._again if key in self._seen else self._new
            if line.length >= MAX_UNDER_WAY or self._monotonic() < self._away_until:
                raise self._unavailable()
            task = asyncio.create_task(self._learn(key, line))
            line.length += 1
            self._asking[key] = task
            task.add_done_callback(lambda ended: self._asked(key, line, ended))
        try:
            return await asyncio.shield(task)
        except KeystoneAway:
            raise self._unavailable() from None

    def _asked(self, key: _Key, line: _Line, task: asyncio.Task[Validated | None]) -> None:
        line.length -= 1
        del self._asking[key]
        if not task.cancelled():
            task.exception()  # those who waited got it; without one it is lost on purpose

    def _unavailable(self) -> Unavailable:
        self._metrics.keystone_tokens.inc("unavailable")
        self._metrics.auth_failures.inc("keystone-away")
        return Unavailable("Keystone cannot be asked about the token.", retry_after=AWAY_SECONDS)

    async def _learn(self, key: _Key, line: _Line) -> Validated | None:
        """Ask, and remember the answer. Raises `KeystoneAway`."""
        token, allow_expired = key
        await _enter(line.places)
        try:
            asked_at = self._monotonic()
            async with asyncio.timeout(ASK_SECONDS):
                found = await self._keystone.validate(token, allow_expired=allow_expired)
        except TimeoutError:
            self._lost("it did not answer in time", unreachable=True)
            raise KeystoneAway("it did not answer in time") from None
        except KeystoneAway as error:
            self._lost(str(error), unreachable=error.unreachable)
            raise
        finally:
            line.places.release()
        if self._trouble is not None:
            self._trouble = None
            _log.info("Keystone answers again")
        self._remember(key, found, asked_at)
        return found

    def _remember(self, key: _Key, found: Validated | None, asked_at: float) -> None:
        if found is None:
            self._metrics.keystone_tokens.inc("refused")
            self._seen.pop(key, None)
            self._refused[key] = asked_at + REFUSED_SECONDS
            _shorten(self._refused)
            return
        self._metrics.keystone_tokens.inc("accepted")
        # An expired token that Keystone lets pass has no end of its own to wait for, only the next question.
        left = self._recheck_seconds if key[1] else min(self._recheck_seconds, found.expires_at - self._clock())
        self._seen[key] = _Seen(found, asked_at + left)
        self._seen.move_to_end(key)
        _shorten(self._seen)

    def _lost(self, why: str, *, unreachable: bool) -> None:
        if unreachable:
            self._away_until = self._monotonic() + AWAY_SECONDS
        now = self._monotonic()
        if self._trouble is None or (why != self._trouble and now - self._logged_at >= LOG_SECONDS):
            self._logged_at = now
            _log.warning("Keystone cannot be asked about tokens", why=why)
        self._trouble = why


async def _enter(places: asyncio.Semaphore) -> None:
    try:
        async with asyncio.timeout(LINE_SECONDS):
            await places.acquire()
    except TimeoutError:
        raise KeystoneAway("too many ask about tokens") from None


def _shorten(memory: OrderedDict[_Key, Any]) -> None:
    if len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)
