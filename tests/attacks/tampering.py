"""A valid ticket for one thing, altered to get another: method, path, store, length, digest, time, and the signature itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from urllib.parse import quote

from tests.attacks.attack import Tries, attack
from tests.attacks.target import LIFE_SECONDS, Target, TokenTarget, fresh_key, thing
from tests.attacks.wire import Reply, Shot

_BODY = b"planted by the attacker. " * 8
_SIGNATURE = {"s3": "X-Amz-Signature", "tempurl": "temp_url_sig"}


def every(target: Target) -> bool:
    return target.scheme != "bearer"


def signed(target: Target) -> bool:
    """Whether the signature is a query's parameter of its own."""
    return target.scheme in _SIGNATURE


def writing(target: Target) -> bool:
    return every(target) and target.writes


def mentions(query: str, target: Target) -> str:
    """A query that names the attacker's key, made to name the victim's."""
    return query.replace(quote(target.mine.key, safe=""), quote(target.victim.key, safe=""))


@attack("method altered", holds="a ticket to read one object", on=every)
async def altered_method(target: Target, tries: Tries) -> None:
    """The URL is used with other methods, and with headers that rename the method."""
    get = target.get(target.mine.key)
    for method in ("PUT", "POST", "DELETE", "PATCH", "COPY", "MOVE", "MKCOL", "PROPFIND", "OPTIONS", "get", "GET2", "TRACE", "CONNECT"):
        body = _BODY if method in ("PUT", "POST", "PATCH") else None
        await tries.fire(method, get.by(method, body), _does_something)
    for header in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        # A POST under such a name is a DELETE for servers that believe it; `run` looks whether the object is still there.
        await tries.fire(f"POST, {header}: DELETE", get.by("POST", b"").saying((header, "DELETE")))
    await tries.fire("COPY to the victim's key", get.by("COPY").saying(("Destination", f"{get.path.rpartition('/')[0]}/copied")))


def _does_something(reply: Reply) -> bool:
    # OPTIONS is what browsers ask before a request (CORS); an answer without a body opens nothing, and changes would be seen afterwards.
    return reply.ok and bool(reply.body)


@attack("ticket to read used to write", holds="a ticket to read one object", on=writing)
async def read_used_to_write(target: Target, tries: Tries) -> None:
    """The URL of a GET is used to PUT: over its own object, to a free key, to the victim's, with and without a length."""
    control = fresh_key("control")
    tries.control((await target.fire(target.put(control, _BODY))).ok, "an honest PUT")
    get = target.get(target.mine.key)
    victim = target.get(target.victim.key).path
    free = fresh_key("free")
    await tries.fire("PUT over it", get.by("PUT", _BODY))
    await tries.fire("PUT over it, chunked", chunked(get.by("PUT", _BODY)))
    await tries.fire("PUT over the victim's", get.at(victim).by("PUT", _BODY))
    await tries.writes("PUT to a free key", get.at(target.get(free).path).by("PUT", _BODY), free)
    await tries.fire("POST of a form", get.by("POST", _BODY).saying(("Content-Type", "multipart/form-data; boundary=x")))
    await target.store.delete(control)


@attack("ticket to write used otherwise", holds="a ticket to write one new object", on=writing)
async def write_used_otherwise(target: Target, tries: Tries) -> None:
    """The URL of a PUT is used to read, look and delete, at its own key and at the victim's, and to write under another key."""
    key, free = fresh_key("written"), fresh_key("free")
    put = target.put(key, _BODY)
    tries.control((await target.fire(put)).ok and await target.truth(key) == _BODY, "the honest PUT")
    bare = dataclasses.replace(put, body=None)
    victim = target.get(target.victim.key).path
    for method in ("GET", "HEAD", "DELETE"):
        await tries.fire(f"{method} of what it wrote", bare.by(method))
        await tries.fire(f"{method} of the victim's", bare.at(victim).by(method))
    await tries.fire("PUT over the victim's", put.at(victim))
    await tries.writes("PUT to another key", put.at(target.get(free).path), free)
    await target.store.delete(key)


