"""AWS Signature Version 4 for S3: presigned URLs for clients, and the Authorization header for the broker's own requests.

Rules:

* A URL names the method, host, path, query and every given header; nothing of them can change without the signature failing.
* A URL never outlives the credential behind it, nor seven days (Amazon S3 API reference, "Authenticating Requests: Using
  Query Parameters").
* The path is signed as it is sent, never normalised: keys with ``//``, ``.`` or ``%`` stay what they are. Whoever sends such a
  URL must not normalise or re-encode it (``yarl.URL(url, encoded=True)``).
* Signing keys are derived once per day and kept.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from broker.sign.mac import Mac

MAX_EXPIRES_SECONDS = 7 * 24 * 3600
UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"

_NOTHING: Mapping[str, str] = MappingProxyType({})
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_.~/-]*\Z").match
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class S3Credential:
    """An access key pair, with the session token and end of temporary ones (POSIX seconds)."""

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)
    expires_at: float | None = None


class _Day(NamedTuple):
    """What is the same for every signature of one UTC day."""

    number: int
    scope: str
    mac: Mac
    credential: str
    """The query's X-Amz-Credential, with its name, ready to send."""


class _Second(NamedTuple):
    """What is the same for every signature of one second."""

    number: int
    amz_date: str
    day: _Day
    to_sign: str
    """The string to sign up to the hash of the canonical request."""
    query: str
    """The query's algorithm, credential and date, up to the value of X-Amz-Expires."""


@lru_cache(maxsize=4096)
def _encoded(text: str) -> str:
    """URI-encode per the SigV4 rules: everything but A-Z a-z 0-9 - . _ ~ ."""
    return quote(text, safe="-._~")


def _encoded_path(key: str) -> str:
    return key if _PLAIN_PATH(key) else quote(key, safe="/~")


def _encoded_query(query: Mapping[str, str]) -> list[str]:
    """Each parameter encoded, in canonical order (by name, then value)."""
    if len(query) == 1:
        ((name, value),) = query.items()
        return [f"{_encoded(name)}={quote(value, safe='-._~')}"]
    # By pair, not by text: "a-b=" sorts before "a=" as text, but after it by name.
    return [f"{name}={value}" for name, value in sorted((_encoded(name), quote(value, safe="-._~")) for name, value in query.items())]


def _host(scheme: str, hostname: str, port: int | None) -> str:
    """The Host header that clients send: in lower case, without a default port."""
    name = f"[{hostname}]" if ":" in hostname else hostname
    return name if port is None or port == _DEFAULT_PORTS.get(scheme) else f"{name}:{port}"


