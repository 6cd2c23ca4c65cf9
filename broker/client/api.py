"""Every operation of the HTTP contract (schemas/openapi.json) as a typed method.

Rules
- A problem document is raised as the class of `broker.errors` that its type names; no answer at all as `BrokerUnreachable`.
- 429, 503 and broken connections are tried again for `patience` seconds, after Retry-After where it was sent. Every POST carries
  an Idempotency-Key, the same one on each try, so that a retry takes nothing twice.
- Redirects are not followed: the bearer token is meant for the broker alone.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path as FilePath
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote
from uuid import UUID, uuid4

import aiohttp
import orjson
import stamina
from yarl import URL

from broker import errors
from broker.client import answers, settings
from broker.client.answers import (
    Blob,
    Committed,
    Copy,
    Explanation,
    Image,
    Part,
    Path,
    Pieces,
    Quota,
    Replica,
    Service,
    SigningKey,
    Site,
    Store,
    Ticket,
    TicketState,
)
from broker.client.trouble import BrokerUnreachable, NoBroker
from broker.model import Digests

NETWORK_SCHEMES = ("https", "http")
"""What every client can open, wherever it is."""

SCHEMES = (*NETWORK_SCHEMES, "file")
"""What our own downloads can open."""

PATIENCE_SECONDS = 30.0
"""How long a request is tried again before it fails."""

_ANSWER_SECONDS = 120.0
_MOST_WAIT_SECONDS = 60.0
_PAGE = 1000
_MERGE_PATCH = "application/merge-patch+json"
_STATUS = {401: errors.Unauthenticated, 403: errors.Forbidden, 404: errors.NotFound, 429: errors.Busy, 503: errors.Unavailable}
_TYPES = errors.problem_types()
_FOREIGN = (400, 404, 405, 501)
"""Without a problem document these come from something that does not know us; others may come from what stands before a broker."""

Item = TypeVar("Item")
Body = Mapping[str, Any]


class Broker:
    """A connection to one broker; use it as an async context manager.

    `url` and `token` come from the environment when not given (`broker.client.settings`). Raises `WrongSetting` for a
    URL or token that is none.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, *, token_file: FilePath | None = None, patience: float = PATIENCE_SECONDS
    ) -> None:
        self.url = settings.find_url(url)
        self.patience = patience
        self._who = settings.find_authorization(token, token_file)
        self._headers = {"X-Client-Instance": settings.instance(), "Accept": "application/json", **self._who}
        self._trust = settings.trust()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS, connect=10)
        connector = aiohttp.TCPConnector(ssl=self._trust)
        self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers, connector=connector)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    # --- tickets ---

    async def service(self) -> Service:
        return Service.read((await self._ask("GET", "/v1"))[0])

    async def create_ticket(self, request: Body) -> Ticket:
        """A ticket for a request as the contract writes it. Where slots are short it waits at the broker for as long as it is patient."""
        waits = {"wait": wait} if (wait := min(self.patience, _MOST_WAIT_SECONDS)) > 0 else {}
        try:
            return Ticket.read((await self._ask("POST", "/v1/tickets", {**waits, **request}))[0])
        except errors.Invalid as error:
            if error.field != "wait" or "wait" in request:
                raise
        return Ticket.read((await self._ask("POST", "/v1/tickets", request))[0])  # a broker that does not know how to wait

    async def download_ticket(
        self,
        *,
        image: UUID | None = None,
        blob: UUID | None = None,
        formats: Sequence[str] = (),
        convert: Mapping[str, float] | None = None,
        count: int = 3,
        parallel: int = 1,
        prefer: Sequence[str] = (),
        avoid: Sequence[str] = (),
        only: Sequence[str] = (),
        site: str | None = None,
        schemes: Sequence[str] = NETWORK_SCHEMES,
        wait: float | None = None,
    ) -> Ticket:
        """Where can I get this? Name an image or a blob; the first `parallel` of `count` sources are leased.

        `convert`: formats that are converted into one of `formats`, with bytes a second.

        `wait` is for how many seconds to wait for a slot, by default as long as the connection is patient.
        """
        request = {
            "operation": "download", "image": image, "blob": blob, "formats": formats, "convert": convert, "count": max(count, parallel),
            "parallel": parallel,
            "prefer": prefer, "avoid": avoid, "only": only, "site": site, "schemes": schemes, "wait": wait,
        }  # fmt: skip
        return await self.create_ticket(_given(request))

    async def upload_ticket(
        self,
        *,
        image: UUID | Mapping[str, Any] | None = None,
        blob: UUID | None = None,
        format: str | None = None,
        purpose: str | None = None,
        size: int | None = None,
        digests: Digests | None = None,
        count: int = 2,
        prefer: Sequence[str] = (),
        avoid: Sequence[str] = (),
        only: Sequence[str] = (),
        site: str | None = None,
    ) -> Ticket:
        """Where can I put this? `image` is an id, or a new image ``{"name", "visibility"?, "properties"?}``."""
        request = {
            "operation": "upload", "image": image, "blob": blob, "format": format, "purpose": purpose, "size": size, "digests": digests,
            "count": count, "prefer": prefer, "avoid": avoid, "only": only, "site": site, "schemes": NETWORK_SCHEMES,
        }  # fmt: skip
        return await self.create_ticket(_given(request))

    async def create_tickets(self, requests: Sequence[Body]) -> list[Ticket | errors.BrokerError]:
        """Many downloads at once: a ticket or the problem for each, in order."""
        document, _ = await self._ask("POST", "/v1/tickets:batch", {"tickets": list(requests)})
        return [Ticket.read(item) if "id" in item else problem(item["status"], item) for item in document["tickets"]]

    async def explain(
        self, *, image: UUID | None = None, blob: UUID | None = None, formats: Sequence[str] = (), site: str | None = None
    ) -> Explanation:
        """What a download ticket would name now, and why; nothing is leased. Administrators may name any site."""
        request = {"operation": "download", "image": image, "blob": blob, "formats": formats, "site": site, "schemes": SCHEMES}
        return Explanation.read((await self._ask("POST", "/v1/tickets:explain", _given(request)))[0])

    async def ticket(self, id: UUID) -> TicketState:
        return TicketState.read((await self._ask("GET", f"/v1/tickets/{id}"))[0])

    async def release(self, id: UUID, *, patience: float | None = None) -> None:
        """Give the leases back; an upload is abandoned."""
        await self._ask("DELETE", f"/v1/tickets/{id}", patience=patience)

    async def refresh(self, id: UUID, *, patience: float | None = None) -> Ticket:
        """The same places with new URLs, their leases renewed."""
        return Ticket.read((await self._ask("POST", f"/v1/tickets/{id}/refresh", patience=patience))[0])

    async def activate(self, id: UUID, store: str, *, patience: float | None = None) -> Ticket:
        """Lease a standby place."""
        return Ticket.read((await self._ask("POST", f"/v1/tickets/{id}/activate", {"store": store}, patience=patience))[0])

    async def parts(
        self, id: UUID, store: str, numbers: Sequence[int], digests: Mapping[int, Digests] | None = None, size: int | None = None
    ) -> list[Part]:
        """URLs for parts; digests given are bound where the store can."""
        known = {str(number): dict(value) for number, value in (digests or {}).items()}
        body = _given({"store": store, "numbers": list(numbers), "digests": known, "size": size})
        return [Part.read(part) for part in (await self._ask("POST", f"/v1/tickets/{id}/parts", body))[0]["parts"]]

    async def commit(
        self,
        id: UUID,
        store: str,
        size: int,
        digests: Digests,
        pieces: Pieces | None = None,
        parts: Sequence[Body] = (),
    ) -> Committed:
        """The bytes are there: the broker looks, compares, seals. Raises `errors.Mismatch` when the store tells otherwise."""
        body = _given(
            {"store": store, "size": size, "digests": dict(digests), "pieces": pieces and pieces.document(), "parts": list(parts)}
        )
        return Committed.read((await self._ask("POST", f"/v1/tickets/{id}/commit", body))[0])

    async def report(
        self,
        id: UUID,
        store: str,
        outcome: str,
        *,
        bytes: int = 0,
        seconds: float = 0.0,
        setup_seconds: float | None = None,
        detail: str = "",
        final: bool = True,
        patience: float | None = None,
    ) -> None:
        """How it went: ``ok``, ``failed``, ``slow`` or ``corrupt``; `final` False tells progress and renews the lease."""
        body = _given(
            {"store": store, "outcome": outcome, "bytes": bytes, "seconds": round(seconds, 6), "detail": _printable(detail), "final": final}
        )
        if setup_seconds is not None:
            body["setup_seconds"] = round(setup_seconds, 6)
        await self._ask("POST", f"/v1/tickets/{id}/report", body, patience=patience)

    # --- images, blobs, replicas ---

    def images(self, **filters: str | None) -> AsyncIterator[Image]:
        """All images that match: by name, visibility, status, project, format."""
        return self._pages("/v1/images", "images", filters, Image.read)

    async def create_image(self, image: Body) -> Image:
        return Image.read(*await self._ask("POST", "/v1/images", image))

    async def image(self, id: UUID) -> Image:
        return Image.read(*await self._ask("GET", f"/v1/images/{id}"))

    async def change_image(self, id: UUID, change: Body, etag: str) -> Image:
        return Image.read(*await self._ask("PATCH", f"/v1/images/{id}", change, etag=etag))

    async def delete_image(self, id: UUID, etag: str) -> answers.Document:
        """Returns what is deleted and what is kept, as the contract writes it."""
        return (await self._ask("DELETE", f"/v1/images/{id}", etag=etag))[0]

    async def members(self, id: UUID) -> list[answers.Document]:
        """The projects that an image is shared with, as far as this principal may see them, as the contract writes them."""
        members: list[answers.Document] = (await self._ask("GET", f"/v1/images/{id}/members"))[0]["members"]
        return members

    async def add_member(self, id: UUID, project: str) -> answers.Document:
        """Share an image with a project."""
        return (await self._ask("POST", f"/v1/images/{id}/members", {"member": project}))[0]

    async def answer_member(self, id: UUID, project: str, status: str) -> answers.Document:
        """Say for a project whether it takes an image that is shared with it into its lists."""
        return (await self._ask("PUT", f"/v1/images/{id}/members/{quote(project, safe='')}", {"status": status}))[0]

    async def remove_member(self, id: UUID, project: str) -> None:
        await self._ask("DELETE", f"/v1/images/{id}/members/{quote(project, safe='')}")

    async def vetting(self, id: UUID) -> answers.Document:
        """Whether an image is approved, and what was decided of it, as the contract writes it."""
        return (await self._ask("GET", f"/v1/images/{id}/vetting"))[0]

    async def decide_vetting(self, id: UUID, decision: str, reason: str, etag: str) -> answers.Document:
        """Approve or reject an image as it was when it had this ETag."""
        body = _given({"decision": decision, "reason": reason})
        return (await self._ask("PUT", f"/v1/images/{id}/vetting", body, etag=etag))[0]

    async def tell_verdict(self, id: UUID, blob: UUID, valid: bool, signature: Mapping[str, str], detail: str) -> None:
        """What was found of an image's signature, with the properties that were looked at."""
        body = {"blob": str(blob), "valid": valid, "signature": dict(signature), "detail": _printable(detail)}
        await self._ask("POST", f"/v1/images/{id}/verdicts", body)

    async def blob(self, id: UUID, *, patience: float | None = None) -> Blob:
        return Blob.read((await self._ask("GET", f"/v1/blobs/{id}", patience=patience))[0])

    def blob_replicas(self, id: UUID) -> AsyncIterator[Replica]:
        return self._pages(f"/v1/blobs/{id}/replicas", "replicas", None, Replica.read)

    async def register_replica(self, blob: UUID, replica: Body) -> Replica:
        return Replica.read(*await self._ask("POST", f"/v1/blobs/{blob}/replicas", replica))

    async def adopt_object(self, image: UUID, adopted: Body) -> Replica:
        return Replica.read(*await self._ask("POST", f"/v1/images/{image}/blobs", adopted))

    def replicas(self, **filters: str | None) -> AsyncIterator[Replica]:
        """All replicas that match: by store, purpose, state."""
        return self._pages("/v1/replicas", "replicas", filters, Replica.read)

    async def replica(self, id: UUID) -> Replica:
        return Replica.read(*await self._ask("GET", f"/v1/replicas/{id}"))

    async def change_replica(self, id: UUID, change: Body, etag: str) -> Replica:
        return Replica.read(*await self._ask("PATCH", f"/v1/replicas/{id}", change, etag=etag))

    async def delete_replica(self, id: UUID, etag: str) -> None:
        await self._ask("DELETE", f"/v1/replicas/{id}", etag=etag)

    # --- copies ---

    def copies(self, **filters: str | None) -> AsyncIterator[Copy]:
        """All copies that match: by image, state, purpose."""
        return self._pages("/v1/copies", "copies", filters, Copy.read)

    async def create_copy(self, copy: Body) -> Copy:
        """Ask for one: ``{"image", "store", "format"?, "purpose"?}``."""
        return Copy.read((await self._ask("POST", "/v1/copies", copy))[0])

    async def copy(self, id: UUID) -> Copy:
        return Copy.read((await self._ask("GET", f"/v1/copies/{id}"))[0])

    async def cancel_copy(self, id: UUID) -> None:
        await self._ask("DELETE", f"/v1/copies/{id}")

    async def take_copy(self, stores: Sequence[str] = ()) -> Copy | None:
        """The next one to make, to one of `stores` if any are named; ``None`` while none waits."""
        document, _ = await self._ask("POST", "/v1/copies:take", _given({"stores": list(stores)}))
        return Copy.read(document) if document else None

    async def report_copy(self, id: UUID, turn: int, outcome: str, *, bytes: int = 0, problem: str = "") -> Copy:
        """How it goes or went: ``running``, ``ok`` or ``failed``."""
        body = {"turn": turn, "outcome": outcome, "bytes": bytes, **_given({"problem": _printable(problem)})}
        return Copy.read((await self._ask("POST", f"/v1/copies/{id}/report", body))[0])

    # --- stores, sites, paths ---

    def stores(self, **filters: str | None) -> AsyncIterator[Store]:
        """All stores that match: by site, kind."""
        return self._pages("/v1/stores", "stores", filters, Store.read)

    async def create_store(self, store: Body) -> Store:
        return Store.read(*await self._ask("POST", "/v1/stores", store))

    async def store(self, name: str) -> Store:
        return Store.read(*await self._ask("GET", f"/v1/stores/{quote(name, safe='')}"))

    async def change_store(self, name: str, change: Body, etag: str) -> Store:
        return Store.read(*await self._ask("PATCH", f"/v1/stores/{quote(name, safe='')}", change, etag=etag))

    async def probe_store(self, name: str) -> Store:
        return Store.read(*await self._ask("POST", f"/v1/stores/{quote(name, safe='')}/probe"))

    async def delete_store(self, name: str, etag: str) -> None:
        await self._ask("DELETE", f"/v1/stores/{quote(name, safe='')}", etag=etag)

    def sites(self) -> AsyncIterator[Site]:
        return self._pages("/v1/sites", "sites", {}, Site.read)

    async def create_site(self, site: Body) -> Site:
        return Site.read(*await self._ask("POST", "/v1/sites", site))

    async def site(self, path: str) -> Site:
        return Site.read(*await self._ask("GET", f"/v1/sites/{quote(path, safe='')}"))

    async def change_site(self, path: str, change: Body, etag: str) -> Site:
        return Site.read(*await self._ask("PATCH", f"/v1/sites/{quote(path, safe='')}", change, etag=etag))

    async def delete_site(self, path: str, etag: str) -> None:
        await self._ask("DELETE", f"/v1/sites/{quote(path, safe='')}", etag=etag)

    def quotas(self) -> AsyncIterator[Quota]:
        """Projects with quotas of their own."""
        return self._pages("/v1/quotas", "quotas", {}, Quota.read)

    async def quota(self, project: str) -> Quota:
        return Quota.read((await self._ask("GET", f"/v1/quotas/{quote(project, safe='')}"))[0])

    async def set_quota(self, project: str, limits: Body) -> Quota:
        """Set a project's quota as a whole."""
        return Quota.read((await self._ask("PUT", f"/v1/quotas/{quote(project, safe='')}", limits))[0])

    async def delete_quota(self, project: str) -> None:
        await self._ask("DELETE", f"/v1/quotas/{quote(project, safe='')}")

    def paths(self, **filters: str | None) -> AsyncIterator[Path]:
        """What was observed, by site and store."""
        return self._pages("/v1/paths", "paths", filters, Path.read)

    # --- signing keys ---

    async def keys(self) -> list[SigningKey]:
        return _signing_keys(await self._ask("GET", "/v1/keys"))

    async def rotate_keys(self, algorithm: str | None = None) -> list[SigningKey]:
        """Let the next key take over; all keys as they are then."""
        return _signing_keys(await self._ask("POST", "/v1/keys", {} if algorithm is None else {"algorithm": algorithm}))

    async def revoke_key(self, id: str) -> list[SigningKey]:
        """End a key at once; all keys as they are then."""
        return _signing_keys(await self._ask("DELETE", f"/v1/keys/{quote(id, safe='')}"))

    # --- one request ---

    async def _pages(
        self, path: str, name: str, filters: Mapping[str, str | None] | None, read: Callable[[answers.Document], Item]
    ) -> AsyncIterator[Item]:
        query = {key: value for key, value in (filters or {}).items() if value is not None}
        if filters is not None:
            query["limit"] = str(_PAGE)
        while True:
            page, _ = await self._ask("GET", path, query=query)
            for item in page[name]:
                yield read(item)
            if "next" not in page:
                return
            query["marker"] = page["next"]

    async def _ask(
        self,
        method: str,
        path: str,
        body: Body | None = None,
        *,
        etag: str | None = None,
        query: Mapping[str, str] | None = None,
        patience: float | None = None,
    ) -> tuple[dict[str, Any], str | None]:
        """One operation with its retries: the answer's JSON object (empty for 204) and its ETag."""
        headers = {}
        if method == "POST":
            headers["Idempotency-Key"] = str(uuid4())
        if etag is not None:
            headers["If-Match"] = etag
        if body is not None:
            headers["Content-Type"] = _MERGE_PATCH if method == "PATCH" else "application/json"
        data = None if body is None else orjson.dumps(body)
        patience = self.patience if patience is None else patience
        end = time.monotonic() + patience

        def again(error: Exception) -> bool | float:
            left = end - time.monotonic()
            if isinstance(error, BrokerUnreachable):
                return left > 0
            if not isinstance(error, errors.BrokerError) or error.status not in (429, 503):
                return False
            pause = error.retry_after
            return left > 0 if pause is None else pause if pause < left else False

        async for attempt in stamina.retry_context(on=again, attempts=None, timeout=patience or 1e-9, wait_initial=0.2, wait_max=5.0):
            with attempt:
                return await self._once(method, path, data, headers, query)
        raise AssertionError("unreachable")  # the loop returns or raises

    def _unreachable(self, error: Exception) -> BrokerUnreachable:
        """What to raise for an error of the network; its class alone is told, since texts of these errors may quote the request."""
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            reason = getattr(error.certificate_error, "verify_message", "") or "it does not fit"
            return BrokerUnreachable(
                f"the certificate of the broker at {self.url} is not believed: {reason}",
                "if it is from an authority of your own, set BROKER_CA_FILE to that one's certificate",
            )
        hint = "is it running, and is --url or BROKER_URL right?"
        if isinstance(error, aiohttp.ClientConnectorSSLError):
            hint = "does it speak TLS? Try http://"
        elif isinstance(error, aiohttp.ServerDisconnectedError) and self.url.startswith("http://"):
            hint += " If it speaks TLS, the URL begins with https://"
        return BrokerUnreachable(f"the broker at {self.url} does not answer ({type(error).__name__})", hint)

    async def _once(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str], query: Mapping[str, str] | None
    ) -> tuple[dict[str, Any], str | None]:
        if self._session is None:
            raise RuntimeError("use `async with Broker(…)`")
        try:
            async with self._session.request(
                method, _encoded(self.url + path), data=data, headers=headers, params=query, allow_redirects=False
            ) as answer:
                content = await answer.read()
                status, etag, pause = answer.status, answer.headers.get("ETag"), answer.headers.get("Retry-After")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(error) from None
        document = _json(content)
        ours = str(document.get("type", "")).startswith("/problems/") if status >= 300 else bool(document) or not content
        if not ours and (status < 400 or status in _FOREIGN):
            raise NoBroker(f"what answers at {self.url} is no broker (status {status})", "is --url or BROKER_URL right?")
        if status >= 300:
            refused = problem(status, document, pause)
            if isinstance(refused, errors.Unauthenticated) and (trouble := settings.trouble_with(self._who)):
                refused.detail = trouble
            raise refused
        return document, etag


