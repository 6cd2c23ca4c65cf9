"""How transfers went: reports, and what follows from them, by one statement for those of many clients.

Rules
- A place of a ticket is reported once; later reports change nothing. What is `implied` (`broker.signals`) is no report: it counts
  only while there is none, and leaves none.
- The averages of the client's own site get all of what is added, those of wider sites what `broker.voices` lets them hear; the
  statement computes the very same share.
- A failure excludes the store for its client (`failures`) in the same transaction, so that whoever sees the report sees that too.
- Rows are locked in the order of voices, paths, failures, each by key: brokers never wait for each other in a circle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from broker.catalog.connect import reachable
from broker.catalog.paths import SUMS
from broker.paths import Contribution
from broker.suspicion import HALF_LIFE_SECONDS, WINDOW_SECONDS, Words
from broker.voices import MOST, RATE_FACTOR, SPARE, TIME_FACTOR, UNKNOWN_SECONDS, Voice

KEPT_SECONDS = 86400.0
"""After so long without a word a voice is forgotten."""


class ReportRow(NamedTuple):
    """A client's word on one place of its ticket, or what is taken for one, and what follows from it."""

    ticket_id: UUID
    store_id: int
    direction: str
    outcome: str
    bytes: int
    seconds: float
    detail: str | None
    implied: bool
    voice: Voice
    weight: float
    """What the word weighs: 1 for a report."""
    trouble: float
    """How bad it is for everyone's trust in the store, 0 to 1 (`broker.suspicion`)."""
    excludes: str | None
    """The name of the client for which the store is excluded now."""
    excluded_seconds: float
    site: str
    """The client's own site, ``""`` when it is not proven."""
    contributions: Mapping[str, Contribution]
    """What is added to the averages, by site: its own and the wider ones."""


class Noted(NamedTuple):
    """`counted`: it was the first word on that place. `xact` is the transaction that holds it, ``None`` when nothing was written."""

    counted: bool
    xact: int | None


# What is left of a weight, and of a sum. PostgreSQL makes an error of what is too small for a number, and one row in which that
# happens would refuse every later report: so nothing fades by more than 2^-500 at once, and a sum that has faded to nothing is nothing.
_KEPT = "power(2.0, -least(500, greatest(0, extract(epoch FROM now() - v.{at})::float8) / {half_life}))"
_NOTHING = 1e-100


def _left(name: str, at: str) -> str:
    kept = _KEPT.format(at=at, half_life="$25")
    return f"CASE WHEN v.{name} > {_NOTHING} THEN v.{name} * {kept} ELSE 0 END"


# What reports told on average, of what a wider site knows; `broker.voices.moderated` says the same.
_MEAN_BUSY, _MEAN_SETUP = (
    f"coalesce({TIME_FACTOR} * nullif(k.{name}, 0) / nullif(k.{weight}, 0), {UNKNOWN_SECONDS})"
    for name, weight in (("busy_seconds", "weight"), ("setup", "setup_weight"))
)

