"""How busy, how fast and how reliable stores are, as far as this broker knows: loads, averages, failures of single clients, doubts.

Rules
- Loads are read every half second, and taken from every grant in between. They are hints: the database decides who gets a slot.
- What a path promises is worked out once for `OUTLOOK_SECONDS`, not for each request: evidence halves in minutes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from broker import rank
from broker.catalog.failures import Failure
from broker.catalog.leases import SlotsRow
from broker.catalog.paths import PathKey
from broker.model import Direction, Store
from broker.paths import IDLE, Load, PathAverage
from broker.rank import Averages, Outlooks

OUTLOOK_SECONDS = 5.0
"""How long what was made of averages is used; new averages end it at once."""

OUTLOOK_SITES = 1000
"""Sites whose outlooks are kept, at most."""

CLIENTS = 50_000
"""Clients whose failures are remembered, at most."""


class Conditions:
    """Loads, averages and doubts by store, failures by client."""

    def __init__(self) -> None:
        self.read_loads: dict[str, Load] = {}
        self.write_loads: dict[str, Load] = {}
        self._averages: dict[str, dict[tuple[str, str], PathAverage]] = {"read": {}, "write": {}}
        self._averages_at = 0.0
        self._outlooks: dict[tuple[Direction, str | None], Outlooks] = {}
        self._failures: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._forgot_until = float("-inf")
        self._doubts: dict[str, dict[str, float]] = {"read": {}, "write": {}}
        self._noted: Mapping[tuple[int, str], int] | None = None

    # -- loads

    def take_over_loads(self, rows: Iterable[SlotsRow], by_id: Mapping[int, Store]) -> None:
        """These are the loads now."""
        read: dict[str, Load] = {}
        write: dict[str, Load] = {}
        for store_id, direction, leased, taken in rows:
            store = by_id.get(store_id)
            if store is not None:
                (read if direction == Direction.READ else write)[store.name] = Load(active=leased, reserved=taken)
        self.read_loads, self.write_loads = read, write

    def take_over_leases(self, held: Mapping[tuple[int, str], int], by_id: Mapping[int, Store]) -> None:
        """A grant has just seen how many leases stores hold. All requests of one statement bring the same mapping; once is enough."""
        if held is self._noted:
            return
        self._noted = held
        for (store_id, direction), leased in held.items():
            store = by_id.get(store_id)
            if store is not None:
                loads = self.read_loads if direction == Direction.READ else self.write_loads
                before = loads.get(store.name, IDLE)
                if before.active != leased:
                    loads[store.name] = Load(active=leased, reserved=before.reserved)

    # -- averages

    def take_over_averages(self, found: Mapping[PathKey, PathAverage], by_id: Mapping[int, Store]) -> None:
        """These averages may have changed."""
        for key, average in found.items():
            self._averages_at = max(self._averages_at, average.updated_at)
            store = by_id.get(key.store_id)
            if store is not None and self._averages[key.direction].get((key.site, store.name)) != average:
                self._averages[key.direction][key.site, store.name] = average
                self._outlooks.clear()

    @property
    def averages_at(self) -> float:
        """When the youngest known average was updated."""
        return self._averages_at

    def averages(self, direction: Direction) -> Averages:
        """What transfers in that direction reported, by (site, store)."""
        return self._averages[direction.value]

    def outlooks(self, direction: Direction, site: str | None, policy: rank.Policy, now: float) -> Outlooks:
        """What the paths between a site and every store promise."""
        found = self._outlooks.get((direction, site))
        if found is None or not found.at <= now < found.at + OUTLOOK_SECONDS:
            if len(self._outlooks) >= OUTLOOK_SITES:
                self._outlooks.clear()
            found = self._outlooks[direction, site] = Outlooks(
                site, self._averages[direction.value], policy, now, self._doubts[direction.value]
            )
        return found

    def forget_outlooks(self) -> None:
        """Stores have changed, perhaps moved to another site."""
        self._outlooks.clear()

    # -- failures

    def take_over_failures(self, found: Iterable[Failure], now: float, by_id: Mapping[int, Store]) -> None:
        """These exclusions are in force."""
        for client, store_id, left_seconds in found:
            store = by_id.get(store_id)
            if store is not None:
                self.note_failure(client, store.name, now + left_seconds, now)

    def note_failure(self, client: str, store: str, until: float, now: float) -> None:
        """A client was failed by a store: it is not offered it until then."""
        known = self._failures.setdefault(client, {})
        known[store] = until
        self._failures.move_to_end(client)
        while self._failures and (len(self._failures) > CLIENTS or self._is_over(next(iter(self._failures)), now)):
            _, forgotten = self._failures.popitem(last=False)
            self._forgot_until = max(self._forgot_until, *forgotten.values())

    def _is_over(self, client: str, now: float) -> bool:
        return all(until <= now for until in self._failures[client].values())

    def has_all_failures(self, now: float) -> bool:
        """Whether nothing was forgotten for want of room that is still in force."""
        return self._forgot_until <= now

    def failing(self, now: float) -> Mapping[str, int]:
        """How many clients each store is kept from."""
        found: dict[str, int] = {}
        for known in self._failures.values():
            for store, until in known.items():
                if until > now:
                    found[store] = found.get(store, 0) + 1
        return found

    def failures(self, client: str) -> Mapping[str, float]:
        """Stores that failed this client, with the instants until which that counts."""
        return self._failures.get(client, _NO_FAILURES) if self._failures else _NO_FAILURES

    # -- doubts

    def take_over_doubts(self, found: Mapping[tuple[int, str], float], by_id: Mapping[int, Store]) -> None:
        """So far are stores doubted by everyone; those not named not at all."""
        doubts: dict[str, dict[str, float]] = {"read": {}, "write": {}}
        for (store_id, direction), doubt in found.items():
            store = by_id.get(store_id)
            if store is not None and doubt > 0:
                doubts[direction][store.name] = doubt
        if doubts != self._doubts:
            self._doubts = doubts
            self._outlooks.clear()

    def doubts(self, direction: Direction) -> Mapping[str, float]:
        """How far stores are doubted in that direction, 0 to 1; those that are not are left out."""
        return self._doubts[direction.value]


_NO_FAILURES: Mapping[str, float] = {}
