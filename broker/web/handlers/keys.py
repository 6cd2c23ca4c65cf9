"""Signing keys: the published set, and its administration."""

from __future__ import annotations

from broker import errors
from broker.service import key_rotation
from broker.web.call import Answer, Call

__all__ = ["get_keys", "list_keys", "revoke_key", "rotate_keys"]


async def get_keys(call: Call) -> Answer:
    context = call.context
    if context.memory.unread_seconds() > context.keys.terms.overlap_seconds:
        raise errors.Unavailable("The keys may have changed meanwhile.", retry_after=1.0)
    found = context.keys.published(context.clock())
    headers = {"Cache-Control": f"public, max-age={context.keys.terms.max_age_seconds}", "ETag": found.etag}
    known = [tag.strip().removeprefix("W/") for tag in call.headers.get("If-None-Match", "").split(",")]
    if found.etag in known or "*" in known:
        return Answer(304, None, headers)
    return Answer(200, found.body, headers)


async def list_keys(call: Call) -> Answer:
    return Answer(200, await key_rotation.list_keys(call.context, call.client))


async def rotate_keys(call: Call) -> Answer:
    return Answer(200, await key_rotation.rotate_keys(call.context, call.client, call.body, await call.claim()))


async def revoke_key(call: Call) -> Answer:
    return Answer(200, await key_rotation.revoke_key(call.context, call.client, call.path["key"]))
