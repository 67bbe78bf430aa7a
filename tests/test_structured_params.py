"""What users may ask for in `SamplingParams.structured_outputs`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hermes_async import RequestError, SamplingParams, StructuredOutputs


def test_a_mapping_is_taken_as_the_class_is() -> None:
    schema = {"type": "object", "properties": {"é": {"type": "integer"}}}
    params = SamplingParams(structured_outputs={"json": schema})
    assert params.structured_outputs == StructuredOutputs(json=json.dumps(schema))
    assert SamplingParams(structured_outputs=StructuredOutputs(json=schema)) == params
    assert StructuredOutputs(choice=["a", "b"]).choice == ("a", "b")
    assert SamplingParams(structured_outputs=None).structured_outputs is None


def test_a_schema_is_kept_as_it_was() -> None:
    schema: dict[str, Any] = {"type": "object"}
    asked = StructuredOutputs(json=schema)
    schema["type"] = "array"
    assert asked.json == '{"type": "object"}'


def circular() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


def deep() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(10**5):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "exactly one"),
        ({"json": {}, "regex": "a"}, "exactly one"),
        ({"json_object": False}, "exactly one"),
        ({"json_object": 1}, "json_object must be True or False"),
        ({"grammar": "a"}, "no field 'grammar'"),
        ({"json": 5}, "json must be a text"),
        ({"json": {"minimum": float("nan")}}, "no JSON schema"),
        ({"json": {"const": object()}}, "no JSON schema"),
        ({"json": circular()}, "no JSON schema"),
        ({"json": {"description": "x" * 2**16}}, "more than 65536 bytes"),
        ({"json": "é" * 2**15 + "x"}, "more than 65536 bytes"),
        ({"regex": b"a"}, "regex must be a text"),
        ({"regex": "\ud800"}, "lone surrogate"),
        ({"regex": "x" * 8193}, "more than 8192 bytes"),
        ({"choice": []}, "at least one text"),
        ({"choice": ["a", ""]}, "none may be empty"),
        ({"choice": ["a", 5]}, "only str"),
        ({"choice": ["x" * 2**15] * 3}, "more than 65536 bytes"),
        ("json", "must be StructuredOutputs, a mapping or None, not str"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_asked_for(asked: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        SamplingParams(structured_outputs=asked)
    assert len(str(caught.value)) < 500


def test_a_schema_that_is_too_deep_for_python() -> None:
    with pytest.raises(RequestError, match="nested too deeply"):
        StructuredOutputs(json=deep())


@pytest.mark.parametrize("flag", ["ignore_eos", "include_stop_str_in_output"])
def test_nothing_may_follow_a_structured_answer(flag: str) -> None:
    with pytest.raises(RequestError, match=f"{flag} does not go with structured_outputs"):
        SamplingParams(structured_outputs={"json_object": True}, **{flag: True})
