"""Redirects and Metalinks made of a ticket."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.web.redirect import METALINK, file_name, metalink, openable, redirect, wants_metalink

SOURCES = [{"url": "http://a/1?token=x&y=<z>", "headers": {}}, {"url": "http://b/2", "headers": {}}]
SHA256 = "ab" * 32


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (None, False),
        ("", False),
        ("*/*", False),
        ("application/*", False),
        ("application/metalink+xml", False),  # version 3, which nobody here writes
        (METALINK, True),
        ("*/*,application/metalink4+xml,application/metalink+xml", True),  # aria2 1.36
        ("text/html, Application/Metalink4+XML ; q=0.5", True),
        ("application/metalink4+xml;q=0", False),
        ("application/metalink4+xml; q=0.000, */*", False),
        ("application/metalink4+xml;q=0.001", True),
    ],
)
def test_who_wants_a_metalink(accept: str | None, wanted: bool) -> None:
    assert wants_metalink(accept) is wanted


def test_a_redirect_names_every_source_in_a_field_of_its_own() -> None:
    fields = redirect(SOURCES, {"sha256": SHA256, "md5": "00" * 16, "sha1": "00" * 20})
    assert fields["Location"] == SOURCES[0]["url"]
    assert fields.getall("Link") == [
        "<http://a/1?token=x&y=<z>>; rel=duplicate; pri=1",
        "<http://b/2>; rel=duplicate; pri=2",
    ]
    assert fields["Repr-Digest"] == "sha-256=:q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6s=:, md5=:AAAAAAAAAAAAAAAAAAAAAA==:"
    assert fields["Digest"] == "SHA-256=q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6s=,MD5=AAAAAAAAAAAAAAAAAAAAAA=="


def test_without_digests_none_are_told() -> None:
    assert {"Repr-Digest", "Digest"}.isdisjoint(redirect(SOURCES, {}))


def test_sources_with_header_fields_are_left_out() -> None:
    assert openable({"sources": [{"url": "http://c/3", "headers": {"X-Needed": "1"}}, *SOURCES]}) == SOURCES


@pytest.mark.parametrize("pieces", [None, {"length": 4, "algorithm": "sha256", "digests": ["cd" * 32, "ef" * 32]}])
def test_a_metalink_says_what_there_is(pieces: object) -> None:
    blob = {"size": 7, "digests": {"sha256": SHA256}, "pieces": pieces}
    (file,) = ElementTree.fromstring(metalink(SOURCES, blob, "a.raw"))
    name = "{urn:ietf:params:xml:ns:metalink}"
    assert file.get("name") == "a.raw"
    assert file.findtext(f"{name}size") == "7"
    assert [(hash.get("type"), hash.text) for hash in file.findall(f"{name}hash")] == [("sha-256", SHA256)]
    assert [(url.get("priority"), url.text) for url in file.findall(f"{name}url")] == [("1", SOURCES[0]["url"]), ("2", SOURCES[1]["url"])]
    listed = file.find(f"{name}pieces")
    if pieces is None:
        assert listed is None
    else:
        assert listed is not None
        assert (listed.get("length"), listed.get("type"), [hash.text for hash in listed]) == ("4", "sha-256", ["cd" * 32, "ef" * 32])


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("debian", "qcow2", "debian.qcow2"),
        ("debian.qcow2", "qcow2", "debian.qcow2"),
        ("../../etc/passwd", None, "etc_passwd"),
        (".bashrc", "raw", "bashrc.raw"),
        ("Größe 1", "raw", "Gr_e_1.raw"),
        ("???", "raw", "id.raw"),
        ("x" * 300, None, "x" * 200),
    ],
)
def test_file_names(name: str, format: str | None, expected: str) -> None:
    assert file_name(name, format, "id") == expected


@given(st.text())
def test_a_file_name_is_safe_in_any_directory(name: str) -> None:
    found = file_name(name, None, "id")
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", found)