def _spellings(mine: str, victim: str) -> Iterator[tuple[str, str]]:
    """Names and paths by which something that is not `mine` might be reached with a ticket for it."""
    parent, _, name = mine.rpartition("/")
    grandparent, _, _ = parent.rpartition("/")
    down = victim[len(grandparent) + 1 :] if victim.startswith(grandparent + "/") else victim.lstrip("/")
    yield "another key", victim
    yield "dot segments", f"{mine}/../../{down}"
    yield "dot segments, inside", f"{grandparent}/./{down}"
    yield "encoded dots", f"{mine}/%2e%2e/%2e%2e/{down}"
    yield "encoded slashes", f"{mine}%2f..%2f..%2f{down}"
    yield "double-encoded", f"{mine}%252f..%252f..%252f{down}"
    yield "backslashes", f"{mine}\\..\\..\\{down}".replace("\\", "%5c")
    yield "overlong dots", f"{mine}/%c0%ae%c0%ae/%c0%ae%c0%ae/{down}"
    yield "cut by NUL", f"{victim}%00{mine}"
    yield "cut by NUL, behind", f"{mine}%00{victim}"
    yield "a path parameter", f"{victim};{name}"
    yield "a path parameter, behind", f"{mine};/../../{down}"
    yield "double slash", f"{grandparent}//{down}"
    yield "trailing slash", f"{victim}/"
    yield "absolute form", f"http://127.0.0.1{victim}"
    yield "a fragment", f"{victim}#{mine}"
    yield "an encoded question mark", f"{victim}%3f{mine}"
    yield "a line feed", f"{victim}%0a{mine}"


@attack("path altered", holds="a ticket to read one object", on=every)
async def altered_path(target: Target, tries: Tries) -> None:
    """The ticket is sent to the victim's path, spelled plainly, encoded, twice encoded, with dot segments, backslashes, NUL, doubled and
    trailing slashes, path parameters; counts when a byte of the victim's comes back, or anything but the ticket's own object."""
    get = target.get(target.mine.key)
    victim = target.get(target.victim.key).path
    for name, path in _spellings(get.path, victim):
        await tries.fire(name, get.at(path), _other_than(target))
        if signed(target) and name == "another key":
            await tries.fire("another key, in the query too", get.asking(f"{get.query}&key={victim}").at(victim), _other_than(target))


@attack("case and slashes of the path", holds="a ticket to read one object", on=every)
async def case_and_slashes(target: Target, tries: Tries) -> None:
    """Another object lies under the same key in other case; the ticket is sent there, and to its own path with a slash more or less."""
    if target.writes:
        other = thing("upper", target.mine.key.upper())
        await target.plant(other.key, other.content)
        tries.control(await target.truth(other.key) == other.content, "both cases are keys of their own")
    get = target.get(target.mine.key)
    base = get.path[: -len(target.mine.key)]
    await tries.fire("upper case", get.at(base + target.mine.key.upper()), _gains(target))
    await tries.fire("trailing slash", get.at(get.path + "/"), _gains(target))
    await tries.fire("leading slash", get.at("/" + get.path), _gains(target))
    await tries.fire("a slash in between", get.at(get.path.replace("/", "//")), _gains(target))
    if target.writes:
        await target.store.delete(other.key)


def _other_than(target: Target) -> Callable[[Reply], bool]:
    """Counts when something is shown that is not the ticket's own object."""
    return lambda reply: reply.ok and reply.body != target.mine.content


def _gains(target: Target) -> Callable[[Reply], bool]:
    """As `_other_than`; our own servers must refuse what is not just as it was signed, even when nothing is gained by it."""
    return (lambda reply: reply.ok) if target.own else _other_than(target)


@attack("query extended", holds="a ticket to read one object", on=every)
async def extended_query(target: Target, tries: Tries) -> None:
    """Parameters that nobody signed are added, with names that mean something to some store; counts when anything but the ticket's own
    object is shown (at our own servers: whenever it is taken)."""
    get = target.get(target.mine.key)
    for extra in ("x=1", "versionId=null", "acl", "list-type=2", "prefix=", "format=json", "path=/etc/passwd", "download=1", "token2=x"):
        await tries.fire(extra, get.adding(extra), _gains(target))


@attack("store altered", holds="a ticket to read one object of one store", on=lambda target: every(target) and target.elsewhere is not None)
async def altered_store(target: Target, tries: Tries) -> None:
    """The ticket is used at another store of the same server, and one for the other store is used here: path, Host, and who it is for."""
    assert target.elsewhere is not None
    here, now = target.get(target.mine.key), time.time()
    there = Shot.of(target.elsewhere.sign_get(target.mine.key, now + LIFE_SECONDS, now))
    if there.path != here.path:
        await tries.fire("this ticket there", here.at(there.path))
    await tries.fire("that ticket here", there.at(here.path))
    there_victim = Shot.of(target.elsewhere.sign_get(target.victim.key, now + LIFE_SECONDS, now))
    await tries.fire("that ticket for the victim's key here", there_victim.at(target.get(target.victim.key).path))
    if signed(target) or there.path == here.path:
        host = ("Host", "other.example.org")
        hosted = lambda reply: target.scheme == "s3" and reply.ok  # noqa: E731 - elsewhere a ticket does not name the host
        await tries.fire("another Host", here.saying(host), hosted)
        await tries.fire(
            "X-Forwarded-Host", here.saying(("X-Forwarded-Host", "other.example.org")), lambda reply: reply.shows(b"other.example")
        )


