"""Two projects against each other through the broker: everything that one may have heard of the other's, asked for by name."""

from __future__ import annotations

from typing import Any

import orjson

from tests.attacks.api import ATTACKER, ApiTarget
from tests.attacks.attack import Tries, attack
from tests.attacks.target import Target
from tests.attacks.wire import Reply


def tenants(target: Target) -> bool:
    return isinstance(target, ApiTarget)


def _tells(target: ApiTarget) -> Any:
    """Counts when an id or the name of something of the victim's is told."""
    secrets = [str(value).encode() for name, value in target.known.items() if name != "content"]
    return lambda reply: any(secret in reply.body for secret in [*secrets, target.victim.key.encode(), target.victim.marker])


@attack("another project's things", holds="a token of his project, and every id of the victim's", on=tenants)
async def others_things(target: ApiTarget, tries: Tries) -> None:
    """The victim's private image, blob, replica and tickets are read, changed, deleted, used and joined by their ids."""
    known, image = target.known, target.victim.key
    tries.control(
        (await target.fire(target.asking("POST", "/v1/tickets", {"operation": "download", "image": target.mine.key}))).ok,
        "a ticket for his own",
    )
    etag = ("If-Match", '"1"')
    shots = {
        "image": target.asking("GET", f"/v1/images/{image}"),
        "image changed": target.asking("PATCH", f"/v1/images/{image}", {"visibility": "community"}, etag),
        "image deleted": target.asking("DELETE", f"/v1/images/{image}", None, etag),
        "image's ticket": _ticket(target, "download", image=image),
        "blob": target.asking("GET", f"/v1/blobs/{known['blob']}"),
        "blob's ticket": _ticket(target, "download", blob=known["blob"]),
        "blob's replicas": target.asking("GET", f"/v1/blobs/{known['blob']}/replicas"),
        "replica": target.asking("GET", f"/v1/replicas/{known['replica']}"),
        "replica changed": target.asking("PATCH", f"/v1/replicas/{known['replica']}", {"state": "active"}, etag),
        "replica deleted": target.asking("DELETE", f"/v1/replicas/{known['replica']}", None, etag),
        "a copy of his blob": _ticket(target, "upload", blob=known["blob"]),
        "an upload to his image": _ticket(target, "upload", image=image, format="qcow2", size=5),
        "an upload to the blob under way": _ticket(target, "upload", blob=known["blob of the upload"]),
        "an image of his blob": target.asking("POST", "/v1/images", {"name": "thief", "blobs": {"raw": known["blob"]}}),
        "a replica of his blob": _replica(target, known["blob"], "x"),
        "image's members": target.asking("GET", f"/v1/images/{image}/members"),
        "himself as a member": target.asking("POST", f"/v1/images/{image}/members", {"member": ATTACKER}),
        "himself as a member, to Glance": target.asking("POST", f"/v2/images/{image}/members", {"member": ATTACKER}),
        "accepted by himself": target.asking("PUT", f"/v1/images/{image}/members/{ATTACKER}", {"status": "accepted"}),
        "image's vetting": target.asking("GET", f"/v1/images/{image}/vetting"),
        "images with his in upper case": target.asking("GET", f"/v1/images/{image.upper()}"),
        "a batch": target.asking("POST", "/v1/tickets:batch", {"tickets": [{"operation": "download", "image": image}]}),
    }
    for name, shot in shots.items():
        await tries.fire(name, shot, _tells(target) if name == "a batch" else None)


def _ticket(target: ApiTarget, operation: str, **more: Any) -> Any:
    return target.asking("POST", "/v1/tickets", {"operation": operation, **more})


def _replica(target: ApiTarget, blob: str, key: str) -> Any:
    return target.asking("POST", f"/v1/blobs/{blob}/replicas", {"store": "disk", "key": key})


@attack("another project's tickets", holds="a token of his project, and the ids of the victim's tickets", on=tenants)
async def others_tickets(target: ApiTarget, tries: Tries) -> None:
    """The victim's open tickets are looked at, renewed, activated, committed, reported, given back; with headers that claim to be his
    machine, his project, another role."""
    spoofs: dict[str, tuple[tuple[str, str], ...]] = {
        "": (),
        ", as his machine": (("X-Client-Instance", "i"), ("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1")),
        ", X-Project": (("X-Project", "project-b"), ("X-Project-Id", "project-b"), ("X-Roles", "admin"), ("X-Remote-User", "root")),
    }
    for how, headers in spoofs.items():
        for kind in ("download", "upload"):
            path = f"/v1/tickets/{target.known[kind]}"
            for name, method, end, body in (
                ("looked at", "GET", "", None),
                ("renewed", "POST", "/refresh", None),
                ("activated", "POST", "/activate", {"store": "disk"}),
                ("parts", "POST", "/parts", {"numbers": [1]}),
                ("committed", "POST", "/commit", {"size": 10, "digests": {"sha256": "0" * 64}}),
                ("reported", "POST", "/report", {"store": "disk", "outcome": "corrupt"}),
                ("given back", "DELETE", "", None),
            ):
                await tries.fire(f"{kind} {name}{how}", target.asking(method, path + end, body, *headers))
    state = await target.ask("GET", f"/v1/tickets/{target.known['upload']}", project="project-b")
    tries.control(state["state"] == "open", "the victim's upload, which is still open")


