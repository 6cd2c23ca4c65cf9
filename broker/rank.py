"""In which order a client should try the places that have a blob, or could take one.

Read downwards: `rank` accepts or excludes each candidate (`broker.accept`), estimates the seconds until the last byte
for those accepted, weighs them by that, and draws the order. Pure: the caller gives averages, loads, the instant and the
random numbers.

Rules
- seconds = setup + size / min(rate, bandwidth / (active + 1)); what is compared is seconds / success · (1 + cost).
- Rate, setup and success are what transfers reported from the client's site, else from the nearest wider site with
  enough evidence, else a prior by topological distance. The estimate says which. What a wider site measured is no better than the
  prior, since others of it may be nearer to the store; and an unmeasured way is shared by all who read from the store.
- The order is a weighted draw without replacement (Efraimidis and Spirakis, 2006): better is likelier, near-equals
  share, so that many brokers with slightly stale numbers do not herd. Paths that little is known of get a small share more.
- A store that several independent clients were failed by is doubted for everyone: less success, less evidence, not excluded.
- A full store is not excluded here: it may serve as standby, and admission knows better (`broker.admit`).
- Private stores that the principal may not see are kept apart from the other exclusions: counted, never shown. So is what is mounted
  elsewhere: there may be a copy on every host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

from broker.accept import Candidate, Reason, Request, accept
from broker.model import Operation
from broker.paths import IDLE, Load, PathAverage, decay
from broker.sites import ancestors, distance


@dataclass(frozen=True, slots=True)
class Policy:
    """What ranking may be tuned by. Index of the two priors is the distance; their last entry holds for all beyond it."""

    prior_rates: tuple[float, ...] = (1e9, 800e6, 500e6, 400e6, 300e6, 200e6, 150e6, 100e6, 100e6, 50e6, 50e6, 50e6, 20e6)
    """Bytes per second that an unmeasured path is believed to give."""
    prior_setups: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.2)
    """Seconds that an unmeasured path is believed to take until the first byte."""
    prior_transfers: float = 4.0
    """As many transfers at once are believed to get that rate on an unmeasured path; more of them share what these would get."""
    half_life_seconds: float = 600.0
    """Evidence loses half of its weight in this time; the same value as in `broker.paths.Policy`."""
    min_evidence: float = 0.5
    """Weight from which on an average is believed; a single report is believed for one half-life."""
    prior_success: float = 0.98
    """Chance of success that a path begins with."""
    prior_success_weight: float = 2.0
    """How many reports that beginning is worth."""
    success_floor: float = 0.05
    """No chance of success is taken for less."""
    cost_factor: float = 1.0
    """How much a store's cost counts: at 1, a cost of 1 is as bad as twice the time."""
    sharpness: float = 2.0
    """How much likelier the better one is: at 2, half the time is four times as likely."""
    exploration: float = 0.05
    """Share of draws that goes to candidates whatever their estimate, by how little is known of them."""
    prefer_factor: float = 20.0
    """How much likelier a preferred store becomes."""
    unchecked_factor: float = 0.25
    """How much less likely a destination becomes that computes none of the digests the client declared."""
    low_space: float = 0.1
    """Free share of a destination's capacity below which it becomes less likely."""
    unknown_size: int = 1 << 30
    """Bytes that an upload of undeclared size is estimated with."""
    failure_seconds: float = 60.0
    """How long a failure excludes a store for the client that reported it."""


class Estimate(NamedTuple):
    """The numbers behind a place in the order; shown to the client (M2)."""

    seconds: float
    """Until the last byte, when it goes well."""
    rate: float
    """Bytes per second, with the load of this moment."""
    setup_seconds: float
    """Until the first byte."""
    success: float
    """Chance that the transfer delivers, 0 to 1."""
    score: float
    """`seconds` divided by `success`, with cost: what is compared."""
    basis: str
    """Where the rate comes from: ``measured``, ``wider-site:eu`` (``wider-site:`` alone is all clients together) or ``prior``."""
    evidence: float
    """Weight of the reports behind the rate as of now; 0 with a prior."""


class Source(NamedTuple):
    """One place in the order; `weight` is its share of first draws."""

    candidate: Candidate
    estimate: Estimate
    weight: float


class Exclusion(NamedTuple):
    """One candidate that is not offered, and why."""

    candidate: Candidate
    reason: Reason


class Ranking(NamedTuple):
    """The decision. Each candidate is in exactly one of the lists."""

    sources: list[Source]
    excluded: list[Exclusion]
    hidden: list[Exclusion]
    """What the principal must not learn of; for counting only."""
    elsewhere: list[Exclusion]
    """Paths and volumes that nothing proves to be where the client is; counted, and told to who asks why."""


Averages = Mapping[tuple[str, str], PathAverage]
"""By (site, store), all of the direction in question; sites include the wider ones."""

Doubts = Mapping[str, float]
"""By store name: how far it is doubted by everyone in the direction in question (`broker.suspicion`), 0 to 1."""

