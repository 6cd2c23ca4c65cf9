"""How bytes are cut for a store: every byte in exactly one part, nothing that a store cannot take, seal or prove."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as some

from broker import errors
from broker.model import Abilities
from broker.service import parts
from broker.service.parts import MEBIBYTE, Cut, cut, length_of, part_size
from broker.stores.base import Limits
from tests.parts.records import RCLONE, SEAWEEDFS, STORESIDE, SWIFT, SWIFT_S3

S3 = Limits(max_put=5 << 30, min_part=5 << 20, max_part=5 << 30, max_parts=10_000, max_object=5 << 40)
NOTHING = Abilities()
SINGLE_ONLY = replace(SEAWEEDFS, multipart=False, seals_parts=False)
PARTS_ONLY = replace(SEAWEEDFS, refuses_overwrite=False, copies=False)
BLIND = replace(SEAWEEDFS, observes=(), observes_parts=())


@pytest.mark.parametrize(
    ("size", "abilities", "expected"),
    [
        (1, SEAWEEDFS, Cut(None)),
        (64 << 20, SEAWEEDFS, Cut(None)),
        ((64 << 20) + 1, SEAWEEDFS, Cut(16 << 20)),
        (10 << 30, SEAWEEDFS, Cut(16 << 20)),
        (100 << 30, SEAWEEDFS, Cut(103 << 20)),
        (None, SEAWEEDFS, Cut(64 << 20)),
        (1, RCLONE, Cut(None)),
        (1, SWIFT, Cut(None)),
        (1 << 30, SWIFT, Cut(16 << 20)),
        (1 << 30, STORESIDE, Cut(16 << 20)),
        (1 << 30, SINGLE_ONLY, Cut(None)),
        (None, SINGLE_ONLY, Cut(None)),
        (6 << 30, SINGLE_ONLY, parts.TOO_LARGE),
        (1, PARTS_ONLY, Cut(16 << 20)),
        (6 << 40, SEAWEEDFS, parts.TOO_LARGE),
        (1, NOTHING, parts.CANNOT_SEAL),
        (1, replace(SINGLE_ONLY, refuses_overwrite=False, copies=False), parts.CANNOT_SEAL),
        (1 << 30, replace(PARTS_ONLY, seals_parts=False), parts.CANNOT_SEAL),
        (1, BLIND, parts.UNVERIFIABLE),
        (1 << 30, BLIND, parts.UNVERIFIABLE),
        (1 << 30, replace(BLIND, observes=("sha256",)), Cut(16 << 20)),
        (1, replace(BLIND, observes_parts=("md5",)), Cut(16 << 20)),
    ],
)
def test_cut(size: int | None, abilities: Abilities, expected: Cut | str) -> None:
    assert cut(size, abilities, S3, single_put_limit=64 << 20, min_part_size=16 << 20, needs_digest=True) == expected


def test_a_policy_without_digests_takes_blind_stores() -> None:
    assert cut(1, BLIND, S3, single_put_limit=64 << 20, min_part_size=16 << 20, needs_digest=False) == Cut(None)


@pytest.mark.parametrize(
    ("size", "abilities", "only", "expected"),
    [
        (64 << 20, SEAWEEDFS, ("sha256",), Cut(None)),
        ((64 << 20) + 1, SEAWEEDFS, ("sha256",), Cut(None)),
        (5 << 30, SEAWEEDFS, ("sha256",), Cut(None)),
        ((5 << 30) + 1, SEAWEEDFS, ("sha256",), parts.TOO_LARGE),
        (1, SWIFT_S3, ("sha256",), Cut(None)),
        (1, replace(SWIFT_S3, refuses_tampering=False), ("sha256",), parts.UNVERIFIABLE),
        (1, SWIFT, ("sha256",), parts.UNVERIFIABLE),
        (1, RCLONE, ("sha256",), parts.UNVERIFIABLE),
        (1, SWIFT, ("sha256", "md5"), Cut(None)),
        (1, STORESIDE, ("sha256",), Cut(None)),
        (1, SEAWEEDFS, (), parts.UNVERIFIABLE),
        (1, SWIFT, None, Cut(None)),
        (1, PARTS_ONLY, None, parts.CANNOT_SEAL),
    ],
)
def test_one_put_of_what_is_declared_at_once(size: int, abilities: Abilities, only: tuple[str, ...] | None, expected: Cut | str) -> None:
    found = cut(
        size, abilities, S3, single_put_limit=64 << 20, min_part_size=16 << 20, needs_digest=True, whole=True, only_digests=only
    )  # fmt: skip
    assert found == expected


sizes = some.integers(1, 1 << 53)
limits = some.builds(
    Limits,
    max_put=some.just(1 << 30),
    min_part=some.integers(1, 64 << 20),
    max_part=some.integers(64 << 20, 5 << 30),
    max_parts=some.integers(1, 20_000),
    max_object=some.integers(1 << 20, 1 << 53),
)


@given(size=sizes, limit=limits, least=some.integers(1, 64 << 20))
def test_parts_keep_within_every_limit(size: int, limit: Limits, least: int) -> None:
    length = part_size(size, limit, least)
    if length is None:
        # Only what the store cannot hold at all is refused; parts are whole MiB where they have to grow.
        most = min(limit.max_parts, parts.MOST_PARTS) * limit.max_part
        assert size > min(limit.max_object, most)
    else:
        assert limit.min_part <= length <= limit.max_part
        assert parts.count(size, length) <= min(limit.max_parts, parts.MOST_PARTS)


@given(size=some.integers(1, 1 << 40), length=some.integers(1 << 20, 1 << 30))
def test_parts_tile_the_object(size: int, length: int) -> None:
    last = parts.count(size, length)
    assert (last - 1) * length + length_of(last, size, length) == size
    assert 0 < length_of(last, size, length) <= length
    if last > 1:
        assert length_of(1, size, length) == length
    with pytest.raises(errors.Invalid):
        length_of(last + 1, size, length)


def test_an_unknown_size_has_only_whole_parts() -> None:
    assert length_of(10_000, None, 64 * MEBIBYTE) == 64 * MEBIBYTE
