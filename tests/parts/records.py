"""How the real stores of the tests are registered, and what each was seen to enforce (tests/acceptance/test_probe.py holds it to that)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import aiohttp
import pytest_asyncio

from broker.model import Abilities, Store
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart
from tests.parts.swift import SwiftPart

SEAWEEDFS = Abilities(
    reads=True, ranges=True, writes=True, deletes=True, refuses_tampering=True, refuses_expired=True, takes_unsized=True,
    binds_length=True, binds_md5=True, binds_sha256=True, refuses_overwrite=True, observes=("sha256", "md5"),
    multipart=True, observes_parts=("md5",), seals_parts=True, copies=True,
)  # fmt: skip
RCLONE = Abilities(
    reads=True, ranges=False, writes=True, deletes=True, refuses_tampering=True, refuses_expired=True,
    binds_length=True, binds_md5=True, binds_sha256=False, refuses_overwrite=False, observes=("md5",),
    multipart=True, observes_parts=("md5",), seals_parts=True, copies=True,
)  # fmt: skip
SWIFT = Abilities(
    reads=True, ranges=True, writes=True, deletes=True, refuses_tampering=True, refuses_expired=True, takes_unsized=True,
    binds_length=False, binds_md5=False, binds_sha256=False, refuses_overwrite=False, observes=("md5",),
    multipart=True, observes_parts=("md5",), seals_parts=True, copies=True,
)  # fmt: skip
SWIFT_S3 = Abilities(
    reads=True, ranges=True, writes=True, deletes=True, refuses_tampering=True, refuses_expired=True,
    binds_length=True, binds_md5=True, binds_sha256=True, refuses_overwrite=True, observes=("md5",),
    multipart=True, observes_parts=("md5",), seals_parts=False, copies=True, takes_unsized=True,
)  # fmt: skip
"""Swift by its S3 API (middleware s3api): it compares a signed SHA-256 as the bytes come, and tells none afterwards."""
STORESIDE = Abilities(
    reads=True, ranges=True, writes=True, deletes=True, refuses_tampering=True, refuses_expired=True, takes_unsized=True,
    binds_length=True, binds_md5=True, binds_sha256=True, refuses_overwrite=True, observes=("sha256", "md5"),
    multipart=True, observes_parts=("sha256", "md5"), seals_parts=True, copies=False,
)  # fmt: skip
FRONT = Abilities(
    reads=True, ranges=True, writes=True, deletes=True, refuses_tampering=True, refuses_expired=True,
    binds_length=True, binds_md5=True, binds_sha256=True, refuses_overwrite=True, observes=("sha256",),
    multipart=False, observes_parts=(), seals_parts=False, copies=False,
)  # fmt: skip
"""nginx on a directory, and HAProxy or Envoy before such a one."""


def s3_record(part: S3Part, name: str = "s3", abilities: Abilities = SEAWEEDFS, **settings: str) -> Store:
    """A registration of `part`, with the credential ``c``."""
    return Store(
        1, name, "s3", "eu/az1", part.endpoint, settings={"bucket": part.bucket, **settings}, credential="c", abilities=abilities
    )  # fmt: skip


def swift_record(part: SwiftPart, abilities: Abilities = SWIFT, **settings: str) -> Store:
    """A registration of `part`, with the credential ``c``."""
    named = {"account": part.account, "container": part.container, **settings}
    return Store(2, "swift", "swift", "eu/az2", part.endpoint, settings=named, credential="c", abilities=abilities)


def storeside_record(part: StoresidePart, abilities: Abilities = STORESIDE, **settings: str) -> Store:
    """A registration of `part`, which needs no credential."""
    return Store(3, "disk", "http", "eu/az1", part.url, settings={"audience": part.audience, **settings}, abilities=abilities)


def without_clock(abilities: Abilities) -> Mapping[str, object]:
    """All that a table of abilities states, but for the clock, which is nobody's property."""
    return {name: getattr(abilities, name) for name in Abilities.__slots__ if name != "clock_skew_seconds"}


@pytest_asyncio.fixture
async def http_session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session
