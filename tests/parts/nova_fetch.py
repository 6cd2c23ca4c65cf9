"""Nova's own code fetches an image: nova_fetch.py BACKEND GLANCE CONFIGURATION IMAGE TARGET

BACKEND is ``eventlet`` or ``threading``; the file GLANCE takes the place of nova/image/glance.py. The image becomes a raw disk at TARGET,
by the function that the libvirt driver fills its image cache with. The token is in the environment as TOKEN.
"""

from __future__ import annotations

import importlib.util
import os
import sys


def main(backend: str, glance: str, configuration: str, image: str, target: str) -> None:
    from nova import monkey_patch  # type: ignore[import-untyped]

    sys.argv = sys.argv[:1]
    monkey_patch.patch(backend=backend)
    _replace("nova.image.glance", glance)

    from nova import context
    from nova.conf import CONF  # type: ignore[import-untyped]
    from nova.virt import images  # type: ignore[import-untyped]
    from oslo_log import log  # type: ignore[import-untyped]

    log.register_options(CONF)
    CONF([], project="nova", default_config_files=[configuration])
    log.setup(CONF, "nova")
    who = context.RequestContext("alice", "demo", auth_token=os.environ["TOKEN"])
    images.fetch_to_raw(who, image, target)


def _replace(name: str, file: str) -> None:
    """Let the module `name` be what is in `file`."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main(*sys.argv[1:])
