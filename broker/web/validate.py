"""Checks what a request holds against the contract, and says of the first fault which field it is and what was expected.

Rules: a body with a discriminator is checked against the schema that it chooses, so that the error is about the field that
is wrong and not about alternatives; no value of the request is repeated in an error, whatever its size; a query is strict
UTF-8, has no parameter twice and none that is unknown, but for those that the contract declares as arrays and as free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

import jsonschema_rs
import orjson

from broker.errors import BrokerError, Invalid, Malformed
from broker.web.contract import Contract, JsonObject, Parameter

_Kind = jsonschema_rs.ValidationErrorKind
_INTEGER = re.compile(r"-?[0-9]{1,18}\Z")
_FRACTION = re.compile(rb"[\[:,\s]-?[0-9]+[.eE]")
_MAX_QUERY_FIELDS = 32
_MAX_SHOWN = 500


class BodyCheck:
    """Parses and checks the body of one operation."""

    def __init__(self, contract: Contract, schema: JsonObject, max_fields: int) -> None:
        self._max_fields = max_fields
        self._contract = contract
        target = contract.resolve(schema)
        discriminator = target.get("discriminator")
        self._property: str | None = None
        self._choices: dict[str, jsonschema_rs.Draft202012Validator] = {}
        if discriminator is not None:
            self._property = discriminator["propertyName"]
            self._choices = {value: _compile(contract, {"$ref": ref}) for value, ref in discriminator["mapping"].items()}
        self._validator = _compile(contract, schema)

    def __call__(self, raw: bytes) -> Any:
        """The value. Raises `Malformed` when it is no JSON, `Invalid` when it is not what the contract says."""
        if not raw:
            raise Malformed("A JSON body is required.")
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise Malformed(f"The body is no JSON: {error}.") from None
        if isinstance(value, dict) and len(value) > self._max_fields:  # before the validator copies them all into its error
            raise Invalid("The body has too many fields.", expected=f"at most {self._max_fields} fields")
        validator = self._validator if self._property is None else self._choose(value)
        try:
            if not validator.is_valid(value):
                raise first_fault(validator, value, self._contract.document)
        except ValueError:  # the validator takes 255 levels, the parser more
            raise Malformed("The body is nested too deeply.") from None
        if _FRACTION.search(raw) is not None:
            value = _whole_numbers(value)
        return value

    def _choose(self, value: Any) -> jsonschema_rs.Draft202012Validator:
        name = self._property or ""
        if not isinstance(value, dict):
            raise Invalid("The body must be an object.", expected="an object")
        chosen = value.get(name)
        validator = self._choices.get(chosen) if isinstance(chosen, str) else None
        if validator is None:
            raise Invalid(f"{name} says what is asked for.", field=name, expected=_one_of(self._choices))
        return validator


class ParameterCheck:
    """Reads and checks the parameters of one operation that are in one place."""

    def __init__(self, contract: Contract, parameters: Sequence[Parameter]) -> None:
        schemas = {parameter.name: contract.resolve(parameter.schema) for parameter in parameters}
        self._names = frozenset(schemas)
        self._integers = {name for name, schema in schemas.items() if schema.get("type") == "integer"}
        self._lists = {name for name, schema in schemas.items() if schema.get("type") == "array"}
        self._free = next((name for name, schema in schemas.items() if schema.get("type") == "object"), None)
        self._defaults = {name: schema["default"] for name, schema in schemas.items() if "default" in schema}
        self._schema: JsonObject = {
            "type": "object",
            "properties": {p.name: p.schema for p in parameters},
            "required": [p.name for p in parameters if p.required and p.place != "header"],  # 428 is for the handler
            "additionalProperties": False,
        }
        self._validator = _compile(contract, self._schema)
        self._root = {**contract.document, **self._schema}

    def __call__(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The values by name, with the defaults of those that are missing. Raises `Invalid`."""
        values: dict[str, Any] = {
            name: int(text) if name in self._integers and _INTEGER.match(text) else text for name, text in found.items()
        }
        try:
            valid = self._validator.is_valid(values)
        except UnicodeEncodeError:  # bytes over 127 in a header or a path come as lone surrogates
            raise Malformed("A path or a header is no UTF-8.") from None
        if not valid:
            raise first_fault(self._validator, values, self._root)
        return self._defaults | values

    def query(self, query: str) -> dict[str, Any]:
        """As above, from a query string."""
        if not query:
            return dict(self._defaults)
        try:
            pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=_MAX_QUERY_FIELDS)
        except ValueError:
            raise Malformed(f"The query is no UTF-8, or has more than {_MAX_QUERY_FIELDS} parameters.") from None
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in self._lists:
                found.setdefault(name, []).append(value)
            else:
                place = found.setdefault(self._free, {}) if self._free is not None and name not in self._names else found
                if name in place:
                    raise Invalid("A query parameter is given twice.", expected="each parameter once")
                place[name] = value
        return self(found)