class S3Signer:
    """Signs requests for one bucket at one endpoint.

    `endpoint` is ``scheme://host[:port][/prefix]`` as the client will see it. The bucket is the first segment of the path
    (`path_style`) or the first label of the host. The empty key is the bucket itself.
    """

    def __init__(self, credential: S3Credential, *, region: str, endpoint: str, bucket: str, path_style: bool = True) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or parts.query or parts.fragment or parts.username is not None:
            raise ValueError("endpoint must be http(s)://host[:port][/prefix]")
        hostname = parts.hostname if path_style else f"{bucket}.{parts.hostname}"
        prefix = parts.path.rstrip("/")
        self.credential = credential
        self.region = region
        self._host = _host(parts.scheme, hostname, parts.port)
        self.origin = f"{parts.scheme}://{self._host}"
        self._bucket_path = f"{prefix}/{_encoded_path(bucket)}" if path_style else f"{prefix}/"
        self._key_base = f"{self._bucket_path}/" if path_style else self._bucket_path
        self._token_query = "" if credential.session_token is None else f"&X-Amz-Security-Token={_encoded(credential.session_token)}"
        self._second: _Second | None = None

    def url(self, key: str, query: Mapping[str, str] = _NOTHING) -> str:
        """Where `key` lies, unsigned. To be sent as it is, without normalising or re-encoding."""
        base = self.origin + self.path(key)
        return f"{base}?{'&'.join(_encoded_query(query))}" if query else base

    def presign(
        self,
        method: str,
        key: str,
        *,
        expires_at: float,
        now: float,
        query: Mapping[str, str] = _NOTHING,
        headers: Mapping[str, str] = _NOTHING,
    ) -> str:
        """One URL; as `presigner` and `Presigner.url` say."""
        return self.presigner(method, query, headers).url(key, expires_at, now)

    def presigner(self, method: str, query: Mapping[str, str] = _NOTHING, headers: Mapping[str, str] = _NOTHING) -> Presigner:
        """What presigns `method` with these parameters and headers, for any key and time.

        The client must send all of `headers` with just these values. The body is unsigned unless they hold
        ``x-amz-content-sha256``. `query` may not hold authentication parameters (``X-Amz-…``).
        """
        lowered = _lowered(headers)
        payload = lowered.get("x-amz-content-sha256", UNSIGNED_PAYLOAD)
        canonical_headers, signed_headers = self._canonical_headers(lowered)
        before, after = _around_authentication(query)
        after = f"{self._token_query}&X-Amz-SignedHeaders={signed_headers.replace(';', '%3B')}{after}"
        return Presigner(self, method, before, after, f"{canonical_headers}\n{signed_headers}\n{payload}")

    def authorize(
        self,
        method: str,
        key: str,
        *,
        now: float,
        query: Mapping[str, str] = _NOTHING,
        headers: Mapping[str, str] = _NOTHING,
        payload_sha256: str = UNSIGNED_PAYLOAD,
    ) -> dict[str, str]:
        """The headers to send with a request of our own to ``url(key, query)``: `headers`, date, payload hash, Authorization."""
        second = self.second(now)
        result = dict(headers) | {"x-amz-date": second.amz_date, "x-amz-content-sha256": payload_sha256}
        if self.credential.session_token is not None:
            result["x-amz-security-token"] = self.credential.session_token
        canonical_headers, signed_headers = self._canonical_headers(_lowered(result))
        request = f"{method}\n{self.path(key)}\n{'&'.join(_encoded_query(query))}\n{canonical_headers}\n{signed_headers}\n{payload_sha256}"
        result["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.credential.access_key}/{second.day.scope}, "
            f"SignedHeaders={signed_headers}, Signature={_signature(second, request)}"
        )
        return result

    def path(self, key: str) -> str:
        """The path of `key`, encoded."""
        return self._key_base + _encoded_path(key) if key else self._bucket_path

    def _canonical_headers(self, lowered: dict[str, str]) -> tuple[str, str]:
        """The canonical headers and their names; `lowered` gains the host."""
        if "host" in lowered:
            raise ValueError("the host follows from the endpoint; it is no header to give")
        lowered["host"] = self._host
        names = sorted(lowered)
        return "".join([f"{name}:{lowered[name]}\n" for name in names]), ";".join(names)

    def second(self, now: float) -> _Second:
        """Everything that depends only on the time; kept for the second, the derived key for the day."""
        number = int(now)
        if self._second is None or self._second.number != number:
            self._second = self._at(number)
        return self._second

    def _at(self, second: int) -> _Second:
        number = second // 86400
        day = self._second.day if self._second is not None and self._second.day.number == number else self._derive(number)
        amz_date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))
        return _Second(
            second,
            amz_date,
            day,
            f"AWS4-HMAC-SHA256\n{amz_date}\n{day.scope}\n",
            f"X-Amz-Algorithm=AWS4-HMAC-SHA256&{day.credential}&X-Amz-Date={amz_date}&X-Amz-Expires=",
        )

    def _derive(self, day: int) -> _Day:
        """The signing key of one day (AWS General Reference, "Calculate the signature")."""
        date = time.strftime("%Y%m%d", time.gmtime(day * 86400))
        key = f"AWS4{self.credential.secret_key}".encode()
        for part in (date, self.region, "s3", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        scope = f"{date}/{self.region}/s3/aws4_request"
        return _Day(day, scope, Mac(key, "sha256"), f"X-Amz-Credential={_encoded(f'{self.credential.access_key}/{scope}')}")


class Presigner:
    """Presigns one kind of request: method, query and headers stay, key and time change.

    Everything that stays is put together beforehand: a URL costs one SHA-256, one HMAC and three f-strings.
    """

    __slots__ = ("_after", "_before", "_signer", "_tail", "method")

    def __init__(self, signer: S3Signer, method: str, before: str, after: str, tail: str) -> None:
        self._signer = signer
        self.method = method
        self._before = before
        self._after = after
        self._tail = tail

    def url(self, key: str, expires_at: float, now: float) -> str:
        """A URL for `key` until `expires_at` (rounded down), or until the credential ends or seven days have passed.

        Raises `ValueError` when the URL could not live for a whole second.
        """
        signer = self._signer
        second = signer.second(now)
        end = signer.credential.expires_at
        lifetime = int(expires_at if end is None or end > expires_at else end) - second.number
        if lifetime > MAX_EXPIRES_SECONDS:
            lifetime = MAX_EXPIRES_SECONDS
        elif lifetime <= 0:
            raise ValueError("the URL would have expired already: expires_at, or the credential's end, is not after now")
        path = signer.path(key)
        query = f"{self._before}{second.query}{lifetime}{self._after}"
        request = f"{self.method}\n{path}\n{query}\n{self._tail}"
        return f"{signer.origin}{path}?{query}&X-Amz-Signature={_signature(second, request)}"


def _lowered(headers: Mapping[str, str]) -> dict[str, str]:
    """Names in lower case, values trimmed and with runs of white space made one space."""
    lowered = {name.lower(): _SPACES.sub(" ", value.strip()) for name, value in headers.items()}
    if len(lowered) != len(headers):
        raise ValueError("a header is given twice")
    return lowered


def _around_authentication(query: Mapping[str, str]) -> tuple[str, str]:
    """What stands before and after the authentication parameters in the canonical query, where all are sorted."""
    pairs = _encoded_query(query)
    before = [pair for pair in pairs if pair.partition("=")[0] < "X-Amz-"]
    after = pairs[len(before) :]
    if after and after[0].startswith("X-Amz-"):
        raise ValueError("query may not hold authentication parameters")
    return "".join([f"{pair}&" for pair in before]), "".join([f"&{pair}" for pair in after])


def _signature(second: _Second, request: str) -> str:
    hashed = hashlib.sha256(request.encode()).hexdigest()
    return second.day.mac.hexdigest(f"{second.to_sign}{hashed}".encode())
