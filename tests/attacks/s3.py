"""Attacks that only S3's presigned URLs offer."""

from __future__ import annotations

import secrets
import time

from tests.attacks.attack import Tries, attack
from tests.attacks.target import Target, fresh_key
from tests.attacks.wire import Shot

_BODY = b"planted by the attacker. " * 8


def s3(target: Target) -> bool:
    return target.scheme == "s3"


@attack("X-Amz-… altered", holds="a URL to read one object", on=s3)
async def altered_parameters(target: Target, tries: Tries) -> None:
    """Credential, scope, date, signed headers and algorithm of the URL are changed one by one."""
    get = target.get(target.mine.key)
    credential = get.parameter("X-Amz-Credential")
    access, date, region, service, end = credential.split("%2F")
    yesterday = time.strftime("%Y%m%d", time.gmtime(time.time() - 86400))
    for name, scope in (
        ("another key id", ("AKIAIOSFODNN7EXAMPLE", date, region, service, end)),
        ("no key id", ("", date, region, service, end)),
        ("key id in small letters", (access.swapcase(), date, region, service, end)),
        ("yesterday", (access, yesterday, region, service, end)),
        ("another region", (access, date, "eu-west-9", service, end)),
        ("another service", (access, date, region, "sts", end)),
        ("another end", (access, date, region, service, "aws5_request")),
        ("a part more", (access, date, region, service, end, "x")),
        ("a part less", (access, date, region, service)),
    ):
        await tries.fire(f"scope: {name}", get.setting("X-Amz-Credential", "%2F".join(scope)))
    for name, value in (("none", ""), ("host;range", "host%3Brange"), ("HOST", "HOST"), ("host twice", "host%3Bhost"), ("x", "x")):
        await tries.fire(f"signed headers: {name}", get.setting("X-Amz-SignedHeaders", value))
    await tries.fire("algorithm of version 4a", get.setting("X-Amz-Algorithm", "AWS4-ECDSA-P256-SHA256"))
    await tries.fire("a session token added", get.adding("X-Amz-Security-Token=x"))
    await tries.fire("names in small letters", get.asking(get.query.replace("X-Amz-", "x-amz-")))
    header = (
        f"AWS4-HMAC-SHA256 Credential={credential.replace('%2F', '/')}, SignedHeaders=host, Signature={get.parameter('X-Amz-Signature')}"
    )
    moved = get.asking("").saying(
        ("Authorization", header), ("x-amz-date", get.parameter("X-Amz-Date")), ("x-amz-content-sha256", "UNSIGNED-PAYLOAD")
    )
    await tries.fire("moved into Authorization", moved)


@attack("subresources by a URL to read", holds="a URL to read one object", on=s3)
async def subresources(target: Target, tries: Tries) -> None:
    """The signed query is extended by what S3 calls subresources, and by headers for the answer; the method is changed with them."""
    get = target.get(target.mine.key)
    for name in (
        "acl",
        "uploads",
        "delete",
        "tagging",
        "torrent",
        "versionId=null",
        "partNumber=1",
        "attributes",
        "retention",
        "legal-hold",
        "restore",
        "select&select-type=2",
    ):
        await tries.fire(f"GET ?{name}", get.adding(name))
        await tries.fire(f"GET ?{name}, first", get.asking(f"{name}&{get.query}"))
    for name in ("uploads", "delete", "restore"):
        await tries.fire(f"POST ?{name}", get.adding(name).by("POST", b"<Delete/>"))
    for name in ("acl", "tagging", "partNumber=1&uploadId=x"):
        await tries.fire(f"PUT ?{name}", get.adding(name).by("PUT", _BODY))
    for name, value in (
        ("response-content-type", "text/html"),
        ("response-content-disposition", "inline"),
        ("response-cache-control", "x"),
    ):
        await tries.fire(f"{name} added", get.adding(f"{name}={value}"))
    await tries.fire("response-content-type changed", get.setting("response-content-type", "text%2Fhtml"))
    await tries.fire("response-content-type left out", get.lacking("response-content-type"))


@attack("signed headers dropped", holds="a URL to write one object", on=s3)
async def dropped_headers(target: Target, tries: Tries) -> None:
    """Each header that was signed with a PUT is left out, emptied or changed; counts when something is written."""
    control = fresh_key("control")
    put = target.put(control, _BODY)
    tries.control((await target.fire(put)).ok, "the honest PUT")
    await target.store.delete(control)
    for name, _ in put.headers:
        for how in ("left out", "emptied", "changed", "twice"):
            key = fresh_key("headers")
            shot = target.put(key, _BODY)
            value = next(value for other, value in shot.headers if other == name)
            changed = {
                "left out": (),
                "emptied": ((name, ""),),
                "changed": ((name, value[:-1] + "A"),),
                "twice": ((name, value), (name, value[:-1] + "A")),
            }[how]
            await tries.writes(f"{name} {how}", shot.silent_on(name).saying(*changed), key)
            await target.store.delete(key)


@attack("signed for another", holds="a key of his own", on=s3)
async def foreign_key(target: Target, tries: Tries) -> None:
    """URLs that are signed with a secret that the store does not know: an invented one, an empty one, the access key itself."""
    from urllib.parse import unquote

    from broker.sign.sigv4 import S3Credential, S3Signer

    access = unquote(target.get(target.victim.key).parameter("X-Amz-Credential")).split("/")[0]
    bucket = target.get("x").path.split("/")[1]
    now = time.time()
    for name, secret in (("invented", secrets.token_hex(20)), ("empty", ""), ("the access key", access), ("null", "null")):
        for whose in (access, "anonymous", ""):
            signer = S3Signer(S3Credential(whose, secret), region="us-east-1", endpoint=target.origin, bucket=bucket)
            url = signer.presign("GET", target.victim.key, expires_at=now + 600, now=now)
            await tries.fire(f"{name}, as {whose if whose != access else 'the broker'}", Shot("GET", url[len(target.origin) :]))