@attack("length altered", holds="a ticket to write one object of a stated length", on=writing)
async def altered_length(target: Target, tries: Tries) -> None:
    """Longer, shorter and empty bodies, chunked ones without a length, a length that lies; counts when an object appears."""
    body = _BODY
    control = fresh_key("control")
    tries.control((await target.fire(target.put(control, body))).ok, "the honest PUT")
    await target.store.delete(control)
    for name, sent in (("longer", body + b"!"), ("shorter", body[:-1]), ("empty", b"")):
        key = fresh_key("length")
        await tries.writes(name, length_only(target, key, body).by("PUT", sent), key)
        await target.store.delete(key)
    key = fresh_key("length")
    await tries.writes("chunked and longer", chunked(length_only(target, key, body).by("PUT", body + b"!")), key)
    await target.store.delete(key)
    key = fresh_key("length")
    lying = length_only(target, key, body).by("PUT", body + b"!").saying(("X-Expected-Entity-Length", str(len(body))))
    await tries.writes("told in another header", lying, key)
    await target.store.delete(key)


def length_only(target: Target, key: str, body: bytes) -> Shot:
    """A ticket that states the length and no digest."""
    from broker.stores.base import Write

    now = time.time()
    return Shot.of(target.store.sign_put(Write(key, now + LIFE_SECONDS, len(body)), now), body)


@attack("digest altered", holds="a ticket to write one object of a stated digest", on=writing)
async def altered_digest(target: Target, tries: Tries) -> None:
    """Another body of the same length: with the ticket's headers, without them, with its own digests in them; counts when it is kept."""
    body = _BODY
    other = body[::-1]
    control = fresh_key("control")
    tries.control((await target.fire(target.put(control, body))).ok, "the honest PUT")
    await target.store.delete(control)
    binding = ("content-md5", "x-amz-checksum-sha256", "etag", "if-none-match")
    tampered = (
        ("another body", lambda put: put.by("PUT", other)),
        ("headers left out", lambda put: put.by("PUT", other).silent_on(*binding)),
        ("headers replaced", lambda put: put.by("PUT", other).silent_on(*binding).saying(*_claims_for(other, put))),
        ("headers twice", lambda put: put.by("PUT", other).saying(*_claims_for(other, put))),
        ("chunked", lambda put: chunked(put.by("PUT", other))),
    )
    for name, tamper in tampered:
        key = fresh_key("digest")
        await tries.writes(name, tamper(target.put(key, body)), key, other)
        await target.store.delete(key)


def _claims_for(body: bytes, put: Shot) -> list[tuple[str, str]]:
    """The digest headers of `put`, with the right values for another body."""
    import base64
    import hashlib

    md5, sha256 = hashlib.md5(body), hashlib.sha256(body)
    values = {
        "content-md5": base64.b64encode(md5.digest()).decode(),
        "x-amz-checksum-sha256": base64.b64encode(sha256.digest()).decode(),
        "etag": md5.hexdigest(),
    }
    return [(name, values[name.lower()]) for name, _ in put.headers if name.lower() in values]


def chunked(shot: Shot) -> Shot:
    """The same body without a length (RFC 9112 section 7.1)."""
    body = shot.body or b""
    framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    return dataclasses.replace(shot.saying(("Transfer-Encoding", "chunked")), body=framed)


