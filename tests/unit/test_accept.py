"""Which candidates can be offered: every reason, which one comes first, and what a private store gives away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.accept import Candidate, Reason, Request, accept, destination, source
from broker.model import Abilities, Exposure, Operation, Purpose, Replica, ReplicaState, Store
from broker.paths import IDLE, Load

NOW = 1000.0
READABLE = Candidate("s1", "eu/az1", "https", Abilities(reads=True), project="acme")
WRITABLE = Candidate("s1", "eu/az1", "https", Abilities(writes=True), observes=frozenset({"md5"}), capacity=1000, max_size=500)
FILE = frozenset({"https", "file"})
MOUNT = {"scheme": "file", "handed": True, "abilities": Abilities()}
"""A shared mount at eu/az1; nothing was probed there."""
DOWNLOAD = Request(Operation.DOWNLOAD, project="other", size=100)
UPLOAD = Request(Operation.UPLOAD, project="other", size=100)


@pytest.mark.parametrize(
    ("candidate", "request_", "reason"),
    [
        ({}, {}, None),
        ({"exposure": Exposure.SERVICE}, {}, Reason.PRIVATE),
        ({"exposure": Exposure.SERVICE}, {"sees_private": True}, None),
        ({"exposure": Exposure.SERVICE, "enabled": False}, {}, Reason.PRIVATE),
        ({"exposure": Exposure.SERVICE, "enabled": False}, {"sees_private": True}, Reason.DISABLED),
        ({"enabled": False}, {}, Reason.DISABLED),
        ({"enabled": False, "state": ReplicaState.CORRUPT}, {}, Reason.DISABLED),
        ({"state": ReplicaState.PENDING}, {}, Reason.PENDING),
        ({"state": ReplicaState.CORRUPT}, {}, Reason.CORRUPT),
        ({"state": ReplicaState.MISSING}, {}, Reason.MISSING),
        ({"state": ReplicaState.DELETING}, {}, Reason.DELETING),
        ({"state": ReplicaState.UNSEALED}, {}, Reason.UNSEALED),
        ({"state": ReplicaState.UNSEALED}, {"project": "acme"}, None),
        ({"state": ReplicaState.CORRUPT}, {"project": "acme"}, Reason.CORRUPT),
        ({"state": ReplicaState.UNSEALED, "project": ""}, {"project": ""}, Reason.UNSEALED),
        ({"abilities": Abilities()}, {}, Reason.NOT_READABLE),
        ({"writable": False}, {}, None),
        ({}, {"avoid": frozenset({"s1"})}, Reason.AVOIDED),
        ({}, {"avoid": frozenset({"s2"})}, None),
        ({}, {"avoid": frozenset({"s1"}), "prefer": frozenset({"s1"})}, Reason.AVOIDED),
        ({}, {"schemes": frozenset({"http", "file"})}, Reason.SCHEME),
        ({}, {"schemes": frozenset({"https"})}, None),
        ({}, {"failed_until": {"s1": NOW + 1}}, Reason.RECENTLY_FAILED),
        ({}, {"failed_until": {"s1": NOW}}, None),
        ({}, {"failed_until": {"s2": NOW + 1}}, None),
        ({"slots": 0}, {}, Reason.FULL),
        ({"slots": 1}, {}, None),
        (MOUNT, {}, Reason.NOT_MOUNTED),
        (MOUNT, {"site": "eu/az1", "schemes": FILE}, Reason.NOT_MOUNTED),
        (MOUNT, {"proven_site": "eu/az2", "schemes": FILE}, Reason.NOT_MOUNTED),
        (MOUNT, {"proven_site": "eu", "schemes": FILE}, Reason.NOT_MOUNTED),
        (MOUNT, {"proven_site": "eu/az10", "schemes": FILE}, Reason.NOT_MOUNTED),
        (MOUNT, {"proven_site": "eu/az1"}, Reason.SCHEME),
        (MOUNT, {"proven_site": "eu/az1", "schemes": frozenset({"https"})}, Reason.SCHEME),
        (MOUNT, {"proven_site": "eu/az1", "schemes": FILE}, None),
        (MOUNT, {"proven_site": "eu/az1/rack3/host7", "schemes": FILE}, None),
        ({**MOUNT, "exposure": Exposure.SERVICE}, {}, Reason.PRIVATE),
        ({**MOUNT, "exposure": Exposure.SERVICE}, {"proven_site": "eu/az1", "schemes": FILE}, Reason.PRIVATE),
        ({**MOUNT, "state": ReplicaState.CORRUPT}, {}, Reason.CORRUPT),
        ({**MOUNT, "scheme": "rbd"}, {"proven_site": "eu/az1", "schemes": FILE}, Reason.SCHEME),
    ],
)
def test_download(candidate: dict[str, Any], request_: dict[str, Any], reason: Reason | None) -> None:
    assert accept(DOWNLOAD._replace(**request_), replace(READABLE, **candidate), IDLE, NOW) is reason


@pytest.mark.parametrize(
    ("candidate", "request_", "reserved", "reason"),
    [
        ({}, {}, 0, None),
        ({"writable": False}, {}, 0, Reason.NOT_WRITABLE),
        ({"abilities": Abilities(reads=True)}, {}, 0, Reason.NOT_WRITABLE),
        ({"trusted": False}, {}, 0, Reason.UNENFORCED),
        ({"trusted": False, "writable": False}, {}, 0, Reason.NOT_WRITABLE),
        ({"observes": frozenset()}, {}, 0, Reason.UNVERIFIABLE),
        ({"observes": frozenset()}, {"needs_digest": False}, 0, None),
        ({}, {"size": 500}, 0, None),
        ({}, {"size": 501}, 0, Reason.TOO_LARGE),
        ({"max_size": None}, {"size": 501}, 0, None),
        ({}, {"size": 100}, 900, None),
        ({}, {"size": 101}, 900, Reason.NO_CAPACITY),
        ({"capacity": None}, {"size": 101}, 900, None),
        ({}, {"size": None}, 999, None),
        ({}, {"size": None}, 1000, Reason.NO_CAPACITY),
        ({}, {}, 5000, Reason.NO_CAPACITY),
        ({"enabled": False}, {}, 0, Reason.DISABLED),
        ({"exposure": Exposure.SERVICE}, {}, 0, Reason.PRIVATE),
        ({}, {"avoid": frozenset({"s1"})}, 0, Reason.AVOIDED),
        ({}, {"schemes": frozenset({"http"})}, 0, Reason.SCHEME),
        ({}, {"failed_until": {"s1": NOW + 1}}, 0, Reason.RECENTLY_FAILED),
        ({"slots": 0}, {}, 0, Reason.FULL),
    ],
)
def test_upload(candidate: dict[str, Any], request_: dict[str, Any], reserved: int, reason: Reason | None) -> None:
    assert accept(UPLOAD._replace(**request_), replace(WRITABLE, **candidate), Load(reserved=reserved), NOW) is reason


def test_every_replica_state_but_active_has_a_reason() -> None:
    for state in ReplicaState:
        reason = accept(DOWNLOAD, replace(READABLE, state=state), IDLE, NOW)
        assert (reason is None) == (state is ReplicaState.ACTIVE)


@given(
    state=st.sampled_from(list(ReplicaState)),
    enabled=st.booleans(),
    exposure=st.sampled_from(list(Exposure)),
    sees_private=st.booleans(),
    project=st.sampled_from(["acme", "other"]),
)
def test_only_what_may_be_named_is_accepted(
    state: ReplicaState, enabled: bool, exposure: Exposure, sees_private: bool, project: str
) -> None:
    """Invariant 2, and 14 for what is unsealed."""
    candidate = replace(READABLE, state=state, enabled=enabled, exposure=exposure)
    reason = accept(DOWNLOAD._replace(sees_private=sees_private, project=project), candidate, IDLE, NOW)
    good = state is ReplicaState.ACTIVE or (state is ReplicaState.UNSEALED and project == "acme")
    visible = exposure is Exposure.PUBLIC or sees_private
    assert (reason is None) == (good and enabled and visible)
    assert (reason is Reason.PRIVATE) == (not visible)


def store(**changes: Any) -> Store:
    abilities = Abilities(reads=True, writes=True, observes=("sha256",), observes_parts=("md5",))
    made = Store(
        7, "s1", "s3", "eu/az1", "https://s1", read_slots=1, write_slots=2, read_bandwidth=3, write_bandwidth=4, cost=0.5, capacity=900,
        exposure=Exposure.SERVICE, abilities=abilities,
    )  # fmt: skip
    return replace(made, **changes)


def test_source_is_the_reading_side() -> None:
    replica = Replica(UUID(int=1), UUID(int=2), "s1", "k", Purpose.CACHE, ReplicaState.UNSEALED, False, "acme")
    made = source(replica, store(), "https")
    assert (made.store, made.site, made.kind, made.key, made.replica) == ("s1", "eu/az1", "s3", "k", str(UUID(int=1)))
    assert (made.slots, made.bandwidth, made.cost) == (1, 3, 0.5)
    assert (made.state, made.project, made.exposure) == (ReplicaState.UNSEALED, "acme", Exposure.SERVICE)


@pytest.mark.parametrize(("multipart", "observes"), [(False, {"sha256"}), (True, {"sha256", "md5"})])
def test_destination_is_the_writing_side(multipart: bool, observes: set[str]) -> None:
    made = destination(store(writable=False, abilities=replace(store().abilities, multipart=multipart)), "http", 5)
    assert (made.slots, made.bandwidth, made.capacity, made.max_size) == (2, 4, 900, 5)
    assert (made.writable, made.replica, made.scheme) == (False, None, "http")
    assert made.observes == observes


@pytest.mark.parametrize("missing", [{}, {"refuses_tampering": False}, {"refuses_expired": False}])
@pytest.mark.parametrize("setting", [None, "refused", "allowed"])
def test_uploads_go_where_urls_are_enforced_unless_the_operator_allows_it(missing: dict[str, bool], setting: str | None) -> None:
    abilities = replace(store().abilities, **{"refuses_tampering": True, "refuses_expired": True} | missing)
    registered = store(abilities=abilities, exposure=Exposure.PUBLIC, settings={} if setting is None else {"weak_uploads": setting})
    reason = accept(UPLOAD, destination(registered, "https", None), IDLE, NOW)
    assert reason is (Reason.UNENFORCED if missing and setting != "allowed" else None)
