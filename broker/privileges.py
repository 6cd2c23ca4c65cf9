"""Gives up root for good: `drop` makes this process one of an ordinary account. What only root may open is opened before.

Rules: groups first, then the group, then the user (a user may not change groups); the real, effective and saved ids at once,
so that there is no way back; no program that is started from then on gains rights (no_new_privs, prctl(2)); what was done is
checked, not assumed. To be called before threads exist: no_new_privs is a thread's own.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522  # capget(2): two sets of effective, permitted, inheritable
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapAmb")


class PrivilegeError(Exception):
    """The account is unusable or the rights cannot be given up; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What was opened with rights that are given up before the broker runs: sockets that are bound, and the passphrase of the keys."""

    api: Sequence[socket.socket] = ()
    metrics: Sequence[socket.socket] = ()
    passphrase: bytes | None = field(default=None, repr=False)


def bind(host: str, port: int, *, reuse_port: bool = False) -> list[socket.socket]:
    """Sockets for every address that `host` has, bound but not listening yet. Raises `OSError` that names the address."""
    bound: list[socket.socket] = []
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind(place)
        except OSError as error:
            for each in (listener, *bound):
                each.close()
            raise OSError(error.errno, f"cannot listen on {host} port {port}: {error.strerror}") from None
        bound.append(listener)
    return bound


def account(name: str) -> pwd.struct_passwd:
    """The account to become. Raises `PrivilegeError` when there is none, when it is root, or when this process may not become it."""
    try:
        found = pwd.getpwnam(name)
    except (KeyError, ValueError):
        raise PrivilegeError(f"there is no account {name!r}; make one with: useradd --system --create-home {name}") from None
    if found.pw_uid == 0:
        raise PrivilegeError(f"{name} is root itself; name an ordinary account")
    if os.geteuid() not in (0, found.pw_uid):
        raise PrivilegeError(f"only root can become {name}; leave --user out, or start as root")
    return found


def drop(found: pwd.struct_passwd) -> None:
    """Become `found`, with the groups that it has and no capabilities. Raises `PrivilegeError`; then nothing may go on."""
    try:
        if os.geteuid() == 0:
            os.setgroups(os.getgrouplist(found.pw_name, found.pw_gid))
            os.setresgid(found.pw_gid, found.pw_gid, found.pw_gid)
            os.setresuid(found.pw_uid, found.pw_uid, found.pw_uid)
    except OSError as error:
        raise PrivilegeError(f"cannot become {found.pw_name}: {error.strerror}") from None
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise PrivilegeError(f"no_new_privs is refused: {os.strerror(ctypes.get_errno())}")
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if rights() and libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))) != 0:  # a service manager may have given some
        raise PrivilegeError(f"capabilities cannot be given up: {os.strerror(ctypes.get_errno())}")
    kept = rights()
    if os.getresuid() != (found.pw_uid,) * 3 or kept:
        raise PrivilegeError(f"rights of root are left after becoming {found.pw_name}: {', '.join(kept) or 'a user id'}")


def require_installation(found: pwd.struct_passwd) -> None:
    """Raise `PrivilegeError` when `found`, who is this user now, cannot read the broker's own files: some are read only when needed."""
    if not os.access(__file__, os.R_OK):
        place = Path(__file__).parent
        raise PrivilegeError(
            f"{found.pw_name} cannot read this installation in {place}; install it where everybody can, such as below /opt"
        )


def rights() -> list[str]:
    """The sets of capabilities of this process that are not empty, as /proc/self/status names them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return [name for name in _CAPABILITIES if int(fields.get(name, "0"), 16)]