# $1-$15: a column each of the reports; $16-$24: a column each of the contributions, by the report's number; $25: the averages' half-life.
_RECORD = f"""
WITH told AS MATERIALIZED (
    SELECT DISTINCT ON (t.ticket_id, t.store_id) t.*
    FROM unnest($1::uuid[], $2::int[], $3::text[], $4::text[], $5::bigint[], $6::float8[], $7::text[], $8::bool[], $9::text[], $10::text[],
                $11::text[], $12::float8[], $13::float8[], $14::text[], $15::float8[]) WITH ORDINALITY
        AS t (ticket_id, store_id, direction, outcome, bytes, seconds, detail, implied, voice, network, project, weight, trouble, excludes,
              excluded_seconds, n)
    JOIN stores s ON s.id = t.store_id
    ORDER BY t.ticket_id, t.store_id, t.implied, t.n
), recorded AS (
    INSERT INTO reports (ticket_id, store_id, outcome, bytes, seconds, detail)
    SELECT ticket_id, store_id, outcome, bytes, seconds, detail FROM told WHERE NOT implied
    ON CONFLICT DO NOTHING RETURNING ticket_id, store_id
), counted AS MATERIALIZED (
    SELECT t.* FROM told t JOIN recorded USING (ticket_id, store_id) WHERE NOT implied
    UNION ALL
    SELECT t.* FROM told t WHERE implied AND NOT EXISTS (SELECT FROM reports r WHERE r.ticket_id = t.ticket_id AND r.store_id = t.store_id)
), spoken AS (
    SELECT voice, store_id, direction, min(network) AS network, min(project) AS project, sum(weight) AS weight,
           (array_agg(trouble ORDER BY n DESC))[1] AS trouble, bool_or(NOT implied) AS explicit
    FROM counted GROUP BY voice, store_id, direction
), voiced AS (
    INSERT INTO voices AS v (voice, store_id, direction, network, project, weight, trouble, heard_at, reported_at)
    SELECT voice, store_id, direction, network, project, weight, trouble, now(), CASE WHEN explicit THEN now() END
    FROM spoken ORDER BY voice, store_id, direction
    ON CONFLICT (voice, store_id, direction) DO UPDATE SET
        weight = {_left("weight", "heard_at")} + excluded.weight,
        trouble = CASE WHEN excluded.trouble = 0 THEN 0
                  ELSE greatest(excluded.trouble, v.trouble * {_KEPT.format(at="heard_at", half_life=HALF_LIFE_SECONDS)}) END,
        heard_at = greatest(v.heard_at, excluded.heard_at),
        reported_at = coalesce(excluded.reported_at, v.reported_at)
    RETURNING voice, store_id, direction, weight
), heard AS MATERIALIZED (
    SELECT s.voice, s.store_id, s.direction,
           least(1.0, {MOST * SPARE} / (({SPARE} + v.weight - s.weight) * ({SPARE} + v.weight))) AS share
    FROM spoken s JOIN voiced v USING (voice, store_id, direction)
), added AS (
    SELECT c.site, t.store_id, t.direction,
           sum(c.weight * a.share) AS weight, sum(c.good * a.share) AS good, sum(a.rate * a.busy * a.share) AS bytes,
           sum(a.busy * a.share) AS busy_seconds, sum(c.setup_weight * a.share) AS setup_weight, sum(a.setup * a.share) AS setup
    FROM counted t
    JOIN unnest($16::bigint[], $17::text[], $18::bool[], {", ".join(f"${n}::float8[]" for n in range(19, 25))})
        AS c (n, site, own, {", ".join(SUMS)}) USING (n)
    JOIN heard h ON h.voice = t.voice AND h.store_id = t.store_id AND h.direction = t.direction
    LEFT JOIN paths k ON NOT c.own AND k.site = c.site AND k.store_id = t.store_id AND k.direction = t.direction
    CROSS JOIN LATERAL (SELECT coalesce(k.bytes / nullif(k.busy_seconds, 0), 0) AS rate) b
    CROSS JOIN LATERAL (
        SELECT CASE WHEN c.own THEN 1 ELSE h.share END AS share,
               CASE WHEN c.own THEN c.busy_seconds ELSE least(c.busy_seconds, c.weight * {_MEAN_BUSY}) END AS busy,
               CASE WHEN c.own THEN c.setup ELSE least(c.setup, c.setup_weight * {_MEAN_SETUP}) END AS setup,
               CASE WHEN c.busy_seconds <= 0 THEN 0 WHEN c.own OR b.rate <= 0 THEN c.bytes / c.busy_seconds
                    ELSE least(greatest(c.bytes / c.busy_seconds, b.rate / {RATE_FACTOR}), b.rate * {RATE_FACTOR}) END AS rate) a
    GROUP BY c.site, t.store_id, t.direction
), averaged AS (
    INSERT INTO paths AS v (site, store_id, direction, {", ".join(SUMS)}, updated_at)
    SELECT site, store_id, direction, {", ".join(SUMS)}, now() FROM added ORDER BY site, store_id, direction
    ON CONFLICT (site, store_id, direction) DO UPDATE SET
        {", ".join(f"{name} = {_left(name, 'updated_at')} + excluded.{name}" for name in SUMS)},
        updated_at = greatest(v.updated_at, excluded.updated_at)
), failed AS (
    INSERT INTO failures AS f (client, store_id, until)
    SELECT excludes, store_id, clock_timestamp() + make_interval(secs => max(excluded_seconds))
    FROM counted WHERE excludes IS NOT NULL GROUP BY excludes, store_id ORDER BY excludes, store_id
    ON CONFLICT (client, store_id) DO UPDATE SET until = greatest(f.until, excluded.until)
)
SELECT n, pg_current_xact_id()::text FROM counted
"""  # noqa: S608 - only names and numbers of our own


