"""Downloads an image for nova-compute by a ticket: from several stores at once, from the next one when one fails, verified and reported.

Nova finds `download` by the entry point ``ticket`` of ``nova.image.download``, which nova.patch gives it.

Rules
- The work is done by ``broker get`` in a process of its own: Nova may run on eventlet, where asyncio has no place, and the client may have
  an environment of its own. oslo.concurrency waits for the process and lets other greenthreads run.
- The token is that of Nova's user, so a download is allowed to whom the image service would allow it; it is in the process's environment,
  never in its arguments. With ``token_file`` it is the service's own, which private stores are for.
- The file appears under Nova's name whole and verified, or not at all. What fails is an exception: Nova logs it, and asks the image
  service for the bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any
from urllib.parse import ParseResult

import nova.conf
from nova import exception
from nova.image import glance
from oslo_concurrency import processutils
from oslo_config import cfg
from oslo_log import log as logging

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF
CONF.register_opts(
    [
        cfg.URIOpt("url", schemes=["http", "https"], help="The broker. By default it is the image service that Nova is configured with."),
        cfg.StrOpt("command", default="broker", help="The client's program, by its path where it is not on PATH."),
        cfg.StrOpt("token_file", help="File with a bearer token of the service's own. By default the token of Nova's user is sent."),
    ],
    group="transfer_broker",
)

WAIT_SECONDS = 600
"""How long to stand in line for a slot, and to try again while the broker is away, before Nova asks Glance."""


def download(context: Any, url_parts: ParseResult, dst_path: str, metadata: dict[str, Any]) -> None:
    """Write an image to `dst_path`: the one whose id is the path of `url_parts`, in the format that `metadata` names as ``disk_format``.

    Raises `CouldNotFetchImage`; what went wrong is in the log.
    """
    image, options = url_parts.path, CONF.transfer_broker
    who = ["--token-file", options.token_file] if options.token_file else []
    url = options.url or glance.generate_glance_url(context).rstrip("/")
    format = ["--format", metadata["disk_format"]] if metadata.get("disk_format") else []
    environment = {name: value for name, value in os.environ.items() if name not in ("BROKER_TOKEN", "OS_TOKEN")}
    if not who and context.auth_token:
        environment["OS_TOKEN"] = context.auth_token
    # Beside the target, so that the file can take its place by a rename, and so that nothing is left of what failed.
    place = tempfile.mkdtemp(prefix=".ticket-", dir=os.path.dirname(dst_path))
    try:
        fetched = os.path.join(place, "image")
        said, _ = processutils.execute(
            options.command, "get", image, "--url", url, *who, *format, "--wait", str(WAIT_SECONDS), "--output", fetched, "--json",
            env_variables=environment,
        )  # fmt: skip
        os.rename(fetched, dst_path)
    except (processutils.ProcessExecutionError, OSError) as error:
        LOG.error("Image %s did not come by a ticket: %s", image, getattr(error, "stderr", None) or error)
        raise exception.CouldNotFetchImage(image_id=image) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
    LOG.info("Image %s came by a ticket: %s", image, said.splitlines()[-1] if said else "")
