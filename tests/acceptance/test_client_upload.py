"""The upload engine against stores that fail: what is committed is the file, parts are sent again or elsewhere, a kill loses little."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from broker import errors
from broker.client import upload as engine
from broker.client.api import Broker
from broker.client.trouble import LocalTrouble, TransferFailed
from broker.client.upload import Offer, Uploaded, upload, upload_stream
from tests.acceptance.fake_broker import FakeBroker, FakeStore, serving
from tests.parts.process import find_program

MEBIBYTE = 1 << 20
CONTENT = random.Random(11).randbytes(10 * MEBIBYTE + 12345)
OFFER = Offer(image={"name": "demo"}, format="raw")


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(engine, "_RETRY_SECONDS", 0.01)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


def _broker(*stores: FakeStore) -> FakeBroker:
    return FakeBroker(b"", {store.name: store for store in stores})


def _stored(store: FakeStore) -> bytes:
    return b"".join(part for _, part in sorted(store.parts.items()))


async def _put(fake: FakeBroker, source: Path, offer: Offer = OFFER, **more: object) -> Uploaded:
    async with Broker(fake.url, "token", patience=2) as broker:
        return await upload(broker, source, offer, stall_seconds=2, **more)  # type: ignore[arg-type]


async def test_one_put(source: Path) -> None:
    async with serving(_broker(FakeStore("a"))) as fake:
        put = await _put(fake, source)
    assert _stored(fake.stores["a"]) == CONTENT
    assert put.store == "a"
    (commit,) = fake.commits
    assert commit["digests"]["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert commit["pieces"]["digests"] == [hashlib.sha256(CONTENT).hexdigest()]
    assert fake.outcomes() == {"a": "ok"}
    assert fake.requests[0]["size"] == len(CONTENT)


@pytest.mark.parametrize("kind", ["http", "s3"])
async def test_parts_with_digests_of_each_and_of_the_whole(kind: str, source: Path) -> None:
    async with serving(_broker(FakeStore("a", part_size=MEBIBYTE, kind=kind))) as fake:
        await _put(fake, source)
    assert _stored(fake.stores["a"]) == CONTENT
    (commit,) = fake.commits
    assert [part["number"] for part in commit["parts"]] == list(range(1, 12))
    for part in commit["parts"]:
        content = fake.stores["a"].parts[part["number"]]
        assert part["size"] == len(content)
        assert part["digests"]["sha256"] == hashlib.sha256(content).hexdigest()
        assert ("md5" in part["digests"]) == (kind == "s3")
    assert commit["pieces"] == {"length": MEBIBYTE, "algorithm": "sha256", "digests": [p["digests"]["sha256"] for p in commit["parts"]]}
    assert len(fake.stores["a"].taken) == 11


async def test_refused_parts_are_sent_again_with_their_digests_bound(source: Path) -> None:
    async with serving(_broker(FakeStore("a", part_size=MEBIBYTE, refuse_parts=3))) as fake:
        await _put(fake, source)
    assert _stored(fake.stores["a"]) == CONTENT
    assert fake.asked.count(("POST", "parts")) >= 3


@pytest.mark.parametrize("part_size", [None, MEBIBYTE])
async def test_refused_urls_are_signed_again(part_size: int | None, source: Path) -> None:
    fake = _broker(FakeStore("a", "expired-once", part_size=part_size))
    fake.content = b""
    async with serving(fake):
        await _put(fake, source)
    assert _stored(fake.stores["a"]) == CONTENT


@pytest.mark.parametrize("part_size", [None, MEBIBYTE])
async def test_another_store_when_one_dies(part_size: int | None, source: Path) -> None:
    async with serving(_broker(FakeStore("dead", "status", part_size=part_size), FakeStore("good", part_size=part_size))) as fake:
        put = await _put(fake, source)
    assert put.store == "good"
    assert _stored(fake.stores["good"]) == CONTENT
    assert fake.outcomes() == {"dead": "failed", "good": "ok"}


async def test_another_store_when_one_hangs(source: Path) -> None:
    hanging = FakeStore("hang", "hang", part_size=MEBIBYTE)
    async with serving(_broker(hanging, FakeStore("good", part_size=MEBIBYTE))) as fake, Broker(fake.url, "token") as broker:
        put = await upload(broker, source, OFFER, stall_seconds=0.3)
    assert put.store == "good"
    assert _stored(fake.stores["good"]) == CONTENT


async def test_no_store_at_all(source: Path) -> None:
    async with serving(_broker(FakeStore("dead", "status"))) as fake:
        with pytest.raises(TransferFailed, match="dead answered 500"):
            await _put(fake, source)
    assert fake.commits == []


async def test_a_store_that_tells_another_md5_is_caught_before_the_commit(source: Path) -> None:
    async with serving(_broker(FakeStore("bad", "corrupt", kind="s3"), FakeStore("good", kind="s3"))) as fake:
        put = await _put(fake, source)
    assert put.store == "good"
    assert fake.outcomes()["bad"] == "failed"


async def test_what_the_broker_finds_different_fails(source: Path) -> None:
    async with serving(_broker(FakeStore("bad", "corrupt"))) as fake:
        with pytest.raises(errors.Mismatch):
            await _put(fake, source)


async def test_digest_first_is_declared(source: Path) -> None:
    async with serving(_broker(FakeStore("a"))) as fake:
        await _put(fake, source, digest_first=True)
    assert fake.requests[0]["digests"] == {"sha256": hashlib.sha256(CONTENT).hexdigest()}


async def test_killed_in_the_middle_it_sends_only_the_rest(source: Path, tmp_path: Path) -> None:
    store = FakeStore("a", "slow", part_size=MEBIBYTE)
    async with serving(_broker(store)) as fake:
        script = (
            "import asyncio, sys; from pathlib import Path\n"
            "from broker.client.api import Broker; from broker.client.upload import Offer, upload\n"
            "async def main():\n"
            "    async with Broker(sys.argv[1], 'token') as broker:\n"
            "        await upload(broker, Path(sys.argv[2]), Offer(image={'name': 'demo'}, format='raw'))\n"
            "asyncio.run(main())\n"
        )
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, fake.url, str(source))
        end = time.monotonic() + 60
        while len(store.taken) < 5:
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        assert fake.commits == []
        store.mode = "good"
        await asyncio.sleep(0.5)
        before = len(store.taken)
        put = await _put(fake, source)
    assert len(fake.tickets) == 1
    assert put.resumed > 0
    assert len(store.taken) - before == 11 - put.resumed // MEBIBYTE
    assert _stored(store) == CONTENT
    assert not list((tmp_path / "state").rglob("*.jsonl"))


@pytest.mark.parametrize("part_size", [None, MEBIBYTE])
async def test_interrupted_it_says_how_to_go_on_and_nothing_else(part_size: int | None, source: Path) -> None:
    program = find_program("broker", "pip install -e '.[test]'")
    async with serving(_broker(FakeStore("a", "hang", part_size=part_size, taken=[0, 0]))) as fake:
        arguments = [program, "put", str(source), "--url", fake.url, "--quiet"]
        process = await asyncio.create_subprocess_exec(*arguments, stderr=asyncio.subprocess.PIPE)
        while not fake.stores["a"].requests:
            assert process.returncode is None
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = await process.communicate()
    assert process.returncode == 130
    assert said.decode() == "broker: interrupted; run the same command again to go on\n"


async def test_a_changed_file_begins_again(source: Path) -> None:
    store = FakeStore("a", part_size=MEBIBYTE)
    async with serving(_broker(store)) as fake:
        fake.stores["a"].refuse_parts = 1000
        with pytest.raises(TransferFailed):
            await _put(fake, source)
        store.refuse_parts = 0
        other = CONTENT[::-1]
        source.write_bytes(other)
        put = await _put(fake, source)
    assert put.resumed == 0
    assert _stored(store) == other
    assert len(fake.tickets) == 2


@pytest.mark.parametrize("length", [1, MEBIBYTE, 3 * MEBIBYTE, 3 * MEBIBYTE + 5])
async def test_a_pipe_of_unknown_length(length: int) -> None:
    content = CONTENT[:length]
    async with serving(_broker(FakeStore("a", part_size=MEBIBYTE))) as fake, Broker(fake.url, "token") as broker:
        await upload_stream(broker, io.BytesIO(content), OFFER)
    assert _stored(fake.stores["a"]) == content
    assert "size" not in fake.requests[0]
    assert fake.commits[0]["size"] == length


async def test_an_empty_pipe_is_given_up() -> None:
    async with serving(_broker(FakeStore("a", part_size=MEBIBYTE))) as fake, Broker(fake.url, "token") as broker:
        with pytest.raises(LocalTrouble, match="empty"):
            await upload_stream(broker, io.BytesIO(b""), OFFER)
    assert fake.asked[-1][0] == "DELETE"


@pytest.mark.parametrize("make", ["empty", "directory", "missing"])
async def test_what_is_no_file_is_refused_before_anything_is_asked(make: str, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if make == "empty":
        path.write_bytes(b"")
    elif make == "directory":
        path.mkdir()
    async with serving(_broker(FakeStore("a"))) as fake:
        with pytest.raises(LocalTrouble):
            await _put(fake, path)
    assert fake.requests == []
