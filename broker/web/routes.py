"""From a request to its answer: one function per request, no stack of middleware.

The contracts are the single source of truth: each of their operations is bound to the handler of that name, and nothing starts
when one is missing on either side. The way of a request: find the operation, authenticate, check roles, check path, query,
headers and body, handle, render, count. A body is read only for those who may send one, never beyond its limit.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from itertools import count
from os import urandom
from time import perf_counter
from typing import Any
from urllib.parse import unquote

import aiohttp
import asyncpg
import orjson
import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler
from multidict import CIMultiDict, CIMultiDictProxy, istr

from broker import errors
from broker.catalog.connect import is_transient
from broker.log import RequestContext, current_request
from broker.model import Client, Principal, Role
from broker.service.context import Context
from broker.web import contract, problem
from broker.web.auth import Authenticator
from broker.web.bodies import Bodies, Share
from broker.web.call import Answer, Call, Handler
from broker.web.client import INSTANCE_HEADER, ClientFinder
from broker.web.connections import Connection, Gate
from broker.web.cors import Cors
from broker.web.dialect import Dialect
from broker.web.keystone_tokens import AUTH_TOKEN_HEADER, SERVICE_TOKEN_HEADER, KeystoneTokens
from broker.web.refusals import Refusals
from broker.web.reply import Reply
from broker.web.status.pages import PATH as PAGES
from broker.web.status.pages import Pages, is_for_browsers
from broker.web.validate import BodyCheck, ParameterCheck

BODY_SECONDS = 60.0
"""A body must have arrived in this time."""

_JSON = "application/json"
_AUTH_TOKEN, _SERVICE_TOKEN = map(istr, (AUTH_TOKEN_HEADER, SERVICE_TOKEN_HEADER))
_AUTHORIZATION, _CONTENT_ENCODING, _CONTENT_TYPE, _FORWARDED, _INSTANCE, _TRACE = map(
    istr, ("Authorization", "Content-Encoding", "Content-Type", "X-Forwarded-For", INSTANCE_HEADER, "traceparent")
)
"""Names of header fields that are looked up without changing their case first."""

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}\Z")  # W3C Trace Context, version 00
_PARAMETER = re.compile(r"\{([a-z_]+)\}")
_log = structlog.get_logger(__name__)


class Route:
    """One operation, compiled."""

    def __init__(self, dialect: Dialect, operation: contract.Operation, handler: Handler) -> None:
        self.id = operation.id
        self.dialect = dialect
        self.handler = handler
        self.secured = operation.secured
        self.roles = operation.roles
        spoken = dialect.contract
        self.bodies = {type: BodyCheck(spoken, schema, operation.max_fields) for type, schema in operation.bodies.items()}
        self.body_limit = operation.body_limit
        self.body_required = operation.body_required
        self.body_ignored = operation.body_ignored
        self.path = ParameterCheck(spoken, operation.of("path")) if operation.of("path") else None
        self.query = ParameterCheck(spoken, operation.of("query"))
        self.header_names = tuple(istr(parameter.name) for parameter in operation.of("header"))
        self.headers = ParameterCheck(spoken, operation.of("header"))


class Router:
    """Finds the operation of a path and a method. Paths without parameters cost one look-up.

    `dialects`: the broker's own API first, to which all paths belong that are no other's.
    """

    def __init__(self, dialects: Sequence[Dialect]) -> None:
        self._plain: dict[str, dict[str, Route]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        self._own, *self._others = dialects
        by_path: dict[str, dict[str, Route]] = {}
        known: set[str] = set()
        for dialect in dialects:
            for operation, handler in _bound(dialect):
                if operation.id in known or operation.method in by_path.setdefault(operation.path, {}):
                    raise RuntimeError(f"two contracts have the operation {operation.id}, or {operation.method} {operation.path}")
                known.add(operation.id)
                by_path[operation.path][operation.method] = Route(dialect, operation, handler)
        for path, methods in by_path.items():
            if "GET" in methods:
                methods["HEAD"] = methods["GET"]  # RFC 9110 section 9.1; the server leaves the body out
            if "{" in path:
                pattern = _PARAMETER.sub(r"(?P<\1>[^/]+)", "".join(part if part[0] == "{" else re.escape(part) for part in _split(path)))
                self._patterns.append((re.compile(pattern + r"\Z"), methods))
            else:
                self._plain[path] = methods

    def find(self, path: str, method: str) -> tuple[Route, dict[str, str]]:
        """The operation, and the path's parameters decoded. Raises `NotFound`, `MethodNotAllowed`, `Malformed`."""
        parameters: dict[str, str] = {}
        methods = self._plain.get(path)
        if methods is None:
            for pattern, candidates in self._patterns:
                if match := pattern.match(path):
                    methods = candidates
                    try:
                        parameters = {name: unquote(text, errors="strict") for name, text in match.groupdict().items()}
                    except UnicodeDecodeError:
                        raise errors.Malformed("The path is no UTF-8.") from None
                    break
            else:
                raise errors.NotFound(self.dialect_of(path).unknown)
        route = methods.get(method)
        if route is None:
            raise errors.MethodNotAllowed(expected=", ".join(sorted(methods)))
        return route, parameters

    def dialect_of(self, path: str) -> Dialect:
        """Whose path it is, also when no operation has it."""
        return next((dialect for dialect in self._others if dialect.has(path)), self._own)


