"""Makes copies that were asked for: takes one, reads it by a ticket, writes it by an upload, says how it went.

Rules
- Nothing unverified is sent: the blob is whole on this machine's disk, its digest checked, before the upload begins.
- While an agent works it reports every `BEAT_SECONDS`, or the copy is given to another one. A copy that was taken back, or is
  another's, is dropped at once.
- What fails is reported with its reason, without URLs or secrets, and the agent goes on with the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from broker import errors
from broker.client.answers import Copy
from broker.client.api import Broker
from broker.client.download import download
from broker.client.progress import Progress
from broker.client.sources import Wanted
from broker.client.trouble import ClientError
from broker.client.upload import Offer, Uploaded, upload

BEAT_SECONDS = 20.0


class TakenBack(ClientError):
    """The copy is not wanted any more, or another agent has it."""


async def make(broker: Broker, copy: Copy, *, site: str | None = None, progress: Progress | None = None) -> Uploaded:
    """Make one copy that was taken, through a file in TMPDIR, and report its end. Raises what a download or an upload raises, and
    `TakenBack`; the copy is then reported as failed, if it is still this agent's."""
    progress = progress or Progress()
    try:
        async with _reported(broker, copy, progress):
            with tempfile.TemporaryDirectory(prefix="broker-copy-") as directory:
                path = Path(directory) / "blob"
                await download(broker, Wanted(blob=copy.blob, site=site), path, progress=progress)
                offer = Offer(blob=copy.blob, only=[copy.store], site=site, purpose=copy.purpose)
                done = await upload(broker, path, offer, progress=progress)
    except TakenBack:
        raise
    except (errors.BrokerError, ClientError, OSError) as error:
        with contextlib.suppress(errors.BrokerError, ClientError):
            await broker.report_copy(copy.id, copy.turn, "failed", problem=f"{type(error).__name__}: {error}"[:500])
        raise
    await broker.report_copy(copy.id, copy.turn, "ok", bytes=done.size)
    return done


async def take(broker: Broker, stores: Sequence[str], pause_seconds: float | None) -> AsyncIterator[Copy]:
    """Copies as they come up; while none waits it asks again every `pause_seconds`, or ends when that is ``None``."""
    while True:
        copy = await broker.take_copy(stores)
        if copy is not None:
            yield copy
        elif pause_seconds is None:
            return
        else:
            await asyncio.sleep(pause_seconds)


@contextlib.asynccontextmanager
async def _reported(broker: Broker, copy: Copy, progress: Progress) -> AsyncIterator[None]:
    """Keep the copy while the block runs. Raises `TakenBack` in it when that is refused."""
    refused = False
    worker = asyncio.current_task()
    assert worker is not None

    async def beat() -> None:
        nonlocal refused
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                await broker.report_copy(copy.id, copy.turn, "running", bytes=progress.done)
            except (errors.NotFound, errors.Gone):
                refused = True
                worker.cancel()
                return
            except (errors.BrokerError, ClientError):
                continue  # the next beat may come through

    task = asyncio.create_task(beat())
    try:
        yield
    except asyncio.CancelledError:
        if not refused:
            raise
        worker.uncancel()
        raise TakenBack("the copy is not wanted any more, or another agent has it", "nothing is left to do") from None
    finally:
        task.cancel()
