"""What Nova and Cinder do with images, by their own code: image_service.py nova|cinder API CONTENT

API is where their Glance is, CONTENT the file of an image. The token is in the environment as TOKEN. It makes an image, brings its bytes
as a stream, lists, looks, downloads and deletes it; what came of each step is printed as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

META = {"name": "snapshot", "disk_format": "raw", "container_format": "bare", "properties": {"os_type": "linux"}}


def nova(api: str, token: str) -> tuple[Any, Any, Mapping[str, Any]]:
    """Nova's image service, a context for it, and what it is called with."""
    from nova import context
    from nova.conf import CONF  # type: ignore[import-untyped]
    from nova.image import glance  # type: ignore[import-untyped]

    CONF([], project="nova", default_config_files=[])
    CONF.set_override("api_servers", [api], group="glance")
    return glance.GlanceImageServiceV2(), context.RequestContext("alice", "demo", auth_token=token), {"is_public": False}


def cinder(api: str, token: str) -> tuple[Any, Any, Mapping[str, Any]]:
    """Cinder's image service, a context for it, and what it is called with."""
    from cinder import context, objects  # type: ignore[import-untyped]

    objects.register_all()  # as its programs begin; its modules import each other in circles
    from cinder.image import glance  # type: ignore[import-untyped]

    glance.CONF([], project="cinder", default_config_files=[])
    glance.CONF.set_override("glance_api_servers", [api])
    return glance.GlanceImageService(), context.RequestContext("alice", "demo", auth_token=token), {}


def steps(
    service: Any, who: Any, more: Mapping[str, Any], content: Path, download: Callable[[str, Path], None], takes_data: bool
) -> dict[str, Any]:
    """Carry out each; what came of them."""
    made = service.create(who, {**META, **more})
    with content.open("rb") as body:
        sent = service.update(who, made["id"], {**META, **more}, data=body, purge_props=False)
    shown = service.show(who, made["id"])
    listed = [image["id"] for image in service.detail(who)]
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "target"
        download(made["id"], target)
        got = hashlib.sha256(target.read_bytes()).hexdigest()
    service.delete(who, made["id"])
    if takes_data:  # Cinder's hands the stream on to a method that knows of none
        with content.open("rb") as body:
            whole = service.create(who, {**META, **more}, data=body)
        assert (whole["status"], whole["checksum"]) == (shown["status"], shown["checksum"]), whole
        service.delete(who, whole["id"])
    return {
        "before": made["status"], "after": sent["status"], "size": shown["size"], "checksum": shown["checksum"],
        "properties": shown["properties"], "listed": made["id"] in listed, "sha256": got,
        "left": [image["id"] for image in service.detail(who)].count(made["id"]),
    }  # fmt: skip


def main(which: str, api: str, content: str) -> None:
    service, who, more = {"nova": nova, "cinder": cinder}[which](api, os.environ["TOKEN"])

    def download(id: str, target: Path) -> None:
        if which == "nova":
            service.download(who, id, dst_path=str(target))
            return
        with target.open("wb") as file:
            service.download(who, id, file)

    print(json.dumps(steps(service, who, more, Path(content), download, takes_data=which == "nova")))


if __name__ == "__main__":
    main(*sys.argv[1:])
