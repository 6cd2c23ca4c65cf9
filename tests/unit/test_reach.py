"""Which addresses the broker opens: the ranges, the ways to write them, and what a name server may answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import StoreUnavailable
from broker.stores import reach
from broker.stores.exchange import Exchange
from broker.stores.reach import AddressRefused, Reach, judge

TABLE = {
    "8.8.8.8": "public", "100.63.255.255": "public", "100.128.0.0": "public", "172.15.255.255": "public", "172.32.0.0": "public",
    "169.253.255.255": "public", "223.255.255.255": "public", "126.255.255.255": "public", "2600::1": "public", "2a00:1450::1": "public",
    "127.0.0.1": "loopback", "127.255.255.255": "loopback", "::1": "loopback", "10.0.0.1": "private", "10.255.255.255": "private",
    "172.16.0.0": "private", "172.31.255.255": "private", "192.168.0.1": "private", "fc00::1": "private", "fdff:ffff::1": "private",
    "100.64.0.0": "shared (carrier-grade NAT)", "100.127.255.255": "shared (carrier-grade NAT)", "198.18.0.1": "benchmarking",
    "192.0.2.1": "documentation", "2001:db8::1": "documentation", "3fff::1": "documentation",
    "169.254.169.254": "link-local", "169.254.0.0": "link-local", "169.254.255.255": "link-local", "fe80::1": "link-local",
    "fe80::1%eth0": "link-local", "febf:ffff::1": "link-local", "100.100.100.200": "metadata", "168.63.129.16": "metadata",
    "fd00:ec2::254": "metadata", "fd20:ce::254": "metadata", "0.0.0.0": "unspecified", "0.1.2.3": "unspecified", "::": "unspecified",
    "224.0.0.1": "multicast", "239.255.255.255": "multicast", "ff02::1": "multicast", "240.0.0.1": "reserved",
    "255.255.255.255": "reserved", "192.0.0.192": "reserved", "192.88.99.1": "reserved", "2001:0:1::1": "reserved", "4000::1": "reserved",
    "100::1": "reserved", "fec0::1": "reserved", "64:ff9b:1::1": "reserved",
    "::ffff:127.0.0.1": "loopback", "::ffff:169.254.169.254": "link-local", "::ffff:a00:1": "private", "::ffff:8.8.8.8": "public",
    "64:ff9b::7f00:1": "loopback", "64:ff9b::a9fe:a9fe": "link-local", "64:ff9b::808:808": "public",
    "2002:7f00:1::": "reserved", "2002:a9fe:a9fe::1": "reserved", "2002:808:808::": "reserved",
    "::127.0.0.1": "loopback", "::169.254.169.254": "link-local", "::ffff:0.0.0.0": "unspecified",
    "localhost": "unreadable", "": "unreadable", "127.1": "unreadable", "2130706433": "unreadable", "0x7f000001": "unreadable",
}  # fmt: skip
INSIDE = {"loopback", "private", "shared (carrier-grade NAT)", "benchmarking", "documentation"}


@pytest.mark.parametrize("address", TABLE)
def test_ranges(address: str) -> None:
    word = TABLE[address]
    expected = Reach.PUBLIC if word == "public" else Reach.INSIDE if word in INSIDE else Reach.NEVER
    assert judge(address) == (expected, word)


@given(st.ip_addresses())
def test_nothing_that_python_calls_special_is_public(address: IPv4Address | IPv6Address) -> None:
    reached, _ = judge(str(address))
    if address.is_private or address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
        assert reached is not Reach.PUBLIC


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_inside_an_ipv6_one_is_judged_alike(address: IPv4Address) -> None:
    number = int(address)
    for prefix in (0xFFFF << 32, 0x64FF9B << 96):
        assert judge(str(IPv6Address(prefix | number))) == judge(str(address))


class Answers(AbstractResolver):
    """A name server that answers what `queue` says, one list of addresses for each question, the last one for ever."""

    def __init__(self, *queue: list[str]) -> None:
        self.queue = list(queue)
        self.asked = 0

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        self.asked += 1
        found = self.queue.pop(0) if len(self.queue) > 1 else self.queue[0]
        return [
            ResolveResult(
                hostname=host, host=one, port=port, family=socket.AF_INET6 if ":" in one else socket.AF_INET, proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for one in found
        ]  # fmt: skip

    async def close(self) -> None: ...


@pytest.fixture
async def trap() -> AsyncIterator[tuple[int, list[str]]]:
    """Something on loopback that must not be reached; what reached it all the same."""
    seen: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        seen.append(request.path)
        return web.Response()

    server = await asyncio.get_running_loop().create_server(web.Server(answer, access_log=None), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1], seen
    server.close()


async def asked(port: int, host: str, *, internal: bool, answers: Any = None) -> None:
    connector = reach.connector(internal=internal)
    if answers is not None:
        connector._resolver, connector._use_dns_cache = answers, False
    async with aiohttp.ClientSession(connector=connector) as session:
        await Exchange(session, "s").ask("GET", f"http://{host}:{port}/x", {}, expect=(200,), repeatable=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::ffff:127.0.0.1]", "localhost"])
async def test_every_spelling_of_loopback_is_refused(host: str, trap: tuple[int, list[str]]) -> None:
    port, seen = trap
    with pytest.raises(AddressRefused) as error:
        await asked(port, host, internal=False)
    assert "loopback address" in error.value.detail
    problem = error.value.as_invalid()
    assert (problem.status, problem.field) == (400, "internal")
    assert "--internal" in str(problem.expected)
    assert seen == []


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.0.0.1.", "[::1%25lo]", "0"])
async def test_odd_spellings_reach_nothing(host: str, trap: tuple[int, list[str]]) -> None:
    port, seen = trap
    with pytest.raises(StoreUnavailable):
        await asked(port, host, internal=False)
    assert seen == []


async def test_a_store_that_is_declared_internal_is_reached(trap: tuple[int, list[str]]) -> None:
    port, seen = trap
    await asked(port, "127.0.0.1", internal=True)
    await asked(port, "localhost", internal=True)
    assert seen == ["/x", "/x"]


@pytest.mark.parametrize("address", ["169.254.169.254", "100.100.100.200", "224.0.0.1", "0.0.0.0", "::", "fe80::1"])
async def test_not_even_an_internal_store_is_at_the_metadata_service(address: str) -> None:
    with pytest.raises(AddressRefused) as error:
        await asked(80, "store.test", internal=True, answers=Answers([address]))
    assert error.value.as_invalid().field == "endpoint"


async def test_the_address_that_was_checked_is_the_one_that_is_connected_to(trap: tuple[int, list[str]]) -> None:
    """A name that is public when the store is registered and loopback afterwards, or both at once, reaches nothing."""
    port, seen = trap
    changing = Answers(["8.8.8.8"], ["127.0.0.1"])
    await changing.resolve("store.test")  # whatever looked before the connection was made
    with pytest.raises(AddressRefused):
        await asked(port, "store.test", internal=False, answers=changing)
    assert changing.asked == 2, "asked once for a connection, and not again for an address that is refused"
    with pytest.raises(AddressRefused):
        await asked(port, "store.test", internal=False, answers=Answers(["127.0.0.1", "::1", "10.0.0.1"]))
    assert seen == []