@attack("expiry altered", holds="a ticket to read that has ended", on=every)
async def altered_expiry(target: Target, tries: Tries) -> None:
    """A ticket that worked is used after its end, and with a later end written into it."""
    now = time.time()
    ended = target.get(target.mine.key, life=30.0, now=now - 90)
    tries.control((await target.fire(target.get(target.mine.key, life=120.0, now=now - 90))).ok, "one of the same age that lives on")
    await tries.fire("after its end", ended)
    if target.scheme == "s3":
        later = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        await tries.fire("X-Amz-Expires raised", ended.setting("X-Amz-Expires", "3600"))
        await tries.fire("X-Amz-Expires negative", ended.setting("X-Amz-Expires", "-1"))
        await tries.fire("X-Amz-Expires added", ended.adding("X-Amz-Expires=3600"))
        await tries.fire("X-Amz-Expires first", ended.asking(f"X-Amz-Expires=3600&{ended.query}"))
        await tries.fire("X-Amz-Expires left out", ended.lacking("X-Amz-Expires"))
        await tries.fire("X-Amz-Date moved", ended.setting("X-Amz-Date", later))
        await tries.fire("x-amz-date as a header", ended.saying(("x-amz-date", later)))
        await tries.fire("Date as a header", ended.saying(("Date", later)))
    elif target.scheme == "tempurl":
        end = int(ended.parameter("temp_url_expires"))
        iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end + 3600))
        for name, value in (
            ("raised", str(end + 3600)),
            ("as ISO 8601, later", iso),
            ("0", "0"),
            ("negative", f"-{end}"),
            ("with a plus", f"%2B{end}"),
            ("with a point", f"{end}.9e9"),
            ("in figures of another script", quote("".join(chr(0x660 + int(c)) for c in str(end)))),
            ("with spaces", f"%20{end}"),
            ("with zeros", f"0{end}"),
            ("as a word", "never"),
            ("empty", ""),
        ):
            await tries.fire(f"temp_url_expires {name}", ended.setting("temp_url_expires", value))
        await tries.fire("temp_url_expires added", ended.adding(f"temp_url_expires={end + 3600}"))
        await tries.fire("temp_url_expires first", ended.asking(f"temp_url_expires={end + 3600}&{ended.query}"))
    else:
        assert isinstance(target, TokenTarget)
        from tests.attacks.forge import rewritten

        honest = target.token("GET", target.mine.key, expires_at=now - 30, not_before=now - 90)
        for name, changes in (
            ("exp raised", {"exp": int(now) + 3600}),
            ("exp as text", {"exp": str(int(now) + 3600)}),
            ("exp null", {"exp": None}),
            ("exp left out", {"exp": ...}),
            ("exp 1e400", {"exp": 1e308}),
        ):
            await tries.fire(name, target.carrying(rewritten(honest, changes), target.mine.key))
    if target.writes:
        key = fresh_key("late")
        await tries.writes("a PUT after its end", target.put(key, _BODY, life=30.0, now=now - 90), key)


@attack("used before its time", holds="a ticket that is valid later", on=lambda target: target.scheme in ("s3", "token"))
async def not_before(target: Target, tries: Tries) -> None:
    """A ticket that was made for later is used now (the broker makes none; TempURLs cannot say it)."""
    now = time.time()
    for name, later in (("a minute", 60.0), ("20 minutes", 1200.0), ("a day", 86400.0)):
        if isinstance(target, TokenTarget):
            token = target.token("GET", target.mine.key, not_before=now + later, expires_at=now + later + 600)
            await tries.fire(name, target.carrying(token, target.mine.key))
        else:
            await tries.fire(name, target.get(target.mine.key, now=now + later))


@attack("signature stripped", holds="a ticket to read one object", on=every)
async def stripped(target: Target, tries: Tries) -> None:
    """The signature is left out, emptied, cut, or replaced; the whole query is left out."""
    get = target.get(target.mine.key)
    await tries.fire("no query at all", get.asking(""))
    await tries.fire("an empty Authorization", get.asking("").saying(("Authorization", "")))
    await tries.fire("Authorization: Bearer", get.asking("").saying(("Authorization", "Bearer")))
    await tries.fire("Basic credentials", get.asking("").saying(("Authorization", "Basic YWRtaW46YWRtaW4=")))
    name = _SIGNATURE.get(target.scheme)
    if name is not None:
        value = get.parameter(name)
        await tries.fire("left out", get.lacking(name))
        for what, changed in (
            ("emptied", ""),
            ("cut", value[:-1]),
            ("one more", value + "0"),
            ("of zeros", "0" * len(value)),
            ("null", "null"),
        ):
            await tries.fire(what, get.setting(name, changed))
    if target.scheme == "s3":
        await tries.fire("no algorithm", get.lacking("X-Amz-Algorithm"))
        await tries.fire("another algorithm", get.setting("X-Amz-Algorithm", "none"))
        await tries.fire("no credential", get.lacking("X-Amz-Credential"))
        await tries.fire("no date", get.lacking("X-Amz-Date"))
        await tries.fire("no signed headers", get.lacking("X-Amz-SignedHeaders"))
        await tries.fire("version 2, empty", get.asking("AWSAccessKeyId=x&Signature=&Expires=9999999999"))
    if target.scheme == "tempurl":
        await tries.fire("no end", get.lacking("temp_url_expires"))
        await tries.fire("sha1 of the same", get.setting("temp_url_sig", "sha1:AAAA"))


