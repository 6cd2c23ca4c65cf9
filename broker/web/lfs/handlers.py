"""Git LFS: batches, what follows an upload, and locks, which there are not."""

from __future__ import annotations

import re
from typing import NoReturn
from urllib.parse import quote

from broker import errors
from broker.service import repositories
from broker.service.repositories import Repository, Result, Wish
from broker.web.call import Answer, Call
from broker.web.lfs import objects
from broker.web.lfs.render import MEDIA_TYPE

__all__ = ["lfs_batch", "lfs_batch_of_remote", "lfs_create_lock", "lfs_list_locks", "lfs_verify", "lfs_verify_locks"]

MOST_OBJECTS = 1000
"""Of one batch. git-lfs asks for 100 at a time (``lfs.transfer.batchSize``)."""

_FIELDS = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"}
_ACCEPTED = re.compile(r"(?:application/(?:vnd\.git-lfs\+json|json|\*)|\*/\*)\s*(?:;|\Z)")


async def lfs_batch(call: Call) -> Answer:
    _require_accepted(call)
    body = call.body
    asked, operation = body["objects"], body["operation"]
    if len(asked) > MOST_OBJECTS:
        raise errors.TooLarge("Too many objects.", field="objects", expected=f"at most {MOST_OBJECTS}")
    if body.get("hash_algo", "sha256") != "sha256":
        raise errors.Conflict("Objects are named by SHA-256 here.", field="hash_algo", expected="sha256")
    if "basic" not in (body.get("transfers") or ["basic"]):
        raise errors.Invalid("No other adapter is offered.", field="transfers", expected="basic among them")
    wishes = objects.read(asked)
    good = [wish for wish in wishes if isinstance(wish, Wish)]
    call.context.pace.count(call.client.principal.project, len(good))
    repository = _repository(call)
    verb = repositories.fetch if operation == "download" else repositories.send
    found = iter(await verb(call.context, call.client, repository, good))
    results: list[Result] = [next(found) if isinstance(wish, Wish) else wish for wish in wishes]
    if operation == "upload" and results and all(isinstance(result, errors.Invalid) for result in results):
        raise next(result for result in results if isinstance(result, errors.Invalid))
    now, verify = call.context.clock(), _verify(call, repository)
    shown = [objects.show(entry, result, operation, verify, now) for entry, result in zip(asked, results, strict=True)]
    return Answer(200, {"transfer": "basic", "objects": shown, "hash_algo": "sha256"}, _FIELDS)


async def lfs_batch_of_remote(call: Call) -> Answer:
    return await lfs_batch(call)


async def lfs_verify(call: Call) -> Answer:
    _require_accepted(call)
    (wish,) = objects.read([call.body])
    if isinstance(wish, errors.BrokerError):
        raise wish
    await repositories.confirm(call.context, call.client, _repository(call), wish)
    return Answer(200, wish._asdict(), _FIELDS)


async def lfs_list_locks(call: Call) -> Answer:
    _refuse_locks()


async def lfs_create_lock(call: Call) -> Answer:
    _refuse_locks()


async def lfs_verify_locks(call: Call) -> Answer:
    _refuse_locks()


def _refuse_locks() -> NoReturn:
    """What a server without locks answers (docs/api/locking.md): git-lfs then pushes without them."""
    raise errors.NotFound("Files cannot be locked here.")


def _repository(call: Call) -> Repository:
    return Repository(call.path["project"], call.path["repository"].removesuffix(".git"))


def _verify(call: Call, repository: Repository) -> str:
    """One address for all objects: git-lfs learns once how to authenticate there."""
    return f"{call.context.keys.issuer}/lfs/{quote(repository.project, safe='')}/{repository.name}/objects/verify"


def _require_accepted(call: Call) -> None:
    """Raise `NotAcceptable` for who would not take the answer (RFC 9110 section 12.5.1)."""
    given = call.headers.get("Accept") or "*/*"
    if not any(_ACCEPTED.match(entry.strip().lower()) for entry in given.split(",")):
        raise errors.NotAcceptable(field="Accept", expected=MEDIA_TYPE)
