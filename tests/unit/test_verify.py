"""The verdict of a commit: nothing that differs is ever accepted, nothing is accepted without proof (invariants 4, 5, 14)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from broker.model import MAX_BLOB_SIZE, Blob, BlobState, Digests, Observation, PartSeen, Pieces, ReplicaState
from broker.verify import (
    Accepted,
    Declaration,
    Mismatched,
    PartDeclared,
    PartsProblem,
    Unproven,
    VerifyPolicy,
    adopted,
    combined,
    declaration_problems,
    digest_problems,
    part_lengths,
    parts_problem,
    reverify,
    tiles,
    verdict,
)

POLICY = VerifyPolicy()
BY_SIZE = VerifyPolicy(size_suffices=True)
CONTENT = b"0123456789" * 25
SIZE = len(CONTENT)
PART = 100
ALGORITHMS = ("md5", "sha1", "sha256", "sha512")


def digest(algorithm: str, content: bytes = CONTENT) -> str:
    return hashlib.new(algorithm, content).hexdigest()


def digests(*algorithms: str, content: bytes = CONTENT) -> Digests:
    return {name: digest(name, content) for name in algorithms}


def cut(content: bytes = CONTENT, length: int = PART) -> list[bytes]:
    return [content[offset : offset + length] for offset in range(0, len(content), length)]


def declared_parts(*algorithms: str, length: int = PART) -> tuple[PartDeclared, ...]:
    pieces = cut(length=length)
    return tuple(PartDeclared(n, (n - 1) * length, len(c), digests(*algorithms, content=c)) for n, c in enumerate(pieces, start=1))


def seen_parts(*algorithms: str, content: bytes = CONTENT, length: int = PART) -> tuple[PartSeen, ...]:
    return tuple(PartSeen(n, len(c), digests(*algorithms, content=c)) for n, c in enumerate(cut(content, length), start=1))


def pieces(algorithm: str = "sha256", length: int = PART) -> Pieces:
    return Pieces(length, algorithm, tuple(digest(algorithm, c) for c in cut(length=length)))


def declared(*algorithms: str, **changes: Any) -> Declaration:
    return replace(Declaration(SIZE, digests(*algorithms)), **changes)


def seen(*algorithms: str, by: str = "broker", **changes: Any) -> Observation:
    return replace(Observation(SIZE, 5.0, by, digests(*algorithms)), **changes)


@pytest.mark.parametrize(
    ("declaration", "observation", "strength", "proven"),
    [
        (declared("sha256"), seen("sha256"), "sha256", ("sha256",)),
        (declared("sha512", "sha256", "md5"), seen("md5", "sha512"), "sha512", ("sha512", "md5")),
        (declared("sha256", "md5"), seen("md5"), "md5", ("md5",)),
        (declared("md5", digests={"md5": digest("md5").upper()}), seen("md5"), "md5", ("md5",)),
        (declared("md5"), seen(digests={"md5": digest("md5").upper()}), "md5", ("md5",)),
        (declared(parts=declared_parts("md5")), seen(parts=seen_parts("md5")), "parts:md5", ()),
        (declared("sha256", parts=declared_parts("md5", "sha256")), seen(parts=seen_parts("md5", "sha256")), "parts:sha256", ()),
        (declared("md5", parts=declared_parts("sha256")), seen("md5", parts=seen_parts("sha256")), "parts:sha256", ("md5",)),
        (declared("md5", parts=declared_parts("md5")), seen("md5", parts=seen_parts("md5")), "md5", ("md5",)),
        (declared(pieces=pieces()), seen(parts=seen_parts("sha256")), "parts:sha256", ()),
        (declared("md5", pieces=pieces(length=50)), seen("md5", parts=seen_parts("sha256")), "md5", ("md5",)),
    ],
)
def test_accepted_by_the_strongest_common_digest(
    declaration: Declaration, observation: Observation, strength: str, proven: tuple[str, ...]
) -> None:
    assert verdict(declaration, observation, POLICY) == Accepted(strength, "broker", proven)


def test_who_observed_is_kept() -> None:
    result = verdict(declared("md5"), seen("md5", by="agent"), POLICY)
    assert isinstance(result, Accepted)
    assert result.observed_by == "agent"


OTHER = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
TWO = seen_parts("md5")[:2]


@pytest.mark.parametrize(
    ("declaration", "observation", "field"),
    [
        (declared("sha256"), seen("sha256", size=SIZE + 1), "size"),
        (declared("sha256"), seen("sha256", size=0), "size"),
        (declared("sha256"), seen(digests=digests("sha256", content=OTHER)), "digests.sha256"),
        (declared("sha256", "sha1"), seen(digests={**digests("sha256"), **digests("sha1", content=OTHER)}), "digests.sha1"),
        (declared("sha512", "md5"), seen(digests={**digests("sha512"), **digests("md5", content=OTHER)}), "digests.md5"),
        (declared(parts=declared_parts("md5")), seen(parts=seen_parts("md5", content=OTHER)), "parts[1].digests.md5"),
        (declared("md5", parts=declared_parts("md5")), seen("md5", parts=seen_parts("md5", content=OTHER)), "parts[1].digests.md5"),
        (declared(parts=declared_parts("md5")), seen(parts=TWO), "parts[3]"),
        (declared(parts=declared_parts("md5")[:2]), seen(parts=seen_parts("md5")), "parts[3]"),
        (declared(parts=declared_parts("md5")), seen(parts=(*TWO, PartSeen(3, 49))), "parts[3].size"),
        (declared(pieces=pieces()), seen(parts=seen_parts("sha256", content=OTHER)), "parts[1].digests.sha256"),
    ],
)
@pytest.mark.parametrize("policy", [POLICY, BY_SIZE])
def test_any_difference_is_a_mismatch(declaration: Declaration, observation: Observation, field: str, policy: VerifyPolicy) -> None:
    result = verdict(declaration, observation, policy)
    assert isinstance(result, Mismatched)
    assert result.field == field
    assert result.declared != result.observed


@pytest.mark.parametrize(
    ("declaration", "observation", "said"),
    [
        (declared("sha256"), seen(), "the store tells no digest; declared: sha256"),
        (declared(), seen("sha256"), "the store tells sha256; declared: none"),
        (declared("sha256"), seen("md5"), "the store tells md5; declared: sha256"),
        (declared("sha1"), seen("sha1"), "the store tells sha1; declared: sha1"),
        (declared("md5", parts=declared_parts("md5")), seen(), "the store tells no digest; declared: md5, parts:md5"),
        (declared("sha256"), seen(parts=seen_parts("md5")), "the store tells parts:md5; declared: sha256"),
        (declared(parts=declared_parts("sha256")), seen(parts=seen_parts("md5")), "the store tells parts:md5; declared: parts:sha256"),
        (declared(pieces=pieces("sha1")), seen(parts=seen_parts("sha1")), "the store tells parts:sha1; declared: none"),
    ],
)
def test_without_proof_policy_decides(declaration: Declaration, observation: Observation, said: str) -> None:
    assert verdict(declaration, observation, POLICY) == Unproven(said)
    by_size = verdict(declaration, observation, BY_SIZE)
    assert isinstance(by_size, Accepted)
    assert by_size.strength == "size"


@pytest.mark.parametrize("policy", [POLICY, BY_SIZE])
def test_the_size_is_never_assumed(policy: VerifyPolicy) -> None:
    assert verdict(declared("sha256", size=None), seen("sha256"), policy) == Unproven("the size was not declared")


def test_policy_may_refuse_an_algorithm() -> None:
    strict = VerifyPolicy(algorithms=("sha256",))
    assert isinstance(verdict(declared("md5"), seen("md5"), strict), Unproven)
    assert isinstance(verdict(declared(parts=declared_parts("md5")), seen(parts=seen_parts("md5")), strict), Unproven)
    assert verdict(declared("md5", "sha256"), seen("md5", "sha256"), strict) == Accepted("sha256", "broker", ("md5", "sha256"))


@pytest.mark.parametrize(
    ("parts", "there"),
    [
        pytest.param(declared_parts("md5"), (*TWO, PartSeen(3, 50)), id="one part without a digest"),
        pytest.param(declared_parts("md5"), tuple(reversed(seen_parts("md5"))), id="not in order"),
        pytest.param((*declared_parts("md5")[:2], replace(declared_parts("md5")[2], offset=0)), seen_parts("md5"), id="overlap"),
        pytest.param(declared_parts("md5")[:2], TWO, id="not the whole"),
        pytest.param((), seen_parts("md5"), id="none declared"),
    ],
)
def test_parts_prove_only_the_whole(parts: tuple[PartDeclared, ...], there: tuple[PartSeen, ...]) -> None:
    assert isinstance(verdict(declared(parts=parts), seen(parts=there), POLICY), Unproven)


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(Pieces(0, "sha256", ()), id="no length"),
        pytest.param(Pieces(1, "sha256", ("ab",)), id="a digest for each byte is missing"),
        pytest.param(Pieces(PART, "sha256", pieces().digests[:2]), id="too few"),
        pytest.param(Pieces(90, "sha256", pieces().digests), id="cut elsewhere"),
    ],
)
def test_pieces_that_do_not_fit_the_parts_prove_nothing(made: Pieces) -> None:
    assert isinstance(verdict(declared(pieces=made), seen(parts=seen_parts("sha256")), POLICY), Unproven)


SETS = st.sets(st.sampled_from(ALGORITHMS))


@given(SETS, st.dictionaries(st.sampled_from(ALGORITHMS), st.booleans()), st.booleans(), st.integers(-1, 1))
def test_what_differs_is_never_accepted(declares: set[str], tells: dict[str, bool], size_suffices: bool, more: int) -> None:
    """Every combination of declared digests, told digests (right or wrong) and size."""
    observation = seen(size=SIZE + more, digests={name: digest(name, CONTENT if right else OTHER) for name, right in tells.items()})
    result = verdict(declared(*declares), observation, VerifyPolicy(size_suffices=size_suffices))
    differs = more != 0 or any(not right for name, right in tells.items() if name in declares)
    proofs = {"md5", "sha256", "sha512"} & declares & set(tells)
    assert isinstance(result, Mismatched) == differs
    assert isinstance(result, Accepted) == (not differs and (bool(proofs) or size_suffices))
    if isinstance(result, Accepted):
        assert set(result.proven) == declares & set(tells)
        assert (result.strength == "size") == (not proofs)


@given(st.binary(min_size=1, max_size=300), st.binary(min_size=1, max_size=300), st.integers(1, 120))
def test_other_bytes_in_parts_are_never_accepted(ours: bytes, theirs: bytes, length: int) -> None:
    assume(ours != theirs)
    parts = tuple(PartDeclared(n, (n - 1) * length, len(c), digests("md5", content=c)) for n, c in enumerate(cut(ours, length), start=1))
    observation = Observation(len(theirs), 0.0, "broker", parts=seen_parts("md5", content=theirs, length=length))
    for policy in (POLICY, BY_SIZE):
        assert isinstance(verdict(Declaration(len(ours), parts=parts), observation, policy), Mismatched)


BLOB = Blob(UUID(int=1), SIZE, digests("sha256", "md5"), BlobState.ACTIVE, pieces())


@pytest.mark.parametrize(
    ("blob", "observation", "state"),
    [
        (BLOB, seen("md5"), ReplicaState.ACTIVE),
        (BLOB, seen(parts=seen_parts("sha256")), ReplicaState.ACTIVE),
        (BLOB, seen(digests=digests("md5", content=OTHER)), ReplicaState.CORRUPT),
        (BLOB, seen("md5", size=1), ReplicaState.CORRUPT),
        (BLOB, None, ReplicaState.MISSING),
        (BLOB, seen(), None),
        (replace(BLOB, size=None), seen("sha256"), None),
    ],
)
def test_reverify(blob: Blob, observation: Observation | None, state: ReplicaState | None) -> None:
    recheck = reverify(blob, observation, POLICY)
    assert recheck.state is state
    assert isinstance(recheck.verdict, Accepted) == (state is ReplicaState.ACTIVE)


@pytest.mark.parametrize(
    ("told_before", "told", "state"),
    [
        ({"sha256", "md5"}, (), ReplicaState.CORRUPT),
        ({"sha256", "md5"}, ("md5",), ReplicaState.ACTIVE),
        ({"sha256"}, ("sha1",), ReplicaState.CORRUPT),
        ((), (), None),
    ],
)
def test_a_store_that_forgot_the_digests_it_told_has_another_object(
    told_before: Collection[str], told: tuple[str, ...], state: ReplicaState | None
) -> None:
    assert reverify(BLOB, seen(*told), POLICY, told_before).state is state


START = Declaration(SIZE, digests("sha256"))


@pytest.mark.parametrize(
    ("start", "commit", "result"),
    [
        (Declaration(), declared("md5"), declared("md5")),
        (START, Declaration(), START),
        (START, declared("md5"), declared("md5", "sha256")),
        (START, declared("sha256", digests={"sha256": digest("sha256").upper()}), START),
        (Declaration(pieces=pieces()), declared(), declared(pieces=pieces())),
        (declared(), Declaration(pieces=pieces()), declared(pieces=pieces())),
        (declared(pieces=pieces()), declared(pieces=pieces()), declared(pieces=pieces())),
        (declared(parts=declared_parts()), Declaration(), declared(parts=declared_parts())),
        (declared(), Declaration(parts=declared_parts("md5")), declared(parts=declared_parts("md5"))),
        (declared(parts=declared_parts("sha1")), declared(parts=declared_parts("md5")), declared(parts=declared_parts("sha1", "md5"))),
        (declared(parts=declared_parts("md5")), declared(parts=declared_parts()[1:]), declared(parts=declared_parts("md5"))),
    ],
)
def test_a_commit_adds_to_the_start(start: Declaration, commit: Declaration, result: Declaration) -> None:
    assert combined(start, commit) == result


@pytest.mark.parametrize(
    ("start", "commit", "field"),
    [
        (START, Declaration(SIZE + 1), "size"),
        (START, Declaration(digests=digests("sha256", content=OTHER)), "digests.sha256"),
        (declared(pieces=pieces()), declared(pieces=pieces(length=50)), "pieces"),
        (declared(parts=declared_parts()), declared(parts=(PartDeclared(2, 100, 99),)), "parts[2]"),
        (declared(parts=declared_parts()), declared(parts=(PartDeclared(2, 99, 100),)), "parts[2]"),
        (declared(parts=declared_parts()), declared(parts=(PartDeclared(4, 250, 1),)), "parts[4]"),
        (declared(parts=declared_parts("md5")), declared(parts=(PartDeclared(1, 0, 100, {"md5": "00"}),)), "parts[1].digests.md5"),
    ],
)
def test_a_commit_changes_nothing(start: Declaration, commit: Declaration, field: str) -> None:
    result = combined(start, commit)
    assert isinstance(result, Mismatched)
    assert result.field == field


@pytest.mark.parametrize(
    ("given_", "fields"),
    [
        ({}, []),
        (digests(*ALGORITHMS), []),
        ({"sha256": digest("sha256").upper()}, []),
        ({"crc32": "00000000"}, ["digests"]),
        ({"sha256": digest("md5")}, ["digests.sha256"]),
        ({"md5": ""}, ["digests.md5"]),
        ({"md5": "g" * 32}, ["digests.md5"]),
        ({"md5": "0" * 31 + "\n"}, ["digests.md5"]),
        ({"md5": "0x" + "0" * 30}, ["digests.md5"]),
        ({"md5": "٣" * 32}, ["digests.md5"]),
        ({"md5": "0", "sha1": "0"}, ["digests.md5", "digests.sha1"]),
    ],
)
def test_digest_problems(given_: dict[str, str], fields: list[str]) -> None:
    assert [problem.field for problem in digest_problems(given_)] == fields


@pytest.mark.parametrize(
    ("declaration", "fields"),
    [
        (Declaration(), []),
        (declared("sha256", pieces=pieces(), parts=declared_parts("md5")), []),
        (Declaration(1), []),
        (Declaration(MAX_BLOB_SIZE), []),
        (Declaration(0), ["size"]),
        (Declaration(-1), ["size"]),
        (Declaration(MAX_BLOB_SIZE + 1), ["size"]),
        (Declaration(0, pieces=pieces()), ["size"]),
        (declared(digests={"md5": "x"}), ["digests.md5"]),
        (declared(pieces=Pieces(0, "sha256", ())), ["pieces.length"]),
        (declared(pieces=Pieces(PART, "sha256", pieces().digests[:2])), ["pieces.digests"]),
        (declared(pieces=Pieces(1, "sha256", ())), ["pieces.digests"]),
        (declared(pieces=Pieces(PART, "sha256", ("x", "y", "z"))), ["pieces.sha256"]),
        (declared(pieces=Pieces(PART, "crc32", ("x", "y", "z"))), ["pieces"]),
        (Declaration(pieces=pieces()), []),
        (declared(parts=()), ["parts"]),
        (declared(parts=declared_parts()[:2]), ["parts"]),
        (Declaration(parts=declared_parts()), []),
        (Declaration(parts=declared_parts()[1:]), ["parts"]),
        (
            declared(parts=tuple(replace(p, digests={"md5": "x"}) for p in declared_parts()[:1]) + declared_parts()[1:]),
            ["parts[1].digests.md5"],
        ),
    ],
)
def test_declaration_problems(declaration: Declaration, fields: list[str]) -> None:
    assert [problem.field for problem in declaration_problems(declaration)] == fields


@pytest.mark.parametrize(
    ("parts", "size", "whole"),
    [
        ([(1, 0, 5)], 5, True),
        ([(1, 0, 5), (2, 5, 1)], 6, True),
        ([(1, 0, 5), (2, 5, 1)], None, True),
        ([(1, 0, 5), (2, 5, 1)], 7, False),
        ([(1, 0, 5), (2, 6, 1)], 7, False),
        ([(1, 0, 5), (2, 4, 1)], 5, False),
        ([(1, 0, 5), (3, 5, 1)], 6, False),
        ([(2, 0, 5)], 5, False),
        ([(1, 1, 5)], 6, False),
        ([(1, 0, 0)], 0, False),
        ([(1, 0, 6), (2, 6, -1)], 5, False),
        ([], 0, False),
    ],
)
def test_tiles(parts: list[tuple[int, int, int]], size: int | None, whole: bool) -> None:
    assert tiles([PartDeclared(*part) for part in parts], size) == whole


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_part_lengths_add_up(size: int, part_size: int) -> None:
    assume(size // part_size < 10_000)
    lengths = part_lengths(size, part_size)
    assert sum(lengths) == size
    assert all(length == part_size for length in lengths[:-1])
    assert 0 < lengths[-1] <= part_size


@pytest.mark.parametrize(
    ("there", "size", "problem"),
    [
        ([(1, 100), (2, 100), (3, 50)], 250, None),
        ([(3, 50), (1, 100), (2, 100)], 250, None),
        ([(1, 100), (3, 50)], 250, PartsProblem((2,), (), ())),
        ([], 250, PartsProblem((1, 2, 3), (), ())),
        ([(1, 100), (2, 99), (3, 50)], 250, PartsProblem((), (2,), ())),
        ([(1, 100), (2, 100), (3, 100)], 250, PartsProblem((), (3,), ())),
        ([(1, 100), (2, 100), (3, 50), (4, 1)], 250, PartsProblem((), (), (4,))),
        ([(0, 1), (1, 100), (2, 100)], 200, PartsProblem((), (), (0,))),
        ([(1, 7), (4, 1)], 250, PartsProblem((2, 3), (1,), (4,))),
        ([(1, 100), (2, 7)], None, None),
        ([(1, 7)], None, None),
        ([(1, 7), (2, 100)], None, PartsProblem((), (1,), ())),
        ([(2, 100)], None, PartsProblem((1,), (), ())),
        ([(1, 101)], None, PartsProblem((), (1,), ())),
        ([(1, 0)], None, PartsProblem((), (1,), ())),
        ([], None, PartsProblem((1,), (), ())),
    ],
)
def test_parts_problem(there: list[tuple[int, int]], size: int | None, problem: PartsProblem | None) -> None:
    assert parts_problem([PartSeen(number, length) for number, length in there], size, PART) == problem


@pytest.mark.parametrize(
    ("declared", "observed", "bound", "expected"),
    [
        (("sha256",), ("md5",), ("sha256",), Accepted("bound:sha256", "broker")),
        (("sha256",), (), ("sha256",), Accepted("bound:sha256", "broker")),
        (("sha256",), ("sha256", "md5"), ("sha256",), Accepted("sha256", "broker", ("sha256",))),
        (("sha256", "md5"), ("md5",), ("sha256",), Accepted("bound:sha256", "broker", ("md5",))),
        (("sha256",), ("md5",), (), None),
        (("md5",), (), ("sha256",), None),
        (("sha256",), (), ("md5",), None),
    ],
)
def test_what_every_url_bound_is_proven(
    declared: tuple[str, ...], observed: tuple[str, ...], bound: tuple[str, ...], expected: Accepted | None
) -> None:
    found = verdict(Declaration(SIZE, digests(*declared)), Observation(SIZE, 0, "broker", digests(*observed)), POLICY, bound)
    assert found == expected if expected is not None else isinstance(found, Unproven)


def test_a_bound_digest_excuses_no_difference() -> None:
    other = Observation(SIZE, 0, "broker", digests("md5", content=b"other"))
    assert isinstance(verdict(Declaration(SIZE, digests("sha256", "md5")), other, POLICY, ("sha256",)), Mismatched)
    shorter = Observation(SIZE - 1, 0, "broker", {})
    assert isinstance(verdict(Declaration(SIZE, digests("sha256")), shorter, POLICY, ("sha256",)), Mismatched)


@pytest.mark.parametrize(
    ("said", "observation", "strength", "kept"),
    [
        ((), seen("md5"), "md5", {"md5"}),
        ((), seen("md5", "sha256"), "sha256", {"md5", "sha256"}),
        (("md5",), seen("md5", "sha256"), "sha256", {"md5", "sha256"}),
        (("md5", "sha512"), seen("md5"), "md5", {"md5", "sha512"}),  # one of both is tied to the object
        ((), seen(parts=seen_parts("md5")), "parts:md5", set()),
    ],
)
def test_an_object_becomes_what_its_store_says_of_it(
    said: Collection[str], observation: Observation, strength: str, kept: set[str]
) -> None:
    found = adopted(digests(*said), observation, POLICY)
    assert isinstance(found, tuple)
    declaration, accepted = found
    assert (declaration.size, set(declaration.digests), accepted.strength) == (SIZE, kept, strength)
    assert verdict(declaration, observation, POLICY) == accepted, "a later look finds the same"
    assert set(accepted.proven) == set(observation.digests)


@pytest.mark.parametrize(
    ("said", "observation", "reason"),
    [
        ({}, seen(), ""),
        ({}, seen("sha1"), ""),  # proves nothing
        (digests("sha512"), seen("md5"), "it tells md5"),
        (digests("md5"), seen(parts=seen_parts("md5")), "it tells none"),
        ({}, seen(parts=seen_parts("md5")[:-1]), ""),  # a part is missing
        ({}, seen(parts=(*seen_parts("md5")[::-1],)), ""),  # the short one comes first
        ({}, Observation(0, 5.0, "broker", digests("md5", content=b"")), "size"),
    ],
)
def test_an_object_that_nothing_proves_is_not_taken(said: Digests, observation: Observation, reason: str) -> None:
    found = adopted(said, observation, POLICY)
    assert isinstance(found, Unproven)
    assert reason in found.reason


@given(st.sampled_from(ALGORITHMS), st.sampled_from(ALGORITHMS))
def test_a_digest_that_differs_is_never_adopted(said: str, other: str) -> None:
    wrong = {**digests(other), said: digest(said, b"else")}
    assert isinstance(adopted(wrong, seen(*ALGORITHMS), POLICY), Mismatched)
