"""Where a client is: only trusted proxies are believed, and only as far as they are trusted."""

from __future__ import annotations

import ipaddress

import pytest

from broker.errors import Invalid
from broker.model import Principal, Role
from broker.web.client import ClientFinder

ALICE = Principal("alice", "demo", Role.MEMBER, 1e10)
FINDER = ClientFinder(
    [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")], lambda address: "eu/az1" if address.startswith("192.") else None
)


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
        ("10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["198.51.100.7, 10.0.0.2"], "198.51.100.7"),
        ("10.0.0.1", ["1.1.1.1", "198.51.100.7", "10.9.9.9"], "198.51.100.7"),
        ("10.0.0.1", ["198.51.100.7:1234"], "198.51.100.7"),
        ("fd00::1", ["[2001:db8::5]:80"], "2001:db8::5"),
        ("10.0.0.1", ["::ffff:198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["198.51.100.7, nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["nonsense, 10.0.0.3"], "10.0.0.3"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.2, 10.0.0.3"], "10.0.0.2"),
        ("", ["198.51.100.7"], ""),
    ],
)
def test_the_address(peer: str, forwarded: list[str], address: str) -> None:
    assert FINDER.find(ALICE, peer, forwarded, None).address == address


def test_the_site_is_the_tokens_else_the_networks() -> None:
    assert FINDER.find(ALICE, "192.0.2.1", [], None).site == "eu/az1"
    assert FINDER.find(ALICE, "198.51.100.1", [], None).site is None
    proven = Principal("alice", "demo", Role.MEMBER, 1e10, site="us/east")
    assert FINDER.find(proven, "192.0.2.1", [], None).site == "us/east"


def test_the_instance_is_bounded_and_printable() -> None:
    assert FINDER.find(ALICE, "192.0.2.1", [], "host-7").instance == "host-7"
    for wrong in ("x" * 129, "a\x7f", "é"):
        with pytest.raises(Invalid) as error:
            FINDER.find(ALICE, "192.0.2.1", [], wrong)
        assert error.value.field == "X-Client-Instance"
