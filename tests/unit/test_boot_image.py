"""The demo's disk: what a BIOS looks for is where it looks, and the same bytes come every time."""

from __future__ import annotations

import json
import struct
import subprocess
import zlib
from pathlib import Path

from deploy import boot_image
from tests.parts.process import find_program

SIZE = 4 << 20


def test_the_boot_sector_is_one() -> None:
    sector = boot_image.boot_sector(SIZE)
    assert len(sector) == 512
    assert sector[510:] == b"\x55\xaa"
    # mov si, packet and mov si, failed: the code is loaded at 0x7c00.
    packet, failed = (struct.unpack_from("<H", sector, at + 1)[0] - 0x7C00 for at in (0x16, 0x26))
    assert sector[0x16] == sector[0x26] == 0xBE
    assert struct.unpack_from("<BBHHHQ", sector, packet) == (16, 0, 1, 0x7E00, 0, (SIZE - (1 << 20)) // 512)
    assert sector[failed : sector.index(b"\0", failed)] == boot_image.FAILED
    assert failed + len(boot_image.FAILED) < 446


def test_each_mebibyte_begins_with_its_line(tmp_path: Path) -> None:
    boot_image.write_raw(tmp_path / "disk", SIZE)
    content = (tmp_path / "disk").read_bytes()
    assert len(content) == SIZE
    lines = [content[at : content.index(b"\0", at)] for at in range(1 << 20, SIZE, 1 << 20)]
    assert lines == [b"Mebibyte 1.\r\n", b"Mebibyte 2.\r\n", boot_image.TEXT]


def test_its_partition_is_active_and_ends_with_the_disk() -> None:
    status, kind, first, sectors = struct.unpack_from("<B3xB3xII", boot_image.boot_sector(SIZE), 446)
    assert (status, kind) == (0x80, 0x83)
    assert (first + sectors) * 512 == SIZE


def test_the_image_is_qcow2_and_holds_the_same_noise_every_time(tmp_path: Path) -> None:
    qemu_img = find_program("qemu-img", "apt-get install qemu-utils")
    image = boot_image.make(tmp_path, SIZE)
    seen = json.loads(subprocess.run([qemu_img, "info", "--output=json", str(image)], capture_output=True, check=True).stdout)
    assert (seen["format"], seen["virtual-size"]) == ("qcow2", SIZE)
    again, back = tmp_path / "again.raw", tmp_path / "back.raw"
    boot_image.write_raw(again, SIZE)
    subprocess.run([qemu_img, "convert", "-O", "raw", str(image), str(back)], check=True)
    assert back.read_bytes() == again.read_bytes()
    assert len(zlib.compress(again.read_bytes())) > 0.99 * SIZE
