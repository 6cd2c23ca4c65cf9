"""The closed loop over two real brokers on one PostgreSQL: what one client tells one broker is known to the other before it is answered;
a liar stays within his bound; what fails for several is doubted by everyone, and comes back.

Stores are rows here: no byte is moved, only words are. Addresses come through a trusted proxy.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.catalog import connect
from broker.model import new_id
from broker.service import jobs, signals
from broker.service.memory import FRESH_SECONDS
from tests.parts.broker import Api, RunningBroker, broker_on
from tests.parts.cluster import Brokers, brokers_on
from tests.parts.condition import until
from tests.parts.postgres import Postgres

ABILITIES = {
    "reads": True, "ranges": True, "writes": True, "refuses_tampering": True, "refuses_expired": True, "refuses_overwrite": True,
    "binds_length": True, "binds_sha256": True, "observes": ["sha256"],
}  # fmt: skip
S3 = {"access_key": "AKIDTEST", "secret_key": "not-very-secret"}
GB = 10**9
SETTINGS = {"http": {"trusted_proxies": ["127.0.0.1/32"]}, "policy": {"ranking": {"failure_seconds": 30.0}}}


async def add_store(db: Any, name: str) -> int:
    """A store at eu/az1 that is only a row; in one statement, since brokers look at once."""
    await db.execute("INSERT INTO sites (path) VALUES ('eu/az1') ON CONFLICT DO NOTHING")
    id = await db.fetchval(
        """WITH made AS (INSERT INTO stores (name, kind, site, endpoint, settings, credential, abilities)
                         VALUES ($1, 's3', 'eu/az1', $2, '{"bucket": "images"}', 's3', $3) RETURNING id),
                room AS (INSERT INTO spaces (store_id) SELECT id FROM made),
                slot AS (INSERT INTO slots (store_id, direction) SELECT id, d FROM made, unnest(ARRAY['read', 'write']) AS d)
           SELECT id FROM made""",
        name, f"https://{name}.example", ABILITIES,
    )  # fmt: skip
    return int(id)


async def add_blob(db: Any, stores: Sequence[int], size: int = GB) -> str:
    """A public blob with a replica on each store."""
    blob, image = new_id(), new_id()
    await db.execute("INSERT INTO blobs (id, size, digests, state) VALUES ($1, $2, $3, 'active')", blob, size, {"md5": "a" * 32})
    await db.execute(
        "INSERT INTO images (id, name, project, subject, visibility, status) VALUES ($1, 'i', 'p', 'u', 'public', 'active')", image
    )
    await db.execute("INSERT INTO image_blobs VALUES ($1, 'raw', $2)", image, blob)
    for store in stores:
        await db.execute(
            """INSERT INTO replicas (id, blob_id, store_id, key, state, project, subject, observed_by, observed_strength, observed_at)
               VALUES ($1, $2, $3, $4, 'active', 'p', 'u', 'broker', 'md5', now())""",
            new_id(), blob, store, f"{blob}/{store}",
        )  # fmt: skip
    return str(blob)


async def ask(api: Api, blob: str, **wishes: Any) -> Any:
    reply = await api.post("/v1/tickets", {"operation": "download", "blob": blob, **wishes})
    assert reply.status == 201, str(reply.body)
    return reply.body


async def tell(api: Api, ticket: Any, store: str, outcome: str = "failed", **told: Any) -> None:
    reply = await api.post(f"/v1/tickets/{ticket['id']}/report", {"store": store, "outcome": outcome, **told})
    assert reply.status == 204, reply.body


def named(ticket: Any) -> set[str]:
    return {source["store"] for source in ticket["sources"]}


@dataclass
class Pair:
    """Two brokers in this process, each with its own memory, and clients anywhere."""

    here: RunningBroker
    there: RunningBroker
    session: aiohttp.ClientSession
    stores: dict[str, int]
    blob: str

    @property
    def db(self) -> Any:
        return self.here.context.db

    def client(self, address: str, project: str = "p", *, at: RunningBroker | None = None, instance: str = "") -> Api:
        broker = at or self.here
        token = broker.token(project=project, subject=f"{project}-user")
        return Api(broker.url, self.session, token, {"X-Forwarded-For": address, "X-Client-Instance": instance})

    async def catch_up(self) -> None:
        """Both brokers know everything, doubts too."""
        for broker in (self.here, self.there):
            broker.context.memory._doubted_at = float("-inf")
            await broker.context.memory.catch_up()

    async def seen_from(self, address: str, at: RunningBroker, project: str = "watcher") -> dict[str, Any]:
        """What a client there would be told, by store."""
        reply = await self.client(address, project, at=at).post("/v1/tickets:explain", {"operation": "download", "blob": self.blob})
        assert reply.status == 200, reply.body
        return {candidate["store"]: candidate for candidate in reply.body["candidates"]}

    async def age(self, seconds: float) -> None:
        """As if all words had been said so long ago."""
        await self.db.execute("UPDATE voices SET heard_at = heard_at - make_interval(secs => $1)", seconds)
        await self.db.execute("UPDATE paths SET updated_at = updated_at - make_interval(secs => $1)", seconds)


@pytest.fixture
async def pair(database: str, tmp_path: Path) -> AsyncIterator[Pair]:
    async with (
        broker_on(database, tmp_path, SETTINGS, with_jobs=False) as here,
        broker_on(database, tmp_path, SETTINGS, with_jobs=False) as there,
        aiohttp.ClientSession() as session,
    ):
        here.credential("s3", S3)
        stores = {name: await add_store(here.context.db, name) for name in ("a", "b")}
        for number in range(1, 4):
            await here.context.db.execute(
                "INSERT INTO sites (path, networks) VALUES ($1, ARRAY[$2::cidr])", f"eu/office{number}", f"10.{number}.0.0/16"
            )
        made = Pair(here, there, session, stores, await add_blob(here.context.db, list(stores.values())))
        await made.catch_up()
        yield made


# -- one client


@pytest.fixture
def brokers(postgres: Postgres, tmp_path: Path) -> Iterator[Brokers]:
    """Two processes."""
    with brokers_on(postgres.create(), tmp_path, 2) as started:
        started.credential("s3", S3)
        yield started


async def test_the_very_next_ticket_at_another_broker_does_not_name_what_failed(brokers: Brokers, session: aiohttp.ClientSession) -> None:
    """Brokers as processes of their own; downloads and uploads; nobody else is concerned."""
    db = await connect.connect_one(brokers.database)
    stores = [await add_store(db, name) for name in ("a", "b")]
    new = {"operation": "upload", "image": {"name": "i"}, "size": 10}
    for at in (0, 1):
        api = brokers.api(session, subject="first", at=at)
        await until(lambda api=api: _can_write(api, new | {"only": ["a", "b"]}))  # type: ignore[misc]
    for number in range(12):
        blob = await add_blob(db, stores)
        here, there = (brokers.api(session, subject=f"s{number}", at=at) for at in (number % 2, 1 - number % 2))
        ticket = await ask(here, blob)
        failed = ticket["sources"][0]["store"]
        await tell(here, ticket, failed)
        after = await ask(there, blob)
        assert (failed in named(after), after["excluded"]) == (False, [{"store": failed, "reason": "recently-failed"}])
        other = there.as_(brokers.token(subject=f"s{number}"), X_Client_Instance="another machine")
        assert failed in named(await ask(other, blob)), "an instance of the same principal is another client"
    here, there = (brokers.api(session, subject="writer", at=at) for at in (0, 1))
    first = (await here.post("/v1/tickets", new)).body
    failed = first["destinations"][0]["store"]
    await tell(here, first, failed)
    second = (await there.post("/v1/tickets", new)).body
    assert {place["store"] for place in second["destinations"]} == {"a", "b"} - {failed}
    assert {"store": failed, "reason": "recently-failed"} in second["excluded"]
    await db.close()


async def _can_write(api: Api, request: dict[str, Any]) -> bool:
    """Whether that broker knows the stores that are named."""
    return (await api.post("/v1/tickets", request)).status == 201


async def test_a_hundred_failures_at_once_are_known_at_once(pair: Pair) -> None:
    """A hundred nodes under one account are a hundred clients, and their reports wait together."""

    async def fail(number: int) -> bool:
        here, there = (pair.client("10.1.0.9", at=at, instance=f"node{number}") for at in (pair.here, pair.there))
        ticket = await ask(here, pair.blob)
        store = ticket["sources"][0]["store"]
        await tell(here, ticket, store)
        return store not in named(await ask(there, pair.blob))

    assert all(await asyncio.gather(*(fail(number) for number in range(100))))
    assert await pair.db.fetchval("SELECT count(*) FROM failures") == 100
    assert sum(pair.there.context.memory.failing(pair.there.context.clock()).values()) == 100
    spread = await counted(pair, "broker_failure_spread_seconds_count", "outcome")
    assert spread == {"known": 100}


async def test_a_broker_that_does_not_answer_delays_a_report_no_longer_than_it_is_believed(pair: Pair) -> None:
    """One that was killed leaves its row behind; after that nobody waits for it."""
    await pair.db.execute("INSERT INTO brokers VALUES ($1, '1:1:', clock_timestamp())", new_id())
    client = pair.client("10.1.0.9")
    ticket = await ask(client, pair.blob)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await tell(client, ticket, "a")
    assert loop.time() - began > FRESH_SECONDS / 2, "it was waited for"
    assert named(await ask(pair.client("10.1.0.9", at=pair.there), pair.blob)) == {"b"}


# -- a liar


async def report_many(pair: Pair, api: Api, count: int, **told: Any) -> None:
    """So many tickets, and as many reports, from one client."""
    lock = asyncio.Semaphore(20)

    async def report(ticket: Any) -> None:
        async with lock:
            await tell(api, ticket, "a", **told)

    for begin in range(0, count, 250):
        wanted = [{"operation": "download", "blob": pair.blob, "only": ["a"]}] * min(250, count - begin)
        made = (await api.post("/v1/tickets:batch", {"tickets": wanted})).body["tickets"]
        await asyncio.gather(*(report(ticket) for ticket in made))


async def test_a_liar_with_a_thousand_reports_moves_no_other_network_beyond_his_bound(pair: Pair) -> None:
    """README, "Whose word counts how much": 10 honest reports, and one voice under many instances that says the worst there is."""
    for number in range(10):
        honest = pair.client(f"10.2.0.{number + 1}", f"honest{number}")
        await tell(honest, await ask(honest, pair.blob, only=["a"]), "a", "ok", bytes=GB, seconds=10.0)
    await pair.catch_up()
    before = (await pair.seen_from("10.3.0.1", pair.there))["a"]["estimate"]
    assert (before["basis"], before["rate"]) == ("wider-site:eu", pytest.approx(1e8, rel=0.01))
    for number in range(4):
        liar = pair.client("10.1.0.9", "liar", instance=f"invented{number}", at=pair.here if number % 2 else pair.there)
        await report_many(pair, liar, 250, outcome="slow", bytes=2 << 20, seconds=30.0)
    assert await pair.db.fetchval("SELECT count(*) FROM reports") == 1010
    await pair.catch_up()
    after = (await pair.seen_from("10.3.0.1", pair.there))["a"]["estimate"]
    own = (await pair.seen_from("10.1.0.9", pair.there))["a"]["estimate"]
    assert 0.68 <= after["rate"] / before["rate"] < 1, "the bound is that of one voice among ten"
    assert after["success"] >= before["success"] - 0.01
    assert (own["basis"], own["rate"] < 1e6) == ("measured", True), "his own network believes him"
    weight = await pair.db.fetchval("SELECT weight FROM paths WHERE site = 'eu' AND direction = 'read'")
    assert 10 < weight < 13.01

    # The same voice says that everything fails.
    await report_many(pair, pair.client("10.1.0.9", "liar"), 50)
    await pair.catch_up()
    seen = await pair.seen_from("10.3.0.1", pair.there)
    assert (set(seen), seen["a"]["doubt"]) == ({"a", "b"}, 0.0)
    assert seen["a"]["estimate"]["success"] > 0.75, "three reports' worth at most against ten"


# -- everyone


async def first_places(pair: Pair, address: str, count: int = 200) -> Counter[str]:
    """Which store came first, asked at the other broker."""
    api = pair.client(address, "watcher", at=pair.there)
    made = (await api.post("/v1/tickets:batch", {"tickets": [{"operation": "download", "blob": pair.blob}] * count})).body["tickets"]
    return Counter(ticket["sources"][0]["store"] for ticket in made)


async def test_what_fails_for_several_independent_clients_sinks_for_everyone_and_comes_back(pair: Pair) -> None:
    """By time alone, and sooner by those who are served."""
    assert min((await first_places(pair, "10.3.0.1")).values()) > 50
    for address, project in (("10.1.1.1", "p1"), ("10.2.1.1", "p2"), ("192.0.2.1", "p3"), ("198.51.100.1", "p4")):
        client = pair.client(address, project)
        await tell(client, await ask(client, pair.blob, only=["a"]), "a")
        await pair.catch_up()
    doubted = (await pair.seen_from("10.3.0.1", pair.there))["a"]
    assert doubted["doubt"] >= 0.9
    assert doubted["estimate"]["success"] <= 0.1
    firsts = await first_places(pair, "10.3.0.1")
    assert firsts["a"] < 0.15 * firsts["b"]
    assert (await counted(pair, "broker_suspicion", "store", measured=True)) == {"a": doubted["doubt"]}
    # Others are served: the explorers' word counts.
    for number in range(3):
        client = pair.client(f"203.0.{number}.1", f"served{number}")
        await tell(client, await ask(client, pair.blob, only=["a"]), "a", "ok", bytes=GB, seconds=2.0)
    await pair.catch_up()
    better = (await pair.seen_from("10.3.0.1", pair.there))["a"]
    assert 0 < better["doubt"] < doubted["doubt"] - 0.2
    # Nobody says anything for ten minutes.
    await pair.age(600)
    await pair.catch_up()
    well = (await pair.seen_from("10.3.0.1", pair.there))["a"]
    assert well["doubt"] == 0
    assert (await first_places(pair, "10.3.0.1"))["a"] > 20


async def counted(pair: Pair, name: str, label: str, *, measured: bool = False) -> dict[str, float]:
    """A metric of the first broker by a label."""
    if measured:
        await jobs.measure(pair.here.context)
    async with pair.session.get(f"{pair.here.metrics_url}/metrics") as reply:
        text = await reply.text()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.labels[label]: sample.value for sample in samples if sample.name == name}


# -- silence


async def average(pair: Pair, direction: str = "read") -> Any:
    return await pair.db.fetchrow(
        "SELECT weight, good, bytes, busy_seconds FROM paths WHERE site = 'eu/office1' AND direction = $1", direction
    )


async def test_asking_again_is_a_weak_failure_unless_the_first_was_reported(pair: Pair) -> None:
    client = pair.client("10.1.0.9")
    for _ in range(20):
        await ask(client, pair.blob, only=["a"])
    reported = await ask(client, pair.blob, only=["b"])
    await tell(client, reported, "b", "ok")
    await ask(client, pair.blob, only=["b"])
    await signals.take_repeats(pair.here.context)
    (row,) = await pair.db.fetch("SELECT weight, good FROM paths p WHERE site = 'eu/office1' AND store_id = $1", pair.stores["a"])
    assert (row["weight"], row["good"]) == (pytest.approx(0.25, rel=1e-2), 0), "twenty requests say no more than two"
    assert (await counted(pair, "broker_signals_total", "kind"))["repeated"] == 1
    assert named(await ask(client, pair.blob)) == {"a", "b"}, "nothing is excluded"


async def test_silence_tells_a_little(pair: Pair) -> None:
    """The end of a ticket without a word, of those who otherwise report; and a commit without a report."""
    await ends_without_a_word(pair)
    await commits_without_a_report(pair)


async def ends_without_a_word(pair: Pair) -> None:
    reporter, silent = pair.client("10.1.0.9"), pair.client("10.1.0.10", "silent")
    await tell(reporter, await ask(reporter, pair.blob, only=["b"]), "b", "ok")
    forgotten = [await ask(api, pair.blob, only=["a"]) for api in (reporter, silent)]
    given_back = await ask(reporter, await add_blob(pair.db, [pair.stores["a"]]))
    assert (await reporter.delete(f"/v1/tickets/{given_back['id']}")).status == 204
    await pair.db.execute("UPDATE watermarks SET at = now() - interval '10 minutes'")
    await pair.db.execute(
        "UPDATE tickets SET expires_at = now() - interval '1 minute' WHERE id = ANY ($1::uuid[])",
        [UUID(ticket["id"]) for ticket in (*forgotten, given_back)],
    )
    assert (await signals.look_back(pair.here.context))["expired"] == 1
    assert (await signals.look_back(pair.there.context))["expired"] == 0, "once, by whichever broker comes first"
    (row,) = await pair.db.fetch("SELECT weight, good FROM paths p WHERE site = 'eu/office1' AND store_id = $1", pair.stores["a"])
    assert (row["weight"], row["good"]) == (pytest.approx(0.25, rel=1e-2), 0)


async def commits_without_a_report(pair: Pair) -> None:
    """Looked for a minute after the commit, since a report may come yet; the commit itself is another test's affair."""
    client = pair.client("10.1.0.9")
    made = [
        (await client.post("/v1/tickets", {"operation": "upload", "image": {"name": "i"}, "size": 50_000_000, "only": ["a"]})).body
        for _ in range(3)
    ]
    for number, ticket in enumerate(made):
        upload, replica = UUID(ticket["id"]), new_id()
        await pair.db.execute(
            """INSERT INTO replicas (id, blob_id, store_id, key, state, project, subject, observed_strength)
               SELECT $2, blob_id, $3, $2::uuid::text, 'active', 'p', 'u', 'md5' FROM uploads WHERE id = $1""",
            upload, replica, pair.stores["a"],
        )  # fmt: skip
        await pair.db.execute(
            """UPDATE uploads SET state = 'committed', replica_id = $2, touched_at = now() - interval '2 minutes',
                   created_at = now() - interval '130 seconds', sent_at = $3::float8 * interval '1 second' + now() - interval '130 seconds'
               WHERE id = $1""",
            upload, replica, 10.0 if number < 2 else None,
        )  # fmt: skip
    await tell(client, made[1], "a", "ok", bytes=50_000_000, seconds=20.0)
    await pair.db.execute("UPDATE watermarks SET at = now() - interval '10 minutes'")
    assert (await signals.look_back(pair.here.context))["committed"] == 1
    row = await average(pair, "write")
    assert row["weight"] == pytest.approx(1.5, rel=1e-2), "one report, and half of one"
    assert row["bytes"] / row["busy_seconds"] == pytest.approx(75e6 / 25, rel=1e-2)
