"""Who watches the leases in a storm: by no broker's word, on a connection of its own, by the database's clock.

It looks at what is there again and again; and triggers of its own in the storm's database write every change of a lease or of a
limit down, in the order of the locks, so that afterwards every instant can be judged and not only those that were looked at.

More leases than slots are right in one case: the limit was lowered, and none was granted since.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.storms.store import Event

_SETUP = """
CREATE TABLE storm (
    seq bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL DEFAULT clock_timestamp(), what text NOT NULL, store_id int NOT NULL,
    direction text NOT NULL, slots int, ticket uuid, granted_at timestamptz, expires_at timestamptz
);
CREATE FUNCTION storm_lease() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE l leases := CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
BEGIN
    INSERT INTO storm (what, store_id, direction, ticket, granted_at, expires_at)
        VALUES (TG_OP, l.store_id, l.direction, l.ticket_id, l.granted_at, l.expires_at);
    RETURN NULL;
END $$;
CREATE FUNCTION storm_slots() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO storm (what, store_id, direction, slots) VALUES ('SLOTS', NEW.store_id, NEW.direction, NEW.slots);
    RETURN NULL;
END $$;
INSERT INTO storm (what, store_id, direction, slots) SELECT 'SLOTS', store_id, direction, slots FROM slots;
CREATE TRIGGER storm AFTER INSERT OR UPDATE OR DELETE ON leases FOR EACH ROW EXECUTE FUNCTION storm_lease();
CREATE TRIGGER storm AFTER INSERT OR UPDATE OF slots ON slots FOR EACH ROW EXECUTE FUNCTION storm_slots();
"""

_LOOK = """
SELECT s.store_id, s.direction, s.slots, count(l.*)::int AS held,
       coalesce(max(l.granted_at) > (SELECT max(at) FROM storm t WHERE t.what = 'SLOTS' AND t.store_id = s.store_id
                                                               AND t.direction = s.direction), false) AS granted_since
FROM slots s LEFT JOIN leases l ON (l.store_id, l.direction) = (s.store_id, s.direction) AND l.expires_at > clock_timestamp()
WHERE s.slots IS NOT NULL GROUP BY s.store_id, s.direction, s.slots
"""


@dataclass
class Observer:
    """Looks on until it is cancelled."""

    db: Any
    looks: int = 0
    full: int = 0
    """Times that a limit was seen reached."""
    over: list[str] = field(default_factory=list)

    async def prepare(self) -> None:
        """Begin to write down what happens."""
        await self.db.execute(_SETUP)

    async def watch(self) -> None:
        while True:
            self.looks += 1
            for store_id, direction, slots, held, granted_since in await self.db.fetch(_LOOK):
                self.full += held == slots
                if held > slots and granted_since:
                    self.over.append(f"store {store_id} {direction}: {held} leases, {slots} slots")
            await asyncio.sleep(0.005)


Key = tuple[int, str]


@dataclass
class History:
    """What the storm's log tells of every instant."""

    granted: int = 0
    renewed: int = 0
    ended: int = 0
    expired: int = 0
    """Of the ended: those that nobody gave back."""
    limits: int = 0
    """Changes of slots."""
    full: int = 0
    """Grants that took a store's last slot."""
    over: list[str] = field(default_factory=list)
    """Grants after which more unexpired leases were there than slots."""
    transfers: int = 0
    most: Counter[Key] = field(default_factory=Counter)
    unleased: list[str] = field(default_factory=list)
    """Instants at which a store moved more bodies than it had unexpired leases."""


async def history(db: Any, transfers: Mapping[int, Iterable[Event]]) -> History:
    """Judge every instant; `transfers` is what the stores wrote down, by store id."""
    rows = await db.fetch(
        """SELECT what, store_id, direction, slots, ticket, extract(epoch FROM at)::float8 AS at,
                  extract(epoch FROM granted_at)::float8 AS granted_at, extract(epoch FROM expires_at)::float8 AS expires_at
           FROM storm ORDER BY seq"""
    )
    told = History()
    _judge_leases(rows, told)
    for store_id, seen in transfers.items():
        for direction in ("read", "write"):
            own = [row for row in rows if (row["store_id"], row["direction"]) == (store_id, direction)]
            began = own[0]["at"]  # before, the store was probed and filled
            _judge_transfers((store_id, direction), own, [e for e in seen if e.direction == direction and e.at > began], told)
    return told


def _judge_leases(rows: Sequence[Any], told: History) -> None:
    slots: dict[Key, int | None] = {}
    held: defaultdict[Key, dict[Any, float]] = defaultdict(dict)
    for row in rows:
        key = row["store_id"], row["direction"]
        match row["what"]:
            case "SLOTS":
                slots[key] = row["slots"]
                told.limits += 1
            case "DELETE":
                held[key].pop(row["ticket"], None)
                told.ended += 1
                told.expired += row["expires_at"] <= row["at"]
            case "UPDATE":
                held[key][row["ticket"]] = row["expires_at"]
                told.renewed += 1
            case "INSERT":
                held[key][row["ticket"]] = row["expires_at"]
                told.granted += 1
                limit, unexpired = slots[key], sum(end > row["granted_at"] for end in held[key].values())
                if limit is not None:
                    told.full += unexpired == limit
                    if unexpired > limit:
                        told.over.append(f"store {key[0]} {key[1]} at {row['granted_at']}: {unexpired} leases, {limit} slots")


def _judge_transfers(key: Key, rows: Sequence[Any], seen: Sequence[Event], told: History) -> None:
    """A body may move only while there is a lease for it: never more bodies at once than leases, so never more than slots."""
    changes = sorted([(row["at"] if row["what"] != "INSERT" else row["granted_at"], row["what"], row) for row in rows if row["ticket"]],
                     key=lambda change: change[0])  # fmt: skip
    held: dict[Any, float] = {}
    moving = position = 0
    for event in sorted(seen):
        while position < len(changes) and changes[position][0] <= event.at:
            _, what, row = changes[position]
            position += 1
            if what == "DELETE":
                held.pop(row["ticket"], None)
            else:
                held[row["ticket"]] = row["expires_at"]
        moving += event.change
        if event.change < 0:
            continue
        told.transfers += 1
        told.most[key] = max(told.most[key], moving)
        leased = sum(end > event.at for end in held.values())
        if moving > leased:
            told.unleased.append(f"store {key[0]} {key[1]} at {event.at}: {moving} bodies, {leased} leases")
