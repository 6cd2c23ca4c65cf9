"""A Ceph cluster of one monitor and one store in memory (Debian ``ceph-mon``, ``ceph-osd``, ``ceph-common``), for volumes (RBD).

It is too large for the tests; ``python -m tests.storms volumes`` starts it.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from tests.parts.process import find_program, free_ports, running

_INSTALL = "apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common"

_CONFIGURATION = """[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{port}
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
ms_mon_client_mode = crc
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = 2147483648
osd_class_load_list = *
osd_class_default_list = *
mon_allow_pool_size_one = true
mon_data = {place}/mon
osd_data = {place}/osd
run_dir = {place}
admin_socket = {place}/$name.asok
pid_file = {place}/$name.pid
log_file = {place}/$name.log
mon_cluster_log_file = {place}/cluster.log
crash_dir = {place}
"""


@dataclass(frozen=True)
class Ceph:
    """A running cluster with one pool. Whoever has its configuration may do everything: it knows no keys."""

    fsid: str
    pool: str
    configuration: Path

    @property
    def endpoint(self) -> str:
        """As a store of kind ``rbd`` is registered."""
        return f"rbd://{self.fsid}/{self.pool}"

    def command(self, program: str, *arguments: str) -> list[str]:
        """A command line that works on this cluster."""
        return [find_program(program, _INSTALL), "--conf", str(self.configuration), *arguments]

    def run(self, program: str, *arguments: str) -> str:
        """What a command prints. Raises `subprocess.CalledProcessError`, and `subprocess.TimeoutExpired` after a minute."""
        return subprocess.run(self.command(program, *arguments), check=True, capture_output=True, timeout=60, text=True).stdout


@contextlib.contextmanager
def ceph_in(place: Path, pool: str = "images") -> Iterator[Ceph]:
    """A cluster that keeps its files in `place`, an absolute path, until the block ends."""
    (port,) = free_ports(1)
    fsid, configuration = str(uuid4()), place / "ceph.conf"
    for name in ("mon", "osd"):
        (place / name).mkdir(parents=True)
    configuration.write_text(_CONFIGURATION.format(fsid=fsid, port=port, place=place))
    ceph = Ceph(fsid, pool, configuration)
    ceph.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{port}]", str(place / "monmap"))
    ceph.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(place / "monmap"))

    def tells(text: str, *arguments: str) -> bool:
        done = subprocess.run(ceph.command("ceph", "--connect-timeout", "5", *arguments), capture_output=True, text=True, check=False)
        return text in done.stdout

    mon = running(ceph.command("ceph-mon", "-i", "a", "-f"), log=place / "mon.out", ready=lambda: tells("quorum", "-s"))
    with mon:
        number = str(uuid4())
        ceph.run("ceph", "osd", "new", number, "0")
        ceph.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", number, "--no-mon-config")
        ceph.run("ceph", "osd", "crush", "add-bucket", "here", "host")
        ceph.run("ceph", "osd", "crush", "move", "here", "root=default")
        ceph.run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=here")
        osd = running(ceph.command("ceph-osd", "-i", "0", "-f"), log=place / "osd.out", ready=lambda: tells("1 up", "osd", "stat"))
        with osd:
            ceph.run("ceph", "osd", "pool", "create", pool, "1")
            ceph.run("rbd", "pool", "init", pool)
            yield ceph