def problem(status: int, document: Mapping[str, Any], retry_after: str | None = None) -> errors.BrokerError:
    """A problem document (RFC 9457) as the exception that it names; by `status` when it names none that we know."""
    name = str(document.get("type", "")).rpartition("/")[2]
    kind = _TYPES.get(name) or _STATUS.get(status) or (errors.Unavailable if status in (502, 504) else errors.BrokerError)
    known = ("type", "title", "status", "detail", "field", "expected", "retry_after")
    pause = document.get("retry_after")
    if pause is None and retry_after is not None and retry_after.isdigit():
        pause = float(retry_after)
    return kind(
        document.get("detail") or document.get("title") or f"the broker answered {status}",
        field=document.get("field"),
        expected=document.get("expected"),
        retry_after=pause,
        extra={key: value for key, value in document.items() if key not in known},
    )


def _signing_keys(answer: tuple[dict[str, Any], str | None]) -> list[SigningKey]:
    return [SigningKey.read(document) for document in answer[0]["keys"]]


def _json(content: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(content) if content else {}
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}


def _encoded(url: str) -> URL:
    """The URL as it stands: percent-encoded slashes of a site's path must reach the broker."""
    return URL(url, encoded=True)


def _given(body: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was not given."""
    return {key: value for key, value in body.items() if value is not None and value != () and value != [] and value != {} and value != ""}


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:500]
