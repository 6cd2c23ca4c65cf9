"""A disk image that a PC boots: it prints one line on the screen and on the first serial port, then halts.

Everything after the boot sector is noise of a fixed seed, so that nothing on the way can make the image smaller. Try it with:
qemu-system-x86_64 -nographic -drive file=IMAGE,format=qcow2
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

SIZE = 64 << 20
"""Of the disk, in bytes."""

TEXT = b"Booted from an image that came by ticket.\r\n"

_MEBIBYTE = 1 << 20
_SECTOR = 512
_SEED = 2

# 16-bit code, loaded by the BIOS at 0x7C00; the text follows it.
_CODE = bytes.fromhex(
    "31c0"      # 00      xor ax, ax
    "8ed8"      # 02      mov ds, ax
    "8ed0"      # 04      mov ss, ax
    "bc007c"    # 06      mov sp, 0x7c00
    "fc"        # 09      cld
    "be2b7c"    # 0a      mov si, 0x7c00 + 0x2b
    "ac"        # 0d next lodsb
    "84c0"      # 0e      test al, al
    "7416"      # 10      jz halt
    "50"        # 12      push ax
    "b40e"      # 13      mov ah, 0x0e           teletype
    "bb0700"    # 15      mov bx, 7
    "cd10"      # 18      int 0x10
    "bafd03"    # 1a      mov dx, 0x3fd          status of the serial port: wait until it takes a byte; all ones where there is none
    "ec"        # 1d wait in al, dx
    "a820"      # 1e      test al, 0x20
    "74fb"      # 20      jz wait
    "58"        # 22      pop ax
    "b2f8"      # 23      mov dl, 0xf8
    "ee"        # 25      out dx, al
    "ebe5"      # 26      jmp next
    "f4"        # 28 halt hlt
    "ebfd"      # 29      jmp halt
)  # fmt: skip


def boot_sector(size: int = SIZE) -> bytes:
    """512 bytes: the code, its text, a partition table whose one active partition spans the rest of a disk of `size` bytes."""
    first, sectors = _MEBIBYTE // _SECTOR, (size - _MEBIBYTE) // _SECTOR
    # Status, first and last sector in a geometry that nobody uses any more, type (Linux), first sector, their number.
    partition = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", first, sectors)
    return (_CODE + TEXT + b"\0").ljust(446, b"\0") + partition + bytes(48) + b"\x55\xaa"


def write_raw(path: Path, size: int = SIZE) -> None:
    """Write the disk, the same bytes every time. `size` is a multiple of 1 MiB, at least 2 MiB."""
    noise = random.Random(_SEED)
    with path.open("wb") as file:
        file.write(boot_sector(size) + noise.randbytes(_MEBIBYTE - _SECTOR))
        for _ in range(size // _MEBIBYTE - 1):
            file.write(noise.randbytes(_MEBIBYTE))


def make(directory: Path, size: int = SIZE) -> Path:
    """The image as disk.qcow2 in `directory`; as disk.raw where qemu-img is missing."""
    raw = directory / "disk.raw"
    write_raw(raw, size)
    qemu_img = shutil.which("qemu-img")
    if qemu_img is None:
        return raw
    image = directory / "disk.qcow2"
    subprocess.run([qemu_img, "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)], check=True)
    raw.unlink()
    return image
