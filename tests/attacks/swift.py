"""Attacks that only Swift's TempURLs offer."""

from __future__ import annotations

import hashlib
import hmac
import time

from tests.attacks.attack import Tries, attack
from tests.attacks.target import Target, fresh_key
from tests.attacks.wire import Shot


def tempurl(target: Target) -> bool:
    return target.scheme == "tempurl"


@attack("prefix, name and inline added", holds="a URL to read one object", on=tempurl)
async def added_parameters(target: Target, tries: Tries) -> None:
    """temp_url_prefix and temp_url_ip_range are added; filename and inline, which Swift does not sign, as well."""
    get = target.get(target.mine.key)
    victim = target.get(target.victim.key).path
    for prefix in ("", target.mine.key, "m", "/", "mine"):
        await tries.fire(f"prefix {prefix or 'empty'!s}"[:20], get.adding(f"temp_url_prefix={prefix}"))
        await tries.fire(f"prefix {prefix or 'empty'!s}, the victim's"[:30], get.at(victim).adding(f"temp_url_prefix={prefix}"))
    await tries.fire("an IP range", get.adding("temp_url_ip_range=0.0.0.0/0"))
    await tries.fire("filename", get.adding("filename=evil.html"))
    await tries.fire("inline", get.adding("inline"))
    await tries.fire(
        "filename that breaks the header",
        get.adding("filename=a%0d%0aX-Evil:%201"),
        lambda reply: any(name.lower() == "x-evil" for name, _ in reply.headers),
    )


@attack("TempURL forged", holds="the key of another account", on=tempurl)
async def forged(target: Target, tries: Tries) -> None:
    """Signatures by another account's key, by an empty one, by weak digests; for containers, accounts and other methods."""
    get = target.get(target.victim.key)
    end = int(time.time()) + 600
    keys = {"another account's": target.elsewhere_key, "empty": "", "the account's name": get.path.split("/")[2]}
    for name, key in keys.items():
        for digest in ("sha1", "sha256", "sha512"):
            signature = hmac.new(key.encode(), f"GET\n{end}\n{get.path}".encode(), digest).hexdigest()
            await tries.fire(f"{name} key, {digest}", get.asking(f"temp_url_sig={signature}&temp_url_expires={end}"))
    mine = target.get(target.mine.key)
    container = "/".join(get.path.split("/")[:4])
    for path, what in ((container, "container"), (container.rpartition("/")[0], "account"), (container + "/", "container, with a slash")):
        await tries.fire(f"this URL on the {what}", mine.at(path))
        await tries.fire(f"this URL on the {what}, POST", mine.at(path).by("POST", b"").saying(("X-Container-Read", ".r:*")))
    for digest in (hashlib.md5, hashlib.sha1):
        bare = digest(f"GET\n{end}\n{get.path}".encode()).hexdigest()
        await tries.fire(f"a bare {digest().name}", get.asking(f"temp_url_sig={bare}&temp_url_expires={end}"))


@attack("manifests by TempURL", holds="a URL to write one object", on=tempurl)
async def manifests(target: Target, tries: Tries) -> None:
    """A PUT is made a manifest of other objects: static (?multipart-manifest=put), dynamic (X-Object-Manifest), a symbolic link, an
    archive that is unpacked; counts when the victim's bytes lie there."""
    import json

    container = target.get("x").path.split("/")[3]
    whole = f"/{container}/{target.victim.key}"
    list_ = json.dumps([{"path": whole}]).encode()
    for name, shot_of in (
        ("multipart-manifest=put", lambda put: put.adding("multipart-manifest=put").by("PUT", list_)),
        ("multipart-manifest=put first", lambda put: put.asking("multipart-manifest=put&" + put.query).by("PUT", list_)),
        ("X-Static-Large-Object", lambda put: put.saying(("X-Static-Large-Object", "True")).by("PUT", list_)),
        ("X-Object-Manifest", lambda put: put.saying(("X-Object-Manifest", whole.lstrip("/"))).by("PUT", b"")),
        (
            "X-Object-Sysmeta",
            lambda put: put.saying(("X-Object-Sysmeta-Slo-Size", "5"), ("X-Object-Transient-Sysmeta-X", "y")).by("PUT", b""),
        ),
        ("X-Symlink-Target", lambda put: put.saying(("X-Symlink-Target", whole.lstrip("/"))).by("PUT", b"")),
        ("symlink=put", lambda put: put.adding("symlink=get").by("PUT", b"")),
        ("extract-archive", lambda put: put.adding("extract-archive=tar").by("PUT", bytes(10240))),
    ):
        key = fresh_key("manifest")
        await target.fire(shot_of(target.put(key, b"", bound=False)))
        found = await target.fire(target.get(key))
        tries.tried(name, found.shows(target.victim.marker), str(found.status))
        await target.store.delete(key)
    # A COPY with the URL of a PUT, to read what it may only write.
    key = fresh_key("copied")
    put = target.put(key, b"", bound=False)
    shot = Shot("COPY", put.asking(put.query).at(target.get(target.victim.key).path).target, (("Destination", f"{container}/{key}"),))
    await tries.writes("COPY by the URL of a PUT", shot, key)


@attack("large object looked into", holds="a URL to read one large object", on=tempurl)
async def looked_into(target: Target, tries: Tries) -> None:
    """The manifest of a large object is asked for with the URL of the object, and its segments with what it tells."""
    key = fresh_key("large")
    bodies = [b"a" * target.store.limits.min_part, b"b" * 100]
    upload = await target.store.begin(key, None, len(bodies[0]), {})
    for number in (1, 2):
        tries.control((await target.fire(target.part(key, upload, number, bodies))).ok, "an honest part")
    final = await target.store.finish(key, upload, await target.store.parts(key, upload), {})
    get = target.get(final)
    tries.control((await target.fire(get)).body == b"".join(bodies), "the large object")
    reply = await tries.fire(
        "multipart-manifest=get", get.adding("multipart-manifest=get"), lambda reply: reply.ok and b"bytes" in reply.body
    )
    await tries.fire(
        "multipart-manifest=get&format=raw",
        get.adding("multipart-manifest=get&format=raw"),
        lambda reply: reply.ok and b"size_bytes" in reply.body,
    )
    import json

    segment = json.loads(reply.body)[0]["name"] if reply.body.startswith(b"[") else "/images_segments/x"
    await tries.fire("a segment by the object's URL", get.at(get.path.rpartition("/images/")[0] + segment))
    await tries.fire("deleted with its segments", get.adding("multipart-manifest=delete").by("DELETE"))
    tries.control((await target.fire(get)).body == b"".join(bodies), "the large object, afterwards")
    await target.store.delete(final)
