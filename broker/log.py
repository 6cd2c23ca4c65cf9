"""Logs: one JSON object a line (readable lines on a terminal), with the request's id, and without secrets (invariant 13).

Everything goes through `scrub` last, tracebacks and the lines of libraries too: values of signatures and tokens in queries,
credentials in headers and in URLs, whatever looks like a JWT, and the secrets that the broker itself has read. A field
whose name says that it is secret loses its value whatever that is.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, MutableMapping
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, TextIO

import orjson
import stamina.instrumentation
import structlog

HIDDEN = "[hidden]"


class RequestContext(NamedTuple):
    """What every line that is logged during a request carries."""

    id: str
    traceparent: str | None = None


current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)

# Names of query parameters and headers whose values let somebody in. SigV4: AWS General Reference; TempURL: Swift's documentation.
_PARAMETERS = (
    r"x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature|awsaccesskeyid|signature|temp_url_sig|sig|token|access_token"
    r"|id_token|jwt|password|secret|client_secret"
)
_HEADERS = (
    r"authorization|proxy-authorization|x-auth-token|x-subject-token|x-storage-token|x-service-token|cookie|set-cookie|api-key|x-api-key"
)
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?i)(AWS4-HMAC-SHA256\s+)[^\"'\r\n]+"), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)(?<![\w-])((?:{_PARAMETERS})=)[^&\s\"'<>#,;)}}\]]+"), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)(?:(?<![\w-])|(?<=%[0-9a-f]{{2}}))((?:{_PARAMETERS})%3D)[^&\s\"'<>#,;)}}\]%]+"), rf"\1{HIDDEN}"),
    (
        re.compile(rf"(?i)(?<![\w-])([\"']?(?:{_HEADERS})[\"']?\s*[:=,]\s*[\"']?)(?:(?:bearer|basic|digest|negotiate)\s+)?[^\s\"']+"),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[a-z0-9._~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(r"eyJ[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*){0,4}"), HIDDEN),
    (re.compile(r"gAAAA[A-Za-z0-9_-]{20,}={0,2}"), HIDDEN),  # Fernet: the version 0x80, and a time whose first bytes are 0
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s/:@\"']*:)[^\s/@\"']+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
)
_SECRET_NAME = re.compile(
    r"(?i)authorization|password|passphrase|secret|credential$|private|cookie|bearer|^token$|_token$|x-auth-token|^url$|signed_url"
)

Secrets = Callable[[], Iterable[str]]


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without what lets anybody in."""
    for secret in secrets:
        if secret and secret in text:
            text = text.replace(secret, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _tell_retry(details: stamina.instrumentation.RetryDetails) -> None:
    """One short line for what is tried again: the error's class alone, since texts of network errors may quote a request."""
    structlog.stdlib.get_logger(__name__).info(
        "trying again", error=type(details.caused_by).__name__, number=details.retry_num, wait_seconds=round(details.wait_for, 2)
    )


def configure(
    level: Literal["debug", "info", "warning", "error"] = "info",
    format: Literal["auto", "json", "console"] = "auto",
    *,
    secrets: Secrets = tuple,
    stream: TextIO | None = None,
) -> None:
    """Send this process's logs, those of libraries too, to `stream` (stderr). `secrets` is asked for each line."""
    out = stream or sys.stderr
    console = format == "console" or (format == "auto" and out.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_request,
    ]
    last: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer(serializer=lambda event, **_: orjson.dumps(event, default=str).decode())
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.UnicodeDecoder(),
            _Scrubber(secrets),
            last,
        ],
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    stamina.instrumentation.set_on_retry_hooks([_tell_retry])
    logging.getLogger("aiohttp.access").disabled = True  # one line a request is for the front; metrics count them here
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _add_request(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    request = current_request.get()
    if request is not None:
        event["request_id"] = request.id
        if request.traceparent is not None:
            event["traceparent"] = request.traceparent
    return event


class _Scrubber:
    """The last processor before rendering."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    def __call__(self, _: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        secrets = tuple(self._secrets())
        return {str(name): HIDDEN if _SECRET_NAME.search(str(name)) else self._clean(value, secrets) for name, value in event.items()}

    def _clean(self, value: Any, secrets: tuple[str, ...]) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, dict):
            return {str(name): HIDDEN if _SECRET_NAME.search(str(name)) else self._clean(item, secrets) for name, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._clean(item, secrets) for item in value]
        return scrub(value if isinstance(value, str) else str(value), secrets)
