"""A contract, such as schemas/openapi.json, read: which operations there are, and what each takes.

The only place that knows how OpenAPI is spelled. References are resolved here, but for those inside schemas, which the
validator resolves. Every dialect has a contract of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any, Literal

import orjson

from broker.model import Role

Place = Literal["path", "query", "header"]
JsonObject = Mapping[str, Any]

MAX_FIELDS = 64
"""Fields that a body may have at its top, where the operation does not say (``x-max-fields``)."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A value in the path, the query or a header. A query parameter whose schema is an array may come several times; one whose
    schema is an object takes all parameters that have no name of their own (OpenAPI's style ``form``, exploded)."""

    name: str
    place: Place
    schema: JsonObject
    required: bool


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path. `bodies` are the schemas of a body by media type, of `body_limit` bytes and `max_fields` fields at most."""

    id: str
    method: str
    path: str
    parameters: tuple[Parameter, ...]
    bodies: Mapping[str, JsonObject]
    body_required: bool
    body_ignored: bool
    """A body may come and is never read; the connection ends with the answer (``x-body-ignored``)."""
    body_limit: int
    max_fields: int
    secured: bool
    roles: frozenset[Role]
    """Who may call it; empty for everyone who is known."""

    def of(self, place: Place) -> tuple[Parameter, ...]:
        return tuple(parameter for parameter in self.parameters if parameter.place == place)


class Contract:
    """One document of schemas/."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def text(self) -> bytes:
        """The document as it is served."""
        return (resources.files("broker.schemas") / self.name).read_bytes()

    @cached_property
    def document(self) -> dict[str, Any]:
        """The document as a value. Not to be changed."""
        found: dict[str, Any] = orjson.loads(self.text)
        return found

    def operations(self) -> tuple[Operation, ...]:
        """Every operation of the contract."""
        return tuple(
            self._operation(path, method, item.get("parameters", ()), operation)
            for path, item in self.document["paths"].items()
            for method, operation in item.items()
            if method != "parameters"
        )

    def _operation(self, path: str, method: str, shared: Any, operation: JsonObject) -> Operation:
        request = self.resolve(operation.get("requestBody", {}))
        return Operation(
            id=operation["operationId"],
            method=method.upper(),
            path=path,
            parameters=tuple(_parameter(self.resolve(entry)) for entry in [*shared, *operation.get("parameters", ())]),
            bodies={media_type: entry["schema"] for media_type, entry in request.get("content", {}).items()},
            body_required=request.get("required", False),
            body_ignored=operation.get("x-body-ignored", False),
            body_limit=operation.get("x-body-limit", 0),
            max_fields=operation.get("x-max-fields", MAX_FIELDS),
            secured=bool(operation.get("security", self.document["security"])),
            roles=frozenset(Role(role) for role in operation.get("x-roles", ())),
        )

    def resolve(self, entry: JsonObject) -> JsonObject:
        """`entry`, or what it refers to in this document."""
        while "$ref" in entry:
            target: Any = self.document
            for step in entry["$ref"].removeprefix("#/").split("/"):
                target = target[step]
            entry = target
        return entry


def _parameter(entry: JsonObject) -> Parameter:
    return Parameter(entry["name"], entry["in"], entry["schema"], entry.get("required", False))


NATIVE = Contract("openapi.json")
"""The broker's own API."""