class Api:
    """Answers requests. `handle` is what the server calls."""

    def __init__(
        self,
        context: Context,
        router: Router,
        authenticator: Authenticator,
        clients: ClientFinder,
        refusals: Refusals,
        *,
        body_limit_bytes: int,
        keystone: KeystoneTokens | None = None,
        pages: Pages | None = None,
        cors: Cors | None = None,
    ) -> None:
        self._context = context
        self._cors = cors
        self._pages = pages
        self._router = router
        self._authenticator = authenticator
        self._keystone = keystone
        self._clients = clients
        self._refusals = refusals
        self._limit = body_limit_bytes
        self._bodies = Bodies()
        self._ids = count()
        self._prefix = urandom(6).hex()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer to one request, whatever happens."""
        began = perf_counter()
        incoming = request.headers
        traceparent = incoming.get(_TRACE)
        if traceparent is not None and _TRACEPARENT.match(traceparent) is None:
            traceparent = None
        request_id = f"{self._prefix}-{next(self._ids):x}"
        current_request.set(RequestContext(request_id, traceparent))
        operation = ""
        close = False
        dialect: Dialect | None = None
        target = request.raw_path
        path, _, query = target.partition("?")
        try:
            if path == PAGES and self._pages is not None and is_for_browsers(request):
                operation = "getStatusPage"
                answer = await self._pages.answer(request, self._identify, self._payload)
            elif self._cors is not None and (allowed := self._cors.preflight(request.method, incoming)) is not None:
                operation, close = "preflight", request.body_exists
                answer = Answer(204, None, allowed)
            else:
                route, parameters = self._router.find(path if path.startswith("/") else request.rel_url.raw_path, request.method)
                operation, dialect, close = route.id, route.dialect, route.body_ignored and request.body_exists
                answer = await self._answer(request, route, parameters, query)
            status = answer.status
            body = answer.body if isinstance(answer.body, bytes) or answer.body is None else orjson.dumps(answer.body)
            headers: MutableMapping[str, str] = {"Content-Type": _JSON} if body is not None else {}
            if isinstance(answer.headers, CIMultiDict):
                headers = answer.headers
            elif answer.headers is not None:
                headers.update(answer.headers)
        except errors.BrokerError as error:
            dialect = dialect or self._router.dialect_of(path)
            status, body, headers = dialect.render(error, _AUTHORIZATION in incoming or _AUTH_TOKEN in incoming)
            if status == 500:
                _log.error("internal error", exc_info=error)
            close = close or isinstance(error, errors.TooLarge)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            dialect = dialect or self._router.dialect_of(path)
            status, body, headers = dialect.render(_unexpected(error, request_id), False)
        if self._cors is not None and operation not in ("getStatusPage", "preflight"):
            self._cors.allow(incoming, headers)
        headers["X-Request-Id"] = request_id
        if dialect is not None and dialect.request_id is not None:
            headers[dialect.request_id] = request_id
        if traceparent is not None:
            headers["traceparent"] = traceparent
        metrics = self._context.metrics
        metrics.http_requests.inc(operation, str(status))
        metrics.http_seconds.observe(perf_counter() - began, operation)
        return Reply(status, headers, body, close=close)

    async def _answer(self, request: web.BaseRequest, route: Route, path: dict[str, str], query: str) -> Answer:
        headers = request.headers
        client = await self._identify(headers, request.remote or "") if route.secured else None
        if route.roles and (client is None or client.principal.role not in route.roles):
            raise errors.Forbidden(f"This needs the role {' or '.join(role for role in Role if role in route.roles)}.")
        call = Call(self._context, route.id, _client=client, _request=request)
        if route.path is not None:
            call.path = route.path(path)
        call.query = route.query.query(query)
        given = {str(name): value for name in route.header_names if (value := _single(headers, name)) is not None}
        if given:
            call.headers = route.headers(given)
        if route.bodies:
            await self._read(call, request, client, route)
        elif route.body_ignored:
            pass
        elif request.body_exists and request.content_length != 0:
            raise errors.Malformed("This operation takes no body.")
        return await route.handler(call)

    async def _identify(self, headers: CIMultiDictProxy[str], peer: str) -> Client:
        """Who asks with these header fields from the socket's address `peer`. Raises what `_from_openstack` and `_checked` raise."""
        forwarded = headers.getall(_FORWARDED, ())
        if _AUTH_TOKEN in headers:
            principal = await self._from_openstack(headers, peer, forwarded)
        else:
            authorization = _single(headers, _AUTHORIZATION)
            known = self._authenticator.known(authorization) if authorization is not None else None
            principal = known or await self._checked(peer, forwarded, authorization, self._authenticator.authenticate)
        return self._clients.find(principal, peer, forwarded, headers.get(_INSTANCE))

    async def _from_openstack(self, headers: CIMultiDictProxy[str], peer: str, forwarded: Sequence[str]) -> Principal:
        """Whose X-Auth-Token it is: a token of Keystone's, or a bearer token given in this header."""
        token = _single(headers, _AUTH_TOKEN) or ""
        service = _single(headers, _SERVICE_TOKEN)
        if _AUTHORIZATION in headers:  # as RFC 6750 section 2 rules for its own methods
            raise errors.Malformed("Two kinds of token are given.", field=AUTH_TOKEN_HEADER, expected="this header or Authorization")
        keystone = self._keystone
        known = keystone.known(token, service) if keystone is not None else None
        if known is not None:
            return known
        bearer = f"Bearer {token}"
        if known := self._authenticator.known(bearer):
            return known
        if keystone is None or self._authenticator.has_issuer_of(token):
            return await self._checked(peer, forwarded, bearer, self._authenticator.authenticate)
        if keystone.was_good(token, service):
            return await keystone.authenticate(token, service)
        return await self._checked(peer, forwarded, token, lambda given: keystone.authenticate(given or "", service))

    async def _checked(
        self, peer: str, forwarded: Sequence[str], token: str | None, authenticate: Callable[[str | None], Awaitable[Principal]]
    ) -> Principal:
        """Who holds a token that is not known yet, unless too many were refused. Raises what `authenticate` raises, `TooManyRefusals`."""
        if token is None:
            return await authenticate(None)
        return await self._refusals.check(self._clients.address_of(peer, forwarded), token, authenticate)

    async def _read(self, call: Call, request: web.BaseRequest, client: Client | None, route: Route) -> None:
        """The body of an operation that takes one. Raises `UnsupportedMediaType`, `TooLarge`, `Malformed`, `Invalid`, `Unavailable`."""
        given = request.headers.get(_CONTENT_TYPE, "")
        check = route.bodies.get(given) or route.bodies.get(given := given.partition(";")[0].strip().lower())
        if check is None and given == _JSON and len(route.bodies) == 1:
            ((given, check),) = route.bodies.items()
        if not request.body_exists or request.content_length == 0:
            if not route.body_required:
                return
            if check is None:
                raise errors.Malformed("A JSON body is required.")
        if check is None:
            raise errors.UnsupportedMediaType(field="Content-Type", expected=" or ".join(route.bodies))
        if _CONTENT_ENCODING in request.headers:
            raise errors.UnsupportedMediaType(field="Content-Encoding", expected="no encoding")
        call.media_type = given
        call.body = check(await self._payload(request, client, min(route.body_limit, self._limit)))

    async def _payload(self, request: web.BaseRequest, client: Client | None, limit: int) -> bytes:
        length = request.content_length
        if length is not None and length > limit:
            raise errors.TooLarge(f"The body is over {limit} bytes.")
        try:
            content = request.content
            if not content.is_eof():
                whose = None if client is None else (client.principal.project, client.principal.subject)
                with self._bodies.arriving(whose) as share:
                    async with asyncio.timeout(BODY_SECONDS):
                        return await _up_to(content, limit, share)
            body = content.read_nowait()  # what nearly always has arrived with the head
        except TimeoutError:
            raise errors.Malformed("The body did not arrive in time.") from None
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, ConnectionError):
            raise errors.Malformed("The body did not arrive as it was announced.") from None
        if len(body) > limit:
            raise errors.TooLarge(f"The body is over {limit} bytes.")
        return body


