"""Answers in the manner of published models, cut at every place, beside transformers' `parse_response`."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hermes_async import CheckpointError, MessageDelta, RequestError, ResponseStream, ToolCall
from hermes_async.engine.response import prepare_response_stream
from hermes_async.modeling import bounded_patterns, chat_api
from hermes_async.serving.tokenizer import SharedTokenizer

CALL = {"type": "function", "function": "{content}"}
NAMED_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}

# Think tags and JSON in tags, which are no special tokens, as Qwen3 has them.
QWEN = {
    "start_anchor": "<|im_start|>assistant\n",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True,
            "transform": CALL,
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>"},
    },
}  # fmt: skip
# Special tokens around calls, bare keys and strings in special tokens, as Gemma has them.
GEMMA = {
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "thinking": {"open": "<|channel>thought\n", "close": "<channel|>"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)", "close": "<tool_call|>", "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]}, "repeats": True,
            "transform": NAMED_CALL,
        },
        "content": {"close": ["<turn|>", "<|tool_response>"]},
    },
}  # fmt: skip
# Messages in channels, and nothing between them, as GPT-OSS has them.
GPT_OSS = {
    "start_anchor": "<|start|>assistant",
    "fields": {
        "thinking": {
            "open": "<|channel|>analysis<|message|>", "close": ["<|end|>", "<|return|>"], "repeats": True,
            "join": "\n\n",
        },
        "tool_calls": {
            "open_pattern": r"<\|channel\|>commentary to=functions\.(?P<name>\w+) *(<\|constrain\|>json)?<\|message\|>",
            "close": "<|call|>", "content": "json", "repeats": True, "transform": NAMED_CALL,
        },
        "content": {"open": "<|channel|>final<|message|>", "close": ["<|return|>", "<|end|>"]},
    },
}  # fmt: skip
PLAIN = {
    "start_anchor": "A:",
    "fields": {"content": {"content_args": {"strip": False}}, "reasoning": {"open": "(", "close": ")"}},
}
SPECIAL = {
    "qwen": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "gemma": ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<eos>",
              "<|tool_response>", "<tool_response|>"],
    "gpt-oss": ["<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>", "<|constrain|>"],
    "plain": ["</s>"],
}  # fmt: skip
TEMPLATES = {"qwen": QWEN, "gemma": GEMMA, "gpt-oss": GPT_OSS, "plain": PLAIN}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"properties": {"days": {"type": "integer"}}}},
    }
]


def tokenizer(kind: str) -> Any:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), eos_token=SPECIAL[kind][-1]
    )
    fast.add_special_tokens({"extra_special_tokens": SPECIAL[kind]})
    fast.response_template = TEMPLATES[kind]
    return fast


def stream(kind: str, prefix: str, tools: Any = None) -> ResponseStream:
    opened: Any = SimpleNamespace(tokenizer=SharedTokenizer(tokenizer(kind)))
    made = prepare_response_stream(opened, prefix, tools=tools, chat_template_kwargs=None)
    assert made is not None
    return made


def together(deltas: list[MessageDelta]) -> tuple[str, str, list[Any]]:
    calls = [delta.tool_call for delta in deltas if delta.tool_call is not None]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert all(
        len([part for part in (delta.content, delta.reasoning, delta.tool_call) if part]) == 1 for delta in deltas
    )
    return (
        "".join(delta.content for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        [(call.name, json.loads(call.arguments)) for call in calls],
    )


def parsed(kind: str, prefix: str, text: str, tools: Any = None) -> tuple[str, str, list[Any]]:
    message = tokenizer(kind).parse_response(text, prefix=prefix, tools=tools)
    functions = [call["function"] for call in message.get("tool_calls", [])]
    reasoning = [message[name] for name in ("reasoning_content", "thinking", "reasoning") if name in message]
    return (
        message.get("content", ""),
        "".join(reasoning),
        [(function["name"], function["arguments"]) for function in functions],
    )


def ways_to_cut(text: str) -> list[list[str]]:
    return [[text[:idx], text[idx:]] for idx in range(len(text) + 1)] + [list(text), [text]]


QWEN_PROMPT = "<|im_start|>user\n<think>no</think><|im_end|>\n<|im_start|>assistant\n"
ANSWERS = [
    ("qwen", QWEN_PROMPT, "Hello, <b>you</b> < 5!\n\nBye\n<|im_end|>"),
    ("qwen", QWEN_PROMPT, "<think>\nHm, 1 < 2.\n\n</think>\n\nHello  <|im_end|>"),
    ("qwen", QWEN_PROMPT + "<think>\n", "Hm\n</think>\n\nHello"),
    ("qwen", QWEN_PROMPT + "<think>\n\n</think>\n\n", "Hello<|im_end|>"),
    ("qwen", QWEN_PROMPT, "<think>not at an end"),
    ("qwen", QWEN_PROMPT, ""),
    ("qwen", QWEN_PROMPT, "<think>\n\n</think>\n\n<|im_end|>"),
    (
        "qwen",
        QWEN_PROMPT,
        '<think>\nA</think>\nLet me see.\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n'
        '</tool_call>\n<tool_call>{"name": "now", "arguments": {}}</tool_call><|im_end|>',
    ),
    ("qwen", QWEN_PROMPT, '<tool_call>{"name": "weather", "arguments": {"days": "3"}}'),  # at the end of max_tokens
    ("gemma", "<|turn>model\n", "<|channel>thought\nHm\n<channel|>Hello <turn|>"),
    (
        "gemma",
        "<|turn>user\nHello<turn|>\n<|turn>model\n",
        'Well<|tool_call>call:weather{city:<|"|>a, {b: "c"}<|"|>,days:2}<tool_call|><|tool_call>call:now{}<tool_call|>'
        "<|tool_response>",
    ),
    ("gpt-oss", "<|start|>assistant", "<|channel|>final<|message|>Hello<|return|>"),
    (
        "gpt-oss",
        "<|start|>user<|message|>a<|end|><|start|>assistant",
        "<|channel|>analysis<|message|>One <|end|><|start|>assistant<|channel|>analysis<|message|>Two<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Oslo", "days": "2"}<|call|>',
    ),
    ("gpt-oss", "<|start|>assistant<|channel|>analysis<|message|>", "Hm<|end|><|start|>assistant<|channel|>final"
     "<|message|> Hello <|return|>"),
    ("plain", "Q: a A:", " Hello \n"),
    ("plain", "Q: a A: (", "hm) Hello"),
]  # fmt: skip


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize(("kind", "prefix", "text"), ANSWERS)
def test_an_answer_cut_anywhere_is_what_transformers_parses(kind: str, prefix: str, text: str, tools: Any) -> None:
    """Each answer has a copy of one stream, as the answers to one prompt have."""
    expected = parsed(kind, prefix, text, tools)
    prepared_once = stream(kind, prefix, tools)
    for pieces in ways_to_cut(text):
        responses = copy.deepcopy(prepared_once)
        deltas = [delta for piece in pieces for delta in responses.push(piece)]
        assert together(deltas + responses.finish()) == expected


def test_some_of_these_answers_mean() -> None:
    """That `parse_response` is asked what is meant to be asked."""
    assert parsed(*ANSWERS[1]) == ("Hello", "Hm, 1 < 2.", [])
    assert parsed(*ANSWERS[7]) == ("Let me see.", "A", [("weather", {"city": "Zürich"}), ("now", {})])
    assert parsed(*ANSWERS[8], TOOLS) == ("", "", [("weather", {"days": 3})])
    assert parsed(*ANSWERS[10]) == ("Well", "", [("weather", {"city": 'a, {b: "c"}', "days": 2}), ("now", {})])
    assert parsed(*ANSWERS[12], TOOLS) == ("", "One\n\nTwo", [("weather", {"city": "Oslo", "days": 2})])
    assert parsed(*ANSWERS[14]) == (" Hello \n", "", [])


def test_content_and_reasoning_come_at_once_and_a_call_when_it_is_complete() -> None:
    responses = stream("qwen", QWEN_PROMPT)
    assert responses.push("<think>\nHm, ") == [MessageDelta(reasoning="Hm,")]
    assert responses.push("so</think>\n\nHe") == [MessageDelta(reasoning=" so"), MessageDelta(content="He")]
    assert responses.push("llo <") == [MessageDelta(content="llo")]
    assert responses.push("b> <tool_call>") == [MessageDelta(content=" <b>")]
    assert responses.push('{"name": "now", "arguments": {"a": "ü"}}') == []
    assert responses.push("</tool_call>") == [MessageDelta(tool_call=ToolCall(0, "now", '{"a": "ü"}'))]
    assert responses.finish() == []


NO_CALLS = [
    '<tool_call>{"name": "now"',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "a", "arguments": 5}</tool_call>',
    '<tool_call>{"name": "a", "arguments": "x"}</tool_call>',
    '<tool_call>{"name": "a", "arguments": {"b": NaN}}</tool_call>',
    f"<tool_call>{'[' * 5000}</tool_call>",
    "<tool_call>[]</tool_call>",
]
MALFORMED = [
    *(("qwen", text, text) for text in NO_CALLS),
    ("qwen", "Well <tool_call>{bad}</tool_call> so", "Well\n<tool_call>{bad}</tool_call>\nso"),
    ("gemma", "Well<|tool_call>call:now{bad<tool_call|><turn|>", "Well\ncall:now{bad"),
    ("gpt-oss", "Hello<|return|>", "Hello"),
    ("gpt-oss", "<|channel|>commentary to=functions.now<|message|>{bad<|call|>", "commentary to=functions.now{bad"),
    ("plain", "a</s>b < /s></s>", "ab < /s>"),
]
PROMPTS = {"qwen": QWEN_PROMPT, "gemma": "<|turn>model\n", "gpt-oss": "<|start|>assistant", "plain": "A:"}


@pytest.mark.parametrize(("kind", "text", "content"), MALFORMED)
def test_what_does_not_parse_is_content_without_special_tokens(kind: str, text: str, content: str) -> None:
    prepared_once = stream(kind, PROMPTS[kind])
    for pieces in ways_to_cut(text) if len(text) < 1000 else [[text]]:
        responses = copy.deepcopy(prepared_once)
        deltas = [delta for piece in pieces for delta in responses.push(piece)]
        assert together(deltas + responses.finish()) == (content, "", [])


def test_what_comes_after_a_call_that_does_not_parse_is_parsed() -> None:
    text = '<tool_call>{bad}</tool_call><tool_call>{"name": "now", "arguments": {}}</tool_call>'
    responses = stream("qwen", QWEN_PROMPT)
    assert together(responses.push(text)) == ("<tool_call>{bad}</tool_call>", "", [("now", {})])


def test_several_parts_of_the_content_are_lines() -> None:
    responses = stream("qwen", QWEN_PROMPT)
    text = 'One <tool_call>{"name": "now", "arguments": {}}</tool_call> two<think>Hm</think> three'
    assert together(responses.push(text) + responses.finish()) == ("One\ntwo\nthree", "Hm", [("now", {})])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": "\\ud800"}', '{"a": "\\ud800"}'), ('"{\\"a\\": 1}"', '{"a": 1}'), ('""', "{}"), ("null", "{}")],
)
def test_arguments_are_text_that_can_be_sent(arguments: str, expected: str) -> None:
    responses = stream("qwen", QWEN_PROMPT)
    (delta,) = responses.push(f'<tool_call>{{"name": "now", "arguments": {arguments}}}</tool_call>')
    assert delta.tool_call == ToolCall(0, "now", expected)
    expected.encode()


def test_an_answer_has_one_end() -> None:
    responses = stream("qwen", QWEN_PROMPT)
    responses.finish()
    with pytest.raises(RequestError, match="the answer has ended"):
        responses.push("a")
    with pytest.raises(RequestError, match="the answer has ended"):
        responses.finish()


def prepared(template: Any, prompt: Any = "a", tools: Any = None) -> ResponseStream | None:
    fast = tokenizer("plain")
    fast.response_template = template
    opened: Any = SimpleNamespace(tokenizer=SharedTokenizer(fast))
    return prepare_response_stream(opened, prompt, tools=tools, chat_template_kwargs=None)


def test_without_a_template_there_is_no_stream() -> None:
    assert prepared(None) is None
    no_tokenizer: Any = SimpleNamespace(tokenizer=None)
    assert prepare_response_stream(no_tokenizer, "a", tools=None, chat_template_kwargs=None) is None


def test_a_version_of_transformers_without_a_parser_has_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.chat_parsing.ResponseParser", object)
    chat_api.region_parser_class.cache_clear()
    try:
        assert prepared(PLAIN) is None
    finally:
        chat_api.region_parser_class.cache_clear()


@pytest.mark.parametrize("template", [{"fields": {}}, {"fields": {"content": {}}}, {"version": 9, "fields": 5}, 5])
def test_a_template_that_is_none(template: Any) -> None:
    with pytest.raises(CheckpointError, match="the tokenizer's response_template is not valid"):
        prepared(template)


def test_tools_that_are_none() -> None:
    with pytest.raises(RequestError, match="tool 0 has no type"):
        prepared(PLAIN, tools=[{}])


# --- expressions that take for ever ---

SLOW = r"(?:(?:a|aa)+)+!"
"""Takes time that doubles with each further "a" of a text without "!"."""
TEXT = "a" * 60


def with_field(**field: Any) -> dict[str, Any]:
    return {"start_anchor": "A:", "fields": {"content": {}, "thinking": {"open": "(", "close": ")"} | field}}


@pytest.fixture
def short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_patterns, "MAX_SECONDS", 0.02)


@pytest.mark.parametrize(
    "template",
    [
        {"start_anchor": "A:", "fields": {"content": {}, "thinking": {"open_pattern": SLOW, "close": ")"}}},
        {"start_anchor": "A:", "fields": {"content": {"close_pattern": SLOW}}},
        with_field(content="xml-inline", content_args={"tag_pattern": f"(?P<key>{SLOW})(?P<value>b)"}),
        with_field(
            content="xml-inline",
            content_args={
                "tag_pattern": "(?P<key>)(?P<value>a+)",
                "value_parser": {"name": "xml-inline", "args": {"tag_pattern": SLOW}},
            },
        ),
        with_field(
            content="kv-lines",
            content_args={"kv_sep": "a", "value_parser": {"name": "xml-inline", "args": {"tag_pattern": SLOW}}},
        ),
    ],
    ids=["open", "close", "tags", "tags in tags", "tags in lines"],
)
def test_a_template_that_takes_for_ever_with_an_answer(template: Any, short_time: None) -> None:
    responses = prepared(template, "A:")
    assert responses is not None
    for _ in range(2):
        with pytest.raises(RequestError, match=r"response_template took more than 0\.02 s"):
            responses.push(f"({TEXT})")


def test_a_template_that_takes_for_ever_with_a_prompt(short_time: None) -> None:
    with pytest.raises(RequestError, match=r"response_template took more than 0\.02 s"):
        prepared({"start_anchor_pattern": SLOW, "fields": {"content": {}}}, TEXT)
    with pytest.raises(RequestError, match=r"response_template took more than 0\.02 s"):
        prepared({"start_anchor": "A:", "fields": {"content": {"close_pattern": SLOW}}}, f"A:{TEXT}")


def test_answers_to_one_prompt_have_their_own_time(short_time: None) -> None:
    prepared_once = prepared({"start_anchor": "A:", "fields": {"content": {"close_pattern": SLOW}}}, "A:")
    assert prepared_once is not None
    with pytest.raises(RequestError, match="took more than"):
        copy.deepcopy(prepared_once).push(TEXT)
    assert together(prepared_once.push("b") + prepared_once.finish()) == ("b", "", [])
