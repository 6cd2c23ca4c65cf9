"""A batch of objects takes one trip: no more statements for a hundred than for ten, whichever way the bytes go."""

from __future__ import annotations

import hashlib
from typing import Any

import asyncpg
import pytest

from broker import errors
from broker.model import Client, Handle, Role
from broker.service import repositories
from broker.service.context import Context
from broker.service.repositories import Repository, Wish
from tests.parts.desk import Desk, FakeStore, client

HERE, THERE = Repository("p", "here"), Repository("p", "there")


def contents(count: int, seed: str) -> list[bytes]:
    return [f"{seed} {number}".encode() for number in range(count)]


def wishes(files: list[bytes]) -> list[Wish]:
    return [Wish(hashlib.sha256(content).hexdigest(), len(content)) for content in files]


async def put(context: Context, who: Client, fakes: list[FakeStore], files: list[bytes]) -> None:
    for wish, content, handle in zip(wishes(files), files, await repositories.send(context, who, HERE, wishes(files)), strict=True):
        assert isinstance(handle, Handle)
        for fake in fakes:
            fake.put(handle.url, content)
        await repositories.confirm(context, who, HERE, wish)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that is sent to the database from now on."""
    sent: list[str] = []
    execute = asyncpg.Connection._execute

    async def noted(self: Any, query: str, *rest: Any, **options: Any) -> Any:
        sent.append(query)
        return await execute(self, query, *rest, **options)

    monkeypatch.setattr(asyncpg.Connection, "_execute", noted)
    return sent


async def test_a_hundred_cost_the_statements_of_ten(desk: Desk, statements: list[str]) -> None:
    fakes = [await desk.fake("a"), await desk.fake("b", write_slots=9, read_slots=9)]
    context, who = await desk.broker(), client()
    counted: dict[tuple[str, int], int] = {}
    for count in (10, 100):
        files = contents(count, str(count))
        statements.clear()
        sent = await repositories.send(context, who, HERE, wishes(files))
        counted["send", count] = len(statements)
        assert all(isinstance(handle, Handle) for handle in sent)
        for wish, content, handle in zip(wishes(files)[:4], files, sent, strict=False):
            assert isinstance(handle, Handle)
            for fake in fakes:
                fake.put(handle.url, content)
            await repositories.confirm(context, who, HERE, wish)
        statements.clear()
        got = await repositories.fetch(context, client(subject="other"), HERE, wishes(files))
        counted["fetch", count] = len(statements)
        assert [isinstance(result, Handle) for result in got] == [True] * 4 + [False] * (count - 4)
    # Stores are drawn, so that ten may all go to the one that counts no leases.
    assert counted["send", 100] <= 20, counted
    assert counted["fetch", 100] <= 12, counted


async def test_known_bytes_are_linked_at_once(desk: Desk, statements: list[str]) -> None:
    fakes = [await desk.fake()]
    context, who = await desk.broker(), client()
    files = contents(12, "known")
    await put(context, who, fakes, files)
    statements.clear()
    assert await repositories.send(context, who, THERE, wishes(files)) == [None] * len(files)
    assert len(statements) <= 12
    got = await repositories.fetch(context, who, THERE, wishes(files))
    assert all(isinstance(handle, Handle) for handle in got)
    stranger = client(project="q")
    assert all(isinstance(handle, Handle) for handle in await repositories.send(context, stranger, Repository("q", "r"), wishes(files)))
    assert all(isinstance(error, errors.NotFound) for error in await repositories.fetch(context, stranger, HERE, wishes(files)))


async def test_all_of_a_batch_are_let_in_or_none(desk: Desk) -> None:
    await desk.fake(write_slots=1)
    context = await desk.broker()
    assert all(isinstance(handle, Handle) for handle in await repositories.send(context, client(), HERE, wishes(contents(3, "first"))))
    with pytest.raises(errors.Busy) as refused:
        await repositories.send(context, client(subject="other"), HERE, wishes(contents(4, "full")))
    assert refused.value.retry_after is not None
    assert await context.db.fetchval("SELECT count(*) FROM uploads") == 3
    assert await context.db.fetchval("SELECT count(*) FROM lfs_objects") == 3


async def test_a_batch_holds_few_leases(desk: Desk) -> None:
    await desk.fake(write_slots=50)
    context = await desk.broker()
    asked = wishes(contents(30, "leases"))
    handles = await repositories.send(context, client(), HERE, asked)
    assert all(isinstance(handle, Handle) for handle in handles)
    rows = await context.db.fetch("SELECT u.digests ->> 'sha256' FROM leases l JOIN uploads u ON u.id = l.ticket_id")
    assert {row[0] for row in rows} == {wish.oid for wish in asked[-repositories.AT_ONCE :]}, "those that git-lfs comes to last"


async def test_who_may_not_write_is_told(desk: Desk) -> None:
    await desk.fake()
    context = await desk.broker()
    with pytest.raises(errors.Forbidden):
        await repositories.send(context, client(role=Role.READER), HERE, wishes(contents(1, "x")))
    with pytest.raises(errors.NotFound):
        await repositories.send(context, client(project="q", role=Role.ADMIN), HERE, wishes(contents(1, "x")))
