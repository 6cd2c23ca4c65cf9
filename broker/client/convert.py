"""Turns a verified file of one disk format into another, by ``qemu-img``.

Rules
- What others made is looked at before it is opened: a disk that names further files (a backing file, an external data file, extents)
  could have qemu-img copy any file of this machine into the result. Only what is whole in itself is converted.
- The format is the one that the broker told of, never guessed from the bytes.
- The result gets its name when it is whole.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from broker.client.api import Broker
from broker.client.download import STALL_SECONDS, Downloaded, download
from broker.client.fetch import disk_trouble
from broker.client.progress import Progress
from broker.client.sources import Wanted
from broker.client.target import give_name, require_free
from broker.client.trouble import ClientError, LocalTrouble

CONVERTIBLE = ("raw", "qcow2", "vmdk")
"""What can be looked at here, and so converted from."""

RATE = 200_000_000.0
"""Bytes of a blob that are taken to be converted in a second, where nobody says otherwise."""

_QCOW2 = struct.Struct(">4sIQ")
_INCOMPATIBLE = struct.Struct(">Q")
_INCOMPATIBLE_AT = 72
_EXTERNAL_DATA = 1 << 2
_SPARSE = struct.Struct("<4sIIQQQQ")
_SECTOR = 512
_MOST_DESCRIPTOR = 64 << 10
_WHOLE = ("monolithicsparse", "streamoptimized")
_EXTENT = re.compile(r"^\s*(?:rw|rdonly|noaccess)\s", re.MULTILINE)
_PERCENT = re.compile(rb"\(\s*([0-9.]+)/100%\)")


class NotConverted(ClientError):
    """A disk that is not whole in itself, or that qemu-img does not take."""


def qemu_img() -> str:
    """The program. Raises `LocalTrouble` when it is not here."""
    program = shutil.which("qemu-img")
    if program is None:
        raise LocalTrouble(
            "qemu-img is not here, and nothing else converts disks", "install it (Debian: qemu-utils), or leave --convert out"
        )
    return program


async def fetch(
    broker: Broker,
    wanted: Wanted,
    path: Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> Downloaded:
    """As `download.download`; what comes in a format that is wanted only to be converted becomes the first of `Wanted.formats`.

    Raises also `NotConverted`. Beside the target is room for both files needed meanwhile.
    """
    progress = progress or Progress()
    if not wanted.convert:
        return await download(broker, wanted, path, replace=replace, progress=progress, stall_seconds=stall_seconds)
    require_free(path, replace=replace)
    fetched, target = (path.with_name(f".{path.name}.{name}") for name in ("fetched", "converted"))
    done = await download(broker, wanted, fetched, replace=True, progress=progress, stall_seconds=stall_seconds)
    began = time.monotonic()
    converts = done.format is not None and done.format not in wanted.formats
    try:
        if converts:
            target.unlink(missing_ok=True)
            await convert(fetched, done.format or "", target, wanted.formats[0], progress)
        give_name(target if converts else fetched, path, replace=replace)
    except OSError as error:
        raise disk_trouble(error) from None
    if not converts:
        return dataclasses.replace(done, path=path)
    fetched.unlink()
    spent = time.monotonic() - began
    progress.stage = "done"
    return dataclasses.replace(
        done, path=path, format=wanted.formats[0], seconds=done.seconds + spent, converted_from=done.format, converting_seconds=spent
    )


async def convert(source: Path, format: str, target: Path, into: str, progress: Progress) -> None:
    """Write `source`, a disk of `format`, to `target`, which does not exist, as `into`. Raises `NotConverted` and `LocalTrouble`."""
    program = qemu_img()
    check(source, format)
    progress.stage, progress.total, progress.done = "converting", source.stat().st_size, 0
    process = await asyncio.create_subprocess_exec(
        program, "convert", "-p", "-f", format, "-O", into, str(source.absolute()), str(target.absolute()),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stderr is not None
        said = asyncio.create_task(process.stderr.read())
        while told := await process.stdout.read(4096):
            for percent in _PERCENT.findall(told):
                progress.done = int(progress.total * float(percent) / 100)
        words = (await said).decode(errors="replace").strip()
        if await process.wait() != 0:
            raise NotConverted(
                f"qemu-img did not convert {format} into {into}: {words.splitlines()[-1][:300] if words else 'no reason given'}"
            )
        _settle(target)
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        target.unlink(missing_ok=True)
        raise


def _settle(target: Path) -> None:
    """Force the file to disk."""
    file = os.open(target, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check(path: Path, format: str) -> None:
    """Raises `NotConverted` for a disk that is not of this format, or not whole in itself."""
    match format:
        case "raw":
            return
        case "qcow2":
            with path.open("rb") as file:
                _check_qcow2(file.read(_INCOMPATIBLE_AT + _INCOMPATIBLE.size))
        case "vmdk":
            with path.open("rb") as file:
                _check_vmdk(file)
        case _:
            raise NotConverted(f"disks of the format {format} are not converted here", "convert from " + ", ".join(CONVERTIBLE))


def _check_qcow2(head: bytes) -> None:
    """QEMU's docs/interop/qcow2.rst, "Header"."""
    if len(head) < _QCOW2.size or head[:4] != b"QFI\xfb":
        raise NotConverted("the disk is no qcow2")
    _, version, backing = _QCOW2.unpack_from(head)
    if version not in (2, 3):
        raise NotConverted(f"the disk is a qcow of version {version}")
    if backing:
        raise NotConverted("the qcow2 has a backing file, which could be any file of this machine")
    if version == 3 and (len(head) < _INCOMPATIBLE_AT + _INCOMPATIBLE.size or _features(head) & _EXTERNAL_DATA):
        raise NotConverted("the qcow2 has its data in another file, which could be any file of this machine")


def _features(head: bytes) -> int:
    (features,) = _INCOMPATIBLE.unpack_from(head, _INCOMPATIBLE_AT)
    return int(features)


def _check_vmdk(file: IO[bytes]) -> None:
    """VMware's Virtual Disk Format 5.0, "Hosted Sparse Extents" and "The Descriptor File". Only what holds its one extent itself."""
    head = file.read(_SECTOR)
    if len(head) < _SECTOR or head[:4] != b"KDMV":
        raise NotConverted("the disk is no sparse vmdk; a descriptor that names other files is not converted")
    _, _, _, capacity, _, offset, sectors = _SPARSE.unpack_from(head)
    if not capacity or not offset or not 0 < sectors * _SECTOR <= _MOST_DESCRIPTOR:
        raise NotConverted("the vmdk does not describe itself")
    file.seek(offset * _SECTOR)
    # QEMU takes the first that it finds of each, anywhere in the text: so there may be only one.
    text = file.read(sectors * _SECTOR).split(b"\0", 1)[0].decode("latin-1").lower()
    kinds, parents = re.findall(r'createtype\s*=\s*"?(\w*)', text), re.findall(r"parentcid\s*=\s*(\w*)", text)
    whole = len(kinds) == 1 and kinds[0] in _WHOLE and parents == ["ffffffff"] and "parentfilenamehint" not in text
    if not whole or len(_EXTENT.findall(text)) != 1:
        raise NotConverted("the vmdk needs further files, which could be any file of this machine")
