"""The operations of GA4GH's Data Repository Service 1.5, as far as they read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from broker import __version__, errors
from broker.accept import Candidate
from broker.model import new_ids
from broker.service import negotiate, objects
from broker.service.asked import parsed
from broker.service.objects import Found, Part
from broker.web.call import Answer, Call
from broker.web.drs import shapes

__all__ = [
    "drs_authorize_object", "drs_authorize_objects", "drs_get_access", "drs_get_accesses", "drs_get_object", "drs_get_objects",
    "drs_get_service_info", "drs_post_access", "drs_post_object",
]  # fmt: skip

MAX_BULK = 500
"""Ids in one bulk request: as many as a batch of tickets."""

_NO_SUCH_ID = "No such object: ids are UUIDs in lower case, of a blob or an image; compact identifiers are not resolved here."
_NO_SUCH_ACCESS = "No such access_id of this object, or none that can be given now; ask for the object again."


async def drs_get_service_info(call: Call) -> Answer:
    return Answer(200, shapes.service_info(call.context.issuers[0], __version__, MAX_BULK))


async def drs_authorize_object(call: Call) -> Answer:
    id = call.path["object_id"]
    if not objects.is_id(id):
        raise errors.NotFound(_NO_SUCH_ID)
    return Answer(200, shapes.authorizations(id, call.context.issuers))


async def drs_authorize_objects(call: Call) -> Answer:
    ids = _ids(call.body)
    results = [shapes.authorizations(id, call.context.issuers) if objects.is_id(id) else errors.NotFound(_NO_SUCH_ID) for id in ids]
    return Answer(200, shapes.bulk("resolved_drs_object", ids, results))


async def drs_get_object(call: Call) -> Answer:
    return Answer(200, _raised((await _objects(call, [call.path["object_id"]]))[0]))


async def drs_post_object(call: Call) -> Answer:
    _refuse_passports(call.body)
    return await drs_get_object(call)


async def drs_get_objects(call: Call) -> Answer:
    _refuse_passports(call.body)
    ids = _ids(call.body)
    return Answer(200, shapes.bulk("resolved_drs_object", ids, await _objects(call, ids)))


async def drs_get_access(call: Call) -> Answer:
    try:
        shown = _raised((await _accesses(call, [(call.path["object_id"], call.path["access_id"])]))[0])
    except errors.Busy as busy:
        shown = {"msg": f"{busy.detail} Ask again after Retry-After.", "status_code": 202}
        return Answer(202, shown, {"Retry-After": str(max(1, math.ceil(busy.retry_after or 1)))})
    return Answer(200, {name: shown[name] for name in ("url", "headers") if name in shown})


async def drs_post_access(call: Call) -> Answer:
    _refuse_passports(call.body)
    return await drs_get_access(call)


async def drs_get_accesses(call: Call) -> Answer:
    _refuse_passports(call.body)
    wanted = [(entry["bulk_object_id"], access) for entry in call.body["bulk_object_access_ids"] for access in entry["bulk_access_ids"]]
    _bound(max(len(call.body["bulk_object_access_ids"]), len(wanted)), "bulk_object_access_ids")
    results = await _accesses(call, wanted)
    return Answer(200, shapes.bulk("resolved_drs_object_access_urls", [id for id, _ in wanted], results))


# --- requests ---


def _ids(body: Mapping[str, Any]) -> list[str]:
    ids: list[str] = body["bulk_object_ids"]
    _bound(len(ids), "bulk_object_ids")
    return ids


def _bound(count: int, field: str) -> None:
    if count > MAX_BULK:
        raise errors.TooLarge("Too many ids in one request.", field=field, expected=f"at most {MAX_BULK} (maxBulkRequestLength)")


def _refuse_passports(body: Mapping[str, Any] | None) -> None:
    """A passport that is no use here should not have been sent: say so, rather than go on without it."""
    if body and body.get("passports"):
        raise errors.Invalid(
            "GA4GH passports are not taken.", field="passports", expected="a bearer token in Authorization, as OPTIONS tells"
        )


def _raised(result: dict[str, Any] | errors.BrokerError) -> dict[str, Any]:
    if isinstance(result, errors.BrokerError):
        raise result
    return result


# --- objects ---


async def _objects(call: Call, ids: Sequence[str]) -> list[dict[str, Any] | errors.BrokerError]:
    """Each object as it is shown, or its error."""
    found = await _find(call, ids)
    single = [_single(each) for each in found]
    places = iter(await objects.places(call.context, call.client, [part.blob for part in single if part is not None], shapes.SCHEMES))
    host = shapes.host_of(call.context.issuers[0])
    shown: list[dict[str, Any] | errors.BrokerError] = []
    for each, part in zip(found, single, strict=True):
        if isinstance(each, Found):
            lying = [next(places)] if part is not None else []
            try:
                shown.append(shapes.drs_object(each, lying, host))
            except errors.NotFound as error:
                shown.append(error)
        else:
            shown.append(each)
    return shown


async def _find(call: Call, ids: Sequence[str]) -> list[Found | errors.BrokerError]:
    found = await objects.find(call.context, call.client, ids)
    return [each if objects.is_id(id) else errors.NotFound(_NO_SUCH_ID) for id, each in zip(ids, found, strict=True)]


def _single(found: Found | errors.BrokerError) -> Part | None:
    """The blob that an id stands for, if it stands for one alone."""
    return found.parts[0] if isinstance(found, Found) and len(found.parts) == 1 else None


# --- access ---


async def _accesses(call: Call, wanted: Sequence[tuple[str, str]]) -> list[dict[str, Any] | errors.BrokerError]:
    """For each object id and access_id an AccessURL with both, or an error: from tickets for these replicas' stores alone."""
    found = await _find(call, [id for id, _ in wanted])
    single = [_single(each) for each in found]
    places = iter(await objects.places(call.context, call.client, [part.blob for part in single if part is not None], shapes.SCHEMES))
    plans: list[Mapping[str, Any] | errors.BrokerError] = []
    for (_, access), each, part in zip(wanted, found, single, strict=True):
        place = None if part is None else next((place for place in next(places) if place.replica == access), None)
        if isinstance(each, errors.BrokerError):
            plans.append(each)
        else:
            plans.append(errors.NotFound(_NO_SUCH_ACCESS) if part is None or place is None else _ticket(each, part, place))
    asked = [plan for plan in plans if not isinstance(plan, errors.BrokerError)]
    made = iter(await _tickets(call, asked))
    results = [plan if isinstance(plan, errors.BrokerError) else next(made) for plan in plans]
    return [
        result if isinstance(result, errors.BrokerError) else {"drs_object_id": id, "drs_access_id": access, **_first_url(result)}
        for (id, access), result in zip(wanted, results, strict=True)
    ]


async def _tickets(call: Call, asked: Sequence[Mapping[str, Any]]) -> Sequence[dict[str, Any] | errors.BrokerError]:
    if not asked:
        return []
    call.context.pace.count(call.client.principal.project, len(asked))
    ids = new_ids(len(asked), call.context.clock())
    return await negotiate.download_many(call.context, call.client, list(zip(ids, asked, strict=True)))


def _first_url(ticket: Mapping[str, Any]) -> dict[str, Any]:
    return shapes.access_url(parsed(ticket)["sources"][0])


def _ticket(found: Found, part: Part, place: Candidate) -> dict[str, Any]:
    """The request for a ticket that an access stands for."""
    of = {"blob": part.blob.id} if found.image is None else {"image": found.id, "formats": [part.format]}
    asked = {"operation": "download", **of, "only": [place.store], "schemes": [place.scheme], "count": 1, "once": True}
    name = shapes.name_of(part)
    return asked if name is None else asked | {"filename": name}
