"""Queries of ``GET /v2/images``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors
from broker.catalog.image_search import SEARCHED, SORTED, Condition
from broker.web.glance import search

NOT_HIDDEN = Condition("hidden", "eq", False)
ID = "6ecbb4be-0000-4000-8000-000000000000"


def at(*when: int) -> datetime:
    return datetime(*when, tzinfo=UTC)  # type: ignore[arg-type, misc]


@pytest.mark.parametrize(
    ("query", "condition"),
    [
        ({"name": "a"}, ("name", "eq", "a")),
        ({"name": ""}, ("name", "eq", "")),
        ({"name": "eq:a:b"}, ("name", "eq", "a:b")),
        ({"name": 'in:a,"b,c",d\\e'}, ("name", "in", ["a", "b,c", "d\\e"])),
        ({"name": 'in:"say \\"hi\\"",b'}, ("name", "in", ['say "hi"', "b"])),
        ({"id": f"in:{ID},x"}, ("id", "in", [ID, "x"])),
        ({"status": "in:queued,active"}, ("status", "in", ["queued", "active"])),
        ({"container_format": "bare"}, ("container_format", "eq", "bare")),
        ({"disk_format": "in:raw,qcow2"}, ("disk_format", "in", ["raw", "qcow2"])),
        ({"owner": "in:a"}, ("project", "eq", "in:a")),
        ({"checksum": "ab"}, ("md5", "eq", "ab")),
        ({"os_hash_value": "cd"}, ("sha", "eq", "cd")),
        ({"size": "5"}, ("size", "eq", 5)),
        ({"size_min": "5"}, ("size", "gte", 5)),
        ({"size_max": "-5"}, ("size", "lte", -5)),
        ({"min_ram_min": "512"}, ("min_ram", "gte", 512)),
        ({"protected": "True"}, ("protected", "eq", True)),
        ({"created_at": "2026-01-02T03:04:05Z"}, ("created_at", "eq", at(2026, 1, 2, 3, 4, 5))),
        ({"created_at": "gt:2026-01-02T03:04:05Z"}, ("created_at", "gt", at(2026, 1, 2, 3, 4, 5))),
        ({"updated_at": "lte:2026-01-02T03:04:05+02:00"}, ("updated_at", "lte", at(2026, 1, 2, 1, 4, 5))),
        ({"updated_at": "neq:2026-01-02"}, ("updated_at", "neq", at(2026, 1, 2))),
    ],
)
def test_conditions(query: dict[str, Any], condition: Any) -> None:
    assert search.read(query).conditions == (NOT_HIDDEN, condition)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"name": "like:a"}, "name"),
        ({"status": "gt:queued"}, "status"),
        ({"name": 'in:"a'}, None),
        ({"name": 'in:"a"b'}, None),
        ({"size_min": "many"}, "size_min"),
        ({"size_min": "1e3"}, "size_min"),
        ({"size": "9" * 19}, "size"),
        ({"size": "٣"}, "size"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"created_at": "in:2026-01-02"}, "created_at"),
        ({"created_at": "gt:"}, "created_at"),
        ({"updated_at": "0001-01-01T00:00:00+23:00"}, "updated_at"),
        ({"sort": "colour"}, "sort"),
        ({"sort": "name:up"}, "sort"),
        ({"sort": ""}, "sort"),
        ({"sort": "name,name:asc"}, "sort"),
        ({"sort": "name", "sort_key": ["size"]}, "sort"),
        ({"sort_key": ["name", "size", "id"], "sort_dir": ["asc", "asc"]}, "sort_dir"),
        ({"marker": "the last"}, "marker"),
    ],
)
def test_what_is_refused(query: dict[str, Any], field: str | None) -> None:
    with pytest.raises(errors.Invalid) as raised:
        search.read(query)
    assert raised.value.field == field
    assert raised.value.expected


@pytest.mark.parametrize(
    ("query", "sort"),
    [
        ({}, (("created_at", True),)),
        ({"sort": "name:asc, size"}, (("name", False), ("size", True))),
        ({"sort_key": ["name", "size"]}, (("name", True), ("size", True))),
        ({"sort_key": ["name", "size"], "sort_dir": ["asc"]}, (("name", False), ("size", False))),
        ({"sort_key": ["name", "size"], "sort_dir": ["asc", "desc"]}, (("name", False), ("size", True))),
        ({"sort_dir": ["asc"]}, (("created_at", False),)),
    ],
)
def test_order(query: dict[str, Any], sort: Any) -> None:
    assert search.read(query).sort == sort


def test_the_rest() -> None:
    found = search.read(
        {"limit": 5000, "marker": ID.upper(), "tag": ["a", "b"], "visibility": "all", "member_status": "all", "os_hidden": "True",
         "properties": {"os_type": "linux"}}
    )  # fmt: skip
    assert found.limit == search.MAX_LIMIT
    assert found.marker == UUID(ID)
    assert found.tags == ("a", "b")
    assert (found.visibility, found.member_status) == ("all", None)
    assert found.conditions == (Condition("hidden", "eq", True),)
    assert found.properties == {"os_type": "linux"}
    plain = search.read({})
    assert (plain.limit, plain.visibility, plain.member_status) == (search.LIMIT, None, "accepted")


def test_links_repeat_what_was_asked() -> None:
    query = {"limit": 2, "tag": ["a", "b&c"], "marker": ID, "properties": {"os": "x y"}}
    assert search.links(query, "next-id") == {
        "first": "/v2/images?limit=2&tag=a&tag=b%26c&os=x+y",
        "next": "/v2/images?limit=2&tag=a&tag=b%26c&os=x+y&marker=next-id",
        "schema": "/v2/schemas/images",
    }
    assert search.links({}, None) == {"first": "/v2/images", "schema": "/v2/schemas/images"}


def test_every_sort_key_and_field_is_one_of_the_catalogue() -> None:
    assert set(search.SORT_KEYS) <= SORTED <= SEARCHED


@given(st.lists(st.text("ab,\\\"'", min_size=1), min_size=1))
def test_values_in_quotes_come_back_as_they_were(values: list[str]) -> None:
    quoted = ",".join('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values)
    assert search.values_of(quoted) == values