@attack("signature re-encoded", holds="a ticket to read one object", on=signed)
async def reencoded(target: Target, tries: Tries) -> None:
    """The signature in other spellings; counts when the honest one's object comes back. Of tokens: “token spelled otherwise”."""
    get = target.get(target.mine.key)
    name = _SIGNATURE[target.scheme]
    value = get.parameter(name)
    await tries.fire("upper case", get.setting(name, value.upper()))
    await tries.fire("twice percent-encoded", get.setting(name, "".join(f"%25{ord(c):02x}" for c in value)))
    await tries.fire("with spaces", get.setting(name, f"%20{value}%20"))
    await tries.fire("with a line feed", get.setting(name, f"{value}%0a"))
    await tries.fire("with NUL", get.setting(name, f"{value}%00"))


@attack("parameters and headers twice", holds="a ticket to read one object", on=every)
async def doubled(target: Target, tries: Tries) -> None:
    """Each parameter of the ticket comes twice, the honest one first or last; headers too. Counts when anything but the ticket's own
    object is shown (at our own servers: whenever it is taken)."""
    get, gains = target.get(target.mine.key), _gains(target)
    victim = target.get(target.victim.key).path
    for name, value in get.parameters:
        wrong = value[:-1] + ("0" if not value.endswith("0") else "1")
        await tries.fire(f"{name}, wrong one last", get.adding(f"{name}={wrong}"), gains)
        await tries.fire(f"{name}, wrong one first", get.asking(f"{name}={wrong}&{get.query}"), gains)
    await tries.fire("Host twice", get.saying(("Host", "127.0.0.1"), ("Host", "evil.example.org")), gains)
    await tries.fire("Range twice", get.at(victim).saying(("Range", "bytes=0-9"), ("Range", "bytes=5-9")))
    await tries.fire("the query of two tickets", get.at(victim).adding(get.query))


@attack("oversized", holds="nothing, or a ticket to read one object", on=every)
async def oversized(target: Target, tries: Tries) -> None:
    """A signature, a parameter, a header, a path and a number of headers far beyond what is honest; the store must live on."""
    get = target.get(target.mine.key)
    name = _SIGNATURE.get(target.scheme, "token")
    for size in (5_000, 100_000, 1_000_000):
        await tries.fire(f"signature of {size}", get.setting(name, "A" * size))
    await tries.fire("an Authorization of 1 MB", get.asking("").saying(("Authorization", "Bearer " + "A" * 1_000_000)))
    await tries.fire("a path of 100 kB", get.at(get.path + "/" + "a" * 100_000))
    await tries.fire("10,000 headers", get.asking("").saying(*((f"X-{number}", "1") for number in range(10_000))))
    await tries.fire("10,000 parameters", get.asking("&".join(f"p{number}=1" for number in range(10_000))))


@attack("listing", holds="a ticket to read one object", on=every)
async def listing(target: Target, tries: Tries) -> None:
    """The bucket, container or directory is asked for its content, with the ticket and without."""
    get = target.get(target.mine.key)
    top = get.path[: -len(target.mine.key)].rstrip("/")
    folder = get.path.rpartition("/")[0]
    for name, path in (
        ("the top", top or "/"),
        ("the top, with a slash", f"{top}/"),
        ("the object's folder", f"{folder}/"),
        ("the root", "/"),
    ):
        for how, shot in (("with the ticket", get.at(path)), ("bare", get.at(path).asking("")), ("HEAD", get.at(path).by("HEAD"))):
            await tries.fire(f"{name}, {how}", shot, _lists(target))
    for query in ("list-type=2", "delimiter=/&prefix=", "versions", "format=json", "uploads", "location", "policy", "acl"):
        await tries.fire(f"the top, ?{query}", get.at(f"{top}/").adding(query), _lists(target))


def _lists(target: Target) -> Callable[[Reply], bool]:
    """A page that greets everybody is no list."""
    return lambda reply: reply.ok and (target.mine.key.partition("/")[0].encode() in reply.body or target.victim.key.encode() in reply.body)
