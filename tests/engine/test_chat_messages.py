"""Chat messages beside transformers' own chat templates, and what they must be."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hermes_async.engine.chat_messages import checked_messages, render
from hermes_async.errors import RequestError
from hermes_async.serving.tokenizer import SharedTokenizer

# As templates of published checkpoints read a message's content.
JOINS = "{% for m in messages %}[{{ m.role }}]{{ m['content'] + '|' }}{% endfor %}"
PRINTS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}"
WITH_TOOLS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}|{% endfor %}"
)
TAKES_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}|{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_an_assistant_s_message_with_tool_calls_needs_no_content(content: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL], **content}]
    messages.append({"role": "tool", "content": "12"})
    using = tokenizer(WITH_TOOLS)
    expected = using.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(SharedTokenizer(using), messages) == expected == "[user]a|[assistant]weather|[tool]12|"


@pytest.mark.parametrize("template", [JOINS, PRINTS])
def test_text_parts_are_lines_of_a_template_that_takes_texts_only(template: str) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": PARTS}]
    assert render(SharedTokenizer(tokenizer(template)), messages) == "[system]a|[user]one\ntwo|"
    assert messages[1]["content"] is PARTS


def test_a_template_that_takes_text_parts_gets_them() -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": tuple(PARTS)}]
    using = tokenizer(TAKES_PARTS)
    expected = using.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(SharedTokenizer(using), messages) == expected == "[system]a|[user]onetwo|"


def test_a_template_that_takes_parts_alone_gets_texts_as_parts() -> None:
    using = tokenizer(
        "{% for m in messages %}{% for c in m.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
        "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}|{% endfor %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    assert render(SharedTokenizer(using), messages) == "a|b|"
    image = {"type": "image", "image": "a.png"}
    assert render(SharedTokenizer(using), [*messages, {"role": "user", "content": [image]}]) == "a|b|<image>"


def test_what_a_tool_gives_is_the_template_s_matter() -> None:
    using = tokenizer("{% for m in messages %}{{ m.content | tojson }}{% endfor %}")
    messages = [{"role": "tool", "content": {"degrees": 12}}, {"role": "ipython", "content": [1, 2]}]
    assert render(SharedTokenizer(using), messages) == '{"degrees": 12}[1, 2]'


@pytest.mark.parametrize("messages", [5, None, {"role": "user", "content": "a"}, {1}, iter([])])
def test_messages_that_are_no_list(messages: Any) -> None:
    with pytest.raises(RequestError, match=f"in a list, not in a {type(messages).__name__}"):
        checked_messages(messages)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user"}, "message 1, of role 'user', has no content"),
        ({"role": "user", "content": None}, "message 1, of role 'user', has no content"),
        ({"role": "user", "tool_calls": [CALL]}, "only one of role 'assistant' with 'tool_calls'"),
        ({"role": "assistant", "content": None}, "message 1, of role 'assistant', has no content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "message 1, of role 'assistant', has no content"),
        ({"role": "tool"}, "message 1, of role 'tool', has no content"),
        ({"role": "user", "content": 5}, "message 1, of role 'user', has content of type int"),
        ({"role": "user", "content": []}, "has an empty list as content"),
        ({"role": "user", "content": ["a"]}, "has a part 0 of type 'str'"),
        ({"role": "user", "content": [*PARTS, {"type": "image_url"}]}, "part 2 of message 1 has no 'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "has a part 0 of type 'text'"),
        ({"content": "a"}, "message 1 has no role"),
        ({"role": None, "content": "a"}, "message 1 has the role None"),
        (("user", "a"), "message 1 is of type tuple"),
        ({"role": "user", "content": "a\ud800b"}, r"message 1 has a lone surrogate, U\+D800, as character 1"),
        ({"role": "user", "content": [{"type": "text", "text": "\udfff"}]}, "message 1 has a lone surrogate"),
        ({"role": "user\ud800", "content": "a"}, "message 1 has a lone surrogate"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": {"\ud800": 1}}}]},
            "message 1 has a lone surrogate",
        ),
    ],
)
def test_a_message_that_is_none_is_named_by_its_index(message: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        checked_messages([{"role": "user", "content": "a"}, message])
    with pytest.raises(RequestError, match=says):
        render(SharedTokenizer(tokenizer(PRINTS)), [{"role": "user", "content": "a"}, message])
