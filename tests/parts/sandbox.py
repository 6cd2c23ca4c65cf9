"""Runs a program under what a systemd unit says of system calls, memory and address families: ``python sandbox.py UNIT PROGRAM …``.

An approximation of systemd for machines where it does not run: the same filters (systemd.exec(5)) are loaded with the same
library, libseccomp; capabilities and namespaces are not its business. As root, with ``--user NAME`` before UNIT, it becomes
that account first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_EQUAL, _MASKED_EQUAL = 4, 7
_PROT_WRITE, _PROT_EXEC, _SHM_EXEC = 2, 4, 0o100000
_FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}
_LAST_FAMILY = 45


class _Compare(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def settings(unit: Path) -> dict[str, list[str]]:
    """What the unit says, by name, in order; comments and sections left out."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, sign, value = line.partition("=")
        if sign and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def allowed(lines: list[str]) -> set[str]:
    """The system calls that the ``SystemCallFilter=`` lines leave, the ones that systemd always leaves among them."""
    calls = _members("@default")
    for line in lines:
        names = line.removeprefix("~").split()
        members = set().union(*(_members(name) for name in names))
        calls = calls - members if line.startswith("~") else calls | members
    return calls


def _members(name: str) -> set[str]:
    if not name.startswith("@"):
        return {name}
    shown = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True).stdout
    lines = [line.strip() for line in shown.splitlines()[1:]]
    return set().union(*(_members(line) for line in lines if line and not line.startswith("#")))


def load(unit: Path) -> None:
    """Put this process, and all that it starts, under the filters of the unit."""
    said = settings(unit)
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p

    def number(call: str) -> int:
        found: int = library.seccomp_syscall_resolve_name(call.encode())
        return found

    def rule(context: ctypes.c_void_p, action: int, call: str, *compared: _Compare) -> None:
        array = (_Compare * len(compared))(*compared)
        done = library.seccomp_rule_add_array(context, ctypes.c_uint32(action), number(call), len(compared), array)
        assert done == 0, (call, done)

    def load_one(default: int, rules: list[tuple[int, str, tuple[_Compare, ...]]]) -> None:
        context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
        for action, call, compared in rules:
            if number(call) >= 0:  # not every architecture has every call
                rule(context, action, call, *compared)
        assert library.seccomp_load(context) == 0
        library.seccomp_release(context)

    refused = _ERRNO | errno.EPERM
    both = _PROT_WRITE | _PROT_EXEC
    load_one(
        _ALLOW,
        [
            (_ERRNO | errno.EAFNOSUPPORT, "socket", (_Compare(0, _EQUAL, family, 0),))
            for family in range(1, _LAST_FAMILY + 1)
            if family not in [_FAMILIES[name] for name in said["RestrictAddressFamilies"][0].split()]
        ],
    )
    if said["MemoryDenyWriteExecute"] == ["yes"]:
        load_one(
            _ALLOW,
            [
                (refused, "mmap", (_Compare(2, _MASKED_EQUAL, both, both),)),
                (refused, "mprotect", (_Compare(2, _MASKED_EQUAL, _PROT_EXEC, _PROT_EXEC),)),
                (refused, "pkey_mprotect", (_Compare(2, _MASKED_EQUAL, _PROT_EXEC, _PROT_EXEC),)),
                (refused, "shmat", (_Compare(2, _MASKED_EQUAL, _SHM_EXEC, _SHM_EXEC),)),
            ],
        )
    load_one(refused, [(_ALLOW, call, ()) for call in sorted(allowed(said["SystemCallFilter"]))])


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "--user":
        import pwd

        account = pwd.getpwnam(words[1])
        os.setgroups([])
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
        words = words[2:]
    os.umask(int(settings(Path(words[0]))["UMask"][0], 8))
    load(Path(words[0]))
    os.execv(words[1], words[1:])
