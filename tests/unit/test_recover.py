"""What a catalogue was, by what was found: a table of finds, and what becomes of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from uuid import UUID

import pytest

from broker.model import Blob, BlobState, Digests, Observation, Purpose, ReplicaState, Visibility
from broker.recover import RECORDED, Found, Plan, plan
from broker.sign.record import Record, RecordedImage
from broker.verify import VerifyPolicy

A, B, IMAGE, OTHER_IMAGE = (UUID(int=number) for number in (1, 2, 11, 12))
SHA, SHA2, MD5 = "a" * 64, "b" * 64, "c" * 32


def image(id: UUID = IMAGE, format: str = "raw", name: str = "n", project: str = "p") -> RecordedImage:
    return RecordedImage(id, format, name, project, Visibility.PUBLIC)


def found(
    store: str = "s1",
    blob: UUID = A,
    *,
    said: Digests | None = None,
    size: int | None = 10,
    seen: Digests | None = None,
    seen_size: int = 10,
    of: RecordedImage | None = None,
    at: int = 1,
) -> Found:
    """An object that was recorded as `said` and is seen as `seen`."""
    key = f"{blob}/{store}-{at}"
    record = Record(key, blob, "p", Purpose.ORIGIN, size, {"sha256": SHA} if said is None else said, of or image(), at)
    return Found(store, key, record, Observation(seen_size, 0.0, "broker", {"sha256": SHA} if seen is None else seen))


def planned(*finds: Found, known: Mapping[UUID, Blob] | None = None) -> Plan:
    return plan(finds, known or {}, VerifyPolicy())


def states(outcome: Plan) -> dict[str, tuple[ReplicaState, str]]:
    return {copy.found.store: (copy.state, copy.strength) for each in outcome.blobs for copy in each.copies}


@pytest.mark.parametrize(
    ("finds", "expected"),
    [
        ([found()], {"s1": "sha256"}),
        ([found(), found("s2")], {"s1": "sha256", "s2": "sha256"}),
        ([found(), found("s2", seen={})], {"s1": "sha256", "s2": RECORDED}),
        ([found(seen={})], {"s1": RECORDED}),
        ([found(said={}, size=None)], {"s1": "sha256"}),
        ([found(), found("s2", seen={"sha256": SHA2})], {"s1": "sha256", "s2": None}),
        ([found(), found("s2", seen_size=11)], {"s1": "sha256", "s2": None}),
        ([found(said={}, seen={"md5": MD5}), found("s2", seen={})], {"s1": "md5", "s2": RECORDED}),
    ],
)
def test_copies(finds: list[Found], expected: dict[str, str | None]) -> None:
    outcome = planned(*finds)
    assert outcome.conflicts == ()
    told = {store: None if state is ReplicaState.CORRUPT else strength for store, (state, strength) in states(outcome).items()}
    assert told == expected
    (each,) = outcome.blobs
    assert each.blob.size == 10
    assert each.images == (image(),)


@pytest.mark.parametrize(
    ("finds", "reason"),
    [
        ([found(), found("s2", said={"sha256": SHA2}, seen={"sha256": SHA2})], "records contradict each other: sha256"),
        ([found(), found("s2", size=11)], "records contradict each other: size"),
        ([found(said={}), found("s2", said={}, seen={"sha256": SHA2})], "copies contradict each other: sha256"),
        ([found(said={}, size=None), found("s2", said={}, size=None, seen_size=11)], "copies contradict each other: size"),
        ([found(seen={"sha256": SHA2})], "no copy is what was recorded"),
    ],
)
def test_contradictions_are_told_and_left_out(finds: list[Found], reason: str) -> None:
    outcome = planned(*finds)
    assert outcome.blobs == ()
    (conflict,) = outcome.conflicts
    assert (conflict.what, conflict.id, conflict.reason) == ("blob", A, reason)
    assert conflict.places == tuple(f"{each.store}/{each.key}" for each in finds)


def test_a_contradiction_spares_the_others() -> None:
    outcome = planned(found(), found("s2", size=11), found("s1", B, of=image(OTHER_IMAGE)))
    assert [each.blob.id for each in outcome.blobs] == [B]
    assert len(outcome.conflicts) == 1


def test_images_are_as_they_were_recorded_last() -> None:
    old, new = found(of=image(name="old")), found("s1", B, of=image(format="qcow2", name="new"), at=2)
    outcome = planned(new, old)
    assert {made.format: made.name for each in outcome.blobs for made in each.images} == {"raw": "new", "qcow2": "new"}


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (image(format="qcow2", project="q"), "two projects are recorded for it"),
        (image(), "two blobs are recorded as its raw"),
    ],
)
def test_images_that_are_not_one_are_left_out(second: RecordedImage, reason: str) -> None:
    outcome = planned(found(), found("s1", B, of=second))
    assert outcome.blobs == ()
    assert ("image", IMAGE, reason) in [(conflict.what, conflict.id, conflict.reason) for conflict in outcome.conflicts]


def test_what_the_catalogue_knows_counts_more() -> None:
    known = Blob(A, 10, {"sha256": SHA, "md5": MD5}, BlobState.ACTIVE)
    (each,) = planned(found(), known={A: known}).blobs
    assert each.images == ()  # they may be gone on purpose
    assert each.blob.digests == known.digests
    outcome = planned(found(seen={"sha256": SHA, "md5": "d" * 32}), known={A: known})
    assert states(outcome)["s1"][0] is ReplicaState.CORRUPT
    (conflict,) = planned(found(said={"sha256": SHA2}), known={A: known}).conflicts
    assert conflict.reason == "records contradict each other: sha256"


def test_what_is_being_deleted_stays_so() -> None:
    (conflict,) = planned(found(), known={A: Blob(A, 10, {}, BlobState.DELETING)}).conflicts
    assert conflict.reason == "it is being deleted"
    (each,) = planned(found(), known={A: Blob(A, None, {}, BlobState.QUEUED)}).blobs
    assert each.images == (image(),)


def test_a_blob_without_an_image_belongs_to_nobody() -> None:
    alone = found()
    outcome = planned(replace(alone, record=replace(alone.record, image=None)))
    assert outcome.blobs == ()
    assert outcome.conflicts[0].reason == "no image is recorded for it"