async def _up_to(stream: aiohttp.StreamReader, limit: int, share: Share) -> bytes:
    """The body as it arrives. Raises `TooLarge`, `Unavailable`."""
    content = bytearray()
    async for chunk in stream.iter_any():
        content += chunk
        if len(content) > limit:
            raise errors.TooLarge(f"The body is over {limit} bytes.")
        share.take(len(chunk))
    return bytes(content)


class ApiServer(web.Server):
    """aiohttp's server, whose own refusals (of what is no HTTP) are problems too."""

    def __init__(self, api: Api, gate: Gate) -> None:
        def make(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, self._loop, client_max_size=0)  # bodies have their own limits

        super().__init__(api.handle, request_factory=make, access_log=None, auto_decompress=False)
        self._gate = gate

    def __call__(self) -> RequestHandler:
        return _Connection(self, self._gate, loop=self._loop, **self._kwargs)


class _Connection(Connection):
    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        error = _unexpected(exc, None) if status == 500 else self._unreadable(exc)
        status, body, headers = problem.render(error)  # nobody knows for which path it came
        return Reply(status, headers, body, close=True)

    def _unreadable(self, exc: BaseException | None) -> errors.BrokerError:
        if isinstance(exc, LineTooLong) or "Too many" in str(exc):
            self._gate.metrics.http_refusals.inc("head-size")
            return errors.HeadTooLarge()
        return errors.Malformed("This is no HTTP that can be read.")


