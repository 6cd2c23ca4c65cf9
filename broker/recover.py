"""What a catalogue was, by what lies at the stores. Pure: what was found, what the catalogue has, and policy are arguments.

Rules
- Only records that a broker wrote for just that object are believed (`broker.sign.record`); who looks at the stores leaves others out.
- A record says what had been declared when the object was written; the store says what lies there. What differs from the declaration
  is corrupt. What cannot be compared is believed, since a broker has records written only where it looks before it seals; its
  strength is then `RECORDED`.
- Two records of one blob that contradict each other, and copies that do, are a conflict: all of them are left out.
- What the catalogue knows already counts more. Of a blob that it knows only replicas are added: its images may be gone on purpose.
- Of what was recorded of an image the newest counts. Two projects, or two blobs for one format, are a conflict of that image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from broker.model import Blob, BlobState, Digests, Observation, ReplicaState
from broker.sign.record import Record, RecordedImage
from broker.verify import Accepted, Declaration, Mismatched, VerifyPolicy, verdict

RECORDED = "recorded"
"""The strength of a replica that no digest proves: a broker's record says what it is, and its size is right."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object with a record of ours, and what the store says of it."""

    store: str
    key: str
    record: Record
    observed: Observation


@dataclass(frozen=True, slots=True)
class Copy:
    """A replica to be made, ``active`` or ``corrupt``."""

    found: Found
    state: ReplicaState
    strength: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """A blob with the replicas to be made of it, a good one among them unless the catalogue has the blob, and the images that it needs."""

    blob: Blob
    copies: tuple[Copy, ...]
    images: tuple[RecordedImage, ...]


@dataclass(frozen=True, slots=True)
class Conflict:
    """What is left out, and why; `places` are ``store/key``."""

    what: str
    id: UUID
    reason: str
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made, and what is left out."""

    blobs: tuple[Recovered, ...]
    conflicts: tuple[Conflict, ...]


def plan(found: Iterable[Found], known: Mapping[UUID, Blob], policy: VerifyPolicy) -> Plan:
    """What follows from everything that was found; `known` are those of its blobs that the catalogue has."""
    groups: defaultdict[UUID, list[Found]] = defaultdict(list)
    for each in found:
        groups[each.record.blob].append(each)
    recovered: list[Recovered] = []
    conflicts: list[Conflict] = []
    for id in sorted(groups):
        outcome = settle(id, groups[id], known.get(id), policy)
        if isinstance(outcome, Conflict):
            conflicts.append(outcome)
        else:
            recovered.append(outcome)
    images, contradictions = _images(recovered)
    kept = tuple(
        Recovered(
            each.blob, each.copies, tuple(images[image.id, image.format] for image in each.images if (image.id, image.format) in images)
        )
        for each in recovered
    )
    homeless = [each for each in kept if not each.images and each.blob.id not in known]
    conflicts += contradictions
    conflicts += [Conflict("blob", each.blob.id, "no image is recorded for it", _places(each.copies)) for each in homeless]
    return Plan(tuple(each for each in kept if each.images or each.blob.id in known), tuple(conflicts))


def settle(id: UUID, found: Sequence[Found], known: Blob | None, policy: VerifyPolicy) -> Recovered | Conflict:
    """One blob, by everything that claims to be it."""
    places = tuple(f"{each.store}/{each.key}" for each in found)
    if known is not None and known.state is BlobState.DELETING:
        return Conflict("blob", id, "it is being deleted", places)
    settled = known is not None and known.state is BlobState.ACTIVE
    size, digests = (known.size, known.digests) if known is not None and settled else (None, {})
    declared = _declared(size, digests, [each.record for each in found])
    if isinstance(declared, str):
        return Conflict("blob", id, f"records contradict each other: {declared}", places)
    size, digests = declared
    good = [each for each in found if not isinstance(_look(size, digests, each.observed, policy), Mismatched)]
    seen = _declared(size, digests, [each.observed for each in good])
    if isinstance(seen, str):
        return Conflict("blob", id, f"copies contradict each other: {seen}", places)
    if not good and not settled:
        return Conflict("blob", id, "no copy is what was recorded", places)
    size, digests = (size, digests) if settled else seen
    copies = []
    for each in found:
        look = _look(size, digests, each.observed, policy)
        state = ReplicaState.CORRUPT if isinstance(look, Mismatched) else ReplicaState.ACTIVE
        strength = ",".join(dict.fromkeys((look.strength, *look.proven))) if isinstance(look, Accepted) else RECORDED
        copies.append(Copy(each, state, strength))
    images: dict[tuple[UUID, str], RecordedImage] = {}
    if not settled:
        for record in sorted((each.record for each in good), key=lambda record: record.written_at):
            if record.image is not None:
                images[record.image.id, record.image.format] = record.image
    return Recovered(Blob(id, size, digests, BlobState.ACTIVE), tuple(copies), tuple(images.values()))


def _look(size: int | None, digests: Digests, observed: Observation, policy: VerifyPolicy) -> object:
    return verdict(Declaration(observed.size if size is None else size, digests), observed, policy)


def _declared(
    size: int | None, digests: Digests, said: Sequence[Record] | Sequence[Observation]
) -> tuple[int | None, dict[str, str]] | str:
    """Size and digests that all agree on, each of which at least one says; else what they differ in."""
    together = dict(digests)
    for each in said:
        if None not in (size, each.size) and size != each.size:
            return "size"
        size = each.size if size is None else size
        for name, value in each.digests.items():
            if together.setdefault(name, value) != value:
                return name
    return size, together


def _images(recovered: Sequence[Recovered]) -> tuple[dict[tuple[UUID, str], RecordedImage], list[Conflict]]:
    """The images by id and format, each as it was recorded last; and those that are not one image."""
    newest: dict[UUID, tuple[int, RecordedImage]] = {}
    holders: defaultdict[tuple[UUID, str], set[UUID]] = defaultdict(set)
    owners: defaultdict[UUID, set[str]] = defaultdict(set)
    places: defaultdict[UUID, set[str]] = defaultdict(set)
    for each in recovered:
        at = max(copy.found.record.written_at for copy in each.copies)
        for image in each.images:
            holders[image.id, image.format].add(each.blob.id)
            owners[image.id].add(image.project)
            places[image.id].update(_places(each.copies))
            if image.id not in newest or newest[image.id][0] < at:
                newest[image.id] = at, image
    reasons: dict[UUID, str] = {id: "two projects are recorded for it" for id, names in owners.items() if len(names) > 1}
    reasons |= {id: f"two blobs are recorded as its {format}" for (id, format), blobs in holders.items() if len(blobs) > 1}
    kept = {}
    for id, format in holders:
        if id not in reasons:
            last = newest[id][1]
            kept[id, format] = RecordedImage(id, format, last.name, last.project, last.visibility)
    return kept, [Conflict("image", id, reason, tuple(sorted(places[id]))) for id, reason in reasons.items()]


def _places(copies: Sequence[Copy]) -> tuple[str, ...]:
    return tuple(f"{copy.found.store}/{copy.found.key}" for copy in copies)
