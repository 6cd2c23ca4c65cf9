"""The status page's way from a request to its answer: who looks, signing in, signing out.

Rules
- Only ``/`` is answered here: GET for a browser, which says ``text/html`` in Accept, and POST of a form. Everything else at ``/`` stays
  free for others who ask there.
- Who comes with a token in Authorization or X-Auth-Token is known by it, as everywhere. A browser signs in: the form's token is checked
  as one in a header would be, refusals counted alike, and answered with a session (`broker.web.status.session`). A token is never read
  from a URL, never kept, never shown.
- A form counts only from a page of this broker (Sec-Fetch-Site, else Origin): nobody can sign somebody else in, or out.
- No page may be framed, cached, or load anything but its own style.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs, urlsplit

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from broker import errors
from broker.model import Client, Principal
from broker.service.status import Overviews
from broker.web import problem
from broker.web.call import Answer
from broker.web.keystone_tokens import AUTH_TOKEN_HEADER
from broker.web.status import render
from broker.web.status.session import Sessions

PATH = "/"
FORM_LIMIT = 16 << 10
REFRESH_SECONDS = 10

Identify = Callable[[CIMultiDictProxy[str], str], Awaitable[Client]]
"""From header fields and the socket's address to who asks; raises what the API answers with."""

ReadBody = Callable[[web.BaseRequest, Client | None, int], Awaitable[bytes]]
"""The request's body, up to a limit; raises what the API answers with."""

_FORM = "application/x-www-form-urlencoded"
_HTML = re.compile(r"(?:^|,)\s*text/html\s*(?:;(?!\s*q=0(?:\.0*)?\s*(?:[,;]|$))[^,]*)?(?:,|$)", re.IGNORECASE)
_FIELDS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src '{render.STYLE_HASH}'; img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # none at all would take Origin from forms too (Fetch standard, "append a request Origin header")
    "Vary": "Accept, Authorization, Cookie, X-Auth-Token",
    "X-Content-Type-Options": "nosniff",
}


def is_for_browsers(request: web.BaseRequest) -> bool:
    """Whether a request for ``/`` is one for the page."""
    if request.method in ("GET", "HEAD"):
        return _HTML.search(request.headers.get("Accept", "")) is not None
    return request.method == "POST" and request.content_type == _FORM


def is_own_form(headers: CIMultiDictProxy[str], public_host: str) -> bool:
    """Whether a form was sent from a page of this broker, which has the name `public_host` besides the one it was asked by.

    Browsers say so: by Sec-Fetch-Site where the connection is trustworthy, else by Origin. What says neither is no browser, and nobody
    can make it send anything.
    """
    if "Sec-Fetch-Site" in headers:
        return headers.getall("Sec-Fetch-Site") == ["same-origin"]
    if "Origin" in headers:
        host = urlsplit(headers["Origin"]).netloc.lower()
        return len(headers.getall("Origin")) == 1 and host != "" and host in (headers.get("Host", "").lower(), public_host.lower())
    return True


class Pages:
    """Answers browsers. `keystone` says whether tokens of Keystone are accepted, `public_url` how browsers may name this broker."""

    def __init__(self, overviews: Overviews, sessions: Sessions, *, public_url: str, keystone: bool) -> None:
        self._overviews = overviews
        self._sessions = sessions
        self._public_host = urlsplit(public_url).netloc
        self._keystone = keystone

    async def answer(self, request: web.BaseRequest, identify: Identify, read: ReadBody) -> Answer:
        """The page, or the form to sign in, whatever happens but a mistake of ours."""
        try:
            if request.method == "POST":
                return await self._form(request, identify, read)
            principal = await self._viewer(request, identify)
        except errors.TooLarge:  # the rest of it is on its way: the connection has to end
            raise
        except errors.BrokerError as error:
            return self._refused(error)
        if principal is None:
            return self._sign_in(401, {"WWW-Authenticate": f'Bearer realm="{problem.REALM}"'})
        overview = await self._overviews.of(principal)
        refresh = None if request.query.get("refresh") == "off" else REFRESH_SECONDS
        has_session = "Authorization" not in request.headers and AUTH_TOKEN_HEADER not in request.headers
        # In a thread: with hundreds of stores it takes a while, and tickets must not wait for it.
        body = await asyncio.to_thread(render.status, overview, principal, refresh=refresh, can_sign_out=has_session)
        return Answer(200, body, dict(_FIELDS))

    async def _viewer(self, request: web.BaseRequest, identify: Identify) -> Principal | None:
        headers = request.headers
        if "Authorization" in headers or AUTH_TOKEN_HEADER in headers:
            return (await identify(headers, request.remote or "")).principal
        return self._sessions.principal("; ".join(headers.getall("Cookie", ())))

    async def _form(self, request: web.BaseRequest, identify: Identify, read: ReadBody) -> Answer:
        if not is_own_form(request.headers, self._public_host):
            raise errors.Forbidden("The form was sent from a page of somebody else.")
        fields = _fields(await read(request, None, FORM_LIMIT))
        if "sign-out" in fields:
            return _go_on(self._sessions.close())
        token = fields.get("token", "").strip()
        if not token or not token.isascii() or not token.isprintable():
            raise errors.Malformed("A token is letters, digits, dots, hyphens and the like, in one line.", field="token")
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() == "x-forwarded-for")
        if fields.get("kind") == "keystone" and self._keystone:
            headers[AUTH_TOKEN_HEADER] = token
        else:
            headers["Authorization"] = f"Bearer {token}"
        client = await identify(CIMultiDictProxy(headers), request.remote or "")
        return _go_on(self._sessions.open(client.principal))

    def _refused(self, error: errors.BrokerError) -> Answer:
        """The form again, with what was wrong."""
        status, _, headers = problem.render(error, token_given=True)
        if isinstance(error, errors.Unauthenticated):
            said = "This token is not accepted: it is no token of this broker or its issuers, or it has ended."
        else:
            said = error.detail or error.title
        kept = {name: value for name, value in headers.items() if name not in ("Content-Type", "Cache-Control")}
        return self._sign_in(status, kept, said)

    def _sign_in(self, status: int, headers: dict[str, str], said: str | None = None) -> Answer:
        return Answer(status, render.sign_in(said, keystone=self._keystone), _FIELDS | headers)


def _fields(body: bytes) -> dict[str, str]:
    """The form's fields, each once. Raises `Malformed`."""
    try:
        found = parse_qs(body.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=8)
    except ValueError:
        raise errors.Malformed("This is no form that can be read.") from None
    if any(len(values) > 1 for values in found.values()):
        raise errors.Malformed("A field of the form is given twice.")
    return {name: values[0] for name, values in found.items()}


def _go_on(cookie: str) -> Answer:
    """To the page, by GET (RFC 9110 section 15.4.4)."""
    return Answer(303, b"", {**_FIELDS, "Location": PATH, "Set-Cookie": cookie})
