"""The download engine against sources that do what they should not: the file is right, the source is switched, the broker is told."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

import orjson
import pytest

from broker import errors
from broker.client import plan, sources
from broker.client.api import Broker
from broker.client.download import Downloaded, download
from broker.client.journal import journal_of, load_download, temporary_of
from broker.client.sources import Wanted
from broker.client.trouble import BrokerUnreachable, LocalTrouble, TransferFailed, VerificationFailed
from tests.acceptance.fake_broker import FakeBroker, FakeStore, serving
from tests.parts.condition import until
from tests.parts.process import find_program

MEBIBYTE = 1 << 20
CONTENT = random.Random(7).randbytes(24 * MEBIBYTE)


def _broker(*stores: FakeStore, content: bytes = CONTENT, **more: object) -> FakeBroker:
    return FakeBroker(content, {store.name: store for store in stores}, **more)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PAUSES", (0.0, 0.05, 0.1))


async def _get(fake: FakeBroker, target: Path, *, parallel: int | None = 1, stall: float = 1.0, force: bool = False) -> Downloaded:
    async with Broker(fake.url, "token", patience=2) as broker:
        return await download(broker, Wanted(blob=fake.blob, parallel=parallel), target, replace=force, stall_seconds=stall)


def _nothing_left(target: Path) -> bool:
    return not target.exists() and not temporary_of(target).exists() and not journal_of(target).exists()


async def test_one_good_source_delivers_in_one_request_and_is_reported(tmp_path: Path) -> None:
    target = tmp_path / "image"
    async with serving(_broker(FakeStore("a"))) as fake:
        got = await _get(fake, target)
    assert target.read_bytes() == CONTENT
    assert got.verified_by == "sha256"
    assert len(fake.stores["a"].requests) == 1
    assert [(report["store"], report["outcome"], report["bytes"]) for report in fake.reports] == [("a", "ok", len(CONTENT))]
    assert not temporary_of(target).exists()
    assert not journal_of(target).exists()


@pytest.mark.parametrize(
    "bad",
    [
        FakeStore("bad", "cut", after=5 * MEBIBYTE + 17),
        FakeStore("bad", "hang", after=5 * MEBIBYTE + 17),
        FakeStore("bad", "hang", after=0),
        FakeStore("bad", "wrong-range"),
        FakeStore("bad", "wrong-size"),
        FakeStore("bad", "status", status=403),
        FakeStore("bad", "status", status=404),
        FakeStore("bad", "status", status=500),
        FakeStore("bad", "status", status=503),
        FakeStore("bad", "status", status=302),
    ],
    ids=lambda store: f"{store.mode}-{store.status if store.mode == 'status' else store.after}",
)
async def test_the_next_source_takes_over(bad: FakeStore, tmp_path: Path) -> None:
    target = tmp_path / "image"
    async with serving(_broker(bad, FakeStore("good"))) as fake:
        await _get(fake, target)
    assert target.read_bytes() == CONTENT
    assert fake.outcomes() == {"bad": "failed", "good": "ok"}
    assert ("POST", "activate") in fake.asked


async def test_bytes_that_came_before_a_cut_are_not_fetched_again(tmp_path: Path) -> None:
    async with serving(_broker(FakeStore("bad", "cut", after=10 * MEBIBYTE), FakeStore("good"))) as fake:
        await _get(fake, tmp_path / "image")
    assert fake.stores["good"].sent < len(CONTENT) - 9 * MEBIBYTE


@pytest.mark.parametrize("mode", ["whole", "chunked"])
async def test_a_store_that_ignores_ranges_still_serves(mode: str, tmp_path: Path) -> None:
    target = tmp_path / "image"
    async with serving(_broker(FakeStore("cut", "cut", after=3 * MEBIBYTE), FakeStore("whole", mode))) as fake:
        await _get(fake, target)
    assert target.read_bytes() == CONTENT
    assert fake.outcomes()["whole"] == "ok"


async def test_several_sources_share_the_work(tmp_path: Path) -> None:
    content = CONTENT * 5
    async with serving(_broker(FakeStore("a"), FakeStore("b"), content=content)) as fake:
        await _get(fake, tmp_path / "image", parallel=2)
    assert (tmp_path / "image").read_bytes() == content
    assert fake.outcomes() == {"a": "ok", "b": "ok"}
    assert fake.stores["a"].sent + fake.stores["b"].sent < 1.5 * len(content)


async def test_a_slow_source_loses_its_bytes_to_a_fast_one(tmp_path: Path) -> None:
    async with serving(_broker(FakeStore("slow", "slow"), FakeStore("fast"))) as fake:
        await _get(fake, tmp_path / "image", parallel=2)
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert fake.stores["fast"].sent > fake.stores["slow"].sent


async def test_a_hanging_source_among_several_is_not_waited_for(tmp_path: Path) -> None:
    async with serving(_broker(FakeStore("hang", "hang", after=MEBIBYTE), FakeStore("good"))) as fake:
        await _get(fake, tmp_path / "image", parallel=2, stall=600)
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert fake.outcomes() == {"hang": "slow", "good": "ok"}, fake.reports


async def test_a_source_that_failed_is_asked_for_again_while_another_one_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "AGAIN_SECONDS", 0.2)
    monkeypatch.setattr(plan, "MORE_SECONDS", 0.5)
    failing = FakeStore("well-later", "status", status=500)
    async with serving(_broker(failing, FakeStore("slow", "slow"), content=CONTENT)) as fake:
        work = asyncio.create_task(_get(fake, tmp_path / "image", parallel=2, stall=600))
        await until(lambda: "well-later" in fake.outcomes())
        failing.mode = "good"
        await work
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert fake.outcomes()["well-later"] == "ok"
    assert "slow" in fake.requests[-1]["avoid"]
    assert "well-later" not in fake.requests[-1]["avoid"]


@pytest.mark.parametrize(
    ("lasted", "expected", "due"),
    [(1, 10, 30), (20, 10, 30), (21, 10, 10.5), (4, 1, 3), (100, 10, 30), (6.2, 3, 3.1)],
)
def test_late_sources_are_told_of_more_often(lasted: float, expected: float, due: float) -> None:
    assert sources.word_due(lasted, expected) == pytest.approx(due)


async def test_where_every_store_is_full_a_download_that_lost_its_source_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BROKER_SECONDS", 0.3)
    failing = FakeStore("a", "status", status=500)
    async with serving(_broker(failing)) as fake, Broker(fake.url, "token", patience=60) as broker:
        report = broker.report

        def then_full(*arguments: object, **more: object) -> object:
            if failing.mode == "status":
                failing.mode, fake.busy, fake.retry_after = "good", 5, 1
            return report(*arguments, **more)  # type: ignore[arg-type]

        broker.report = then_full  # type: ignore[method-assign,assignment]
        await download(broker, Wanted(blob=fake.blob), tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert fake.busy == 0


async def test_an_expired_url_is_signed_again(tmp_path: Path) -> None:
    async with serving(_broker(FakeStore("a", lives=-1))) as fake:
        await _get(fake, tmp_path / "image")
    assert ("POST", "refresh") in fake.asked
    assert fake.outcomes() == {"a": "ok"}


async def test_a_refused_url_is_signed_again_once(tmp_path: Path) -> None:
    async with serving(_broker(FakeStore("a", "expired-once"))) as fake:
        await _get(fake, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert fake.asked.count(("POST", "refresh")) == 1


async def test_goes_on_without_the_broker_while_urls_live(tmp_path: Path) -> None:
    fake = _broker(FakeStore("bad", "cut", after=4 * MEBIBYTE), FakeStore("good"))
    async with serving(fake), Broker(fake.url, "token", patience=2) as broker:
        ticket = broker.download_ticket

        async def then_down(**arguments: object) -> object:
            answer = await ticket(**arguments)  # type: ignore[arg-type]
            fake.down = True
            return answer

        broker.download_ticket = then_down  # type: ignore[method-assign,assignment]
        got = await download(broker, Wanted(blob=fake.blob, parallel=1), tmp_path / "image", stall_seconds=1)
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert {used.store: used.outcome for used in got.sources} == {"bad": "failed", "good": "ok"}


async def test_a_busy_broker_is_asked_again(tmp_path: Path) -> None:
    async with serving(_broker(FakeStore("a"), busy=2)) as fake:
        await _get(fake, tmp_path / "image")
    assert len(fake.requests) == 3


async def test_no_broker_at_all(tmp_path: Path) -> None:
    async with Broker("http://127.0.0.1:9", "token", patience=0) as broker:
        with pytest.raises(BrokerUnreachable):
            await download(broker, Wanted(image=_broker(FakeStore("a")).image), tmp_path / "image")
    assert _nothing_left(tmp_path / "image")


async def test_when_every_source_fails_the_journal_stays(tmp_path: Path) -> None:
    target = tmp_path / "image"
    async with serving(_broker(FakeStore("bad", "cut", after=6 * MEBIBYTE))) as fake:
        with pytest.raises(TransferFailed, match="bad connection broken"):
            await _get(fake, target)
        assert not target.exists()
        fake.stores["bad"].mode = "good"
        fake.stores["bad"].sent = 0
        got = await _get(fake, target)
    assert target.read_bytes() == CONTENT
    assert got.resumed >= 5 * MEBIBYTE
    assert fake.stores["bad"].sent < len(CONTENT) - 5 * MEBIBYTE


async def test_wrong_bytes_never_get_the_name(tmp_path: Path) -> None:
    target = tmp_path / "image"
    async with serving(_broker(FakeStore("bad", "corrupt"))) as fake:
        with pytest.raises(VerificationFailed):
            await _get(fake, target)
    assert _nothing_left(target)
    assert fake.outcomes() == {"bad": "corrupt"}


async def test_after_wrong_bytes_another_source_delivers_all(tmp_path: Path) -> None:
    async with serving(_broker(FakeStore("bad", "corrupt"), FakeStore("good"))) as fake:
        await _get(fake, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert fake.outcomes() == {"bad": "corrupt", "good": "ok"}


async def test_a_bad_piece_alone_is_fetched_again(tmp_path: Path) -> None:
    async with serving(_broker(FakeStore("bad", "corrupt", after=7 * MEBIBYTE), FakeStore("good"), pieces=MEBIBYTE)) as fake:
        await _get(fake, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert fake.outcomes() == {"bad": "corrupt", "good": "ok"}
    assert fake.stores["good"].sent == MEBIBYTE


async def test_mixed_wrong_bytes_without_pieces_are_found_by_trying_one_source_at_a_time(tmp_path: Path) -> None:
    content = CONTENT * 4
    async with serving(_broker(FakeStore("good"), FakeStore("bad", "corrupt", after=40 * MEBIBYTE), content=content)) as fake:
        fake.stores["good"].mode = "slow"  # so that the other one has a share
        task = asyncio.create_task(_get(fake, tmp_path / "image", parallel=2))
        while fake.stores["bad"].sent < 20 * MEBIBYTE:
            await asyncio.sleep(0.01)
        fake.stores["good"].mode = "good"
        await task
    assert (tmp_path / "image").read_bytes() == content


async def test_an_existing_target_stays(tmp_path: Path) -> None:
    target = tmp_path / "image"
    target.write_bytes(b"mine")
    async with serving(_broker(FakeStore("a"))) as fake:
        with pytest.raises(LocalTrouble, match="exists already"):
            await _get(fake, target)
        assert target.read_bytes() == b"mine"
        assert fake.requests == []
        await _get(fake, target, force=True)
    assert target.read_bytes() == CONTENT


async def test_two_downloads_to_one_target_exclude_each_other(tmp_path: Path) -> None:
    async with serving(_broker(FakeStore("a", "slow"))) as fake:
        first = asyncio.create_task(_get(fake, tmp_path / "image"))
        while not fake.stores["a"].sent:
            await asyncio.sleep(0.01)
        with pytest.raises(LocalTrouble, match="another download"):
            await _get(fake, tmp_path / "image")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_a_full_disk_is_said_plainly_and_leaves_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "image"
    write = os.pwrite

    def full(file: int, data: bytes, offset: int) -> int:
        if offset > 4 * MEBIBYTE:
            raise OSError(28, "No space left on device")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    async with serving(_broker(FakeStore("a"))) as fake:
        with pytest.raises(LocalTrouble, match="No space left"):
            await _get(fake, target)
    assert not target.exists()
    assert "a" not in fake.outcomes()


async def test_what_the_broker_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    async with serving(_broker()) as fake:
        with pytest.raises(errors.NoSource):
            await _get(fake, tmp_path / "image")
    assert _nothing_left(tmp_path / "image")


async def test_killed_in_the_middle_it_resumes(tmp_path: Path) -> None:
    target = tmp_path / "image"
    async with serving(_broker(FakeStore("a", "slow"))) as fake:
        script = (
            "import asyncio, sys, uuid; from pathlib import Path\n"
            "from broker.client.api import Broker; from broker.client.download import download; from broker.client.sources import Wanted\n"
            "async def main():\n"
            "    async with Broker(sys.argv[1], 'token') as broker:\n"
            "        await download(broker, Wanted(blob=uuid.UUID(sys.argv[2]), parallel=1), Path(sys.argv[3]))\n"
            "asyncio.run(main())\n"
        )
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, fake.url, str(fake.blob), str(target))
        end = time.monotonic() + 60
        while not journal_of(target).exists():
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        state = load_download(journal_of(target), temporary_of(target).stat().st_size)
        assert state is not None
        for start, stop, _ in state.origins:
            assert temporary_of(target).read_bytes()[start:stop] == CONTENT[start:stop]
        fake.stores["a"].mode = "good"
        fake.stores["a"].sent = 0
        got = await _get(fake, target)
    assert target.read_bytes() == CONTENT
    assert got.resumed > 0
    assert fake.stores["a"].sent == len(CONTENT) - got.resumed


async def test_no_error_or_note_holds_a_signed_url(tmp_path: Path) -> None:
    async with serving(_broker(FakeStore("bad", "status", status=500))) as fake:
        with pytest.raises(TransferFailed) as caught:
            await _get(fake, tmp_path / "image")
        async with Broker(fake.url, "token") as broker:
            ticket = await broker.download_ticket(blob=fake.blob)
    assert "SECRET" not in str(caught.value) + repr(ticket)
    assert all("SECRET" not in report.get("detail", "") for report in fake.reports)


async def test_interrupted_the_command_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    target = tmp_path / "image"
    program = find_program("broker", "pip install -e '.[test]'")
    async with serving(_broker(FakeStore("a", "slow"))) as fake:
        arguments = [program, "get", str(fake.blob), "--url", fake.url, "-o", str(target), "--json"]
        process = await asyncio.create_subprocess_exec(*arguments, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not journal_of(target).exists():
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = await process.communicate()
        assert process.returncode == 130
        assert b"run the same command again" in said
        assert b"Traceback" not in said
        assert ("DELETE", str(fake.tickets[-1])) in fake.asked
        assert not target.exists()
        fake.stores["a"].mode = "good"
        process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
        lines, _ = await process.communicate()
    done = orjson.loads(lines.splitlines()[-1])
    assert done["event"] == "done"
    assert done["resumed"] > 0
    assert target.read_bytes() == CONTENT
