"""What is found, in the words of DRS 1.5: objects, bundles, access methods, authorizations, errors.

Rules

- A blob is a DRS object under its own id, which names the same bytes for ever. The id of an image with one format leads to that
  object, which tells its own id; an image with several formats is a bundle of their blobs.
- An access method is one replica: its access_id is the replica's id, unique over everything. Nothing is signed for an object; the
  URL is made when its access_id is asked for. The type is ``https`` for every URL to be opened by HTTP: DRS has no word for ``http``.
- How to authenticate is the same for everything here, and said by OPTIONS alone: the published schemas of DRS 1.2, which clients check
  with, refuse access methods with further fields.
- Names are portable file names, as the specification asks.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import UUID

import orjson

from broker import errors
from broker.accept import Candidate
from broker.log import scrub
from broker.model import created_at
from broker.service.instants import instant
from broker.service.objects import Found, Part
from broker.web import problem
from broker.web.redirect import file_name

CHECKSUMS: Mapping[str, str] = {"sha512": "sha-512", "sha256": "sha-256", "md5": "md5", "sha1": "sha1"}
"""Our names of digests to DRS's (Checksum.type): IANA's where it has one."""

_TYPES = {"https": "https", "http": "https", "file": "file"}
SCHEMES = frozenset(_TYPES)
"""What of our places DRS has a type for."""

_LAST_INSTANT = 253402300799.0
"""The end of the year 9999, the last that RFC 3339 can say."""

_STATUS = {409: 404, 410: 404, 412: 400, 422: 400, 428: 400}
"""Statuses that DRS does not have, and what it says instead."""


def name_of(part: Part) -> str | None:
    """What a part's file is called, where it has an image to be called after."""
    return None if part.image is None else file_name(part.image.name, part.format, str(part.image.id))


def drs_object(found: Found, places: Sequence[Sequence[Candidate]], host: str) -> dict[str, Any]:
    """A DrsObject: the blob of the only part, with its `places`, or a bundle. Raises `NotFound` for what DRS has no words for."""
    if len(found.parts) == 1:
        return _blob(found.parts[0], places[0], host)
    return _bundle(found, host)


def _blob(part: Part, places: Iterable[Candidate], host: str) -> dict[str, Any]:
    blob = part.blob
    shown: dict[str, Any] = {
        "id": blob.id,
        "self_uri": uri(host, blob.id),
        "size": _size(part),
        "created_time": instant(_created(part)),
        "mime_type": "application/octet-stream",
        "checksums": _checksums(_digests(part)),
    }
    if (name := name_of(part)) is not None:
        shown["name"] = name
    if part.images:
        shown["aliases"] = list(part.images)
    if methods := [_method(place) for place in places]:
        shown["access_methods"] = methods
    return shown


def _bundle(found: Found, host: str) -> dict[str, Any]:
    assert found.image is not None
    digests = [_digests(part) for part in found.parts]
    shared = {ours: _together(ours, [each[ours] for each in digests]) for ours in CHECKSUMS if all(ours in each for each in digests)}
    return {
        "id": found.id,
        "self_uri": uri(host, found.id),
        "name": file_name(found.image.name, None, found.id),
        "size": sum(_size(part) for part in found.parts),
        "created_time": instant(found.image.created_at),
        "checksums": _checksums(shared),
        "contents": [{"name": name_of(part), "id": part.blob.id, "drs_uri": [uri(host, part.blob.id)]} for part in found.parts],
    }


def _created(part: Part) -> float:
    """When the blob was named, which its id tells; one that another catalogue made with an id of its own is as old as its image."""
    id = UUID(part.blob.id)
    if id.version == 7:
        return min(created_at(id), _LAST_INSTANT)
    return part.image.created_at if part.image is not None else 0.0


def _method(place: Candidate) -> dict[str, Any]:
    return {"type": _TYPES[place.scheme], "access_id": place.replica, "region": place.site}


