"""What reads or writes tokens, URLs and answers, as functions of bytes: each may refuse what it gets in its own words, and must
do nothing else. A property that holds for whatever is not refused stands with each.

`PARSERS` maps names to functions and to honest inputs, from which fuzzers start.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from broker import config, metrics
from broker.claims import InvalidToken, TransferToken, from_claims
from broker.errors import BrokerError
from broker.model import Principal, Role, Store
from broker.sign.sigv4 import S3Credential, S3Signer
from broker.sign.tempurl import temp_url
from broker.sign.token import TokenSigner, generate_key, jwks
from broker.stores import s3_documents
from broker.stores.exchange import Answer, skew
from broker.stores.http import _place, _repr_digests
from broker.stores.registry import _check_address
from broker.storeside.conditional import Conditions
from broker.storeside.refused import Refused
from broker.storeside.target import read_target, read_token
from broker.storeside.verify import keys_of, verify
from broker.web.auth import Authenticator
from broker.web.client import ClientFinder
from tests.attacks import forge

NOW = 1_795_365_748.0
ISSUER, AUDIENCE, PATH = "http://broker.test", "disk-1", "/blob-1/key"
KEY = generate_key("ES256", 0)
_SIGNER = TokenSigner([KEY], ISSUER)
_PUBLISHED = keys_of(jwks([KEY]))
_PLAIN_URL = re.compile(r"[!-~]*\Z")


class Parser(NamedTuple):
    """A function that must take any bytes, and honest ones for it."""

    take: Callable[[bytes], object]
    seeds: Sequence[bytes]


PARSERS: dict[str, Parser] = {}


def parser(*seeds: bytes | str) -> Callable[[Callable[[bytes], object]], Callable[[bytes], object]]:
    def register(take: Callable[[bytes], object]) -> Callable[[bytes], object]:
        PARSERS[take.__name__] = Parser(take, [seed.encode() if isinstance(seed, str) else seed for seed in seeds])
        return take

    return register


def token_for(method: str = "GET", path: str = PATH, **claims: Any) -> TransferToken:
    return TransferToken(ISSUER, AUDIENCE, "transfer", method, path, NOW + 600, NOW, "id-1", **claims)


_GET = token_for()
_PUT = token_for("PUT", length=5, digest="md5:" + "0" * 32)
_PART = token_for("PUT", length=5, upload="5-abc", offset=10)
_HONEST = [_SIGNER.sign(token, NOW) for token in (_GET, _PUT, _PART)]


# -- tokens


@parser(*_HONEST, forge.high_s(_HONEST[0]), *forge.other_spellings(_HONEST[0]).values())
def token(data: bytes) -> None:
    """Nothing is granted but what was signed."""
    text = data.decode("latin-1")
    for method in ("GET", "PUT"):
        with contextlib.suppress(Refused):
            grant = verify(
                text, method, PATH, {"Content-Length": "5"} if method == "PUT" else {}, _PUBLISHED, NOW, audience=AUDIENCE, issuer=ISSUER
            )
            assert grant.token in (_GET, _PUT, _PART)


@parser(*(json.dumps(token.to_claims()) for token in (_GET, _PUT, _PART)), '{"iss": 1, "exp": 1e400}', "[]")
def signed_claims(data: bytes) -> None:
    """A rightly signed payload of any content is read strictly, or refused."""
    head = forge.written({"alg": "ES256", "kid": KEY.id})
    text = f"{head}.{forge.segment(data)}"
    signed = f"{text}.{forge.segment(forge.signature(text.encode(), KEY.private))}"
    with contextlib.suppress(Refused):
        grant = verify(signed, "GET", PATH, {}, _PUBLISHED, NOW, audience=AUDIENCE, issuer=ISSUER)
        assert (grant.token.path, grant.token.method, grant.token.audience) == (PATH, "GET", AUDIENCE)


@parser(*(json.dumps(token.to_claims()) for token in (_GET, _PUT, _PART)))
def claims(data: bytes) -> None:
    """Claims that are read say the same when they are written and read again."""
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(data)
        if isinstance(document, dict):
            with contextlib.suppress(InvalidToken):
                read = from_claims(document)
                written = from_claims(read.to_claims())
                assert (written.path, written.length, written.offset, written.digest) == (read.path, read.length, read.offset, read.digest)


@parser(
    json.dumps(jwks([KEY])),
    json.dumps(jwks([generate_key("EdDSA", 0)])),
    '{"keys": [{"kty": "RSA", "kid": "a", "n": "AQAB", "e": "AQAB"}]}',
    "{}",
)
def key_set(data: bytes) -> None:
    """Whatever is published makes keys of the right kind, or is no key set."""
    with contextlib.suppress(ValueError, RecursionError):
        keys = keys_of(json.loads(data))
        assert all(key.algorithm_name in ("ES256", "RS256", "EdDSA") for key in keys.values())


@parser(
    f"Bearer {_SIGNER.sign_claims({'aud': 'a', 'sub': 's', 'project': 'p', 'role': 'member', 'exp': 1000}, NOW)}",
    "bearer x",
    "Basic eA==",
    "Bearer ..",
)
def bearer(data: bytes) -> None:
    """The broker's API: any Authorization header is refused in its words."""
    with contextlib.suppress(BrokerError):
        principal = _LOOP.run_until_complete(_AUTHENTICATOR.authenticate(data.decode("latin-1")))
        raise AssertionError(f"taken for {principal}, though the only signed token ended long ago")


