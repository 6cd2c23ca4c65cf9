"""Whether what lies at a store is what was declared: the verdict of a commit, and of every later look (invariants 4, 5, 14).

Rules
- The size is always stated and always compared. Nothing is assumed: no size, no acceptance.
- Any digest that both sides have and that differs is a mismatch, however weak its algorithm.
- An object is accepted by the strongest digest that both sides have, of the whole or of every one of its parts; policy
  says which algorithms count, and whether the size alone may do.
- Only what the store computed itself is in an `Observation`; a digest that merely came along with the upload proves nothing, unless
  the store was seen to refuse every body of another digest, and the object can only have come by a URL that bound it (``bound:``).
- Parts prove the whole only if both sides' parts tile it: numbers 1 to n, no gap, the sizes adding up.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from broker.model import CONTENT_DIGESTS, DIGEST_HEX_LENGTH, MAX_BLOB_SIZE, Blob, Digests, Observation, PartSeen, Pieces, ReplicaState

_HEX = re.compile(r"[0-9a-fA-F]+\Z")
_STRENGTH = ("sha512", "sha256", "parts:sha512", "parts:sha256", "bound:sha256", "md5", "parts:md5")
SIZE_ONLY = "size"
"""The strength of an acceptance by size alone."""


@dataclass(frozen=True, slots=True)
class VerifyPolicy:
    """What counts as proof."""

    algorithms: tuple[str, ...] = CONTENT_DIGESTS
    """Digest algorithms that prove content."""
    size_suffices: bool = False
    """Accept by size alone where no digest can be compared; by default a content digest is needed."""


@dataclass(frozen=True, slots=True)
class PartDeclared:
    """One part as the client declares it: numbers begin at 1; offset and length in bytes of the whole object."""

    number: int
    offset: int
    length: int
    digests: Digests = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a client says that the bytes are, at the start of an upload or at its commit."""

    size: int | None = None
    digests: Digests = field(default_factory=dict)
    pieces: Pieces | None = None
    parts: tuple[PartDeclared, ...] | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The object is what was declared. `strength` is the best proof: ``sha512``, ``parts:md5``, ``bound:sha256``, …, or ``size``."""

    strength: str
    observed_by: str
    proven: tuple[str, ...] = ()
    """Algorithms of declared whole-object digests that the store itself confirmed; other declared ones are still a claim."""


@dataclass(frozen=True, slots=True)
class Mismatched:
    """One field that differs: ``size``, ``digests.md5``, ``parts[3].size``, ``parts[3].digests.md5``."""

    field: str
    declared: str
    observed: str


@dataclass(frozen=True, slots=True)
class Unproven:
    """Nothing differs, but nothing that policy accepts proves the content either. `reason` is safe to show."""

    reason: str


Verdict = Accepted | Mismatched | Unproven


class Problem(NamedTuple):
    """One thing wrong with a declaration: which field, and what was expected there."""

    field: str
    expected: str


class PartsProblem(NamedTuple):
    """What is wrong with the parts that have arrived, by number."""

    missing: tuple[int, ...]
    wrong_size: tuple[int, ...]
    unexpected: tuple[int, ...]


class Recheck(NamedTuple):
    """A later look at a replica: the state that follows (``None``: the look proved nothing, so nothing changes) and why."""

    state: ReplicaState | None
    verdict: Verdict


def verdict(declaration: Declaration, observation: Observation, policy: VerifyPolicy, bound: Collection[str] = ()) -> Verdict:
    """Compare a declaration with what was seen of the object.

    `bound`: algorithms of declared digests that every URL by which the object can have been written was signed with, at a store that
    was seen to refuse any other body (`broker.model.Abilities.binds`). Then the store itself compared the digest as the bytes came.
    """
    if declaration.size is None:
        return Unproven("the size was not declared")
    if observation.size != declaration.size:
        return Mismatched("size", str(declaration.size), str(observation.size))
    declared = normalised(declaration.digests)
    difference = _difference("digests", declared, observation.digests)
    if difference is not None:
        return difference
    proven = tuple(name for name in declared if name in normalised(observation.digests))
    proofs = set(proven)
    for parts in _declared_parts(declaration, observation):
        difference = _parts_difference(parts, observation.parts)
        if difference is not None:
            return difference
        proofs |= {f"parts:{name}" for name in _common_to_parts(parts, observation.parts, declaration.size)}
    proofs |= {f"bound:{name}" for name in bound if name in declared}
    for strength in _STRENGTH:
        if strength in proofs and strength.rpartition(":")[2] in policy.algorithms:
            return Accepted(strength, observation.by, proven)
    if policy.size_suffices:
        return Accepted(SIZE_ONLY, observation.by, proven)
    return Unproven(_why_unproven(declaration, observation))


def reverify(blob: Blob, observation: Observation | None, policy: VerifyPolicy, told_before: Collection[str] = ()) -> Recheck:
    """What a look at a replica of a known blob means for it (invariant 5); also for an existing object that is being registered.

    `told_before`: algorithms of digests that the store told of this object once, and tells of others still. A store that has
    forgotten them all says that the object is not the one it knew (a file server whose file was changed behind its back).
    """
    if observation is None:
        return Recheck(ReplicaState.MISSING, Unproven("the object is not at the store"))
    result = verdict(Declaration(size=blob.size, digests=blob.digests, pieces=blob.pieces), observation, policy)
    if isinstance(result, Accepted):
        return Recheck(ReplicaState.ACTIVE, result)
    if isinstance(result, Mismatched):
        return Recheck(ReplicaState.CORRUPT, result)
    forgotten = told_before and not set(told_before) & set(observation.digests)
    return Recheck(ReplicaState.CORRUPT if forgotten else None, result)


def adopted(said: Digests, observation: Observation, policy: VerifyPolicy) -> tuple[Declaration, Accepted] | Mismatched | Unproven:
    """What an object that lies at a store already is, when it becomes a blob: its size and whatever digests the store computed, of the
    whole or of equal parts, and beside them what is said of it. The store's word is the declaration: without any, nothing is adopted.
    Of what is said at least one digest has to be one that the store tells too, else nothing ties it to the object.
    """
    if said and not normalised(said).keys() & observation.digests.keys():
        told = ", ".join(sorted(observation.digests)) or "none"
        return Unproven(f"the store tells none of the digests that were given, which could be compared (it tells {told})")
    parts = observation.parts
    tiles = len(parts) > 0 and len({part.size for part in parts[:-1]} | {parts[0].size}) == 1 and parts[-1].size <= parts[0].size
    pieces = None
    if tiles and all("md5" in part.digests for part in parts) and sum(part.size for part in parts) == observation.size:
        pieces = Pieces(parts[0].size, "md5", tuple(part.digests["md5"] for part in parts))
    declaration = Declaration(observation.size, {**normalised(observation.digests), **normalised(said)}, pieces)
    problems = declaration_problems(declaration)
    if problems:
        return Unproven(f"its {problems[0].field} is not {problems[0].expected}")
    found = verdict(declaration, observation, policy)
    return (declaration, found) if isinstance(found, Accepted) else found


def combined(start: Declaration, commit: Declaration) -> Declaration | Mismatched:
    """What both declarations of an upload say together. What was declared at the start binds: a commit adds, it does not change.

    `Mismatched.observed` is then what the commit said.
    """
    if start.size is not None and commit.size is not None and start.size != commit.size:
        return Mismatched("size", str(start.size), str(commit.size))
    first, second = normalised(start.digests), normalised(commit.digests)
    difference = _difference("digests", first, second)
    if difference is not None:
        return difference
    if start.pieces is not None and commit.pieces is not None and start.pieces != commit.pieces:
        return Mismatched("pieces", f"{start.pieces.algorithm} of {start.pieces.length} bytes", "others")
    parts = start.parts or commit.parts
    if start.parts and commit.parts:
        merged = _combined_parts(start.parts, commit.parts)
        if isinstance(merged, Mismatched):
            return merged
        parts = merged
    return Declaration(
        size=commit.size if start.size is None else start.size,
        digests={**second, **first},
        pieces=start.pieces or commit.pieces,
        parts=parts,
    )


def normalised(digests: Digests) -> Digests:
    """The same digests in lower case."""
    return {name: value.lower() for name, value in digests.items()}


def digest_problems(digests: Mapping[str, str], where: str = "digests") -> list[Problem]:
    """What is wrong with declared digests: an unknown algorithm, a wrong length, not hex. Upper case is accepted (`normalised`)."""
    problems = []
    for name, value in digests.items():
        length = DIGEST_HEX_LENGTH.get(name)
        if length is None:
            problems.append(Problem(where, "one of " + ", ".join(sorted(DIGEST_HEX_LENGTH))))
        elif len(value) != length or _HEX.match(value) is None:
            problems.append(Problem(f"{where}.{name}", f"{length} hex digits"))
    return problems


def declaration_problems(declaration: Declaration) -> list[Problem]:
    """What is wrong with a declaration by itself, before anything is looked at."""
    size = declaration.size
    problems = digest_problems(declaration.digests)
    if size is not None and not 1 <= size <= MAX_BLOB_SIZE:
        problems.append(Problem("size", f"1 to {MAX_BLOB_SIZE} bytes"))
        size = None
    pieces = declaration.pieces
    if pieces is not None:
        problems += _piece_problems(pieces, size)
    if declaration.parts is not None:
        for part in declaration.parts:
            problems += digest_problems(part.digests, f"parts[{part.number}].digests")
        if not tiles(declaration.parts, size):
            whole = "the whole" if size is None else f"{size} bytes"
            problems.append(Problem("parts", f"numbers 1 to n in order, each beginning where the last one ended, together {whole}"))
    return problems


def tiles(parts: Sequence[PartDeclared], size: int | None) -> bool:
    """Whether the parts, in order, cover 0 to `size` without gap or overlap (to any end when the size is unknown)."""
    offset = 0
    for number, part in enumerate(parts, start=1):
        if part.number != number or part.offset != offset or part.length <= 0:
            return False
        offset += part.length
    return bool(parts) and (size is None or offset == size)


def part_lengths(size: int, part_size: int) -> list[int]:
    """The lengths of the parts of an object: all `part_size`, the last one what is left."""
    full, rest = divmod(size, part_size)
    return [part_size] * full + ([rest] if rest else [])


def parts_problem(seen: Sequence[PartSeen], size: int | None, part_size: int) -> PartsProblem | None:
    """What keeps the parts that arrived from being the whole object; ``None`` when they are.

    With an unknown size the highest number seen is taken for the last part.
    """
    sizes = {part.number: part.size for part in seen}
    if size is None:
        last = max(sizes, default=1)
        lengths = [part_size] * (last - 1) + [min(part_size, max(1, sizes.get(last, 1)))]
    else:
        lengths = part_lengths(size, part_size)
    expected = dict(enumerate(lengths, start=1))
    missing = tuple(number for number in expected if number not in sizes)
    wrong = tuple(number for number, length in expected.items() if sizes.get(number, length) != length)
    unexpected = tuple(sorted(number for number in sizes if number not in expected))
    return PartsProblem(missing, wrong, unexpected) if missing or wrong or unexpected else None


def _difference(where: str, declared: Digests, observed: Digests) -> Mismatched | None:
    """The first digest that both have and that differs."""
    for name, value in observed.items():
        if name in declared and declared[name] != value.lower():
            return Mismatched(f"{where}.{name}", declared[name], value.lower())
    return None


def _declared_parts(declaration: Declaration, observation: Observation) -> list[tuple[PartDeclared, ...]]:
    """What can be held against the parts seen: the declared parts, and the pieces where the store's parts are cut alike."""
    found: list[tuple[PartDeclared, ...]] = []
    if not observation.parts:
        return found
    if declaration.parts:
        found.append(declaration.parts)
    pieces = declaration.pieces
    if pieces is not None and pieces.length > 0 and len(pieces.digests) == len(observation.parts) == -(-observation.size // pieces.length):
        lengths = part_lengths(observation.size, pieces.length)
        if lengths == [part.size for part in observation.parts]:
            found.append(
                tuple(
                    PartDeclared(number, (number - 1) * pieces.length, length, {pieces.algorithm: digest})
                    for number, (length, digest) in enumerate(zip(lengths, pieces.digests, strict=True), start=1)
                )
            )
    return found


def _combined_parts(start: Sequence[PartDeclared], commit: Sequence[PartDeclared]) -> tuple[PartDeclared, ...] | Mismatched:
    """The parts of the start with what the commit adds to their digests; the commit may leave out parts, not change them."""
    later = {part.number: part for part in commit}
    merged: list[PartDeclared] = []
    for part in start:
        added = later.pop(part.number, part)
        if (added.offset, added.length) != (part.offset, part.length):
            return Mismatched(f"parts[{part.number}]", f"{part.length} bytes at {part.offset}", f"{added.length} bytes at {added.offset}")
        first, second = normalised(part.digests), normalised(added.digests)
        difference = _difference(f"parts[{part.number}].digests", first, second)
        if difference is not None:
            return difference
        merged.append(PartDeclared(part.number, part.offset, part.length, {**second, **first}))
    for number, added in later.items():
        return Mismatched(f"parts[{number}]", "none", f"{added.length} bytes at {added.offset}")
    return tuple(merged)


def _parts_difference(declared: Sequence[PartDeclared], seen: Sequence[PartSeen]) -> Mismatched | None:
    """The first part that is not there, too many, of another size or of another digest."""
    by_number = {part.number: part for part in seen}
    for part in declared:
        there = by_number.pop(part.number, None)
        if there is None:
            return Mismatched(f"parts[{part.number}]", f"{part.length} bytes", "none")
        if there.size != part.length:
            return Mismatched(f"parts[{part.number}].size", str(part.length), str(there.size))
        difference = _difference(f"parts[{part.number}].digests", normalised(part.digests), there.digests)
        if difference is not None:
            return difference
    for number, there in by_number.items():
        return Mismatched(f"parts[{number}]", "none", f"{there.size} bytes")
    return None


def _common_to_parts(declared: Sequence[PartDeclared], seen: Sequence[PartSeen], size: int) -> set[str]:
    """Algorithms by which every part was compared; none unless the parts are the whole, in order, on both sides."""
    if not tiles(declared, size) or [part.number for part in seen] != [part.number for part in declared]:
        return set()
    return set.intersection(*(set(a.digests) & set(b.digests) for a, b in zip(declared, seen, strict=True)))


def _why_unproven(declaration: Declaration, observation: Observation) -> str:
    """What each side had, so that the client can declare something that the store tells."""
    told = sorted(observation.digests) + sorted({f"parts:{name}" for part in observation.parts for name in part.digests})
    declared = sorted(declaration.digests)
    if declaration.parts:
        declared += sorted({f"parts:{name}" for part in declaration.parts for name in part.digests})
    return f"the store tells {', '.join(told) or 'no digest'}; declared: {', '.join(declared) or 'none'}"


def _piece_problems(pieces: Pieces, size: int | None) -> list[Problem]:
    """What is wrong with declared pieces."""
    if pieces.length <= 0:
        return [Problem("pieces.length", "at least 1 byte")]
    problems = []
    for digest in pieces.digests:
        problems += digest_problems({pieces.algorithm: digest}, "pieces")
        if problems:
            break
    if size is not None and len(pieces.digests) != -(-size // pieces.length):
        problems.append(Problem("pieces.digests", f"{-(-size // pieces.length)} digests, one for each {pieces.length} bytes"))
    return problems
