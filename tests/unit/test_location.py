"""Which store a URL names: nothing but what was registered, in one spelling."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from broker.errors import Invalid
from broker.model import Store
from broker.stores.location import MAX_URL_LENGTH, locate, url_of


def _store(name: str, kind: str, endpoint: str, **more: Any) -> Store:
    fields = {field: more.pop(field) for field in ("internal_endpoint",) if field in more}
    return Store(id=len(name), name=name, kind=kind, site="eu", endpoint=endpoint, settings=more, **fields)


S3 = _store("s3", "s3", "https://s3.example", bucket="images", internal_endpoint="http://10.0.0.5:8333")
NESTED = _store("nested", "s3", "https://s3.example", bucket="images", prefix="team/")
HOSTED = _store("hosted", "s3", "https://s3.other:8443/base", bucket="b1", style="virtual")
SWIFT = _store("swift", "swift", "http://swift.example:8080", account="AUTH_x", container="glance")
FILES = _store("files", "http", "http://files.example/data", prefix="v-")
SIX = _store("six", "s3", "http://[2001:db8::1]:9000", bucket="b2")
RAW = _store("third", "tape", "tape://robot")
STORES = [S3, NESTED, HOSTED, SWIFT, FILES, SIX, RAW]


@pytest.mark.parametrize(
    ("url", "store", "key"),
    [
        ("s3://s3.example/images/p/a", "s3", "p/a"),
        ("s3+https://s3.example/images/p/a", "s3", "p/a"),
        ("https://s3.example/images/p/a", "s3", "p/a"),
        ("HTTPS://S3.Example:443/images/p/a", "s3", "p/a"),
        ("s3://s3.example/images/team", "s3", "team"),
        ("s3://s3.example/images/team/a", "nested", "a"),
        ("s3://s3.example/images/teams/a", "s3", "teams/a"),
        ("s3://s3.example/images/p/%61%20b", "s3", "p/a b"),
        ("s3://s3.example/images/p%252Fq/a", "s3", "p%2Fq/a"),
        ("s3://s3.example/images/%C3%A9", "s3", "é"),
        ("https://b1.s3.other:8443/base/k", "hosted", "k"),
        ("s3://s3.other:8443/base/b1/k", "hosted", "k"),
        ("swift+http://swift.example:8080/v1/AUTH_x/glance/k", "swift", "k"),
        ("http://swift.example:8080/v1/AUTH_x/glance/k/l", "swift", "k/l"),
        ("http://files.example/data/v-k", "files", "k"),
        ("http://files.example:80/data/v-k", "files", "k"),
        ("s3+http://[2001:DB8::1]:9000/b2/k", "six", "k"),
    ],
)
def test_a_url_below_a_store_names_it(url: str, store: str, key: str) -> None:
    found = locate(url, STORES)
    assert (found.store.name, found.key) == (store, key)


@pytest.mark.parametrize(
    "url",
    [
        # other hosts, ports, transports, kinds
        "https://s3.example.evil/images/k", "https://evil/s3.example/images/k", "https://s3.example./images/k", "https://xs3.example/images/k",
        "https://s3.example:8443/images/k", "http://s3.example/images/k", "http://s3.example:443/images/k", "s3+http://s3.example/images/k",
        "swift://s3.example/images/k", "s3://files.example/data/v-k", "swift://swift.example:8080/v1/AUTH_x/glance/k",
        "http://169.254.169.254/latest/meta-data", "http://127.0.0.1/k", "http://[::1]/k", "http://[::ffff:7f00:1]/k",
        "https://%73%33.example/images/k", "http://2130706433/k",
        # the address that only the broker uses
        "http://10.0.0.5:8333/images/k",
        # tricks with prefixes
        "https://s3.example/images", "https://s3.example/images/", "https://s3.example/images-private/k", "https://s3.example/image/k",
        "https://s3.example/k", "http://files.example/data/k", "http://files.example/datav-/k", "http://files.example/data/v-",
        "http://swift.example:8080/v1/AUTH_xy/glance/k", "http://swift.example:8080/v1/AUTH_x/glance_segments/k", "https://images/k",
        "https://b2.s3.other:8443/base/k",
        # spellings
        "https://s3.example/images/../other/k", "https://s3.example/images/%2e%2e/k", "https://s3.example/images/.%2E/k",
        "https://s3.example/images/./k", "https://s3.example/images//k", "https://s3.example//images/k", "https://s3.example/images%2Fk",
        "https://s3.example/images/a%2fb", "https://s3.example/images/a%5Cb", "https://s3.example/images/a\\b", "https://s3.example/images/%",
        "https://s3.example/images/%4", "https://s3.example/images/%zz", "https://s3.example/images/%00", "https://s3.example/images/%0a",
        "https://s3.example/images/%ff", "https://s3.example/images/k?x=1", "https://s3.example/images/k?", "https://s3.example/images/k#x",
        "https://s3.example/images/k ", " https://s3.example/images/k", "https://s3.example/images/k\n", "https://s3.ex\tample/images/k",
        "https://s3.example/images/é", "https://ｓ3.example/images/k", "https:\\\\s3.example\\images\\k",
        # users
        "https://s3.example@evil/images/k", "https://user:secret@s3.example/images/k", "s3://AK:SK@s3.example/images/k",
        "https://@s3.example/images/k",
        # no URL of an object
        "", "k", "/images/k", "//s3.example/images/k", "https:///images/k", "https://s3.example:x/images/k", "https://s3.example:99999/images/k",
        "https://[s3.example/images/k", "file:///etc/passwd", "ftp://s3.example/images/k", "gopher://s3.example/images/k", "tape://robot/k",
        "javascript:alert(1)", "s3://https://s3.example/images/k", "https://s3.example/images/" + "k" * MAX_URL_LENGTH,
    ],
)  # fmt: skip
def test_every_other_url_names_none(url: str) -> None:
    with pytest.raises(Invalid) as refused:
        locate(url, STORES, field="locations")
    assert refused.value.field == "locations"
    assert refused.value.expected
    assert "secret" not in refused.value.detail


def test_the_brokers_own_address_is_known_to_who_may_see_it() -> None:
    found = locate("http://10.0.0.5:8333/images/k", STORES, internal=True)
    assert (found.store.name, found.key) == ("s3", "k")


def test_a_store_that_one_may_not_know_is_none() -> None:
    assert locate("s3://s3.example/images/team/a", [S3]).key == "team/a"
    with pytest.raises(Invalid) as hidden:
        locate("s3://s3.example/images/k", [SWIFT])
    with pytest.raises(Invalid) as absent:
        locate("s3://nowhere.example/images/k", STORES)
    assert str(hidden.value) == str(absent.value)


@pytest.mark.parametrize(
    ("store", "url"),
    [
        (S3, "s3+https://s3.example/images/p/a%20b"),
        (HOSTED, "s3+https://s3.other:8443/base/b1/p/a%20b"),
        (SWIFT, "swift+http://swift.example:8080/v1/AUTH_x/glance/p/a%20b"),
        (FILES, "http://files.example/data/v-p/a%20b"),
        (SIX, "s3+http://[2001:db8::1]:9000/b2/p/a%20b"),
        (RAW, None),
    ],
)
def test_a_location_is_spelled_by_its_kind(store: Store, url: str | None) -> None:
    assert url_of(store, "p/a b") == url


_SEGMENT = some.text(
    some.characters(exclude_characters="/\\", exclude_categories=["Cc", "Cs", "Cn", "Cf", "Co", "Zl", "Zp", "Zs"]), min_size=1
)
_KEYS = some.lists(_SEGMENT.filter(lambda segment: segment not in (".", "..")), min_size=1, max_size=4).map("/".join)


@given(store=some.sampled_from([HOSTED, SWIFT, FILES, SIX, NESTED]), key=_KEYS)
def test_what_is_spelled_is_found_again(store: Store, key: str) -> None:
    url = url_of(store, key)
    assert url is not None
    found = locate(url, STORES)
    assert (found.store, found.key) == (store, key)


@given(some.text())
def test_any_text_names_a_store_or_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        locate(text, STORES)
