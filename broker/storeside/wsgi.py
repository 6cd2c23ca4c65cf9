"""A WSGI application behind the broker: every request needs a token, and its body is what the token binds.

::

    keys = BackgroundKeys(KeySource("https://broker/.well-known/jwks.json"))
    app = Verified(app, keys, audience="disk-1", issuer="https://broker")

The application finds its `broker.storeside.Grant` in ``environ["broker.grant"]``, and no token any more: not in the query, not in
Authorization, not in the raw URI. Of a body that is not what the token binds it never reads the end: ``wsgi.input`` raises
`Refused`, and so does ``start_response`` afterwards. Nor can it say yes to a write that it has not read to its end. The server's
own access log may hold tokens: switch it off.

WSGI hands over the path decoded, as Latin-1. It is taken as the UTF-8 that it is; where the server tells the raw target as well
(``REQUEST_URI``, ``RAW_URI``), both must name the same path, which is how ``%2F`` is found out. Elsewhere ``%2F`` is a slash, for
the verifier and for the application alike. With `BackgroundKeys` made before a server forks, its children have no thread: make it
in each (gunicorn without ``--preload`` does).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import orjson

from broker.storeside.body import Body
from broker.storeside.gate import GRANT
from broker.storeside.jwks import BackgroundKeys
from broker.storeside.refused import Refused
from broker.storeside.target import read_target, read_token
from broker.storeside.verify import Grant, UnknownKey, verify

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]

_RAW = ("REQUEST_URI", "RAW_URI")
_CHUNK = 1 << 16


class Verified:
    """`app`, for requests that carry a token of `issuer` for `audience`."""

    def __init__(self, app: Application, keys: BackgroundKeys, *, audience: str, issuer: str) -> None:
        self._app = app
        self._keys = keys
        self._audience = audience
        self._issuer = issuer

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        try:
            grant = self._admit(environ)
        except Refused as refused:
            return _refuse(start_response, refused)
        method, body = environ["REQUEST_METHOD"], Body(grant)
        inner = {name: value for name, value in environ.items() if name not in ("HTTP_AUTHORIZATION", *_RAW)}
        inner |= {"QUERY_STRING": "", GRANT: grant, "wsgi.input": _Input(environ["wsgi.input"], body)}
        begun = False

        def begin(status: str, headers: list[tuple[str, str]], *rest: Any) -> Callable[[bytes], object]:
            nonlocal begun
            refused = body.answerable(method, int(status[:3]))
            if refused is not None and not begun:
                raise refused
            begun = True
            return start_response(status, headers, *rest)

        try:
            result = self._app(inner, begin)
        except Refused as refused:
            if begun:
                raise
            return _refuse(start_response, refused)
        if method not in ("PUT", "POST"):
            return result  # as it is: the server may send a file by itself
        return _guarded(result, lambda refused: None if begun else _refuse(start_response, refused))

    def _admit(self, environ: Environ) -> Grant:
        path, fields = _path(environ), _fields(environ)
        if environ.get("HTTP_TRANSFER_ENCODING") and not environ.get("wsgi.input_terminated"):
            raise Refused(411, "this server cannot tell the end of a body that does not state its length")
        token = read_token(environ.get("QUERY_STRING", ""), fields)
        try:
            return self._verify(token, environ["REQUEST_METHOD"], path, fields)
        except UnknownKey:
            self._keys.refetch()
        return self._verify(token, environ["REQUEST_METHOD"], path, fields)

    def _verify(self, token: str, method: str, path: str, fields: Mapping[str, str]) -> Grant:
        return verify(token, method, path, fields, self._keys.keys(), time.time(), audience=self._audience, issuer=self._issuer)


class _Input:
    """``wsgi.input`` that gives only what `body` allows, and never waits for more than the request says."""

    def __init__(self, stream: Any, body: Body) -> None:
        self._stream = stream
        self._body = body
        self._line = b""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(_CHUNK), b""))
        if self._line:
            found, self._line = self._line[:size], self._line[size:]
            return found
        if self._body.whole or size == 0:
            return b""
        missing = self._body.missing
        chunk: bytes = self._stream.read(size if missing is None else min(size, missing))
        return self._body.take(chunk, last=not chunk)

    def readline(self, size: int = -1) -> bytes:
        while b"\n" not in self._line and (size < 0 or len(self._line) < size):
            held, self._line = self._line, b""
            more = self.read(_CHUNK)
            self._line = held + more
            if not more:
                break
        end = self._line.find(b"\n") + 1 or len(self._line)
        return self.read(end if size < 0 else min(end, size))

    def readlines(self, hint: int = -1) -> list[bytes]:
        return list(self)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")


def _guarded(result: Iterable[bytes], refuse: Callable[[Refused], list[bytes] | None]) -> Iterator[bytes]:
    """The application's answer; a refusal instead when one comes before it has begun."""
    try:
        yield from result
    except Refused as refused:
        answer = refuse(refused)
        if answer is None:
            raise
        yield from answer
    finally:
        if hasattr(result, "close"):
            result.close()


def _path(environ: Environ) -> str:
    """The path that the application will act on. Raises `Refused` (400) when the raw target, if told, says another."""
    try:
        path: str = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1").decode()
    except ValueError:
        raise Refused(400, "the path is not UTF-8") from None
    for raw in [environ[name] for name in _RAW if name in environ] or [quote(path)]:
        if read_target(raw.partition("?")[0])[0] != path:
            raise Refused(400, "the path can be read in two ways")
    return path


def _fields(environ: Environ) -> dict[str, str]:
    """The request's fields. A server joins those that came twice by commas, which no field that may come once survives."""
    own = [(name, name) for name in ("CONTENT_LENGTH", "CONTENT_TYPE") if environ.get(name)]
    others = [(name, name[5:]) for name in environ if name.startswith("HTTP_") and name[5:] not in ("CONTENT_LENGTH", "CONTENT_TYPE")]
    return {field.replace("_", "-").lower(): environ[name] for name, field in own + others}


def _refuse(start_response: StartResponse, refused: Refused) -> list[bytes]:
    body = orjson.dumps(refused.problem())
    fields = {"Content-Type": "application/problem+json", "Content-Length": str(len(body)), **refused.headers}
    start_response(f"{refused.status} {HTTPStatus(refused.status).phrase}", list(fields.items()))
    return [body]