_NO_DOUBTS: Doubts = MappingProxyType({})

Loads = Mapping[str, Load]
"""By store name, all of the direction in question."""


class Outlook(NamedTuple):
    """What a path promises to any transfer, whatever its size and the store's load. The other fields are those of `Estimate`."""

    rate: float
    setup_seconds: float
    success: float
    basis: str
    evidence: float
    shared_rate: float = math.inf
    """What all transfers of the store together are believed to get on a path that nobody of the site has measured."""


class Outlooks:
    """The outlooks of the paths between one site and every store, as of the instant `at`; each is worked out when first asked for."""

    __slots__ = ("_averages", "_doubts", "_policy", "at", "known", "site", "ways")

    def __init__(self, site: str | None, averages: Averages, policy: Policy, at: float, doubts: Doubts = _NO_DOUBTS) -> None:
        self.site = site
        self.at = at
        self._averages = averages
        self._doubts = doubts
        self._policy = policy
        self.known: dict[str, Outlook] = {}
        """Those that were asked for, by store."""
        self.ways: dict[int, Any] = {}
        """For whoever keeps what he made of them, by store id: it is worth no more once they are not."""

    def of(self, candidate: Candidate) -> Outlook:
        """The outlook of the path to the candidate's store."""
        found = self.known.get(candidate.store)
        if found is None:
            found = outlook(self.site, candidate, self._averages, self._policy, self.at)
            doubt = self._doubts.get(candidate.store)
            if doubt is not None:
                found = doubted(found, doubt, self._policy)
            self.known[candidate.store] = found
        return found


class Prospect(NamedTuple):
    """An outlook at one load of its store: all that `size_up` needs to know of a place, made once for many blobs."""

    setup_seconds: float
    rate: float
    success: float
    dearness: float
    """What the store's cost multiplies the time by."""
    strangeness: float
    """How much exploration the path deserves: 1 when nothing is known of it."""


def rank(
    request: Request, candidates: Iterable[Candidate], outlooks: Outlooks, loads: Loads, policy: Policy, now: float, rng: Random
) -> Ranking:
    """Accept or exclude each candidate, then put the accepted ones in the order to try them. `outlooks` are those of the request's site."""
    accepted: list[Candidate] = []
    ranking = Ranking([], [], [], [])
    for candidate in candidates:
        reason = accept(request, candidate, loads.get(candidate.store, IDLE), now)
        if reason is None:
            accepted.append(candidate)
        elif reason is Reason.PRIVATE:
            ranking.hidden.append(Exclusion(candidate, reason))
        elif reason is Reason.NOT_MOUNTED:
            ranking.elsewhere.append(Exclusion(candidate, reason))
        else:
            ranking.excluded.append(Exclusion(candidate, reason))
    return ranking._replace(sources=order(request, accepted, outlooks, loads, policy, rng))


def order(request: Request, accepted: Sequence[Candidate], outlooks: Outlooks, loads: Loads, policy: Policy, rng: Random) -> list[Source]:
    """Candidates that nothing is against, in the order to try them."""
    if not accepted:
        return []
    size = policy.unknown_size if request.size is None else request.size
    estimates = [estimate(outlooks.of(candidate), candidate, size, loads, policy) for candidate in accepted]
    shares = weigh(estimates, _lifts(request, accepted, loads, policy), policy)
    return [Source(accepted[index], estimates[index], shares[index]) for index in draw(shares, rng)]


def size_up(prospects: Sequence[Prospect], size: int | None, policy: Policy) -> tuple[list[float], list[float]]:
    """The seconds that a read of so many bytes takes from each place, and each one's share of first draws: what `order` makes of
    candidates that nothing is against and nothing lifts, without an object for each of them."""
    if size is None:
        size = policy.unknown_size
    seconds: list[float] = []
    scores: list[float] = []
    stranger: list[float] = []
    for setup, rate, success, dearness, strangeness in prospects:
        takes = setup + size / rate
        seconds.append(takes)
        scores.append(takes / success * dearness)
        stranger.append(strangeness)
    return seconds, _shares(scores, stranger, None, policy)


def outlook(site: str | None, candidate: Candidate, averages: Averages, policy: Policy, now: float) -> Outlook:
    """What the path between `site` and the candidate's store promises.

    The nearest site with enough evidence tells; a path known only by its failures tells its success, not its rate.
    """
    rate = setup = success = None
    basis, evidence = "prior", 0.0
    for place in ancestors(site) if averages else ():
        average = averages.get((place, candidate.store))
        if average is None or average.weight < policy.min_evidence:
            continue
        kept = decay(1.0, now - average.updated_at, policy.half_life_seconds)
        weight = average.weight * kept
        if weight < policy.min_evidence:
            continue
        if success is None:
            success = _success(average.good * kept, weight, policy)
        if average.busy_seconds > 0 and average.bytes > 0:
            rate, setup, evidence = average.bytes / average.busy_seconds, average.setup_seconds, weight
            basis = "measured" if place == site else "wider-site:" + place
            break
    shared_rate = math.inf
    if rate is None or setup is None or basis != "measured":
        steps = distance(site, candidate.site)
        prior = policy.prior_rates[min(steps, len(policy.prior_rates) - 1)]
        rate = prior if rate is None else min(rate, prior)  # others may be nearer to the store
        shared_rate = prior * policy.prior_transfers
        setup = policy.prior_setups[min(steps, len(policy.prior_setups) - 1)] if setup is None else setup
    return Outlook(rate, setup, policy.prior_success if success is None else success, basis, evidence, shared_rate)


