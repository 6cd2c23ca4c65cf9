"""A disk image that a PC boots: it reads a line from the last mebibyte of its disk, prints it on the screen and on the first serial port,
and waits. Each character that comes on the serial port makes it read and print the line of the mebibyte before.

So each line tells that a far place of the disk was really read, and a disk can be read bit by bit while the machine runs. Everything else
is noise of a fixed seed, so that nothing on the way can make the image smaller. Try it with:
qemu-system-x86_64 -display none -serial stdio -drive file=IMAGE,format=qcow2
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
"""The line of the last mebibyte."""

FAILED = b"The disk cannot be read.\r\n"
"""What it prints instead of a line that it cannot read."""

_MEBIBYTE = 1 << 20
_SECTOR = 512
_SEED = 2
_LINE = 64

# 16-bit code, loaded by the BIOS at 0x7C00 with the drive's number in DL.
_CODE = bytes.fromhex(
    "31c0"          # 00        xor ax, ax
    "8ed8"          # 02        mov ds, ax
    "8ec0"          # 04        mov es, ax
    "8ed0"          # 06        mov ss, ax
    "bc007c"        # 08        mov sp, 0x7c00
    "fc"            # 0b        cld
    "8816627c"      # 0c        mov [drive], dl
    "c706657c0100"  # 10 again: mov word [packet+2], 1   one sector; the BIOS has put the number read there
    "be637c"        # 16        mov si, packet
    "8a16627c"      # 19        mov dl, [drive]
    "b442"          # 1d        mov ah, 0x42             read by number of sector (EDD)
    "cd13"          # 1f        int 0x13
    "be007e"        # 21        mov si, 0x7e00           where the sector is now
    "7303"          # 24        jnc next
    "be737c"        # 26        mov si, failed
    "ac"            # 29  next: lodsb
    "84c0"          # 2a        test al, al
    "7416"          # 2c        jz key
    "50"            # 2e        push ax
    "b40e"          # 2f        mov ah, 0x0e             teletype
    "bb0700"        # 31        mov bx, 7
    "cd10"          # 34        int 0x10
    "bafd03"        # 36        mov dx, 0x3fd            status of the serial port: wait until it takes a byte; all ones where there is none
    "ec"            # 39  wait: in al, dx
    "a820"          # 3a        test al, 0x20
    "74fb"          # 3c        jz wait
    "58"            # 3e        pop ax
    "b2f8"          # 3f        mov dl, 0xf8
    "ee"            # 41        out dx, al
    "ebe5"          # 42        jmp next
    "fb"            # 44  key:  sti
    "f4"            # 45        hlt                      until the clock ticks
    "bafd03"        # 46        mov dx, 0x3fd
    "ec"            # 49        in al, dx
    "3cff"          # 4a        cmp al, 0xff             no serial port
    "74f6"          # 4c        je key
    "a801"          # 4e        test al, 1               a character has come
    "74f2"          # 50        jz key
    "b2f8"          # 52        mov dl, 0xf8
    "ec"            # 54        in al, dx
    "812e6b7c0008"  # 55        sub word [packet+8], 2048
    "831e6d7c00"    # 5b        sbb word [packet+10], 0
    "ebae"          # 60        jmp again
    "00"            # 62 drive: db 0
    "10000100007e0000"  # 63 packet: its length, sectors, offset and segment; the first sector (8 bytes) follows, and at 73 what failed
)  # fmt: skip


def line(mebibyte: int, size: int = SIZE) -> bytes:
    """The text at the beginning of a mebibyte but the first, whose number is 0, of a disk of `size` bytes."""
    return TEXT if (mebibyte + 1) * _MEBIBYTE == size else b"Mebibyte %d.\r\n" % mebibyte


def boot_sector(size: int = SIZE) -> bytes:
    """512 bytes: the code, what it reads first, a partition table whose one active partition spans the rest of a disk of `size` bytes."""
    last = struct.pack("<Q", (size - _MEBIBYTE) // _SECTOR)
    first, sectors = _MEBIBYTE // _SECTOR, (size - _MEBIBYTE) // _SECTOR
    # Status, first and last sector in a geometry that nobody uses any more, type (Linux), first sector, their number.
    partition = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", first, sectors)
    return (_CODE + last + FAILED + b"\0").ljust(446, b"\0") + partition + bytes(48) + b"\x55\xaa"


def write_raw(path: Path, size: int = SIZE) -> None:
    """Write the disk, the same bytes every time. `size` is a multiple of 1 MiB, at least 2 MiB."""
    noise = random.Random(_SEED)
    with path.open("wb") as file:
        file.write(boot_sector(size) + noise.randbytes(_MEBIBYTE - _SECTOR))
        for mebibyte in range(1, size // _MEBIBYTE):
            file.write(line(mebibyte, size).ljust(_LINE, b"\0") + noise.randbytes(_MEBIBYTE - _LINE))


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
