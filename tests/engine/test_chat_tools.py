"""Tools, calls of tools and variables beside transformers' own chat templates, and what they must be."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hermes_async.engine.chat_messages import checked_messages, render
from hermes_async.engine.chat_tools import MAX_DEPTH, RESERVED_VARIABLES, checked_tools, checked_variables
from hermes_async.errors import RequestError
from hermes_async.serving.tokenizer import SharedTokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "({% for key, value in call.function.arguments.items() %}{{ key }}={{ value }};{% endfor %})"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASKED = [{"role": "user", "content": "a"}]


def tokenizer(template: Any = TEMPLATE) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    fast.chat_template = template
    return fast


def nested(depth: int) -> Any:
    value: Any = "a"
    for _ in range(depth):
        value = [value]
    return value


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def test_tools_reach_the_template_as_transformers_gives_them() -> None:
    using = tokenizer()
    expected = using.apply_chat_template(ASKED, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert render(SharedTokenizer(using), ASKED, tools=[TOOL]) == expected
    assert expected == json.dumps(TOOL) + "\n[user]a[assistant]"
    assert (
        render(SharedTokenizer(using), ASKED, tools=()) == render(SharedTokenizer(using), ASKED) == "[user]a[assistant]"
    )


def test_tools_choose_the_template_that_is_made_for_them() -> None:
    using = tokenizer({"default": "plain", "tool_use": "{{ tools[0].function.name }}"})
    assert render(SharedTokenizer(using), ASKED, tools=[TOOL]) == "weather"
    assert render(SharedTokenizer(using), ASKED) == "plain"


def test_variables_reach_the_template() -> None:
    using = tokenizer()
    assert (
        render(SharedTokenizer(using), ASKED, chat_template_kwargs={"enable_thinking": False})
        == "[user]a[assistant]<think></think>"
    )
    assert render(SharedTokenizer(using), ASKED, chat_template_kwargs={}) == "[user]a[assistant]"
    assert render(SharedTokenizer(using), ASKED, add_generation_prompt=False) == "[user]a"


def test_the_template_gets_arguments_as_a_mapping() -> None:
    messages = [
        {"role": "assistant", "tool_calls": [call('{"city": "Paris", "days": 2}'), call({"city": "Oslo"})]},
        {"role": "assistant", "content": None, "tool_calls": [call(""), call(None), {"function": {"name": "now"}}]},
    ]
    assert render(SharedTokenizer(tokenizer()), messages, add_generation_prompt=False) == (
        "[assistant]weather(city=Paris;days=2;)weather(city=Oslo;)[assistant]weather()weather()now()"
    )
    assert messages[0]["tool_calls"][0] == call('{"city": "Paris", "days": 2}')  # not changed


def test_reasoning_reaches_the_template() -> None:
    message = {"role": "assistant", "reasoning_content": "hm"}
    assert (
        render(SharedTokenizer(tokenizer()), [message], add_generation_prompt=False) == "[assistant]<think>hm</think>"
    )


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_the_name_that_the_response_template_gives_it(given: str) -> None:
    using = tokenizer("{% for m in messages %}{{ m.thinking }}|{% endfor %}")
    using.response_template = {"start_anchor": "a", "fields": {"thinking": {"open": "<", "close": ">"}}}
    messages = [{"role": "assistant", "content": "a", given: "hm"}, {"role": "user", "content": "a"}]
    assert render(SharedTokenizer(using), messages) == "hm||"


def test_a_template_cannot_leave_its_sandbox() -> None:
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set messages = cycler.__init__.__globals__ %}{{ messages.os }}",
    ):
        with pytest.raises(RequestError, match="chat template failed: SecurityError"):
            render(SharedTokenizer(tokenizer(template)), ASKED)


def test_every_argument_of_transformers_call_is_reserved() -> None:
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert set(arguments) - {"kwargs", "documents"} <= RESERVED_VARIABLES  # documents are a template's variable


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        (5, "tools come in a list, not in a int"),
        ("tools", "tools come in a list, not in a str"),
        (TOOL, "tools come in a list, not in a dict"),
        ([TOOL, "weather"], "tool 1 is of type str"),
        ([{"function": {"name": "weather"}}], "tool 0 has no type; the only type is 'function'"),
        ([{"type": "web_search"}], "tool 0 has the type 'web_search'"),
        ([{"type": "function"}], "tool 0 has no function"),
        ([{"type": "function", "function": "weather"}], "tool 0 has the function 'weather'"),
        ([{"type": "function", "function": {}}], "tool 0 has a function with no name"),
        ([{"type": "function", "function": {"name": ""}}], "tool 0 has a function with the name ''"),
        ([{"type": "function", "function": {"name": 5}}], "tool 0 has a function with a name of type int"),
        ([{"type": "function", "function": {"name": "a", "description": 5}}], "tool 0 has a description of type int"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], "tool 0 has a parameters of type list"),
        ([{"type": "function", "function": {"name": "a\ud800"}}], "tool 0 has a lone surrogate"),
        ([{**TOOL, "\udfff": 1}], "tool 0 has a lone surrogate"),
        ([{**TOOL, 5: 1}], "tool 0 has a key of type int; keys are texts"),
        ([{**TOOL, "x": {1, 2}}], "tool 0 has a value of type set, which is not JSON"),
        ([{**TOOL, "x": float("nan")}], "tool 0 has a value of type float, which is not JSON: nan"),
        ([{**TOOL, "x": nested(MAX_DEPTH)}], f"nested more than {MAX_DEPTH} deep"),
        ([{**TOOL, "x": nested(100_000)}], f"nested more than {MAX_DEPTH} deep"),
    ],
)
def test_tools_that_are_none(tools: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        checked_tools(tools)
    with pytest.raises(RequestError, match=says):
        render(SharedTokenizer(tokenizer()), ASKED, tools=tools)


def test_tools_may_be_nested() -> None:
    assert checked_tools(({**TOOL, "x": nested(MAX_DEPTH - 1)},)) == [{**TOOL, "x": nested(MAX_DEPTH - 1)}]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (5, "must be a mapping, not int"),
        ([("a", 1)], "must be a mapping, not list"),
        ({"chat_template": "{{ 1 }}"}, "the template is the checkpoint's"),
        ({"messages": []}, "'messages', which the engine sets"),
        ({"tools": []}, "'tools', which the engine sets"),
        ({"tokenize": True}, "'tokenize', which the engine sets"),
        ({"add_generation_prompt": False}, "'add_generation_prompt', which the engine sets"),
        ({"a b": 1}, "'a b', which cannot be the name of a variable"),
        ({5: 1}, "5, which cannot be the name of a variable"),
        ({"a": object()}, "a value of type object, which is not JSON"),
        ({"a": "\ud800"}, "a lone surrogate"),
        ({"a": nested(MAX_DEPTH)}, f"nested more than {MAX_DEPTH} deep"),
    ],
)
def test_variables_that_are_none(variables: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        checked_variables(variables)
    with pytest.raises(RequestError, match=says):
        render(SharedTokenizer(tokenizer()), ASKED, chat_template_kwargs=variables)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("{", "message 1 has a tool call 1 whose arguments are not JSON: Expecting property name"),
        ("[" * 100_000, "message 1 has a tool call 1 whose arguments are not JSON"),
        ('"city"', "message 1 has a tool call 1 whose arguments are JSON, but no object"),
        ('{"a": "\\ud800"}', "message 1 has a tool call 1 whose arguments has a lone surrogate"),
        (f'{{"a": {"[" * MAX_DEPTH}{"]" * MAX_DEPTH}}}', f"nested more than {MAX_DEPTH} deep"),
    ],
)
def test_arguments_that_are_no_json_object(arguments: str, says: str) -> None:
    messages = [*ASKED, {"role": "assistant", "tool_calls": [call("{}"), call(arguments)]}]
    with pytest.raises(RequestError, match=says):
        render(SharedTokenizer(tokenizer()), messages)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"tool_calls": "weather"}, "message 0, of role 'assistant', has the tool_calls 'weather'"),
        ({"tool_calls": ["weather"]}, "has a tool call 0 of type str"),
        ({"tool_calls": [call("{}"), {"function": "weather"}]}, "has a tool call 1 with the function 'weather'"),
        ({"content": "a", "reasoning_content": 5}, "has a reasoning_content of type int"),
        ({"content": "a", "x": nested(100_000)}, f"nested more than {MAX_DEPTH} deep"),
    ],
)
def test_calls_that_are_none(message: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        checked_messages([{"role": "assistant", **message}])
