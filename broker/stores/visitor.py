"""What a probe sends as a client: signed handles, in its own words, to the endpoint that clients use.

Rules: bounded like every request of the broker's (`exchange`); a store that hangs up counts as refusing; when the clients'
endpoint cannot be reached from here, the same request goes through the internal one under the clients' name for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from broker import model
from broker.errors import StoreUnavailable
from broker.model import Handle
from broker.stores.exchange import CONNECT_SECONDS, TOTAL_SECONDS
from broker.stores.reach import AddressRefused, refusal

MAX_BODY = 16 << 20


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back; `status` 0 when the store hung up, `unreachable` when nobody was there."""

    status: int
    body: bytes = field(default=b"", repr=False)
    unreachable: bool = False

    @property
    def accepted(self) -> bool:
        return 200 <= self.status < 300

    @property
    def refused(self) -> bool:
        """Refused on purpose: neither accepted, nor a failure of the store's own."""
        return (self.status == 0 and not self.unreachable) or 400 <= self.status < 500

    def holds(self, content: bytes) -> bool:
        return self.status == 200 and self.body == content

    def __str__(self) -> str:
        return "unreachable" if self.unreachable else str(self.status or "hung up")


class Visitor:
    """A client of the store that `record` describes."""

    def __init__(self, session: aiohttp.ClientSession, record: model.Store) -> None:
        self.store = record.name
        self._session = session
        self._internal = urlsplit(record.internal_endpoint).netloc if record.internal_endpoint else None
        self._scheme = urlsplit(record.internal_endpoint or record.endpoint).scheme
        self._through_internal = False

    async def send(
        self, handle: Handle, body: bytes | None = None, headers: Mapping[str, str] | None = None, *, unsized: bool = False
    ) -> Reply:
        """Open the handle; with `unsized` the body's length is not told. Raises `StoreUnavailable` when the store does not answer in time
        or answers without end."""
        # The length is that of the body, whatever the handle says: that is how a dishonest client sends it.
        sent = {name: value for name, value in handle.headers.items() if name.lower() != "content-length"} | dict(headers or {})
        reply = await self._send(handle, body, sent, unsized)
        if reply.unreachable and self._internal is not None and not self._through_internal:
            self._through_internal = True
            reply = await self._send(handle, body, sent, unsized)
        return reply

    async def _send(self, handle: Handle, body: bytes | None, headers: Mapping[str, str], unsized: bool) -> Reply:
        url, sent = handle.url, {"Accept-Encoding": "identity", **headers}
        if self._through_internal:
            parts = urlsplit(url)
            sent["Host"] = parts.netloc
            url = parts._replace(scheme=self._scheme, netloc=self._internal or parts.netloc).geturl()
        try:
            async with (
                asyncio.timeout(TOTAL_SECONDS),
                self._session.request(
                    handle.method,
                    URL(url, encoded=True),
                    headers=sent,
                    data=body,
                    chunked=unsized or None,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=TOTAL_SECONDS, sock_connect=CONNECT_SECONDS),
                ) as response,
            ):
                content = bytearray()
                async for chunk in response.content.iter_chunked(1 << 16):
                    content += chunk
                    if len(content) > MAX_BODY:
                        raise StoreUnavailable(f"store {self.store} answers without end")
                return Reply(response.status, bytes(content))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            forbidden = refusal(error)
            if forbidden is not None and (self._internal is None or self._through_internal):
                raise AddressRefused(self.store, forbidden) from None
            return Reply(0, unreachable=True)
        except TimeoutError:
            raise StoreUnavailable(f"store {self.store} did not answer in time") from None
        except (aiohttp.ClientError, OSError, ValueError):
            return Reply(0)
