"""Which disks are converted: those that are whole in themselves, as QEMU's own tools make them and as an attacker would."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from broker.cli.get import command
from broker.client.api import Broker
from broker.client.convert import NotConverted, check, convert, fetch, qemu_img
from broker.client.progress import Progress
from broker.client.sources import Wanted
from broker.client.trouble import LocalTrouble


def make(path: Path, format: str, *options: str) -> Path:
    subprocess.run([qemu_img(), "create", "-q", "-f", format, *options, str(path), "1M"], check=True, capture_output=True)
    return path


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("qcow2", ()), ("qcow2", ("-o", "compat=0.10")), ("qcow2", ("-o", "extended_l2=on")), ("vmdk", ()),
        ("vmdk", ("-o", "subformat=streamOptimized")), ("raw", ()),
    ],
)  # fmt: skip
def test_what_is_whole_is_taken(tmp_path: Path, format: str, options: tuple[str, ...]) -> None:
    check(make(tmp_path / "disk", format, *options), format)


def test_a_disk_that_names_other_files_is_refused(tmp_path: Path) -> None:
    secret = make(tmp_path / "secret", "raw")
    for name, options in (
        ("backed", ("-b", str(secret), "-F", "raw")),
        ("apart", ("-o", f"data_file={tmp_path}/data")),
        ("apart-raw", ("-o", f"data_file={tmp_path}/data-raw,data_file_raw=on")),
    ):
        with pytest.raises(NotConverted, match="any file of this machine"):
            check(make(tmp_path / name, "qcow2", *options), "qcow2")
    for subformat in ("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        with pytest.raises(NotConverted, match="names other files"):
            check(make(tmp_path / subformat, "vmdk", "-o", f"subformat={subformat}"), "vmdk")
    make(tmp_path / "base.vmdk", "vmdk")
    with pytest.raises(NotConverted, match="any file of this machine"):
        check(make(tmp_path / "child.vmdk", "vmdk", "-b", str(tmp_path / "base.vmdk"), "-F", "vmdk"), "vmdk")


GOOD = b'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicSparse"\nRW 2048 SPARSE "x.vmdk"\n'


@pytest.mark.parametrize(
    ("descriptor", "capacity", "refused"),
    [
        (GOOD, 2048, False),
        (GOOD, 0, True),  # QEMU reads such a one as a descriptor that may name any file
        (GOOD.replace(b"monolithicSparse", b"monolithicFlat").replace(b"SPARSE", b"FLAT"), 2048, True),
        (GOOD.replace(b'createType="monolithicSparse"', b'createType="custom"\ncreateType="monolithicSparse"'), 2048, True),
        (GOOD.replace(b"parentCID=ffffffff", b"parentCID=1\nparentCID=ffffffff"), 2048, True),
        (GOOD.replace(b"version=1", b'# parentFileNameHint="/etc/shadow"'), 2048, True),
        (GOOD + b'RW 2048 FLAT "/etc/shadow" 0\n', 2048, True),
        (GOOD.replace(b"RW 2048", b"  RDONLY 1"), 2048, False),
        (b"", 2048, True),
    ],
)
def test_descriptors_of_vmdk(tmp_path: Path, descriptor: bytes, capacity: int, refused: bool) -> None:
    head = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, capacity, 128, 1, 20)
    (tmp_path / "disk").write_bytes(head.ljust(512, b"\0") + descriptor.ljust(20 * 512, b"\0"))
    if refused:
        with pytest.raises(NotConverted):
            check(tmp_path / "disk", "vmdk")
    else:
        check(tmp_path / "disk", "vmdk")


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"QFI\xfb\0\0\0\1" + bytes(100), b"QFI\xfb\0\0\0\3" + bytes(20), b"KDMV", bytes(600)])
def test_what_is_no_disk_of_that_format_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "disk").write_bytes(content)
    for format in ("qcow2", "vmdk", "vhdx"):
        with pytest.raises(NotConverted):
            check(tmp_path / "disk", format)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--convert", "qcow2"), "one --format"),
        (("--format", "raw", "--format", "vdi", "--convert", "qcow2"), "one --format"),
        (("--format", "raw", "--convert", "iso"), "one of raw, qcow2, vmdk"),
        (("--format", "raw", "--convert", "qcow2=fast"), "bytes a second"),
    ],
)
def test_commands_that_make_no_sense(arguments: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(command, ["image", *arguments])
    assert (done.exit_code, words in done.output) == (2, True), done.output


async def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"mine")
    async with Broker("http://127.0.0.1:9", "token") as broker:
        with pytest.raises(LocalTrouble, match="exists already"):
            await fetch(broker, Wanted(formats=["raw"], convert={"qcow2": 1.0}), tmp_path / "disk.raw")


async def test_what_qemu_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "disk"
    broken.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(200))
    with pytest.raises(NotConverted, match=r"did not convert qcow2 into raw: .+"):
        await convert(broken, "qcow2", tmp_path / "target", "raw", Progress())
    assert not (tmp_path / "target").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalTrouble, match="qemu-img is not here"):
        await convert(broken, "qcow2", tmp_path / "target", "raw", Progress())
