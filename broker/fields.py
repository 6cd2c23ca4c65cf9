"""What is wrong with a settings document by schemas/config.json, said for people: every field, and what was probably meant.

Rules: a text names the field and what is allowed there. It repeats a value only where none can be secret: not below
``database``, ``keys`` and ``credentials_dir``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import jsonschema_rs
import orjson

_NEVER_SHOWN = ("database", "keys", "credentials_dir")
_MAY_HOLD_PASSWORDS = {
    "database.url": "must begin with postgresql://",
    "auth.keystone.url": "must be an http(s) URL without a user, a query and a fragment",
}
"""Fields whose wrong values are not repeated, and what is expected of them."""

_KIND = jsonschema_rs.ValidationErrorKind
_DIVERSE = (_KIND.Pattern, _KIND.OneOfNotValid, _KIND.AnyOf)


class Problem(NamedTuple):
    """One thing that is wrong, and the way to it from the top of the document."""

    path: tuple[str | int, ...]
    text: str


def problems(document: Mapping[str, Any]) -> list[Problem]:
    """Everything that the schema refuses in `document`, in the schema's order."""
    # TOML's dates are no JSON; as text they fail by the type that the field wants.
    plain = orjson.loads(orjson.dumps(document, default=str))
    found = []
    for error in jsonschema_rs.Draft202012Validator(_schema()).iter_errors(plain):
        place = tuple(error.instance_path)
        path = [str(step) for step in place]
        if isinstance(error.kind, _KIND.AdditionalProperties):
            found += [Problem((*place, name), _unknown(path, name)) for name in sorted(error.kind.unexpected)]
        elif isinstance(error.kind, _KIND.Required):
            found.append(Problem(place, f"{'.'.join(path)}: {error.kind.property} is missing"))
        else:
            found.append(Problem(place, f"{'.'.join(path) or 'the document'}: {_wrong(path, error)}"))
    return found


def without(document: Mapping[str, Any], path: Sequence[str | int]) -> dict[str, Any]:
    """`document` without the field at `path`; without the whole list where that is in one."""
    name, *rest = path
    kept = dict(document)
    inner = kept.pop(str(name), None)
    if rest and isinstance(inner, Mapping):
        kept[str(name)] = without(inner, rest)
    return kept


def suggestion(name: str, known: Sequence[str]) -> str:
    """The end of a sentence on an unknown `name`: what was probably meant, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown(path: Sequence[str], name: str) -> str:
    full = ".".join([*path, name])
    here = list(_at(path).get("properties", ()))
    # Right name, wrong place: `passphrase_file` at the top, or below `http`.
    elsewhere = [field for field in _all_fields(_schema()) if field.rpartition(".")[2] == name]
    close = suggestion(name, here)
    if not close and elsewhere:
        close = f"; did you mean {elsewhere[0]}?"
    if not close and path:
        close = f"; known: {', '.join(here)}"
    return f"unknown field {full}{close}"


def _wrong(path: Sequence[str], error: Any) -> str:
    if ".".join(path) in _MAY_HOLD_PASSWORDS:
        return _MAY_HOLD_PASSWORDS[".".join(path)]
    described = _at(path).get("description")
    if path[:1] and path[0] in _NEVER_SHOWN:
        kind = _at(path).get("type")
        return f"not allowed here; expected: {described or kind or 'see the README'}"
    if described and isinstance(error.kind, _DIVERSE):
        shown = orjson.dumps(error.instance).decode()[:80]
        return f"{shown} is not allowed; expected: {described}"
    if isinstance(error.kind, _KIND.Enum):
        return f"{orjson.dumps(error.instance).decode()[:80]} is not one of {', '.join(_at(path)['enum'])}"
    text: str = error.message
    return text


def _at(path: Sequence[str]) -> Mapping[str, Any]:
    """The schema of the field at `path`; empty where it says nothing."""
    schema: Any = _schema()
    for step in path:
        if step.isdigit() and "items" in schema:
            schema = schema["items"]
        else:
            others = schema.get("additionalProperties")
            schema = schema.get("properties", {}).get(step) or (others if isinstance(others, Mapping) else {})
        if schema.get("$ref", "").startswith("#/$defs/"):
            schema = {**_schema()["$defs"][schema["$ref"].removeprefix("#/$defs/")], **schema}
    return schema if isinstance(schema, Mapping) else {}


def _all_fields(schema: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        yield prefix + name
        yield from _all_fields(field.get("items", field), f"{prefix}{name}.")


@cache
def _schema() -> Any:
    return orjson.loads((resources.files("broker.schemas") / "config.json").read_bytes())