def first_fault(validator: jsonschema_rs.Draft202012Validator, value: Any, root: JsonObject) -> BrokerError:
    """The error for the first thing that is wrong with `value`. `root` is the document that the validator's schema stands in."""
    try:
        validator.validate(value)  # not iter_errors, which finds them all first: gigabytes, for a body of millions of faults
    except jsonschema_rs.ValidationError as error:
        return _fault(error, root)
    return Invalid("The value is not what the contract says.")


def _compile(contract: Contract, schema: JsonObject) -> jsonschema_rs.Draft202012Validator:
    return _compiled(contract, orjson.dumps(schema))


@cache
def _compiled(contract: Contract, schema: bytes) -> jsonschema_rs.Draft202012Validator:
    """Many operations take the same; each costs the components of its whole contract."""
    return jsonschema_rs.Draft202012Validator({**orjson.loads(schema), "components": contract.document["components"]})


def _fault(error: jsonschema_rs.ValidationError, root: JsonObject) -> Invalid:
    error = _nearest(error)
    path = list(error.instance_path)
    expected = _expected(error, root)
    if isinstance(error.kind, _Kind.AdditionalProperties):
        path.append(sorted(error.kind.unexpected)[0])
        text = "There is no such field."
    elif isinstance(error.kind, _Kind.Required):
        path.append(error.kind.property)
        text = "A field is missing."
    else:
        text = "The value is not allowed here."
    field = ".".join(str(step) for step in path)
    return Invalid(text, field=_printable(field)[:_MAX_SHOWN] or None, expected=expected[:_MAX_SHOWN])


def _nearest(error: jsonschema_rs.ValidationError) -> jsonschema_rs.ValidationError:
    """Of alternatives, the error in the one that was meant: that whose type fits."""
    while isinstance(error.kind, _Kind.OneOfNotValid | _Kind.AnyOf):
        branches = [branch[0] for branch in error.kind.context if branch]
        depth = len(error.instance_path)
        fitting = [inner for inner in branches if not (isinstance(inner.kind, _Kind.Type) and len(inner.instance_path) == depth)]
        if len(fitting) != 1:
            break
        error = fitting[0]
    return error


def _expected(error: jsonschema_rs.ValidationError, root: JsonObject) -> str:
    match error.kind:
        case _Kind.AdditionalProperties():
            known = sorted(_schema_of(error, root).get("properties", ()))
            return _one_of(known) if known else "no field"
        case _Kind.Required():
            return "this field"
        case _Kind.Type(types=types):
            return " or ".join(types)
        case _Kind.Enum(options=options):
            return _one_of(options)
        case _Kind.Constant(expected_value=value):
            return str(value)
        case _Kind.Minimum(limit=limit):
            return f"at least {limit}"
        case _Kind.Maximum(limit=limit):
            return f"at most {limit}"
        case _Kind.MinLength(limit=limit):
            return f"at least {limit} characters"
        case _Kind.MaxLength(limit=limit):
            return f"at most {limit} characters"
        case _Kind.MinItems(limit=limit):
            return f"at least {limit} items"
        case _Kind.MaxItems(limit=limit):
            return f"at most {limit} items"
        case _Kind.MinProperties(limit=limit):
            return f"at least {limit} fields"
        case _Kind.MaxProperties(limit=limit):
            return f"at most {limit} fields"
        case _Kind.UniqueItems():
            return "each item once"
        case _Kind.Pattern(pattern=pattern):
            described: str | None = _schema_of(error, root).get("description")
            return f"{described} It matches {pattern}" if described else f"a text that matches {pattern}"
        case _Kind.PropertyNames(error=inner):
            return "names: " + _expected(inner, root)
        case _Kind.OneOfNotValid(context=context) | _Kind.OneOfMultipleValid(context=context):
            names = [name for schema in _alternatives(error, root) for name in schema.get("required", ())]
            if names:
                return f"exactly one of {', '.join(names)}"
            return " or ".join(_expected(branch[0], root) for branch in context if branch)
        case _:
            return "what the contract says"


def _alternatives(error: jsonschema_rs.ValidationError, root: JsonObject) -> list[JsonObject]:
    return list(_schema_of(error, root).get("oneOf", ()))


def _schema_of(error: jsonschema_rs.ValidationError, root: JsonObject) -> JsonObject:
    """The schema whose keyword failed, where `root` has it."""
    found: Any = root
    try:
        for step in list(error.schema_path)[:-1]:
            found = found[step]
    except (KeyError, IndexError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _one_of(values: Iterable[Any]) -> str:
    return "one of " + ", ".join(str(value) for value in values)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "�" for char in text[: _MAX_SHOWN + 1])


def _whole_numbers(value: Any) -> Any:
    """1.0 is an integer in JSON Schema; here it becomes one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return value
