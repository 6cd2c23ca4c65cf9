"""Our TempURL is what swiftclient makes, and what Swift's own middleware takes apart."""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swiftclient.utils import generate_temp_url  # type: ignore[import-untyped]

from broker.sign.tempurl import Digest, temp_url

names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
containers = names.filter(lambda name: "/" not in name)
digests = st.sampled_from(["sha256", "sha512"])


@given(
    containers,
    names,
    st.floats(0, 4e9),
    names,
    digests,
    st.sampled_from(["GET", "PUT", "DELETE"]),
    st.sampled_from([None, "10.0.0.0/8", "::1"]),
    st.booleans(),
)
def test_equals_swiftclient(
    container: str, name: str, end: float, key: str, digest: Digest, method: str, network: str | None, whole: bool
) -> None:
    prefix = None if whole else name[:1]
    path = f"/v1/AUTH_x/{container}/{name}"
    ours = urlsplit(temp_url(method, "https://swift.example.org:8080", path, key, end, digest=digest, ip_range=network, prefix=prefix))

    signed = path if prefix is None else f"/v1/AUTH_x/{container}/{prefix}"
    theirs = generate_temp_url(signed, int(end), key, method, absolute=True, prefix=prefix is not None, ip_range=network, digest=digest)
    signature = theirs.rpartition("?temp_url_sig=")[2].partition("&")[0] if "?" not in signed else None
    assert (ours.scheme, ours.netloc, unquote(ours.path)) == ("https", "swift.example.org:8080", path)
    query = dict(parse_qsl(ours.query, keep_blank_values=True))
    assert query["temp_url_expires"] == str(int(end))
    assert signature is None or query["temp_url_sig"] == signature
    assert f"temp_url_sig={query['temp_url_sig']}&temp_url_expires={int(end)}" in theirs
    assert query.get("temp_url_ip_range") == network
    assert query.get("temp_url_prefix") == prefix


def test_the_answer_can_be_named() -> None:
    url = temp_url("GET", "http://h", "/v1/a/c/o", "key", 10, filename="a b&c.img", inline=True)
    assert url.endswith("&filename=a%20b%26c.img&inline")


@pytest.mark.parametrize("path", ["/v1/a/c", "/v1/a/c/", "v1/a/c/o", "/v1//c/o", ""])
def test_a_path_must_name_an_object(path: str) -> None:
    with pytest.raises(ValueError, match="path must be"):
        temp_url("GET", "http://h", path, "key", 10)


def test_the_path_lies_under_the_prefix() -> None:
    with pytest.raises(ValueError, match="prefix"):
        temp_url("GET", "http://h", "/v1/a/c/o", "key", 10, prefix="x")