def doubted(path: Outlook, doubt: float, policy: Policy) -> Outlook:
    """The same path, to a store that is doubted by everyone: its success sinks, and so does what is known of it, so that it is explored."""
    trust = 1.0 - doubt
    return path._replace(success=max(policy.success_floor, path.success * trust), evidence=path.evidence * trust)


def estimate(path: Outlook, candidate: Candidate, size: int, loads: Loads, policy: Policy) -> Estimate:
    """What a transfer of `size` bytes over `path` is expected to take."""
    setup, rate, success, dearness, _ = prospect(path, candidate, loads, policy)
    seconds = setup + size / rate
    return Estimate(seconds, rate, setup, success, seconds / success * dearness, path.basis, path.evidence)


def prospect(path: Outlook, candidate: Candidate, loads: Loads, policy: Policy) -> Prospect:
    """What `path` promises at the load of the candidate's store."""
    shared_rate = path.shared_rate
    if candidate.bandwidth and candidate.bandwidth < shared_rate:
        shared_rate = candidate.bandwidth
    rate = min(path.rate, shared_rate / (loads.get(candidate.store, IDLE).active + 1))
    dearness = 1.0 + policy.cost_factor * candidate.cost
    return Prospect(path.setup_seconds, rate, path.success, dearness, 1.0 / (1.0 + path.evidence))


def weigh(estimates: Sequence[Estimate], lifts: Sequence[float] | None, policy: Policy) -> list[float]:
    """Each one's share of first draws; together 1. `lifts` multiply the shares of some beside what was estimated.

    Most of it goes by estimate; the share of exploration is split evenly and each part shrinks with what is known.
    """
    return _shares([e.score for e in estimates], [1.0 / (1.0 + e.evidence) for e in estimates], lifts, policy)


def _shares(scores: Sequence[float], strangeness: Sequence[float], lifts: Sequence[float] | None, policy: Policy) -> list[float]:
    best = max(min(scores), 1e-9)
    sharpness = policy.sharpness
    by_score = [(best / score) ** sharpness if score > best else 1.0 for score in scores]
    scale = (1.0 - policy.exploration) / sum(by_score)
    even = policy.exploration / len(scores)
    if lifts is None:  # then it is known beforehand what the weights come to
        total = 1.0 - policy.exploration + even * sum(strangeness)
        scale, even = scale / total, even / total
        return [scale * weight + even * strange for weight, strange in zip(by_score, strangeness, strict=True)]
    weights = [(scale * weight + even * strange) * lift for weight, strange, lift in zip(by_score, strangeness, lifts, strict=True)]
    total = sum(weights)
    return [weight / total for weight in weights]


def draw(shares: Sequence[float], rng: Random) -> list[int]:
    """Indexes in a random order: at each place, an index is as likely as its share among those that are left."""
    if len(shares) < 2:
        return list(range(len(shares)))
    log, random = math.log, rng.random
    keys = [-log(1.0 - random()) / (share or 1e-300) for share in shares]
    return sorted(range(len(shares)), key=keys.__getitem__)


def _success(good: float, weight: float, policy: Policy) -> float:
    """Chance of success, from evidence that first has to outweigh the prior."""
    prior = policy.prior_success_weight
    return max(policy.success_floor, min(1.0, (good + prior * policy.prior_success) / (weight + prior)))


def _lifts(request: Request, accepted: Sequence[Candidate], loads: Loads, policy: Policy) -> list[float] | None:
    """What makes candidates likelier or less likely beside their estimates; ``None`` when nothing does."""
    if request.operation is Operation.DOWNLOAD and not request.prefer:
        return None
    return [_lift(request, candidate, loads.get(candidate.store, IDLE), policy) for candidate in accepted]


def _lift(request: Request, candidate: Candidate, load: Load, policy: Policy) -> float:
    """What makes a candidate likelier or less likely beside its estimate."""
    lift = policy.prefer_factor if candidate.store in request.prefer else 1.0
    if request.operation is Operation.UPLOAD:
        if request.digests and request.digests.isdisjoint(candidate.observes):
            lift *= policy.unchecked_factor
        if candidate.capacity is not None:
            free = (candidate.capacity - load.reserved) / candidate.capacity
            lift *= min(1.0, max(free, 0.001) / policy.low_space)
    return lift
