"""How bytes are cut for a store, and the URLs that write them.

Rules
- One PUT for what is small, or whose client can do nothing else; parts for what is large or of unknown size; what the store cannot
  seal (invariant 14) is not used.
- Parts are at least `Policy.min_part_size` and grow, by whole MiB, so that there are at most `FEW_PARTS` where the store allows.
- The URL of a part lives shortly; that of a single PUT as long as other URLs; none outlives its upload (invariant 8).
- When a URL's end is noted with the upload before the URL is handed out, what it may still write is known (`uploads.signed`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from broker import errors
from broker.catalog import recovery, uploads
from broker.catalog.uploads import Destination, Upload
from broker.model import Abilities, Digests, Handle, Store
from broker.service.context import Context
from broker.service.instants import instant
from broker.sign.record import Record
from broker.stores.base import Limits, PartWrite, Write

MEBIBYTE = 1 << 20
FEW_PARTS = 1000
MOST_PARTS = 10_000
"""The highest part number of the HTTP contract."""
UNKNOWN_SIZE_FACTOR = 4
"""Parts of an object of unknown size are so many times the least: it must fit whatever it becomes."""

CANNOT_SEAL = "cannot-seal"
UNVERIFIABLE = "unverifiable"
TOO_LARGE = "too-large"


class Cut(NamedTuple):
    """How an object is written: in parts of `part_size` bytes, or with ``None`` in one PUT."""

    part_size: int | None


def cut(
    size: int | None,
    abilities: Abilities,
    limits: Limits,
    *,
    single_put_limit: int,
    min_part_size: int,
    needs_digest: bool,
    whole: bool = False,
    only_digests: Collection[str] | None = None,
) -> Cut | str:
    """How an object of `size` bytes goes to a store, or the reason why it cannot.

    `whole`: in one PUT or not at all. `only_digests`: no other digests will be declared, so that the store
    must be able to prove one of these.
    """
    fits = size is None or size <= limits.max_put
    single_sealed, parts_sealed = abilities.seals_single, abilities.multipart and abilities.seals_parts and not whole
    proofs = abilities.observes if only_digests is None else set(only_digests) & {*abilities.observes, *abilities.binds}
    single = single_sealed and fits and bool(proofs or not needs_digest)
    length = part_size(size, limits, min_part_size) if parts_sealed else None
    in_parts = length is not None and bool(abilities.observes_parts or abilities.observes or not needs_digest)
    if single and (not in_parts or (size is not None and size <= single_put_limit)):
        return Cut(None)
    if in_parts:
        return Cut(length)
    if not single_sealed and not parts_sealed:
        return CANNOT_SEAL
    if (single_sealed and fits) or length is not None:
        return UNVERIFIABLE
    return TOO_LARGE


def part_size(size: int | None, limits: Limits, least: int) -> int | None:
    """The length of the parts of an object of `size` bytes; ``None`` when the store cannot hold it in parts."""
    most = min(limits.max_parts, MOST_PARTS)
    few = 0 if size is None else -(-size // FEW_PARTS)
    wanted = least * UNKNOWN_SIZE_FACTOR if size is None else least if few <= least else _up(few)
    length = min(max(wanted, limits.min_part), limits.max_part)
    if size is not None and -(-size // length) > most:
        length = min(_up(-(-size // most)), limits.max_part)
    if size is not None and (-(-size // length) > most or size > limits.max_object):
        return None
    return length


def _up(size: int) -> int:
    """`size` rounded up to a whole MiB."""
    return -(-size // MEBIBYTE) * MEBIBYTE


def count(size: int, length: int) -> int:
    """How many parts of `length` an object has."""
    return -(-size // length)


def length_of(number: int, size: int | None, part_length: int) -> int:
    """The length of part `number`. Raises `Invalid` when an object of that size has no such part."""
    if size is None:
        return part_length
    rest = size - (number - 1) * part_length
    if rest <= 0:
        last = count(size, part_length)
        raise errors.Invalid("The object has no such part.", field="numbers", expected=f"1 to {last}")
    return min(rest, part_length)


async def metadata(context: Context, upload: Upload, key: str, digests: Digests, size: int | None) -> dict[str, str]:
    """What is kept with the object at `key`, so that a lost catalogue can be made from the stores again (`broker.service.rebuild`).

    `digests` and `size` are what is declared by now. Of a blob that others may have images of, too, only what is known counts.
    """
    known = await recovery.written_for(context.db, upload.blob_id, upload.image_id, upload.project)
    if known.settled:
        size, digests = known.size, known.digests
    about = Record(key, upload.blob_id, upload.project, upload.purpose, size, digests, known.image, int(context.clock()))
    return {"blob": str(upload.blob_id), **digests, **context.keys.sealer.seal(about)}


def sealed_where_written(store: Store) -> bool:
    """Whether an object that is written in one PUT stays under its key when it is sealed, with the metadata of the PUT."""
    return store.abilities.refuses_overwrite


async def sign_single(context: Context, upload: Upload, place: Destination, store: Store) -> Handle:
    """The URL of a single PUT. Raises `StoreUnavailable`."""
    now = context.clock()
    about: Mapping[str, str] = {"blob": str(upload.blob_id), **upload.digests}
    if sealed_where_written(store):
        about = await metadata(context, upload, place.staging_key, upload.digests, upload.size)
    write = Write(
        key=place.staging_key,
        expires_at=min(now + context.policy.url_ttl_seconds, upload.expires_at),
        size=upload.size,
        digests=upload.digests,
        metadata=about,
    )
    handle = context.memory.driver(store.name).sign_put(write, now)
    await uploads.signed(context.db, upload.id, store.id, max(write.expires_at, handle.expires_at), bound(store, upload.digests))
    return handle


def bound(store: Store, digests: Digests) -> list[str]:
    """The digests that a URL for a single PUT to `store` binds, so that they are proven by the object being there."""
    return [name for name in store.abilities.binds if name in digests]


async def sign(
    context: Context, upload: Upload, place: Destination, store: Store, numbers: Iterable[int], digests: Mapping[int, Digests]
) -> list[dict[str, Any]]:
    """The parts asked for, as JSON with their URLs. Raises `Invalid`, `StoreUnavailable`."""
    assert place.part_size is not None
    assert place.multipart_id is not None
    now = context.clock()
    driver = context.memory.driver(store.name)
    ends_at = min(now + context.policy.part_url_ttl_seconds, upload.expires_at)
    signed = []
    until = ends_at
    for number in numbers:
        length = length_of(number, upload.size, place.part_size)
        part = PartWrite(number, (number - 1) * place.part_size, length, ends_at, digests.get(number, {}))
        handle = driver.sign_part(place.staging_key, place.multipart_id, part, now)
        until = max(until, handle.expires_at)
        signed.append(_render(part, handle))
    await uploads.signed(context.db, upload.id, store.id, until)
    return signed


def first_numbers(upload: Upload, place: Destination, seen: Sequence[int], most: int) -> list[int]:
    """The first `most` parts that have not arrived; of an object of unknown size, those after the highest that has."""
    assert place.part_size is not None
    arrived = frozenset(seen)
    last = MOST_PARTS if upload.size is None else count(upload.size, place.part_size)
    numbers: list[int] = []
    for number in range(1, last + 1):
        if len(numbers) >= most:
            break
        if number not in arrived:
            numbers.append(number)
    return numbers


def _render(part: PartWrite, handle: Handle) -> dict[str, Any]:
    return {
        "number": part.number,
        "offset": part.offset,
        "length": part.length,
        "method": handle.method,
        "url": handle.url,
        "headers": dict(handle.headers),
        "expires_at": instant(handle.expires_at),
    }
