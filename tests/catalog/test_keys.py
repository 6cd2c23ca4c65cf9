"""Signing keys and idempotency keys: many brokers agree, and nothing readable is kept."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import jwt
import pytest

from broker import errors
from broker.catalog import idempotency
from broker.model import new_id
from broker.service import keys

ISSUER = "https://broker.test"


async def test_brokers_that_start_at_once_have_one_key(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    now = time.time()
    rings = await asyncio.gather(*(keys.load(pool, b"passphrase", now, ISSUER) for _ in range(6)))
    published = [ring.jwks() for ring in rings]
    assert len(published[0]["keys"]) == 1
    assert all(each == published[0] for each in published)
    assert await pool.fetchval("SELECT count(*) FROM signing_keys") == 1
    bearer = rings[3].signer.sign_claims({"sub": "alice", "aud": "x", "exp": int(now + 60)}, now)
    public = jwt.PyJWK(published[1]["keys"][0])
    assert jwt.decode(bearer, public, algorithms=["ES256"], audience="x", issuer=ISSUER)["sub"] == "alice"


async def test_the_private_half_is_kept_encrypted(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    ring = await keys.load(pool, b"passphrase", time.time(), ISSUER)
    pem = await pool.fetchval("SELECT private_pem FROM signing_keys")
    assert pem.startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert "PRIVATE" not in repr(ring)
    assert "passphrase" not in repr(ring)


async def test_another_passphrase_says_what_to_do_and_makes_no_key(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    await keys.load(pool, b"passphrase", time.time(), ISSUER)
    with pytest.raises(keys.WrongPassphrase, match="revoked_at") as caught:
        await keys.load(pool, b"hunter2", time.time(), ISSUER)
    assert "hunter2" not in str(caught.value)
    assert await pool.fetchval("SELECT count(*) FROM signing_keys") == 1


async def test_a_reload_follows_the_catalogue(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    now = time.time()
    ring = await keys.load(pool, b"passphrase", now, ISSUER)
    before = ring.jwks()
    await pool.execute("UPDATE signing_keys SET revoked_at = now()")
    other = await keys.load(pool, b"passphrase", now, ISSUER)
    assert other.jwks() != before
    await ring.reload()
    assert ring.jwks() == other.jwks()
    assert await pool.fetchval("SELECT count(*) FROM changes WHERE kind = 'key'") == 3


async def test_a_retry_gets_the_first_id_and_another_request_is_refused(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    ids = [new_id() for _ in range(5)]
    got = await asyncio.gather(*(idempotency.claim(pool, "owner", "key", b"print", id) for id in ids))
    assert len(set(got)) == 1
    assert got[0] in ids
    with pytest.raises(errors.IdempotencyMismatch):
        await idempotency.claim(pool, "owner", "key", b"other", new_id())
    assert await idempotency.claim(pool, "owner 2", "key", b"other", ids[0]) == ids[0]


async def test_after_a_day_a_key_is_free_again(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    first, second, third = new_id(), new_id(), new_id()
    await idempotency.claim(pool, "owner", "key", b"print", first)
    await idempotency.forget_old(pool)
    assert await idempotency.claim(pool, "owner", "key", b"print", second) == first
    await pool.execute("UPDATE idempotency SET created_at = now() - interval '25 hours'")
    assert await idempotency.claim(pool, "owner", "key", b"other", second) == second
    await pool.execute("UPDATE idempotency SET created_at = now() - interval '25 hours'")
    await idempotency.forget_old(pool)
    assert await idempotency.claim(pool, "owner", "key", b"print", third) == third
