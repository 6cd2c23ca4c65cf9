"""OpenStack Glance as it is, on SQLite and an S3 store, without Keystone: whoever asks is an administrator.

`start` is a context manager. Glance is run by gunicorn, since it has no server of its own any more.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.parts.process import PartMissing, answers, free_ports, running
from tests.parts.seaweedfs import S3Part

_ROOT = Path(__file__).resolve().parents[2]
INSTALL = "pip install glance 'glance_store[s3]' gunicorn"

_CONFIGURATION = """\
[DEFAULT]
enabled_backends = old:s3
show_multiple_locations = true
log_file = {directory}/glance.log
[glance_store]
default_backend = old
[old]
s3_store_host = {endpoint}
s3_store_access_key = {access_key}
s3_store_secret_key = {secret_key}
s3_store_bucket = {bucket}
s3_store_bucket_url_format = path
[os_glance_staging_store]
filesystem_store_datadir = {directory}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {directory}/tasks
[database]
connection = sqlite:///{directory}/glance.db
[paste_deploy]
config_file = {directory}/paste.ini
"""
_PIPELINE = """\
[pipeline:glance-api]
pipeline = versionnegotiation administrator context rootapp
[composite:rootapp]
paste.composite_factory = glance.api:root_app_factory
/: versions
/v2: v2
[app:versions]
paste.app_factory = glance.api.versions:create_resource
[app:v2]
paste.app_factory = glance.api.v2.router:API.factory
[filter:versionnegotiation]
paste.filter_factory = glance.api.middleware.version_negotiation:VersionNegotiationFilter.factory
[filter:context]
paste.filter_factory = glance.api.middleware.context:ContextMiddleware.factory
[filter:administrator]
paste.filter_factory = tests.parts.glance:administrator
"""


@dataclass(frozen=True, slots=True)
class GlancePart:
    """A running Glance: its URL and process id."""

    url: str
    pid: int


def administrator(configuration: Any, **_: Any) -> Callable[[Any], Any]:
    """A filter of Glance's pipeline in the place of Keystone's: everyone is an administrator of the project ``demo``."""

    def wrap(application: Any) -> Any:
        def answer(environment: dict[str, Any], begin: Any) -> Any:
            told = {"IDENTITY_STATUS": "Confirmed", "ROLES": "admin,member,reader", "PROJECT_ID": "demo", "USER_ID": "root"}
            return application({**environment, **{f"HTTP_X_{name}": value for name, value in told.items()}}, begin)

        return answer

    return wrap


@contextlib.contextmanager
def start(directory: Path, store: S3Part) -> Iterator[GlancePart]:
    """Run Glance with its data in `directory`, and images in the bucket of `store`, until the block ends."""
    if importlib.util.find_spec("glance") is None:
        raise PartMissing(f"Glance is missing: {INSTALL}")
    for name in ("staging", "tasks"):
        (directory / name).mkdir(parents=True)
    configuration = directory / "glance-api.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            directory=directory, endpoint=store.endpoint, bucket=store.bucket, access_key=store.access_key, secret_key=store.secret_key
        )
    )
    (directory / "paste.ini").write_text(_PIPELINE)
    manage = "import sys; from glance.cmd.manage import main; sys.argv[1:] = ['--config-file', sys.argv[1], 'db_sync']; main()"
    subprocess.run([sys.executable, "-c", manage, str(configuration)], check=True, capture_output=True, timeout=120)
    (port,) = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--bind",
        f"127.0.0.1:{port}",
        "--threads",
        "2",
        "--no-control-socket",
        "glance.wsgi.api:application",
    ]
    ready = f"http://127.0.0.1:{port}/v2/images"
    with running(
        command,
        log=directory / "gunicorn.log",
        ready=lambda: answers(ready),
        environment={"OS_GLANCE_CONFIG_DIR": str(directory), "PYTHONPATH": str(_ROOT)},
    ) as process:
        yield GlancePart(f"http://127.0.0.1:{port}", process.pid)
