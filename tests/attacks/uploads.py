"""What a writer still holds when its upload is done: URLs of the PUT and of its parts, and what else they could say."""

from __future__ import annotations

import secrets

from broker.model import PartSeen
from tests.attacks.attack import Tries, attack
from tests.attacks.tampering import chunked, every
from tests.attacks.target import Target, fresh_key
from tests.attacks.wire import Shot


def writing(target: Target) -> bool:
    return every(target) and target.writes


def parting(target: Target) -> bool:
    return writing(target) and target.parts


@attack("finished upload overwritten", holds="the ticket of an upload that was committed", on=writing)
async def overwritten(target: Target, tries: Tries) -> None:
    """After the broker has sealed an upload, its PUT is sent again with other bytes: as it is, without its headers, chunked, empty, and by
    a ticket that binds nothing. Counts when the bytes that were accepted are no longer what the broker names."""
    for name in (
        "as it was",
        "other bytes",
        "without its headers",
        "chunked",
        "empty",
        "by a ticket that binds nothing",
        "If-Match: *",
        "a range of it",
    ):
        staging, final = fresh_key("staging"), fresh_key("final")
        content = secrets.token_bytes(600)
        put, loose = target.put(staging, content), target.put(staging, content, bound=False)
        tries.control((await target.fire(put)).ok, "the honest PUT")
        key = await target.store.seal(staging, final, {})
        tries.control(await target.truth(key) == content, "what was sealed")
        binding = ("if-none-match", "content-md5", "x-amz-checksum-sha256", "etag")
        other = secrets.token_bytes(600)
        again = {
            "as it was": put,
            "other bytes": put.by("PUT", other),
            "without its headers": put.by("PUT", other).silent_on(*binding),
            "chunked": chunked(put.by("PUT", other)),
            "empty": put.by("PUT", b""),
            "by a ticket that binds nothing": loose.by("PUT", other),
            "If-Match: *": loose.by("PUT", other).silent_on("if-none-match").saying(("If-Match", "*")),
            "a range of it": loose.by("PUT", other).silent_on("if-none-match").saying(("Content-Range", "bytes 0-599/600")),
        }[name]
        await target.fire(again)
        tries.tried(name, await target.truth(key) != content)
        for left in (staging, key):
            await target.store.delete(left)


@attack("bytes changed before they are sealed", holds="the ticket of an upload that is being committed", on=writing)
async def swapped(target: Target, tries: Tries) -> None:
    """The PUT is sent again with other bytes after the broker has looked and before it has sealed; counts when they are sealed unseen."""
    staging, final = fresh_key("staging"), fresh_key("final")
    content, other = secrets.token_bytes(600), secrets.token_bytes(600)
    loose = target.put(staging, content, bound=False)
    tries.control((await target.fire(loose)).ok, "the honest PUT")
    seen = await target.store.stat(staging)
    await target.fire(loose.by("PUT", other))
    key = await target.store.seal(staging, final, {})
    sealed = await target.store.stat(key)
    # The commit looks again after sealing, so what matters is that a change can be seen.
    unseen = (
        seen is not None
        and sealed is not None
        and await target.truth(key) == other
        and (sealed.size, sealed.digests) == (seen.size, seen.digests)
    )
    tries.tried("between look and seal", unseen)
    for left in (staging, key):
        await target.store.delete(left)


@attack("parts of a finished upload", holds="the tickets of the parts of an upload that was committed", on=parting)
async def reused_parts(target: Target, tries: Tries) -> None:
    """Part URLs are used again after the parts were joined: with the same bytes, with others, with a number more; counts when the object
    changes."""
    size = max(target.store.limits.min_part, 600)
    bodies = [secrets.token_bytes(size), secrets.token_bytes(600), secrets.token_bytes(600)]
    whole = bodies[0] + bodies[1]
    for name in (
        "as they were",
        "other bytes",
        "by tickets that bind nothing",
        "empty",
        "one more",
        "as a single PUT",
        "given up afterwards",
    ):
        key = fresh_key("joined")
        upload = await target.store.begin(key, sum(map(len, bodies)), size, {})
        shots = [target.part(key, upload, number, bodies[:2]) for number in (1, 2)]
        loose = [target.part(key, upload, number, bodies[:2], bound=False) for number in (1, 2)]
        third = target.part(key, upload, 3, bodies, bound=False)
        for shot in shots:
            tries.control((await target.fire(shot)).ok, "an honest part")
        final = await target.store.finish(key, upload, await target.store.parts(key, upload), {})
        tries.control(await target.truth(final) == whole, "the joined object")
        again = {
            "as they were": shots,
            "other bytes": [_other_bytes(shot) for shot in shots],
            "empty": [shot.by("PUT", b"") for shot in loose],
            "by tickets that bind nothing": [_other_bytes(shot) for shot in loose],
            "one more": [third],
            "as a single PUT": [loose[1].asking(loose[1].query.replace("partNumber=2&", "")).by("PUT", b"x")],
        }.get(name, [])
        statuses = [(await target.fire(shot)).status for shot in again]
        if name == "given up afterwards":
            await target.store.abort(key, upload)
        tries.tried(name, await target.truth(final) != whole, str(statuses))
        await target.store.abort(key, upload)
        await target.store.delete(final)


def _other_bytes(shot: Shot) -> Shot:
    return shot.by("PUT", secrets.token_bytes(len(shot.body or b"")))


