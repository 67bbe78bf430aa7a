"""Refuses JSON schemas whose grammar could take unbounded time, memory or stack to compile.

llguidance bounds most of its work itself. What it does not bound is bounded here, before it sees the schema: recursion
through nesting and references, intersections of schemas (their sizes multiply), multiples (an automaton has a state for
each remainder), and regular expressions (their costs grow with the square of their length).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from hermes_async.errors import RequestError

_MAX_NESTING = 64
_MAX_LEVELS = 600
"""Of all that references lead to, one below the other. A level takes up to 3 KiB of the thread's stack."""

_MAX_INTERSECTIONS = 2048
_MAX_PATTERN_BYTES = 8 * 1024
_MAX_PATTERN_PROPERTIES = 16
_MAX_MULTIPLES = 1000
_MULTIPLES = (1e-6, 1e6)

_NUMBER = (int, float)
_NESTED = ("anyOf", "oneOf", "allOf", "items", "prefixItems", "additionalItems", "additionalProperties")
_ASSERTIONS = frozenset(
    {
        *("required", "minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength", "pattern"),
        *("format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Checks a parsed JSON schema.

    Raises:
        RequestError: It is too deep or too complex, or refers to something outside of it.
    """
    if "x-guidance" in schema:
        raise _refused("the keyword 'x-guidance' is not supported")
    nodes = list(_walk(schema))
    _check_regexes(nodes)
    _check_multiples(nodes)
    sizes = _Sizes(schema)
    sizes.check_levels(nodes)
    sizes.size(schema)
    num_patterns = sum(len(node["patternProperties"]) for node in nodes if _has(node, "patternProperties", dict))
    if num_patterns > _MAX_PATTERN_PROPERTIES or sizes.num_intersections * num_patterns**2 > _MAX_INTERSECTIONS:
        raise _refused("it has too many patternProperties")
    if sizes.num_intersections and len({node["multipleOf"] for node in nodes if _has(node, "multipleOf", _NUMBER)}) > 1:
        raise _refused("it combines schemas, and has different values of multipleOf")


def _refused(why: str) -> RequestError:
    return RequestError(f"structured_outputs.json cannot be used: {why}")


def _has(node: Mapping[str, Any], key: str, kind: Any) -> bool:
    """Whether a keyword has a value of this type; a property of that name has a schema instead."""
    return isinstance(node.get(key), kind) and not isinstance(node.get(key), bool)


def _walk(schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All mappings in a schema."""
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        node, depth = stack.pop()
        if depth > _MAX_NESTING:
            raise _refused(f"it is nested more than {_MAX_NESTING} levels deep")
        if isinstance(node, dict):
            if depth > 1 and (_has(node, "$id", str) or _has(node, "$schema", str)):
                raise _refused("only its top level may have $id and $schema")
            yield node
        values = node.values() if isinstance(node, dict) else node
        stack += [(value, depth + 1) for value in values if isinstance(value, (dict, list))]


def _check_regexes(nodes: list[dict[str, Any]]) -> None:
    num_bytes = sum(len(node["pattern"].encode()) for node in nodes if _has(node, "pattern", str))
    num_bytes += sum(
        len(pattern.encode()) for node in nodes if _has(node, "patternProperties", dict)
        for pattern in node["patternProperties"]
    )  # fmt: skip
    if num_bytes > _MAX_PATTERN_BYTES:
        raise _refused(f"its regular expressions have more than {_MAX_PATTERN_BYTES} bytes")


def _check_multiples(nodes: list[dict[str, Any]]) -> None:
    values = [node["multipleOf"] for node in nodes if _has(node, "multipleOf", _NUMBER)]
    if not all(_MULTIPLES[0] <= value <= _MULTIPLES[1] for value in values):
        raise _refused(f"multipleOf must be from {_MULTIPLES[0]:g} to {_MULTIPLES[1]:g}")
    # A factor of ten costs nothing: it is a zero, or a place of the point.
    digits = [int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits))) for value in values]
    if sum(digits) > _MAX_MULTIPLES or math.prod(set(digits)) > _MAX_MULTIPLES:
        raise _refused("its values of multipleOf have too many digits")


def _schemas_of(key: str, value: Any) -> list[Any]:
    """The schemas in the value of a keyword."""
    if key in ("properties", "patternProperties"):
        return list(value.values()) if isinstance(value, dict) else []
    if key in _NESTED:
        return value if isinstance(value, list) else [value]
    return []


class _Sizes:
    """Upper bounds on what the compiler makes of each part of a schema."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        # All mutable state. Sizes and heights are by `id`: the schema lives as long as this object.
        self._sizes: dict[int, int] = {}
        self._heights: dict[int, int] = {}
        self.num_intersections = 0

    def check_levels(self, nodes: list[dict[str, Any]]) -> None:
        """Bounds the recursion: the compiler follows each reference once, at any depth."""
        references = {node["$ref"] for node in nodes if _has(node, "$ref", str)}
        levels = self._height(self._root)
        for reference in references:
            levels += self._height(self._target(reference))
            if levels > _MAX_LEVELS:
                raise _refused("its references lead too deep")

    def _height(self, node: Any) -> int:
        if not isinstance(node, (dict, list)):
            return 0
        known = self._heights.get(id(node))
        if known is None:
            values = node.values() if isinstance(node, dict) else node
            known = self._heights[id(node)] = 1 + max((self._height(value) for value in values), default=0)
        return known

    def _target(self, reference: str) -> Any:
        """What a reference leads to. It never leaves the schema."""
        if reference != "#" and not reference.startswith("#/"):
            raise _refused(f"$ref must begin with '#/', not {reference!r:.100}")
        node: Any = self._root
        for part in reference.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and name in node:
                node = node[name]
            elif isinstance(node, list) and name.isdecimal() and len(name) < 6 and int(name) < len(node):
                node = node[int(name)]
            else:
                raise _refused(f"$ref {reference!r:.100} leads nowhere")
        return node

    def size(self, schema: Any) -> int:
        """The number of schemas that one becomes. The sizes of parts that must hold together multiply."""
        if not isinstance(schema, dict):
            return 1
        known = self._sizes.get(id(schema))
        if known is not None:
            return known
        self._sizes[id(schema)] = 1  # for references to itself
        own, parts = 1, []
        for key, value in schema.items():
            nested = _schemas_of(key, value)
            if key == "enum" and isinstance(value, list):
                parts.append(len(value))
            elif key == "$ref" and isinstance(value, str):
                parts.append(self.size(self._target(value)))
            elif key in _ASSERTIONS:
                own += 1
            elif key in ("anyOf", "oneOf"):
                part = 0
                for each in nested:  # no comprehensions here: each level of recursion takes one frame
                    part += self.size(each)
                parts.append(part)
            elif key == "allOf":
                for each in nested:
                    parts.append(self.size(each))  # noqa: PERF401
            else:
                for each in nested:
                    own += self.size(each)
        if own > 1 or not parts:
            parts.append(own)
        size = math.prod(max(part, 2) for part in parts) if len(parts) > 1 else parts[0]
        if len(parts) > 1:
            self.num_intersections += size
            if self.num_intersections > _MAX_INTERSECTIONS:
                raise _refused("it combines too many schemas by allOf, or by anyOf, oneOf, enum or $ref beside others")
        self._sizes[id(schema)] = size
        return size