async def record(connection: Any, rows: Sequence[ReportRow], half_life_seconds: float) -> list[Noted]:
    """Record reports, and add them to averages, voices and failures; an answer for each row, in order. `Coalescer`'s work."""
    columns: list[list[Any]] = [[] for _ in range(15)]
    added: list[list[Any]] = [[] for _ in range(9)]
    for n, row in enumerate(rows, 1):
        told: tuple[Any, ...] = (*row[:8], *row.voice, row.weight, row.trouble, row.excludes, row.excluded_seconds)
        for column, value in zip(columns, told, strict=True):
            column.append(value)
        for site, sums in row.contributions.items():
            contribution: tuple[Any, ...] = (n, site, site == row.site != "", *sums)
            for column, value in zip(added, contribution, strict=True):
                column.append(value)
    xacts = {n: int(xact) for n, xact in await connection.fetch(_RECORD, *columns, *added, half_life_seconds)}
    return [Noted(n in xacts, xacts.get(n)) for n in range(1, len(rows) + 1)]


async def last_words(db: Any) -> dict[tuple[int, str], list[Words]]:
    """The last words on every store and direction that has failed somebody lately, by (store id, direction)."""
    with reachable():
        rows = await db.fetch(
            f"""SELECT store_id, direction, network, project, max(trouble * kept), max(CASE WHEN trouble = 0 THEN kept ELSE 0 END)
                FROM (SELECT v.*, {_KEPT.format(at="heard_at", half_life="$2")} AS kept FROM voices v
                      WHERE heard_at > now() - make_interval(secs => $1) AND EXISTS (
                          SELECT FROM voices t WHERE t.store_id = v.store_id AND t.direction = v.direction AND t.trouble > 0
                          AND t.heard_at > now() - make_interval(secs => $1))) told
                GROUP BY store_id, direction, network, project""",  # noqa: S608 - only names of our own
            WINDOW_SECONDS, HALF_LIFE_SECONDS,
        )  # fmt: skip
    found: dict[tuple[int, str], list[Words]] = {}
    for store_id, direction, *words in rows:
        found.setdefault((store_id, direction), []).append(Words(*words))
    return found


async def reporting(db: Any, voices: Sequence[str]) -> set[str]:
    """Those of `voices` that have reported anything within `KEPT_SECONDS`."""
    with reachable():
        rows = await db.fetch(
            "SELECT DISTINCT voice FROM voices WHERE voice = ANY ($1::text[]) AND reported_at > now() - make_interval(secs => $2)",
            list(voices), KEPT_SECONDS,
        )  # fmt: skip
    return {row[0] for row in rows}


async def forget_old(db: Any) -> None:
    """Forget voices that have not been heard for long; their weight has decayed to nothing."""
    with reachable():
        await db.execute(  # what a report is about to renew is left to it: nobody waits for rows that a report holds in its own order
            """DELETE FROM voices WHERE (voice, store_id, direction) IN (
                   SELECT voice, store_id, direction FROM voices WHERE heard_at < now() - make_interval(secs => $1)
                   FOR UPDATE SKIP LOCKED)""",
            KEPT_SECONDS,
        )
