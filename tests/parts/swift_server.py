"""All of OpenStack Swift in one process: ``python swift_server.py DIRECTORY PROXY OBJECT CONTAINER ACCOUNT``.

Reads the configuration that tests/parts/swift.py wrote to DIRECTORY/etc, builds one-device rings and serves the proxy and
the three storage servers on one event loop. Run as a program only: it patches the standard library.
"""
# mypy: ignore-errors

import logging
import sys
from pathlib import Path

import eventlet

eventlet.monkey_patch()

from eventlet import wsgi  # noqa: E402
from swift.common import utils  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402
from swift.common.storage_policy import reload_storage_policies  # noqa: E402
from swift.common.wsgi import loadapp  # noqa: E402


def build_ring(path: Path, port: int) -> None:
    """A ring with one partition on one device."""
    builder = RingBuilder(1, 1, 1)
    address = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "sdb1", "meta": "", **address})
    builder.rebalance()
    builder.get_ring().save(str(path))


def main() -> None:
    directory = Path(sys.argv[1])
    ports = dict(zip(("proxy", "object", "container", "account"), map(int, sys.argv[2:6]), strict=True))
    etc = directory / "etc"
    utils.set_swift_dir(str(etc))
    utils.validate_hash_conf()
    reload_storage_policies()
    for kind in ("object", "container", "account"):
        build_ring(etc / f"{kind}.ring.gz", ports[kind])
    quiet = logging.getLogger("requests")
    quiet.propagate = False
    # The proxy comes last: once it answers, the others do.
    for kind in ("account", "container", "object", "proxy"):
        app = loadapp(str(etc / f"{kind}.conf"), {})
        listener = eventlet.listen(("127.0.0.1", ports[kind]), reuse_addr=True, backlog=512)
        eventlet.spawn(wsgi.server, listener, app, log=quiet, log_output=False, keepalive=True)
    while True:
        eventlet.sleep(3600)


if __name__ == "__main__":
    main()