_LOOP = asyncio.new_event_loop()
_NO_SESSION: Any = None
_AUTHENTICATOR = Authenticator(config.Auth(audience="a"), ISSUER, lambda: jwks([KEY]), _NO_SESSION, _NO_SESSION, metrics.create())


# -- requests


@parser(
    PATH,
    "/a%20b/%C3%BC?token=x",
    "/a/../b",
    "//a",
    "/a%2fb",
    "/%2e%2e/a",
    "/a%00",
    "/%u0041",
    "*",
    "http://h/a",
    "/a?b?c#d",
    "/a;b=c",
    "/%25%34%31",
)
def target(data: bytes) -> None:
    """A path that is not refused has one reading: it has no dot segments, and comes back to itself when it is written again."""
    with contextlib.suppress(Refused):
        path, query = read_target(data.decode("latin-1"))
        assert path.startswith("/")
        assert not {"", ".", ".."} & set(path[1:].split("/"))
        assert not re.search(r"[\x00-\x1f\x7f\\]", path)
        assert unquote(path) == path
        assert read_target(f"{quote(path)}?{query}") == (path, query)


@parser(
    "token=a", "token=a&token=b", "token=a;b=c", "%74oken=a", "token", "token=a%00", "=", "&", "\nBearer x", "token=x\nBearer x\nBasic y"
)
def credentials(data: bytes) -> None:
    """A query and Authorization fields hold one token or none."""
    query, *fields = data.decode("latin-1").split("\n")
    with contextlib.suppress(Refused):
        found = read_token(query, [("Authorization", field) for field in fields])
        assert found in unquote(query.replace("+", " ")) or any(found in field for field in fields)


@parser(
    "bytes=0-99",
    'bytes=-5\n"etag"\n*\nW/"etag", "x"',
    "bytes=0-0,5-9\n\n\n\nSun, 22 Nov 2026 20:00:00 GMT\nSun, 22 Nov 1926 20:00:00 GMT",
    "bytes=999999999999999999-",
    "bytes=5-1",
    "bytes=-0",
    "lines=1-2",
)
def conditions(data: bytes) -> None:
    """A range that is taken lies within the object."""
    names = ("Range", "If-Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since")
    fields = [(name, value) for name, value in zip(names, data.decode("latin-1").split("\n"), strict=False) if value]
    asked = Conditions(fields)
    for size in (0, 100):
        with contextlib.suppress(Refused):
            span = asked.span('"etag"', size)
            assert span is None or (span[0] >= 0 and 0 < span[1] <= size - span[0])
    for method in ("GET", "PUT"):
        with contextlib.suppress(Refused):
            assert asked.check(method, '"etag"', NOW) in (True, False)


@parser("10.0.0.1, 127.0.0.1\nnode", "[::1]:80\nx", "::ffff:1.2.3.4", "1.2.3.4:5, unknown", "\x00", "fe80::1%eth0", "127.0.0.1,127.0.0.1")
def forwarded(data: bytes) -> None:
    """An address that was forwarded is one, or the peer's counts; the instance is short and printable."""
    fields, _, instance = data.decode("latin-1").partition("\n")
    with contextlib.suppress(BrokerError):
        client = _FINDER.find(_PRINCIPAL, "127.0.0.1", [fields], instance)
        ipaddress.ip_address(client.address)
        assert client.instance.isprintable()