@attack("another project's bytes", holds="a token of his project, and the victim's keys and digests", on=tenants)
async def others_bytes(target: ApiTarget, tries: Tries) -> None:
    """The victim's object is registered as a copy of the attacker's blob by its key, the digest of its bytes is declared to get it
    without having it, and the victim's Idempotency-Key is used; lists are asked for."""
    key, tells = target.known["key"], _tells(target)
    own = (await target.ask("GET", f"/v1/images/{target.mine.key}"))["blobs"]["raw"]["id"]
    for name, spelled in (
        ("as it is", key),
        ("under his own prefix", f"{ATTACKER}/../{key}"),
        ("encoded", f"{ATTACKER}%2f..%2f{key}"),
        ("a slash before", f"/{key}"),
        ("dots", f"./{key}"),
        ("NUL", f"{ATTACKER}/\x00{key}"),
        ("above the root", f"{ATTACKER}/../../etc/passwd"),
        ("a folder", f"{ATTACKER}/"),
        ("the server's own", ".broker/tmp"),
    ):
        await tries.fire(f"registered {name}", _replica(target, own, spelled))
    content = target.known["content"]
    import hashlib

    declared = {"sha256": hashlib.sha256(content).hexdigest(), "md5": hashlib.md5(content).hexdigest()}
    body = {"operation": "upload", "image": {"name": "guess"}, "size": len(content), "digests": declared}
    await tries.fire("known content", target.asking("POST", "/v1/tickets", body), lambda reply: not _asks_for_bytes(reply) or tells(reply))
    ticket = await target.ask("POST", "/v1/tickets", body)
    await tries.fire(
        "committed without bytes", target.asking("POST", f"/v1/tickets/{ticket['id']}/commit", {"size": len(content), "digests": declared})
    )
    same = {"operation": "download", "image": target.victim.key}
    once = ("Idempotency-Key", "the-same")
    tries.control((await target.fire(target.asking("POST", "/v1/tickets", same, once, project="project-b"))).ok, "the victim's request")
    await tries.fire("the victim's Idempotency-Key", target.asking("POST", "/v1/tickets", same, once))
    for path in (
        "/v1/images",
        "/v1/images?project=project-b",
        "/v1/images?visibility=private",
        "/v1/images?status=active&limit=1000",
        "/v1/images?member_status=all",
        "/v2/images?visibility=all&member_status=all",
        "/v1/replicas",
        "/v1/replicas?store=disk",
        "/v1/stores",
        "/v1/paths",
        "/v1/sites",
    ):
        await tries.fire(f"GET {path}", target.asking("GET", path), tells)


def _asks_for_bytes(reply: Reply) -> bool:
    answer = orjson.loads(reply.body)
    return bool(answer.get("destinations")) and not answer.get("known")


@attack("another role's work", holds="a member's token", on=tenants)
async def others_work(target: ApiTarget, tries: Tries) -> None:
    """What only administrators may is asked for, plainly, with a role in a header, and in the body."""
    own = await target.fire(target.asking("GET", f"/v1/images/{target.mine.key}"))
    right = ("If-Match", next(value for name, value in own.headers if name.lower() == "etag"))
    store = {"name": "evil", "kind": "s3", "site": "eu/az1", "endpoint": "http://127.0.0.1:1", "settings": {"bucket": "b"}}
    etag = ("If-Match", '"1"')
    shots = {
        "a store added": target.asking("POST", "/v1/stores", store),
        "a store changed": target.asking("PATCH", "/v1/stores/disk", {"endpoint": "http://127.0.0.1:1"}, etag),
        "a store removed": target.asking("DELETE", "/v1/stores/disk", None, etag),
        "a store probed": target.asking("POST", "/v1/stores/disk/probe", {}),
        "a site added": target.asking("POST", "/v1/sites", {"path": "evil"}),
        "a site removed": target.asking("DELETE", "/v1/sites/eu%2Faz1", None, etag),
        "an image made public": target.asking("PATCH", f"/v1/images/{target.mine.key}", {"visibility": "public"}, right),
        "his image approved": target.asking("PUT", f"/v1/images/{target.mine.key}/vetting", {"decision": "approved"}, right),
        "a verdict on his image": target.asking(
            "POST", f"/v1/images/{target.mine.key}/verdicts", {"blob": target.known["blob"], "valid": True, "signature": {}}
        ),
        "an image for another project": target.asking("POST", "/v1/images", {"name": "x", "project": "project-b"}),
        "a store added, X-Roles": target.asking("POST", "/v1/stores", store, ("X-Roles", "admin"), ("X-Role", "admin")),
    }
    for name, shot in shots.items():
        await tries.fire(name, shot)
