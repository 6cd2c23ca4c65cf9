"""Which images fit a search, page by page, in any order.

Rules
- A page goes on after its marker, the last image of the page before, by the values that this image has now; what has the same values is
  ordered by its instant and its id, so that no image is met twice or left out while none changes.
- Whoever asks finds what `broker.permit.lists_image` says, and community images of others only when that visibility, or all, is asked
  for.
- Each kind of image that one may list is a condition of its own that an index answers: most of a cloud's images are other projects'.
- Formats and size are those of the image's main blob: of the format that was declared, else of the first that has bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

from broker.catalog.connect import reachable
from broker.catalog.images import VETTED

Comparison = Literal["eq", "neq", "gt", "gte", "lt", "lte", "in"]

_COMPARISONS: Mapping[Comparison, str] = {"eq": "=", "neq": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


class _Field(NamedTuple):
    """How a field is written in SQL, its type there, and what stands for nothing when sorting by it."""

    sql: str
    type: str
    nothing: str | None = None


_FIELDS: Mapping[str, _Field] = {
    "id": _Field("i.id", "uuid"),
    "name": _Field("i.name", "text"),
    "project": _Field("i.project", "text"),
    "status": _Field("i.status", "text"),
    "disk_format": _Field("coalesce(i.disk_format, m.format)", "text", "''"),
    "container_format": _Field("coalesce(i.container_format, CASE WHEN m.format IS NOT NULL THEN 'bare' END)", "text", "''"),
    "size": _Field("m.size", "bigint", "-1"),
    "min_disk": _Field("i.min_disk", "integer"),
    "min_ram": _Field("i.min_ram", "integer"),
    "protected": _Field("i.protected", "boolean"),
    "hidden": _Field("i.hidden", "boolean"),
    "created_at": _Field("date_trunc('second', i.created_at)", "timestamptz"),
    "updated_at": _Field("date_trunc('second', i.updated_at)", "timestamptz"),
}
_DIGESTS: Mapping[str, str] = {
    "md5": "b.digests ->> 'md5' = {digest}",
    "sha": "b.digests ->> 'sha512' = {digest} OR b.digests ->> 'sha256' = {digest}",
}
_WITH_DIGEST = """i.id = ANY (ARRAY (SELECT ib.image_id FROM image_blobs ib JOIN blobs b ON b.id = ib.blob_id
    WHERE b.state = 'active' AND ({which})))"""

SEARCHED = frozenset((*_FIELDS, *_DIGESTS))
"""Fields that a condition may be about. ``md5`` and ``sha`` (SHA-512 or SHA-256) are equal to a digest of any of the image's blobs."""

SORTED = frozenset(("id", "name", "status", "disk_format", "container_format", "size", "created_at", "updated_at"))

_MAIN_BLOB = """LEFT JOIN LATERAL (
    SELECT ib.format, b.size, b.digests FROM image_blobs ib JOIN blobs b ON b.id = ib.blob_id
    WHERE ib.image_id = i.id AND b.state = 'active' ORDER BY ib.format IS DISTINCT FROM i.disk_format, ib.format LIMIT 1) m ON true"""

_MEMBER = """(i.shared AND i.visibility = 'private' AND i.id = ANY (ARRAY (
    SELECT im.image_id FROM image_members im WHERE im.project = {asker} AND ({answer}::text IS NULL OR im.status = {answer}))))"""

_PUBLIC = f"(i.visibility = 'public' AND {VETTED})"
_COMMUNITY = f"(i.visibility = 'community' AND {VETTED})"


_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Condition(NamedTuple):
    """One field compared with a value of its type; with ``in``, with each of a list."""

    field: str
    comparison: Comparison
    value: str | int | bool | datetime | Sequence[str]


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for. `sort` names fields of `SORTED`, each with whether the largest comes first."""

    limit: int
    conditions: tuple[Condition, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)
    """Properties that an image must have, with their values."""
    tags: tuple[str, ...] = ()
    """It must have all of them."""
    visibility: str | None = None
    """``None``: whatever is listed without asking for more; ``all``: community images too."""
    member_status: str | None = "accepted"
    """Of images that are shared with who asks: only those that it gave this answer to; ``None``: all."""
    sort: tuple[tuple[str, bool], ...] = ()
    marker: UUID | None = None


class _Values:
    """The values of a statement, and how it names them."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def add(self, value: Any) -> str:
        self.given.append(value)
        return f"${len(self.given)}"