_FINDER = ClientFinder([ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")], lambda address: None)
_PRINCIPAL = Principal("s", "p", Role.MEMBER, NOW)


# -- URLs that the broker makes


@parser("key", "a b/ü+%", "../x", "a//b", "a?b#c", "\x00", "\r\nX: y", "%2e%2e/", "日本")
def s3_url(data: bytes) -> None:
    """A presigned URL is one line of ASCII, and its path is the key."""
    key = data.decode("utf-8", "replace")
    url = _S3.presign("GET", key, expires_at=NOW + 60, now=NOW, query={"response-content-type": key})
    assert _PLAIN_URL.match(url)
    if key:
        assert unquote(urlsplit(url).path) == f"/bucket/{key}"
    assert parse_qs(urlsplit(url).query, keep_blank_values=True)["response-content-type"] == [key]


_S3 = S3Signer(S3Credential("access", "secret"), region="us-east-1", endpoint="https://s3.example.org", bucket="bucket")


@parser("key\nname", "a b/ü+%\nx y", "../x\n..", "a?b#c\n&temp_url_expires=9", "\x00\n\r", 'a\nfile"name')
def temp_url_text(data: bytes) -> None:
    """A TempURL is one line of ASCII, and names just its key, end and file name."""
    key, _, name = data.decode("utf-8", "replace").partition("\n")
    with contextlib.suppress(ValueError):
        url = temp_url("GET", "https://swift", f"/v1/AUTH_x/c/{key}", "secret", NOW + 60, filename=name)
        assert _PLAIN_URL.match(url)
        parts = urlsplit(url)
        assert unquote(parts.path) == f"/v1/AUTH_x/c/{key}"
        assert parse_qs(parts.query, keep_blank_values=True)["filename"] == [name]
        assert parse_qs(parts.query)["temp_url_expires"] == [str(int(NOW + 60))]


@parser(
    "http://h:80",
    "https://[::1]:8443/p/",
    "http://user:pw@h",
    "http://h:99999",
    "ftp://h",
    "http://h/%2e%2e",
    "http://[::1",
    "h",
    "http://h?x#y",
)
def endpoint(data: bytes) -> None:
    """An endpoint is an address, or is refused naming the field."""
    text = data.decode("latin-1")
    with contextlib.suppress(BrokerError):
        _check_address("http", text, "endpoint")
        place = _place(Store(1, "s", "http", "x", text), text)
        assert "@" not in place.origin
    with contextlib.suppress(ValueError):
        S3Signer(S3Credential("access", "secret"), region="us-east-1", endpoint=text, bucket="bucket").presign(
            "GET", "k", expires_at=NOW + 60, now=NOW
        )


# -- what stores answer


@parser(
    b'<ListPartsResult xmlns="x"><IsTruncated>true</IsTruncated><Part><PartNumber>1</PartNumber>'
    b'<ETag>"d41d8cd98f00b204e9800998ecf8427e"</ETag><Size>5</Size></Part></ListPartsResult>',
    b"<InitiateMultipartUploadResult><UploadId>x</UploadId></InitiateMultipartUploadResult>",
    b"<ListMultipartUploadsResult><Upload><Key>k</Key><UploadId>u</UploadId></Upload></ListMultipartUploadsResult>",
    b"<Error><Code>NoSuchUpload</Code></Error>",
    b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><Error>&b;</Error>',
)
def s3_answer(data: bytes) -> None:
    """A document of a store is understood, or is none."""
    with contextlib.suppress(s3_documents.BadDocument):
        page = s3_documents.parts_page(data)
        assert all(part.number >= 1 and part.size >= 0 for part in page.parts)
    with contextlib.suppress(s3_documents.BadDocument):
        assert s3_documents.upload_id(data)
    with contextlib.suppress(s3_documents.BadDocument):
        s3_documents.open_uploads(data, "k")
    s3_documents.error_code(data)


@parser(
    "sha-256=:AAAA:, md5=:1B2M2Y8AsgTpgAmY7PhCfg==:\nSun, 22 Nov 2026 20:00:00 GMT",
    "md5=::\n",
    ",\n0",
    "\nThu, 99 Foo 0000",
    "\nSun, 90071992547409932 Nov 2026 20:00:00 GMT",
)
def told(data: bytes) -> None:
    """Digests and dates of a store's answer are read, or left out."""
    digests, _, date = data.decode("latin-1").partition("\n")
    assert all(re.fullmatch("[0-9a-f]+", value) for value in _repr_digests(digests).values())
    assert isinstance(skew(Answer(200, {"Date": date}, b""), NOW), float | None)
