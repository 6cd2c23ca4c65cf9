"""The contract, schemas/openapi.json, read: which operations there are, and what each takes.

The only place that knows how OpenAPI is spelled. References are resolved here, but for those inside schemas, which the
validator resolves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import orjson

from broker.model import Role

Place = Literal["path", "query", "header"]
JsonObject = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A value in the path, the query or a header."""

    name: str
    place: Place
    schema: JsonObject
    required: bool


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path. `body` is the schema of a body that must be there, of `body_limit` bytes at most; `media_type` what it
    must be."""

    id: str
    method: str
    path: str
    parameters: tuple[Parameter, ...]
    media_type: str | None
    body: JsonObject | None
    body_limit: int
    secured: bool
    roles: frozenset[Role]
    """Who may call it; empty for everyone who is known."""

    def of(self, place: Place) -> tuple[Parameter, ...]:
        return tuple(parameter for parameter in self.parameters if parameter.place == place)


@cache
def text() -> bytes:
    """The document as it is served."""
    return (resources.files("broker.schemas") / "openapi.json").read_bytes()


@cache
def document() -> dict[str, Any]:
    """The document as a value. Not to be changed."""
    found: dict[str, Any] = orjson.loads(text())
    return found


def operations() -> tuple[Operation, ...]:
    """Every operation of the contract."""
    contract = document()
    found = []
    for path, item in contract["paths"].items():
        for method, operation in item.items():
            if method == "parameters":
                continue
            parameters = [*item.get("parameters", ()), *operation.get("parameters", ())]
            media_type, body = _body(operation)
            found.append(
                Operation(
                    id=operation["operationId"],
                    method=method.upper(),
                    path=path,
                    parameters=tuple(_parameter(resolve(entry)) for entry in parameters),
                    media_type=media_type,
                    body=body,
                    body_limit=operation.get("x-body-limit", 0),
                    secured=bool(operation.get("security", contract["security"])),
                    roles=frozenset(Role(role) for role in operation.get("x-roles", ())),
                )
            )
    return tuple(found)


def resolve(entry: JsonObject) -> JsonObject:
    """`entry`, or what it refers to in this document."""
    while "$ref" in entry:
        target: Any = document()
        for step in entry["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        entry = target
    return entry


def _parameter(entry: JsonObject) -> Parameter:
    return Parameter(entry["name"], entry["in"], entry["schema"], entry.get("required", False))


def _body(operation: JsonObject) -> tuple[str | None, JsonObject | None]:
    content = resolve(operation.get("requestBody", {})).get("content", {})
    for media_type, entry in content.items():
        return media_type, entry["schema"]
    return None, None
