"""OpenStack Swift: TempURL, tempauth, COPY and SLO, all in one process, with one memcached for its tokens.

`start` is a context manager; `swift` is the fixture of the tests. The account has two TempURL keys and two containers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.parts.process import PartMissing, answers, find_program, free_ports, listens, running

INSTALL = "pip install swift"
INSTALL_MEMCACHED = "apt-get install memcached"

_STORAGE = """\
[DEFAULT]
devices = {run}/node
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
workers = 0
swift_dir = {run}/etc
log_udp_host = 127.0.0.1
log_udp_port = {syslog}
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
replication_server = false
"""

_PROXY = """\
[DEFAULT]
workers = 0
swift_dir = {run}/etc
log_udp_host = 127.0.0.1
log_udp_port = {syslog}
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache bulk tempurl s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:bulk]
use = egg:swift#bulk
[filter:tempurl]
use = egg:swift#tempurl
methods = GET HEAD PUT POST DELETE
allowed_digests = sha256 sha512
[filter:tempauth]
use = egg:swift#tempauth
user_broker_broker = {key} .admin
user_transfer_broker = {member}
user_other_other = {key} .admin
[filter:s3api]
use = egg:swift#s3api
min_segment_size = 5242880
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""

_SWIFT = """\
[swift-hash]
swift_hash_path_prefix = {prefix}
swift_hash_path_suffix = {suffix}
[storage-policy:0]
name = gold
default = yes
"""


@dataclass(frozen=True, slots=True)
class SwiftPart:
    """A running Swift: its endpoint, one account and container, the TempURL keys, and a user for the broker's own requests.

    `member_key` is the password of the user ``transfer:broker``, who has no rights but those that a container gives.
    """

    endpoint: str
    account: str
    container: str
    temp_url_key: str
    temp_url_key2: str
    auth_url: str
    user: str
    key: str
    member_key: str
    pid: int

    @property
    def credential(self) -> dict[str, str]:
        return {
            "temp_url_key": self.temp_url_key,
            "temp_url_key2": self.temp_url_key2,
            "auth_url": self.auth_url,
            "user": self.user,
            "key": self.key,
        }


@contextlib.contextmanager
def start(directory: Path, container: str = "images") -> Iterator[SwiftPart]:
    """Run Swift with its data in `directory`, which must be on a file system with extended attributes, until the block ends."""
    if importlib.util.find_spec("swift") is None:
        raise PartMissing(f"OpenStack Swift is not installed; install it with: {INSTALL}")
    memcached = find_program("memcached", INSTALL_MEMCACHED)
    proxy, object_, container_, account, cache, syslog = free_ports(6)
    key, member = secrets.token_hex(16), secrets.token_hex(16)
    _write_configuration(directory, key, member, cache, syslog)
    server = str(Path(__file__).with_name("swift_server.py"))
    # Isolated (-I): this directory holds a swift.py of its own, which must not hide Swift.
    arguments = [sys.executable, "-I", server, str(directory), *map(str, (proxy, object_, container_, account))]
    endpoint = f"http://127.0.0.1:{proxy}"
    with (
        running(
            [memcached, "-u", "root", "-l", "127.0.0.1", "-p", str(cache), "-U", "0"],
            log=directory / "memcached.log", ready=lambda: listens(cache),
        ),
        running(arguments, log=directory / "swift.log", ready=lambda: answers(f"{endpoint}/healthcheck")) as process,
    ):  # fmt: skip
        first, second = secrets.token_hex(20), secrets.token_hex(20)
        auth_url = f"{endpoint}/auth/v1.0"
        part = SwiftPart(endpoint, "AUTH_broker", container, first, second, auth_url, "broker:broker", key, member, process.pid)
        _prepare(part)
        yield part


def _write_configuration(directory: Path, key: str, member: str, memcached: int, syslog: int) -> None:
    (directory / "node" / "sdb1").mkdir(parents=True, exist_ok=True)
    etc = directory / "etc"
    etc.mkdir(exist_ok=True)
    (etc / "swift.conf").write_text(_SWIFT.format(prefix=secrets.token_hex(8), suffix=secrets.token_hex(8)))
    (etc / "proxy.conf").write_text(_PROXY.format(run=directory, memcached=memcached, syslog=syslog, key=key, member=member))
    for kind in ("account", "container", "object"):
        (etc / f"{kind}.conf").write_text(_STORAGE.format(run=directory, syslog=syslog, kind=kind))


def _prepare(part: SwiftPart) -> None:
    """Log in, set the account's TempURL keys, make the containers."""
    login = urllib.request.Request(part.auth_url, headers={"X-Auth-User": part.user, "X-Auth-Key": part.key})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(login, timeout=10) as response:
        token = response.headers["X-Auth-Token"]
    account = f"{part.endpoint}/v1/{part.account}"
    keys = {"X-Account-Meta-Temp-URL-Key": part.temp_url_key, "X-Account-Meta-Temp-URL-Key-2": part.temp_url_key2}
    for method, url, headers in (
        ("POST", account, keys),
        ("PUT", f"{account}/{part.container}", {}),
        ("PUT", f"{account}/{part.container}_segments", {}),
    ):
        request = urllib.request.Request(url, method=method, headers={"X-Auth-Token": token, **headers})
        opener.open(request, timeout=10).close()


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftPart]:
    with start(tmp_path_factory.mktemp("swift")) as part:
        yield part
