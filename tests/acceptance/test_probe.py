"""What the probe finds of real stores: each row was seen, so a change here is a change of the store or of the probe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from broker import accept
from broker.errors import Invalid, NotFound, StoreUnavailable
from broker.model import Abilities, Store
from broker.stores.base import Store as OpenStore
from broker.stores.http import HttpStore
from broker.stores.probe import Probed, probe
from broker.stores.s3 import S3Store
from broker.stores.swift import SwiftStore
from tests.parts import rclone as rclone_part
from tests.parts.process import free_ports
from tests.parts.records import RCLONE, SEAWEEDFS, STORESIDE, SWIFT, SWIFT_S3, s3_record, storeside_record, swift_record, without_clock
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart
from tests.parts.swift import SwiftPart


def details(found: Probed) -> dict[str, str]:
    return {step.name: step.detail for step in found.steps}


async def left_behind(store: S3Store) -> bytes:
    """A listing of what a probe left in an S3 bucket."""
    answer = await store._ask("GET", "", query={"list-type": "2", "prefix": "probe-"}, expect=(200,))
    return answer.body


@pytest.mark.parametrize(("part", "expected"), [("seaweedfs", SEAWEEDFS), ("rclone", RCLONE)])
async def test_s3(part: str, expected: Abilities, request: pytest.FixtureRequest, http_session: aiohttp.ClientSession) -> None:
    running: S3Part = request.getfixturevalue(part)
    record = s3_record(running, abilities=Abilities())
    store = S3Store(record, running.credential, http_session)
    found = await probe(store, record, http_session, time.time())
    assert without_clock(found.abilities) == without_clock(expected)
    assert abs(found.abilities.clock_skew_seconds) <= 2
    assert all(step.result is not None for step in found.steps)
    assert b"<Key>" not in await left_behind(store)
    assert list(await list_uploads(store)) == []


async def test_swift_by_its_s3_api(swift: SwiftPart, http_session: aiohttp.ClientSession) -> None:
    settings = {"bucket": swift.container}
    record = Store(1, "swift-s3", "s3", "eu/az2", swift.endpoint, settings=settings, credential="c")
    store = S3Store(record, {"access_key": swift.user, "secret_key": swift.key}, http_session)
    found = await probe(store, record, http_session, time.time())
    assert without_clock(found.abilities) == without_clock(SWIFT_S3)
    # What a commit by a bound digest leans on: another body leaves nothing behind, nor does one without the header.
    assert details(found)["binds sha256"] == "other body: 400; without its header: 403; right one: 200"


async def list_uploads(store: S3Store) -> list[bytes]:
    """Multipart uploads that were left open."""
    answer = await store._ask("GET", "", query={"uploads": ""}, expect=(200,))
    return [line for line in answer.body.split(b"<Upload>")[1:] if b"probe-" in line]


async def test_a_lie_that_head_repeats_is_seen(rclone: S3Part, http_session: aiohttp.ClientSession) -> None:
    record = s3_record(rclone, abilities=Abilities())
    found = await probe(S3Store(record, rclone.credential, http_session), record, http_session, time.time())
    assert "HEAD repeats the lie" in details(found)["binds sha256"]
    assert "sha256" not in found.abilities.observes


async def test_a_store_that_verifies_nothing(tmp_path: Path, http_session: aiohttp.ClientSession) -> None:
    with rclone_part.start(tmp_path, enforcing=False) as part:
        record = s3_record(part, abilities=Abilities())
        found = await probe(S3Store(record, part.credential, http_session), record, http_session, time.time())
    assert found.abilities.writes
    assert not found.abilities.refuses_tampering
    assert not found.abilities.refuses_expired
    assert accept.destination(replace(record, abilities=found.abilities), "http", None).trusted is False


async def test_swift(swift: SwiftPart, http_session: aiohttp.ClientSession) -> None:
    record = swift_record(swift, abilities=Abilities())
    store = SwiftStore(record, swift.credential, http_session)
    found = await probe(store, record, http_session, time.time())
    assert without_clock(found.abilities) == without_clock(SWIFT)
    # A client that leaves the ETag header out gets through: an offer, not a binding.
    assert details(found)["binds md5"].startswith("other body: 422; without its header: 201")
    for container, prefix in (("images", "probe-"), ("images_segments", "")):
        answer = await store._ask("GET", container, "", query={"prefix": prefix, "format": "plain"}, expect=(200, 204))
        assert [name for name in answer.body.decode().split() if "probe-" in name] == []


async def test_storeside(storeside: Callable[..., StoresidePart], http_session: aiohttp.ClientSession) -> None:
    part = storeside()
    record = storeside_record(part, Abilities())
    found = await probe(HttpStore(record, part.signer, http_session), record, http_session, time.time())
    assert without_clock(found.abilities) == without_clock(STORESIDE)
    refused = ("unsigned token: 401", "another store's: 401", "another path's: 403", "not valid yet: 401")
    assert details(found)["forged tokens"] == "; ".join(refused)
    assert list(part.root.glob("[!.]*")) == []
    assert list((part.root / ".broker" / "uploads").glob("*/data")) == []


async def test_through_the_internal_endpoint_under_the_clients_name(seaweedfs: S3Part, http_session: aiohttp.ClientSession) -> None:
    (port,) = free_ports(1)
    record = replace(s3_record(seaweedfs), endpoint=f"http://127.0.0.1:{port}", internal_endpoint=seaweedfs.endpoint)
    found = await probe(S3Store(record, seaweedfs.credential, http_session), record, http_session, time.time())
    assert without_clock(found.abilities) == without_clock(SEAWEEDFS)


async def test_nobody_there(http_session: aiohttp.ClientSession) -> None:
    (port,) = free_ports(1)
    record = Store(1, "nobody", "s3", "x", f"http://127.0.0.1:{port}", settings={"bucket": "b"})
    with pytest.raises(StoreUnavailable):
        await probe(S3Store(record, {"access_key": "a", "secret_key": "b"}, http_session), record, http_session, time.time())


async def test_no_such_bucket(seaweedfs: S3Part, http_session: aiohttp.ClientSession) -> None:
    record = s3_record(seaweedfs, bucket="no-such-bucket")
    with pytest.raises(NotFound):
        await probe(S3Store(record, seaweedfs.credential, http_session), record, http_session, time.time())


async def test_a_wrong_credential_writes_nothing(seaweedfs: S3Part, http_session: aiohttp.ClientSession) -> None:
    record = s3_record(seaweedfs)
    store = S3Store(record, {**seaweedfs.credential, "secret_key": "wrong"}, http_session)
    with pytest.raises(StoreUnavailable):
        await probe(store, record, http_session, time.time())


async def test_a_kind_that_cannot_be_probed(http_session: aiohttp.ClientSession) -> None:
    class Plain:
        kind = "plain"

    store: OpenStore = Plain()  # type: ignore[assignment]
    with pytest.raises(Invalid):
        await probe(store, Store(1, "p", "plain", "x", "http://h"), http_session, time.time())