def _unexpected(error: BaseException | None, request_id: str | None) -> errors.BrokerError:
    """What is said of an exception that nobody expected; the log has the rest, scrubbed."""
    if isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError) and is_transient(error):
        return errors.Unavailable("The catalogue cannot be reached.", retry_after=1.0)
    _log.error("unexpected error", exc_info=error)
    return errors.BrokerError(
        "The operator finds more under this request's id." if request_id is None else f"The request's id is {request_id}."
    )


def _single(headers: CIMultiDictProxy[str], name: istr) -> str | None:
    """The value of a header that may come once: a front that takes the last of two would see another request. Raises `Malformed`."""
    if name not in headers:
        return None
    values = headers.getall(name)
    if len(values) > 1:
        raise errors.Malformed("A header is given twice.", field=str(name), expected="this header once")
    return values[0]


def _bound(dialect: Dialect) -> Iterator[tuple[contract.Operation, Handler]]:
    """The operations of a dialect with their handlers. Raises `RuntimeError` when one is missing on either side."""
    operations = {_snake(operation.id): operation for operation in dialect.contract.operations()}
    if missing := sorted(operations.keys() - dialect.handlers.keys()):
        raise RuntimeError(f"{dialect.contract.name} has operations without a handler: {', '.join(missing)}")
    if unknown := sorted(dialect.handlers.keys() - operations.keys()):
        raise RuntimeError(f"there are handlers that {dialect.contract.name} does not know: {', '.join(unknown)}")
    return ((operation, dialect.handlers[name]) for name, operation in operations.items())


def _snake(operation_id: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation_id).lower()


def _split(path: str) -> Sequence[str]:
    return [part for part in re.split(r"(\{[a-z_]+\})", path) if part]
