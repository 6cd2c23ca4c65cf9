"""Our SigV4 gives what botocore gives, for everything that a store may be asked; and its own rules hold."""

from __future__ import annotations

import datetime
from contextlib import AbstractContextManager
from unittest import mock
from urllib.parse import parse_qsl, urlsplit

import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.compat import HTTPHeaders  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]
from hypothesis import example, given
from hypothesis import strategies as st

from broker.sign.sigv4 import MAX_EXPIRES_SECONDS, S3Credential, S3Signer

NOW = 1_795_365_748.25
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
keys = st.one_of(st.text("ab/.+% ~é*'();:@&=$,?#[]", max_size=20), texts).map(lambda key: key.removeprefix("/") or "k")
query_names = st.one_of(
    st.sampled_from(
        [
            "response-content-type",
            "response-content-disposition",
            "uploadId",
            "partNumber",
            "X-Amz",
            "W",
            "Z",
            "a-b",
            "a",
            "x-amz-checksum-mode",
        ]
    ),
    texts.filter(lambda name: name != "" and not name.startswith("X-Amz-")),
)
queries = st.dictionaries(query_names, texts, max_size=4)
header_names = st.sampled_from(
    ["Content-MD5", "content-length", "If-None-Match", "x-amz-checksum-sha256", "X-Amz-Meta-Blob", "x-amz-content-sha256"]
)
headers = st.dictionaries(header_names, st.text("abc*=/+ 012", min_size=1, max_size=12).filter(str.strip), max_size=4)
endpoints = st.sampled_from(
    ["http://127.0.0.1:8333", "https://S3.example.org", "https://s3.example.org:443", "http://s3:80/", "https://[::1]:9000"]
)
tokens = st.sampled_from([None, "FwoGZXIvYXdzE+/=="])
regions = st.sampled_from(["us-east-1", "eu-central-1", "default"])
instants = st.floats(min_value=1e9, max_value=3e9)


def frozen(now: float) -> AbstractContextManager[object]:
    instant = datetime.datetime.fromtimestamp(int(now), datetime.UTC)
    return mock.patch("botocore.auth.get_current_datetime", return_value=instant)


def signer(
    endpoint: str = "https://s3.example.org", *, token: str | None = None, region: str = "eu-central-1", path_style: bool = True
) -> S3Signer:
    return S3Signer(
        S3Credential("AKIDEXAMPLE", "s3cr3t/+", token), region=region, endpoint=endpoint, bucket="images", path_style=path_style
    )


@given(
    keys,
    queries,
    headers,
    endpoints,
    tokens,
    regions,
    st.booleans(),
    instants,
    st.integers(1, MAX_EXPIRES_SECONDS),
    st.sampled_from(["GET", "PUT"]),
)
@example("a//b/../c%20 +~é", {"X-Amz": "1", "a-b": "", "a": "ü"}, {"Content-MD5": " x  y "}, "http://h", "t/", "r", True, NOW, 60, "PUT")
def test_presign_equals_botocore(
    key: str,
    query: dict[str, str],
    given_headers: dict[str, str],
    endpoint: str,
    token: str | None,
    region: str,
    path_style: bool,
    now: float,
    lifetime: int,
    method: str,
) -> None:
    if "[" in endpoint and not path_style:
        return
    if "x-amz-content-sha256" in given_headers:
        given_headers = given_headers | {"x-amz-content-sha256": EMPTY_SHA256}
    ours = signer(endpoint, token=token, region=region, path_style=path_style)
    url = ours.presign(method, key, expires_at=int(now) + lifetime, now=now, query=query, headers=given_headers)

    request = AWSRequest(method=method, url=ours.url(key), params=dict(query), headers=dict(given_headers))
    with frozen(now):
        S3SigV4QueryAuth(Credentials("AKIDEXAMPLE", "s3cr3t/+", token), "s3", region, lifetime).add_auth(request)
    theirs = urlsplit(request.url)
    mine = urlsplit(url)
    assert (mine.scheme, mine.netloc, mine.path) == (theirs.scheme, theirs.netloc, theirs.path)
    assert sorted(mine.query.split("&")) == sorted(theirs.query.split("&"))


