"""Signing keys and idempotency keys: many brokers agree, and nothing readable is kept."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, TypeAlias

import asyncpg
import jwt
import pytest

from broker import errors
from broker.catalog import connect, idempotency
from broker.catalog import keys as key_rows
from broker.model import new_id
from broker.service import keys
from broker.sign import rotation
from broker.sign.rotation import State, Terms

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"  # only the stubs make it generic

ISSUER = "https://broker.test"


@pytest.fixture
async def any_pool(any_postgres: str) -> AsyncIterator[Pool]:
    """A pool on each of the servers that are supported."""
    pool = await connect.connect(any_postgres, min_size=1, max_size=6)
    yield pool
    pool.terminate()


async def test_brokers_that_start_at_once_have_one_key_and_a_standby(any_pool: Pool) -> None:
    rings = await asyncio.gather(*(keys.load(any_pool, b"passphrase", ISSUER) for _ in range(6)))
    now = time.time()
    published = [ring.published(now) for ring in rings]
    assert len(published[0].document["keys"]) == 2
    assert all(each == published[0] for each in published)
    assert await any_pool.fetchval("SELECT count(*) FROM signing_keys") == 2
    assert sorted(life.state(now) for life in rings[0].lives) == [State.SIGNING, State.STANDBY]
    bearer = rings[3].signer.sign_claims({"sub": "alice", "aud": "x", "exp": int(now + 60)}, now)
    assert decoded(rings[1], bearer)["sub"] == "alice"


def decoded(ring: keys.Keyring, bearer: str) -> dict[str, Any]:
    kid = jwt.get_unverified_header(bearer)["kid"]
    found = next(key for key in ring.jwks(time.time())["keys"] if key["kid"] == kid)
    claims: dict[str, Any] = jwt.decode(bearer, jwt.PyJWK(found), algorithms=[found["alg"]], audience="x", issuer=ISSUER)
    return claims


async def test_the_private_half_is_kept_encrypted(pool: Pool) -> None:
    ring = await keys.load(pool, b"passphrase", ISSUER)
    for row in await pool.fetch("SELECT private_pem FROM signing_keys"):
        assert row["private_pem"].startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert "PRIVATE" not in repr(ring)
    assert "passphrase" not in repr(ring)


async def test_another_passphrase_says_what_to_do_and_makes_no_key(pool: Pool) -> None:
    await keys.load(pool, b"passphrase", ISSUER)
    with pytest.raises(keys.WrongPassphrase, match="revoked_at") as caught:
        await keys.load(pool, b"hunter2", ISSUER)
    assert "hunter2" not in str(caught.value)
    await pool.execute("DELETE FROM signing_keys WHERE signs_from = 'infinity'")  # as the step before left it: no standby yet
    with pytest.raises(keys.WrongPassphrase, match="revoked_at"):
        await keys.load(pool, b"hunter2", ISSUER)
    assert await pool.fetchval("SELECT count(*) FROM signing_keys") == 1


async def test_a_reload_follows_the_catalogue(pool: Pool) -> None:
    ring = await keys.load(pool, b"passphrase", ISSUER)
    before = ring.jwks(time.time())
    await pool.execute("UPDATE signing_keys SET revoked_at = now()")
    other = await keys.load(pool, b"passphrase", ISSUER)
    now = time.time()
    assert other.jwks(now) != before
    await ring.reload()
    assert ring.published(now) == other.published(now)
    assert await pool.fetchval("SELECT count(*) FROM changes WHERE kind = 'key'") == 6  # two made, two revoked, two made


async def test_every_instant_comes_back_as_it_was_written(any_pool: Pool) -> None:
    ring = await keys.load(any_pool, b"passphrase", ISSUER)
    signing, standby = sorted(ring.lives, key=lambda life: life.signs_from)
    assert (standby.signs_from, standby.signs_until, standby.kept_until) == (math.inf,) * 3
    now = time.time()
    wanted = replace(signing, signs_until=now + 1.25, kept_until=now + 7.5)
    await key_rows.update(any_pool, wanted)
    read = next(row.life for row in await key_rows.load(any_pool) if row.life.id == signing.id)
    assert (read.signs_until, read.kept_until) == pytest.approx((now + 1.25, now + 7.5), abs=1e-5)
    assert (read.created_at, read.signs_from, read.tokens_until) == (signing.created_at, signing.signs_from, -math.inf)


async def test_a_key_is_kept_for_the_bearer_tokens_that_it_signed(pool: Pool) -> None:
    ring = await keys.load(pool, b"passphrase", ISSUER)
    now = time.time()
    first = rotation.signing(ring.lives, now)
    assert first is not None
    month = now + 30 * 86_400
    await ring.promise(month, now)
    await ring.promise(now + 60, now)  # a shorter one changes nothing
    await ring.change(lambda lives, now: rotation.rotate(lives, now, Terms(overlap_seconds=2)))
    kept = next(life for life in ring.lives if life.id == first.id)
    assert month < kept.kept_until < month + 600
    # It signs until its successor begins, and what it signs then is kept too.
    await ring.promise(month + 86_400, now)
    kept = next(life for life in ring.lives if life.id == first.id)
    assert kept.kept_until > month + 86_400
    bearer = ring.signer.sign_claims({"sub": "alice", "aud": "x", "exp": int(month + 86_400)}, now)
    assert decoded(ring, bearer)["sub"] == "alice"


async def test_two_rotations_at_once_are_one(pool: Pool) -> None:
    rings = [await keys.load(pool, b"passphrase", ISSUER) for _ in range(2)]
    terms = Terms(overlap_seconds=900)
    done = await asyncio.gather(
        *(ring.change(lambda lives, now: rotation.rotate(lives, now, terms)) for ring in rings), return_exceptions=True
    )
    assert sorted(type(each).__name__ for each in done) == ["Plan", "UnderWay"]
    assert await pool.fetchval("SELECT count(*) FROM signing_keys") == 3


async def test_a_broker_with_another_passphrase_hears_of_revocations_and_adds_nothing(pool: Pool) -> None:
    """It was started before the passphrase was changed."""
    ring = await keys.load(pool, b"passphrase", ISSUER)
    first = rotation.signing(ring.lives, time.time())
    assert first is not None
    assert await keys.rewrap(pool, b"passphrase", b"another one") == 2
    with pytest.raises(keys.WrongPassphrase):
        await keys.rewrap(pool, b"passphrase", b"a third one")
    with pytest.raises(keys.WrongPassphrase):
        await ring.change(lambda lives, now: rotation.rotate(lives, now, Terms(overlap_seconds=2)))
    other = await keys.load(pool, b"another one", ISSUER)
    assert other.published(time.time()) == ring.published(time.time())
    await other.change(lambda lives, now: rotation.revoke(lives, first.id, now))
    await ring.reload()
    now = time.time()
    assert first.id not in {key["kid"] for key in ring.jwks(now)["keys"]}
    assert len(ring.unreadable) == 1  # the new standby
    assert jwt.get_unverified_header(ring.signer.sign_claims({"exp": now + 60}, now))["kid"] != first.id


async def test_dead_keys_are_forgotten_after_a_month(pool: Pool) -> None:
    ring = await keys.load(pool, b"passphrase", ISSUER)
    await ring.change(lambda lives, now: rotation.revoke(lives, lives[0].id, now))
    await key_rows.forget_dead(pool)
    assert len(await key_rows.load(pool, dead=True)) == 3
    await pool.execute("UPDATE signing_keys SET revoked_at = revoked_at - interval '31 days'")
    await key_rows.forget_dead(pool)
    assert len(await key_rows.load(pool, dead=True)) == len(ring.lives) == 2


async def test_the_step_before_reads_what_rotation_writes(pool: Pool) -> None:
    """Brokers of the version before are still running: its query finds the standby, which signs nothing (design, invariant 12)."""
    await keys.load(pool, b"passphrase", ISSUER)
    rows = await pool.fetch(
        """SELECT id, algorithm, private_pem, extract(epoch FROM signs_from)::float8 AS signs_from, extract(epoch FROM signs_until)::float8
           FROM signing_keys WHERE revoked_at IS NULL AND (kept_until IS NULL OR kept_until > now()) ORDER BY signs_from, id"""
    )
    assert [row["signs_from"] == math.inf for row in rows] == [False, True]


async def test_a_retry_gets_the_first_id_and_another_request_is_refused(pool: Pool) -> None:
    ids = [new_id() for _ in range(5)]
    got = await asyncio.gather(*(idempotency.claim(pool, "owner", "key", b"print", id) for id in ids))
    assert len(set(got)) == 1
    assert got[0] in ids
    with pytest.raises(errors.IdempotencyMismatch):
        await idempotency.claim(pool, "owner", "key", b"other", new_id())
    assert await idempotency.claim(pool, "owner 2", "key", b"other", ids[0]) == ids[0]


async def test_after_a_day_a_key_is_free_again(pool: Pool) -> None:
    first, second, third = new_id(), new_id(), new_id()
    await idempotency.claim(pool, "owner", "key", b"print", first)
    await idempotency.forget_old(pool)
    assert await idempotency.claim(pool, "owner", "key", b"print", second) == first
    await pool.execute("UPDATE idempotency SET created_at = now() - interval '25 hours'")
    assert await idempotency.claim(pool, "owner", "key", b"other", second) == second
    await pool.execute("UPDATE idempotency SET created_at = now() - interval '25 hours'")
    await idempotency.forget_old(pool)
    assert await idempotency.claim(pool, "owner", "key", b"print", third) == third