def _size(part: Part) -> int:
    if part.blob.size is None:
        raise errors.NotFound("The object has no bytes yet.")
    return part.blob.size


def _digests(part: Part) -> Mapping[str, str]:
    found: Mapping[str, str] = orjson.loads(part.blob.summary)["digests"]
    return found


def _checksums(digests: Mapping[str, str]) -> list[dict[str, str]]:
    if not digests:
        raise errors.NotFound("No digest of the object is known, and DRS has no objects without.")
    return [{"type": theirs, "checksum": digests[ours]} for ours, theirs in CHECKSUMS.items() if ours in digests]


def _together(algorithm: str, checksums: Iterable[str]) -> str:
    """The checksum of a bundle: of its members' ones in hex, sorted and joined (DrsObject.checksums)."""
    return hashlib.new(algorithm, "".join(sorted(checksums)).encode(), usedforsecurity=False).hexdigest()


def uri(host: str, id: str) -> str:
    """A hostname-based DRS URI. It names no port: clients open 443 (DRS API Principles)."""
    return f"drs://{host}/{quote(id, safe='')}"


def host_of(url: str) -> str:
    """The host of this service's URL, as DRS URIs name it."""
    return urlsplit(url).hostname or ""


def service_info(url: str, version: str, longest_bulk: int) -> dict[str, Any]:
    """GA4GH Service Info 1.0 with what DRS adds. The id is the host's name in reverse, as recommended there; addresses have none."""
    host = host_of(url)
    try:
        id = str(ipaddress.ip_address(host))
    except ValueError:
        id = ".".join(reversed(host.split(".")))
    return {
        "id": f"{id}.drs",
        "name": "transfer-broker",
        "type": {"group": "org.ga4gh", "artifact": "drs", "version": "1.5.0"},
        "organization": {"name": host, "url": url},
        "version": version,
        "maxBulkRequestLength": longest_bulk,
        "drs": {"maxBulkRequestLength": longest_bulk},
    }


def access_url(source: Mapping[str, Any]) -> dict[str, Any]:
    """An AccessURL, from a source of a ticket."""
    shown = {"url": source["url"]}
    if source["headers"]:
        shown["headers"] = [f"{name}: {value}" for name, value in source["headers"].items()]
    return shown


def authorizations(id: str, issuers: Sequence[str]) -> dict[str, Any]:
    """How to authenticate for an object; the same whether it exists or not."""
    return {"drs_object_id": id, "supported_types": ["BearerAuth", "BasicAuth"], "bearer_auth_issuers": list(issuers)}


def bulk(member: str, ids: Sequence[str], results: Sequence[dict[str, Any] | errors.BrokerError]) -> dict[str, Any]:
    """The answer to a bulk request: what was resolved under `member`, the ids of the rest by the status that each would have got."""
    resolved = [result for result in results if not isinstance(result, errors.BrokerError)]
    failed: dict[int, list[str]] = {}
    for id, result in zip(ids, results, strict=True):
        if isinstance(result, errors.BrokerError):
            failed.setdefault(status_of(result), []).append(id)
    return {
        "summary": {"requested": len(ids), "resolved": len(resolved), "unresolved": len(ids) - len(resolved)},
        "unresolved_drs_objects": [{"error_code": status, "object_ids": ids} for status, ids in sorted(failed.items())],
        member: resolved,
    }


def status_of(error: errors.BrokerError) -> int:
    """The status by which DRS tells an error."""
    return _STATUS.get(error.status, error.status)


def render(error: errors.BrokerError, token_given: bool = False) -> tuple[int, bytes, dict[str, str]]:
    """An error in DRS's shape; the header fields are those of every API here."""
    _, _, headers = problem.render(error, token_given)
    status, text = status_of(error), error.detail or error.title
    if error.field is not None:
        text = f"{text} (field {error.field}" + (f": expected {error.expected})" if error.expected is not None else ")")
    body = orjson.dumps({"msg": scrub(text), "status_code": status})
    return status, body, headers | {"Content-Type": "application/json"}