async def search(db: Any, wanted: Search, project: str, *, everything: bool) -> list[UUID] | None:
    """The ids of a page of images that `project` may list (`everything`: all images), in order.

    ``None`` when the marker is no image that it may list.
    """
    values = _Values()
    listed = _listed(wanted, project, everything, values)
    order = [*wanted.sort, *((name, True) for name in ("created_at", "id") if name not in dict(wanted.sort))]
    where = [listed, *_fitting(wanted, values)]
    by = ", ".join(f"{_sorted(name)} {'DESC' if descending else 'ASC'}" for name, descending in order)
    images = "FROM images i"
    if any("m." in used for used in (by, *where[1:])):  # looked up for every image, so only where it is needed
        images += f" {_MAIN_BLOB}"
    before = ""
    if wanted.marker is not None:
        marked = ", ".join(f"{_sorted(name)} AS k{index}" for index, (name, _) in enumerate(order))
        before = f"WITH mark AS (SELECT {marked} {images} WHERE i.id = {values.add(wanted.marker)} AND {listed}) "
        where.append(_after(order))
    statement = f"{before}SELECT i.id {images} WHERE {' AND '.join(where)} ORDER BY {by} LIMIT {values.add(wanted.limit)}"
    with reachable():
        rows = await db.fetch(statement, *values.given)
        if not rows and wanted.marker is not None and not await _is_listed(db, wanted, project, everything):
            return None
    return [row[0] for row in rows]


async def _is_listed(db: Any, wanted: Search, project: str, everything: bool) -> bool:
    values = _Values()
    listed = _listed(wanted, project, everything, values)
    statement = f"SELECT true FROM images i WHERE i.id = {values.add(wanted.marker)} AND {listed}"  # noqa: S608 - values are parameters
    return await db.fetchval(statement, *values.given) is not None


def _listed(wanted: Search, project: str, everything: bool, values: _Values) -> str:
    """What may be listed, as far as the search's visibility goes."""
    stored = {"private": "i.visibility = 'private' AND NOT i.shared", "shared": "i.visibility = 'private' AND i.shared"}
    if everything and wanted.visibility is None:
        return f"(i.visibility <> 'community' OR i.project = {values.add(project)})"
    chosen = "true"
    if wanted.visibility not in (None, "all"):
        chosen = stored.get(wanted.visibility) or f"i.visibility = {values.add(wanted.visibility)}"
    if everything:
        return chosen
    asker = values.add(project)
    kinds = [f"i.project = {asker}", _PUBLIC, _MEMBER.format(asker=asker, answer=values.add(wanted.member_status))]
    if wanted.visibility is not None:
        kinds.append(_COMMUNITY)
    return f"{chosen} AND ({' OR '.join(kinds)})"


def _fitting(wanted: Search, values: _Values) -> list[str]:
    """The conditions."""
    found = []
    for name, comparison, value in wanted.conditions:
        if name in _DIGESTS:
            found.append(_WITH_DIGEST.format(which=_DIGESTS[name].format(digest=values.add(value))))
            continue
        sql, type, _ = _FIELDS[name]
        if name == "id":
            found.append(f"{sql} = ANY ({values.add(_ids(value))}::uuid[])")
        elif comparison == "in":
            found.append(f"{sql} = ANY ({values.add(value)}::{type}[])")
        else:
            found.append(f"{sql} {_COMPARISONS[comparison]} {values.add(value)}::{type}")
    if wanted.properties:
        found.append(f"i.properties @> {values.add(dict(wanted.properties))}::jsonb")
    if wanted.tags:
        found.append(f"i.tags @> {values.add(list(wanted.tags))}::text[]")
    return found


def _sorted(name: str) -> str:
    """What is sorted by a field; instants in full."""
    if name in ("created_at", "updated_at"):
        return f"i.{name}"
    sql, _, nothing = _FIELDS[name]
    return sql if nothing is None else f"coalesce({sql}, {nothing})"


def _after(order: Sequence[tuple[str, bool]]) -> str:
    """Whether an image comes after the marker: greater, or smaller, in the first field in which the two differ.

    That it is not before it in the first field follows, and is said for the sake of indexes.
    """
    alternatives = []
    for index, (name, descending) in enumerate(order):
        same = [f"{_sorted(before)} = {_marked(number)}" for number, (before, _) in enumerate(order[:index])]
        alternatives.append(" AND ".join([*same, f"{_sorted(name)} {'<' if descending else '>'} {_marked(index)}"]))
    first, descending = order[0]
    bound = f"{_sorted(first)} {'<=' if descending else '>='} {_marked(0)}"
    return f"{bound} AND (" + " OR ".join(f"({each})" for each in alternatives) + ")"


def _marked(index: int) -> str:
    """The marker's value of a field that is sorted by; ``NULL`` where it is no image that may be listed."""
    return f"(SELECT k{index} FROM mark)"  # noqa: S608 - a number


def _ids(value: Any) -> list[str]:
    """Those of the values that an image can have for an id, which is a UUID in canonical form."""
    return [text for text in ([value] if isinstance(value, str) else value) if _ID.fullmatch(text)]