@given(keys | st.just(""), queries, headers, endpoints, tokens, instants, st.sampled_from(["UNSIGNED-PAYLOAD", EMPTY_SHA256]))
def test_authorize_equals_botocore(
    key: str, query: dict[str, str], given_headers: dict[str, str], endpoint: str, token: str | None, now: float, payload: str
) -> None:
    given_headers = {name: value for name, value in given_headers.items() if name != "x-amz-content-sha256"}
    ours = signer(endpoint, token=token)
    mine = ours.authorize("PUT", key, now=now, query=query, headers=given_headers, payload_sha256=payload)

    request = AWSRequest(method="PUT", url=ours.url(key, query), headers=dict(given_headers))
    with frozen(now), mock.patch.object(S3SigV4Auth, "payload", return_value=payload):
        S3SigV4Auth(Credentials("AKIDEXAMPLE", "s3cr3t/+", token), "s3", "eu-central-1").add_auth(request)
    theirs: HTTPHeaders = request.headers
    assert {name.lower(): value for name, value in mine.items()} == {name.lower(): value for name, value in theirs.items()}


def test_the_bucket_itself() -> None:
    assert signer().url("") == "https://s3.example.org/images"
    assert signer(path_style=False).url("") == "https://images.s3.example.org/"
    assert (
        signer("https://s3.example.org/base/").url("a b", {"b": "1", "a": "x y"}) == "https://s3.example.org/base/images/a%20b?a=x%20y&b=1"
    )


def lifetime_of(url: str) -> int:
    return int(dict(parse_qsl(urlsplit(url).query))["X-Amz-Expires"])


@pytest.mark.parametrize(
    ("expires_in", "credential_in", "lifetime"),
    [
        (600.0, None, 600),
        (600.75, None, 601),  # from the whole second before NOW (.25) to the whole second before the end
        (600.0, 90.0, 90),
        (60.0, 90.0, 60),
        (30 * 86400.0, None, MAX_EXPIRES_SECONDS),
    ],
)
def test_a_url_never_outlives_its_credential_nor_seven_days(expires_in: float, credential_in: float | None, lifetime: int) -> None:
    credential = S3Credential("AK", "sk", "st", None if credential_in is None else NOW + credential_in)
    url = S3Signer(credential, region="r", endpoint="http://h", bucket="b").presign("GET", "k", expires_at=NOW + expires_in, now=NOW)
    assert lifetime_of(url) == lifetime


@pytest.mark.parametrize(("expires_at", "credential_end"), [(NOW, None), (NOW - 5, None), (NOW + 600, NOW - 1)])
def test_what_would_have_expired_is_not_signed(expires_at: float, credential_end: float | None) -> None:
    ours = S3Signer(S3Credential("AK", "sk", None, credential_end), region="r", endpoint="http://h", bucket="b")
    with pytest.raises(ValueError, match="expired"):
        ours.presign("GET", "k", expires_at=expires_at, now=NOW)


def test_the_day_changes_the_derived_key() -> None:
    ours = signer()
    midnight = 1_795_392_000.0
    before = ours.presign("GET", "k", expires_at=midnight + 60, now=midnight - 1)
    after = ours.presign("GET", "k", expires_at=midnight + 60, now=midnight)
    assert before == signer().presign("GET", "k", expires_at=midnight + 60, now=midnight - 1)
    assert after == signer().presign("GET", "k", expires_at=midnight + 60, now=midnight)
    assert ours.presign("GET", "k", expires_at=midnight + 60, now=midnight - 1) == before
    assert ours.presign("GET", "k", expires_at=midnight + 60, now=midnight - 0.5) == before  # the same second


@pytest.mark.parametrize("endpoint", ["ftp://h", "https://", "https://h?x=1", "https://h#f", "https://u:p@h", "h:80"])
def test_an_endpoint_must_be_one(endpoint: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        signer(endpoint)


def test_what_would_confuse_the_store_is_refused() -> None:
    with pytest.raises(ValueError, match="authentication"):
        signer().presign("GET", "k", expires_at=NOW + 60, now=NOW, query={"X-Amz-Expires": "9999999"})
    with pytest.raises(ValueError, match="host"):
        signer().presign("GET", "k", expires_at=NOW + 60, now=NOW, headers={"Host": "evil"})
    with pytest.raises(ValueError, match="twice"):
        signer().presign("GET", "k", expires_at=NOW + 60, now=NOW, headers={"A": "1", "a": "2"})


def test_secrets_are_in_no_repr() -> None:
    text = repr(S3Credential("AK", "very-secret", "very-token"))
    assert "AK" in text
    assert "very" not in text