@attack("parts out of place", holds="the ticket of one part", on=parting)
async def misplaced_parts(target: Target, tries: Tries) -> None:
    """The URL of a part is used for another number, offset, upload and key, for the whole object, and to list, join and give up."""
    key, other = fresh_key("parts"), fresh_key("others")
    size = max(target.store.limits.min_part, 600)
    bodies = [secrets.token_bytes(600), secrets.token_bytes(600)]
    upload = await target.store.begin(key, None, size, {})
    foreign = await target.store.begin(other, None, size, {})
    tries.control((await target.fire(target.part(other, foreign, 1, bodies))).ok, "an honest part")
    before = await parts_of(target, other, foreign)
    part = target.part(key, upload, 1, bodies)
    tries.control((await target.fire(part)).ok, "another honest part")
    mine = await parts_of(target, key, upload)
    bare = part.by("GET")
    for name, shot in (
        ("another number", part.asking(part.query.replace("partNumber=1", "partNumber=2"))),
        ("another upload", part.asking(part.query.replace(upload, foreign))),
        ("another key", part.at(target.part(other, foreign, 1, bodies).path)),
        ("another key's part 2", part.at(target.part(other, foreign, 2, bodies).path)),
        ("the victim's key", part.at(target.get(target.victim.key).path)),
    ):
        if shot != part:
            await target.fire(shot)
            tries.tried(name, await parts_of(target, other, foreign) != before or await parts_of(target, key, upload) != mine)
    await tries.fire("listed", bare)
    await tries.fire("joined", part.by("POST", b'{"parts": [{"offset": 0, "length": 600}]}'))
    await tries.fire("given up", part.by("DELETE"))
    tries.tried("the foreign upload changed", await parts_of(target, other, foreign) != before)
    await target.store.abort(key, upload)
    await target.store.abort(other, foreign)


async def parts_of(target: Target, key: str, upload: str) -> list[PartSeen]:
    return list(await target.store.parts(key, upload))


@attack("PUT with a ride", holds="a ticket to write one object", on=writing)
async def riding(target: Target, tries: Tries) -> None:
    """Headers on an honest PUT that make some stores copy from, link to or show another object; counts when the victim's bytes lie
    under the attacker's key, where he will get a ticket to read them."""
    path = target.get(target.victim.key).path
    short = "/" + path.lstrip("/").partition("/")[2]  # without the first segment, which is the version at Swift
    shorter = "/" + short.lstrip("/").partition("/")[2]
    for name, value in (
        ("X-Copy-From", shorter),
        ("X-Copy-From-Account", ""),
        ("x-amz-copy-source", path),
        ("x-amz-copy-source-range", "bytes=0-100"),
        ("X-Object-Manifest", shorter.lstrip("/")),
        ("X-Symlink-Target", shorter.lstrip("/")),
        ("X-Accel-Redirect", path),
        ("X-Sendfile", path),
        ("Destination", path),
        ("Content-Location", path),
        ("x-amz-website-redirect-location", path),
        ("X-Amz-Metadata-Directive", "REPLACE"),
    ):
        key = fresh_key("riding")
        ride = target.put(key, b"", bound=False).saying((name, value))
        if name in ("X-Copy-From-Account", "x-amz-copy-source-range"):
            source = "X-Copy-From" if name.startswith("X-Copy") else "x-amz-copy-source"
            account = short.lstrip("/").partition("/")[0]
            ride = ride.saying((source, shorter if source == "X-Copy-From" else path))
            ride = Shot(ride.method, ride.target, tuple((n, account if n == "X-Copy-From-Account" else v) for n, v in ride.headers), b"")
        reply = await target.fire(ride)
        found = await target.fire(target.get(key))
        tries.tried(name, found.shows(target.victim.marker), f"{reply.status}, {found.status}")
        await target.store.delete(key)


@attack("PUT that says more", holds="a ticket to write one object", on=writing)
async def says_more(target: Target, tries: Tries) -> None:
    """Headers on an honest PUT that nobody signed: an end of the object's life, rights for everybody, a type and a coding for browsers.
    Counts when the object that the broker has sealed shows it."""
    content = b"<script>alert(1)</script>"
    always = {name.lower() for name, _ in (await target.fire(target.get(target.mine.key))).headers}
    for name, value in (
        ("Content-Type", "text/html"),
        ("Content-Encoding", "gzip"),
        ("Content-Disposition", "inline"),
        ("Cache-Control", "max-age=1"),
        ("X-Delete-At", "9999999999"),
        ("X-Delete-After", "9999999"),
        ("Access-Control-Allow-Origin", "*"),
        ("x-amz-acl", "public-read"),
        ("x-amz-grant-read", 'uri="http://acs.amazonaws.com/groups/global/AllUsers"'),
        ("X-Container-Read", ".r:*"),
        ("x-amz-tagging", "a=b"),
        ("x-amz-storage-class", "GLACIER"),
        ("x-amz-object-lock-mode", "COMPLIANCE"),
    ):
        staging, final = fresh_key("more"), fresh_key("sealed")
        put = target.put(staging, content, bound=False).silent_on(name).saying((name, value))
        reply = await target.fire(put)
        accepted = False
        seen = await target.store.stat(staging) if reply.ok else None
        # Without a digest that the store tells, no commit accepts it.
        if seen is not None and seen.digests:
            key = await target.store.seal(staging, final, {})
            sealed = target.get(key)
            get = await target.fire(sealed)
            told = {header.lower(): text for header, text in get.headers}
            kept = (told.get(name.lower()) == value and name.lower() not in always) or "x-delete-at" in told
            everybody = await target.fire(Shot("GET", sealed.path))
            accepted = kept or everybody.ok
            await target.store.delete(key)
        tries.tried(name, accepted, str(reply.status))
