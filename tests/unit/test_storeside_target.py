"""What a request names: one spelling of a path is enough for everybody, or it is refused."""

from __future__ import annotations

from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.storeside.refused import Refused
from broker.storeside.target import MAX_TARGET_LENGTH, check_path, read_target, read_token


@pytest.mark.parametrize(
    ("raw", "path", "query"),
    [
        ("/a", "/a", ""),
        ("/a/b%20c", "/a/b c", ""),
        ("/%61/b?token=x", "/a/b", "token=x"),
        ("/a%25.img", "/a%.img", ""),
        ("/%C3%BC+;=@:!?a?b", "/ü+;=@:!", "a?b"),
        ("/..a/b..", "/..a/b..", ""),
    ],
)
def test_what_can_be_read_in_one_way(raw: str, path: str, query: str) -> None:
    assert read_target(raw) == (path, query)


@pytest.mark.parametrize(
    "raw",
    [
        "", "a", "*", "/", "//a", "/a/", "/a//b", "/./a", "/a/.", "/a/../b", "/..", "http://host/a", "host:443",
        "/%2e%2e/a", "/%2E/a", "/.%2e/a", "/a%2fb", "/a%2Fb", "/a%5cb", "/a\\b", "/a%00", "/a%0a", "/a%7f", "/a\x00",
        "/a%", "/a%2", "/a%zz", "/a%ff", "/a%c0%ae", "/%252e%252e/a", "/a%252fb", "/a%2561", "/a#b", "/ü",
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused(raw: str) -> None:
    with pytest.raises(Refused) as refused:
        read_target(raw)
    assert refused.value.status == 400


def test_the_length_of_a_target() -> None:
    assert read_target("/" + "a" * (MAX_TARGET_LENGTH - 1))[0] == "/" + "a" * (MAX_TARGET_LENGTH - 1)
    with pytest.raises(Refused) as refused:
        read_target("/" + "a" * MAX_TARGET_LENGTH)
    assert refused.value.status == 414


@given(st.text(st.characters(codec="utf-8"), max_size=30).map(lambda text: "/" + text))
def test_a_path_survives_its_spelling(path: str) -> None:
    try:
        check_path(path)
    except Refused:
        return
    assert read_target(quote(path)) == (path, "")
    assert unquote(path) == path  # nobody who decodes once more sees another


@given(st.text(max_size=60) | st.text("%/.2eEfF5cC\\?#a", max_size=30).map(lambda text: "/" + text))
def test_whatever_comes_is_read_or_refused(raw: str) -> None:
    try:
        path, _ = read_target(raw)
    except Refused:
        return
    assert path.startswith("/")
    assert not {"", ".", ".."} & set(path[1:].split("/"))


@pytest.mark.parametrize(
    ("query", "headers", "expected"),
    [
        ("token=x", {}, "x"),
        ("", {"Authorization": "Bearer x"}, "x"),
        ("", {"authorization": "bEARER  x "}, "x"),
        ("token=x", {"Authorization": "Basic y"}, "x"),
        ("token=", {}, ""),
        ("", {}, 401),
        ("", {"Authorization": "Basic x"}, 401),
        ("", {"Authorization": "Bearer"}, ""),
        ("token=x", {"Authorization": "Bearer x"}, 400),
        ("", [("Authorization", "Bearer x"), ("Authorization", "Bearer y")], 400),
        ("token=x&token=x", {}, 400),
        ("token=x&a=1", {}, 400),
        ("a=1", {"Authorization": "Bearer x"}, 400),
        ("Token=x", {}, 400),
        ("token[]=x", {}, 400),
        ("token", {}, 400),
        ("&".join(["token=x"] * 5000), {}, 400),
        ("token=x;token=y", {}, "x;token=y"),
    ],
)
def test_the_one_token(query: str, headers: dict[str, str], expected: str | int) -> None:
    if isinstance(expected, str):
        assert read_token(query, headers) == expected
    else:
        with pytest.raises(Refused) as refused:
            read_token(query, headers)
        assert refused.value.status == expected
