"""JSON-patch of images, against the Images API reference and what Glance does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors
from broker.web.glance import patch
from broker.web.glance.attributes import MAX_PROPERTIES, MAX_TAGS
from broker.web.glance.documents import MAX_VALUE
from broker.web.glance.patch import V20, V21

IMAGE: dict[str, Any] = {
    "id": "6ecbb4be-0000-4000-8000-000000000000",
    "name": "before",
    "status": "active",
    "properties": {"kept": "1", "a/b": "2", "a~b": "3"},
    "disk_format": "qcow2",
    "container_format": "bare",
    "tags": [],
}


def come_to(*operations: Any, image: dict[str, Any] = IMAGE, media_type: str = V21) -> patch.Patched:
    return patch.apply(image, patch.read(operations, media_type), media_type)


def op(operation: str, path: Any, *value: Any) -> dict[str, Any]:
    return {"op": operation, "path": path, **({"value": value[0]} if value else {})}


@pytest.mark.parametrize(
    ("operations", "request_"),
    [
        ([], {}),
        ([op("replace", "/name", "after")], {"name": "after"}),
        ([op("add", "/name", "after")], {"name": "after"}),
        ([op("replace", "/name", None)], {"name": ""}),
        ([op("replace", "/visibility", "public")], {"visibility": "public"}),
        ([op("replace", "/os_hidden", True), op("replace", "/protected", True)], {"hidden": True, "protected": True}),
        ([op("replace", "/owner", "other")], {"project": "other"}),
        ([op("replace", "/min_disk", 10), op("replace", "/min_ram", 0)], {"min_disk": 10, "min_ram": 0}),
        ([op("replace", "/tags", ["b", "a", "b"])], {"tags": ["b", "a"]}),
        ([op("add", "/new", "x")], {"properties": {"new": "x"}}),
        ([op("add", "/kept", "x")], {"properties": {"kept": "x"}}),
        ([op("replace", "/kept", "")], {"properties": {"kept": ""}}),
        ([op("remove", "/kept")], {"properties": {"kept": None}}),
        ([op("remove", "/a~1b"), op("remove", "/a~0b")], {"properties": {"a/b": None, "a~b": None}}),
        ([op("add", "/~01", "x")], {"properties": {"~1": "x"}}),
        ([op("add", "/new", "x"), op("replace", "/new", "y")], {"properties": {"new": "y"}}),
        ([op("add", "/new", "x"), op("remove", "/new")], {}),
        ([op("remove", "/kept"), op("add", "/kept", "2")], {"properties": {"kept": "2"}}),
        ([op("replace", "/disk_format", "qcow2")], {"disk_format": "qcow2"}),  # as it is: nothing changes
        ([op("add", "/value", "a line\nanother")], {"properties": {"value": "a line\nanother"}}),
        ([op("add", "/value", "x" * MAX_VALUE)], {"properties": {"value": "x" * MAX_VALUE}}),
        ([op("add", "/" + "x" * 255, "1")], {"properties": {"x" * 255: "1"}}),
        ([op("replace", "/tags", [str(n) for n in range(MAX_TAGS)])], {"tags": [str(n) for n in range(MAX_TAGS)]}),
        ([{**op("replace", "/name", "after"), "from": "elsewhere"}], {"name": "after"}),  # RFC 6902: unknown members are ignored
    ],
)
def test_what_a_patch_comes_to(operations: list[Any], request_: dict[str, Any]) -> None:
    assert come_to(*operations) == (request_, ())


@pytest.mark.parametrize(
    ("operation", "error", "field"),
    [
        ({"path": "/name", "value": "x"}, errors.Invalid, "0.op"),
        (op("move", "/name", "x"), errors.Invalid, "0.op"),
        (op("test", "/name", "x"), errors.Invalid, "0.op"),
        ({"op": ["add"], "path": "/name", "value": "x"}, errors.Invalid, "0.op"),
        ({"op": "add", "value": "x"}, errors.Invalid, "0.path"),
        (op("add", 5, "x"), errors.Invalid, "0.path"),
        (op("add", "name", "x"), errors.Invalid, "0.path"),
        (op("add", "", "x"), errors.Invalid, "0.path"),
        (op("add", "/", "x"), errors.Invalid, "0.path"),
        (op("add", "//", "x"), errors.Invalid, "0.path"),
        (op("add", "/name/", "x"), errors.Invalid, "0.path"),
        (op("add", "/ ", "x"), errors.Invalid, "0.path"),
        (op("add", "/a~2b", "x"), errors.Invalid, "0.path"),
        (op("add", "/a~", "x"), errors.Invalid, "0.path"),
        (op("add", "/name/deeper", "x"), errors.Invalid, "0"),
        (op("add", "/tags/-", "x"), errors.Invalid, "0"),
        (op("add", "/locations", []), errors.Invalid, "0"),
        (op("replace", "/locations/0", {}), errors.Invalid, "0"),
        (op("remove", "/locations"), errors.Invalid, "0"),
        (op("add", "/name"), errors.Invalid, "0.value"),
        (op("add", "/name", 5), errors.Invalid, "name"),
        (op("add", "/name", "x" * 256), errors.Invalid, "name"),
        (op("add", "/name", "\x00"), errors.Invalid, "name"),
        (op("add", "/visibility", "secret"), errors.Invalid, "visibility"),
        (op("add", "/protected", "true"), errors.Invalid, "protected"),
        (op("add", "/min_disk", -1), errors.Invalid, "min_disk"),
        (op("add", "/min_ram", 1 << 31), errors.Invalid, "min_ram"),
        (op("add", "/min_ram", 1.5), errors.Invalid, "min_ram"),
        (op("add", "/tags", "one"), errors.Invalid, "tags"),
        (op("add", "/tags", [5]), errors.Invalid, "tags.0"),
        (op("add", "/tags", ["x" * 256]), errors.Invalid, "tags.0"),
        (op("add", "/disk_format", "floppy"), errors.Invalid, "disk_format"),
        (op("add", "/new", 5), errors.Invalid, "new"),
        (op("add", "/new", None), errors.Invalid, "new"),
        (op("add", "/new", "x" * (MAX_VALUE + 1)), errors.Invalid, "new"),
        (op("add", "/new", "\x1b[2J"), errors.Invalid, "new"),
        (op("add", "/" + "x" * 256, "1"), errors.Invalid, None),
        (op("add", "/locations/-", {"metadata": {}}), errors.Invalid, "locations.0.url"),
        *(
            (op("replace", f"/{name}", "x"), errors.Forbidden, None)
            for name in (
                "id", "size", "virtual_size", "status", "checksum", "os_hash_algo", "os_hash_value", "created_at", "updated_at", "self",
                "file", "schema", "direct_url", "stores", "location", "deleted", "deleted_at", "os_glance_importing_to_stores",
            )
        ),
        (op("remove", "/name"), errors.Forbidden, None),
        (op("remove", "/size"), errors.Forbidden, None),
        (op("replace", "/disk_format", "raw"), errors.Forbidden, None),
        (op("add", "/container_format", None), errors.Forbidden, None),
        (op("replace", "/absent", "x"), errors.Conflict, None),
        (op("remove", "/absent"), errors.Conflict, None),
        (op("replace", "/tags", [str(n) for n in range(MAX_TAGS + 1)]), errors.TooLarge, None),
    ],
)  # fmt: skip
def test_what_is_refused(operation: Any, error: type[errors.BrokerError], field: str | None) -> None:
    with pytest.raises(error) as raised:
        come_to(operation)
    assert raised.value.field == field


def test_formats_are_declared_while_there_are_no_bytes() -> None:
    queued = {**IMAGE, "status": "queued"}
    assert come_to(op("replace", "/disk_format", "raw"), op("add", "/container_format", None), image=queued).request == {
        "disk_format": "raw",
        "container_format": None,
    }


@pytest.mark.parametrize(
    ("operation", "outcome"),
    [
        ({"replace": "/name", "value": "after"}, {"name": "after"}),
        ({"add": "/new", "value": "x"}, {"properties": {"new": "x"}}),
        ({"remove": "/kept"}, {"properties": {"kept": None}}),
        ({"add": "/name", "value": "x"}, errors.Conflict),
        ({"add": "/kept", "value": "x"}, errors.Conflict),
        ({"replace": "/absent", "value": "x"}, errors.Conflict),
        ({"add": "/new", "replace": "/new", "value": "x"}, errors.Invalid),
        ({"op": "add", "path": "/new", "value": "x"}, errors.Invalid),
        ({"replace": "name", "value": "x"}, errors.Invalid),
    ],
)
def test_the_older_form(operation: Any, outcome: Any) -> None:
    if isinstance(outcome, dict):
        assert come_to(operation, media_type=V20).request == outcome
    else:
        with pytest.raises(outcome):
            come_to(operation, media_type=V20)


def test_locations_are_told_apart_in_their_order() -> None:
    place = {"url": "s3://bucket/key", "metadata": {}}
    found = come_to(op("add", "/locations/-", place), op("replace", "/name", "x"), op("remove", "/locations/0"))
    assert found.request == {"name": "x"}
    assert found.locations == (("add", ("locations", "-"), place), ("remove", ("locations", "0"), None))


def test_how_many_properties_an_image_may_have() -> None:
    free = MAX_PROPERTIES - len(IMAGE["properties"])
    most = [op("add", f"/p{number}", "x") for number in range(free)]
    assert len(come_to(*most).request["properties"]) == free
    for count in (free + 1, 10_000):
        with pytest.raises(errors.TooLarge, match=f"Maximum: {MAX_PROPERTIES}"):
            come_to(*(op("add", f"/p{number}", "x") for number in range(count)))
    assert come_to(op("remove", "/kept"), *most, op("add", "/last", "x"))


@given(st.dictionaries(st.text("ab/~01", min_size=1, max_size=4).filter(str.strip), st.sampled_from("xyz"), max_size=4), st.data())
def test_a_patch_between_any_two_states_leads_from_one_to_the_other(after: dict[str, str], data: st.DataObject) -> None:
    before: dict[str, str] = data.draw(st.dictionaries(st.sampled_from([*after, "c", "d/e"]), st.sampled_from("xyz")))

    def path(name: str) -> str:
        return "/" + name.replace("~", "~0").replace("/", "~1")

    operations = [op("remove", path(name)) for name in before if name not in after]
    operations += [op("replace" if name in before else "add", path(name), value) for name, value in after.items()]
    found = come_to(*data.draw(st.permutations(operations)), image={**IMAGE, "properties": before})
    merged = {name: value for name, value in (before | found.request.get("properties", {})).items() if value is not None}
    assert merged == after
