"""What an attack is, and what it leaves behind in the table.

Rules:

* An attack has a positive control: the honest request works, before and after, so that a refusal proves something.
* Each of its tries is counted. *Accepted* means what the try says, by default that the store answered 2xx or showed a byte of the
  victim's; and after every attack the objects of victim and attacker must be what they were.
* What is accepted is compared with `weak.STATED`, both ways: a surprise in either direction fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.attacks.target import Target
from tests.attacks.wire import Reply, Shot

Run = Callable[[Target, "Tries"], Awaitable[None]]


class ControlFailed(AssertionError):
    """The honest request did not work, so nothing was shown."""


@dataclass
class Cell:
    """What one attack on one store came to: each try with whether it was accepted, and what was answered."""

    accepted: dict[str, bool] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    """Tries that were answered with 5xx."""


class Tries:
    """Carries out the tries of one attack on one store, and notes them in `cell`."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.cell = Cell()

    def control(self, holds: object, what: str) -> None:
        """Raises `ControlFailed` unless it `holds`."""
        if not holds:
            raise ControlFailed(f"{self.target.kind}: {what}")

    def tried(self, name: str, accepted: bool, note: str = "") -> None:
        assert name not in self.cell.accepted, f"two tries are called {name}"
        self.cell.accepted[name] = accepted
        self.cell.notes[name] = note

    async def fire(self, name: str, shot: Shot, accepted: Callable[[Reply], bool] | None = None) -> Reply:
        """Send one try and count it."""
        reply = await self.target.fire(shot)
        taken = accepted(reply) if accepted is not None else reply.ok
        self.tried(name, taken or reply.shows(self.target.victim.marker), f"{reply.status}")
        if reply.status >= 500:
            self.cell.failures.append(name)
        return reply

    async def writes(self, name: str, shot: Shot, key: str, content: bytes | None = None) -> Reply:
        """Send one try that counts when anything (or just `content`) lies under `key` afterwards, which was free before."""
        reply = await self.target.fire(shot)
        found = await self.target.truth(key)
        self.tried(name, found is not None if content is None else found == content, f"{reply.status}")
        if reply.status >= 500:
            self.cell.failures.append(name)
        return reply


@dataclass(frozen=True)
class Attack:
    """One row of the table."""

    name: str
    family: str
    holds: str
    """What the attacker has, honestly."""
    tries: str
    """What he does with it, and what counts."""
    applies: Callable[[Target], bool]
    run: Run


ATTACKS: list[Attack] = []
"""All rows, in the order of the table."""


def attack(name: str, *, holds: str, on: Callable[[Target], bool]) -> Callable[[Run], Run]:
    """Register a function as an attack; its docstring says what is tried."""

    def register(run: Run) -> Run:
        family = run.__module__.rpartition(".")[2]
        ATTACKS.append(Attack(name, family, holds, " ".join(inspect.getdoc(run).split()), on, run))  # type: ignore[union-attr]
        return run

    return register


async def run(attack: Attack, target: Target) -> Cell:
    """Carry out one attack on one store. Raises `ControlFailed`."""
    tries = Tries(target)
    tries.control(await target.is_honest(), f"before “{attack.name}”")
    await attack.run(target, tries)
    for name, thing in (("the victim's object changed", target.victim), ("the attacker's object changed", target.mine)):
        if await target.truth(thing.key) != thing.content:
            tries.tried(name, True)
            await target.plant(thing.key, thing.content)
    tries.control(await target.is_honest(), f"after “{attack.name}”")
    assert tries.cell.accepted, f"{attack.name} tried nothing on {target.kind}"
    return tries.cell
