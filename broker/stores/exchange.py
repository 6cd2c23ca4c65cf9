"""One request of the broker's own to a store, bounded in every way.

Rules: no redirect is followed; an answer has `MAX_ANSWER` bytes at most and so many seconds, and is never unpacked; only connection
errors of requests that change nothing are tried again; no error text holds a URL, a header or what the store wrote, since any of them
may hold a signature.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import SimpleNamespace
from typing import Any, NamedTuple

import aiohttp
import stamina
from yarl import URL

from broker.errors import StoreUnavailable
from broker.metrics import Metrics
from broker.stores.reach import AddressRefused, refusal

CONNECT_SECONDS = 3.0
TOTAL_SECONDS = 15.0
LONG_SECONDS = 300.0
"""For what makes the store move bytes of its own: server-side copies, joining parts."""

MAX_ANSWER = 2 << 20
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """What a store answered; header names in any case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Exchange:
    """Asks one store, by the shared `session`. `store` is its name, for error texts."""

    def __init__(self, session: aiohttp.ClientSession, store: str) -> None:
        self._session = session
        self._store = store

    async def ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        expect: Collection[int],
        body: bytes | None = None,
        seconds: float | None = None,
        repeatable: bool = False,
    ) -> Answer:
        """Send one request to `url`, exactly as it is encoded. `repeatable` says that asking again can do no harm.

        Raises `StoreUnavailable` for an answer whose status is none of `expect`, is too long, too late, or none at all.
        """
        answer = await self._ask(method, url, headers, body, TOTAL_SECONDS if seconds is None else seconds, repeatable)
        if answer.status not in expect:
            raise self.unexpected(answer.status)
        return answer

    def unexpected(self, status: int) -> StoreUnavailable:
        """What to raise for a status that is no answer to what was asked."""
        if 300 <= status < 400:
            return StoreUnavailable(f"store {self._store} redirects, which is never followed")
        if status in (401, 403):
            return StoreUnavailable(f"store {self._store} refuses what the broker signed ({status})")
        return StoreUnavailable(f"store {self._store} answered {status}")

    def nonsense(self, what: str) -> StoreUnavailable:
        """What to raise for an answer that is not the store's protocol; `what` must hold nothing of the answer itself."""
        return StoreUnavailable(f"store {self._store} answered what is not its protocol: {what}")

    async def _ask(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, seconds: float, repeatable: bool) -> Answer:
        attempts = _ATTEMPTS if repeatable else 1
        try:
            async for attempt in stamina.retry_context(
                on=_is_passing, attempts=attempts, wait_initial=0.1, wait_jitter=0.1, wait_max=0.5, timeout=None
            ):
                with attempt:
                    return await self._once(method, url, headers, body, seconds)
        except TimeoutError:
            raise StoreUnavailable(f"store {self._store} did not answer in time") from None
        except (aiohttp.ClientError, ValueError, OSError) as error:
            if (forbidden := refusal(error)) is not None:
                raise AddressRefused(self._store, forbidden) from None
            # The class alone: texts of these errors may quote the URL.
            raise StoreUnavailable(f"store {self._store} cannot be reached ({type(error).__name__})") from None
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _once(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, seconds: float) -> Answer:
        async with (
            asyncio.timeout(seconds),
            self._session.request(
                method,
                URL(url, encoded=True),
                headers={"Accept-Encoding": "identity", **headers},
                data=b"" if body is None and method in ("PUT", "POST") else body,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS),
                trace_request_ctx=_Traced(self._store, time.perf_counter()),
            ) as response,
        ):
            content = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise self.nonsense(f"more than {MAX_ANSWER} bytes")
            return Answer(response.status, response.headers, bytes(content))


def _is_passing(error: Exception) -> bool:
    return isinstance(error, aiohttp.ClientConnectionError) and refusal(error) is None


class _Traced(NamedTuple):
    """What `tracing` learns of a request; those of others that share the session bring none."""

    store: str
    began: float


def tracing(metrics: Metrics) -> aiohttp.TraceConfig:
    """Counts the requests of a session by store, method and status, and how long they take until the answer's head."""

    async def ended(_: aiohttp.ClientSession, context: SimpleNamespace, request: aiohttp.TraceRequestEndParams) -> None:
        note(context.trace_request_ctx, request.method, str(request.response.status))

    async def failed(_: aiohttp.ClientSession, context: SimpleNamespace, request: aiohttp.TraceRequestExceptionParams) -> None:
        note(context.trace_request_ctx, request.method, "failed")

    def note(traced: Any, method: str, outcome: str) -> None:
        if isinstance(traced, _Traced):
            metrics.store_requests.inc(traced.store, method, outcome)
            metrics.store_seconds.observe(time.perf_counter() - traced.began, traced.store, method)

    config = aiohttp.TraceConfig()
    config.on_request_end.append(ended)
    config.on_request_exception.append(failed)
    return config


def skew(answer: Answer, now: float) -> float | None:
    """The Date header minus `now`, in whole seconds (RFC 9110 section 6.6.1); ``None`` when there is no readable one."""
    try:
        # The header cuts fractions off, so the store's clock is half a second later on average.
        return float(round(parsedate_to_datetime(answer.headers.get("Date", "")).timestamp() + 0.5 - now))
    except (ValueError, TypeError, OverflowError):
        return None


def clock() -> float:
    """The time for requests of the broker's own; signing for clients takes `now` as an argument."""
    return time.time()
