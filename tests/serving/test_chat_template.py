"""Chat templates give what transformers makes of them, and none takes more than its bounds."""
# ruff: noqa: E501  # templates in one line

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hermes_async.errors import RequestError
from hermes_async.serving import template_limits
from hermes_async.serving.chat_template import render_template
from hermes_async.serving.tokenizer import SharedTokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " Be kind. "},
    {"role": "user", "content": [{"type": "text", "text": "ein Würfel"}, {"type": "image"}], "name": None},
    {"role": "assistant", "content": None, "reasoning_content": "thought", "tool_calls": [
        {"type": "function", "function": {"name": "roll", "arguments": {"sides": 6, "label": "a\tb\nc"}}}
    ]},
    {"role": "tool", "content": "5"},
    {"role": "user", "content": "100 * 2 % of it"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "roll", "parameters": {"type": "object", "properties": {}}}}]

# What templates of models do, one after another.
TEMPLATES = [
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{{ message.content | string | trim }}"
    "{% if not loop.last %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{%- set ns = namespace(last=-1, texts=[]) %}{% for message in messages[::-1] %}{% if message.role == 'user' %}"
    "{% set ns.last = messages | length - 1 - loop.index0 %}{% break %}{% endif %}{% endfor %}{{ ns.last }}",
    "{% macro show(value, depth=0) %}{% if value is mapping %}{% for key, inner in value | dictsort %}{{ '  ' * depth }}"
    "{{ key }}:{{ show(inner, depth + 1) }}{% endfor %}{% elif value is string %}{{ value | tojson }}{% else %}{{ value }}"
    "{% endif %}{% endmacro %}{% for message in messages %}{{ show(message) }}{% endfor %}",
    "{% for tool in tools %}{{ tool | tojson(indent=2) }}{{ tool.function.name.upper().ljust(12, '.') }}{% endfor %}",
    "{% for m in messages if m.role != 'tool' %}{{ loop.index }}/{{ loop.length }} {{ m.role ~ ':' ~ loop.first }};{% endfor %}",
    "{% set texts %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}{{ texts | upper | replace('USER', 'U') }}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ '{}-{:>4}'.format(messages | length, 7) }} {{ '%s=%05.1f' % ('a', 2.5) }} {{ 'a,b'.split(',') | last }}",
    "{% set a, b = 1, [2, 3] %}{{ a + b[0] }} {{ b + [4] }} {{ (1, 2) }} {{ {'x': b}.items() | list }} {{ 'abc'[1:] }} {{ 2 ** 3 }}",
    "{% for m in messages %}{% generation %}{{ m.reasoning_content or m.role }}{% endgeneration %}{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}{% filter trim %} b {% endfilter %}",
    "{% macro w() %}[{{ caller(1) }}]{% endmacro %}{% call(x) w() %}<{{ x }}>{% endcall %}",
    "{{ documents }}{{ enable_thinking }}{{ missing }}{{ messages[0].content.strip() }}{{ dict(a=1) }}{{ range(3) | list }}",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_text_is_that_of_transformers(tokenizer: PreTrainedTokenizerFast, template: str, prompt: bool) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "chat_template": template, "enable_thinking": False}
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt, **options)
    assert SharedTokenizer(tokenizer).chat_text(MESSAGES, add_generation_prompt=prompt, **options) == expected


def test_a_template_that_is_chosen_by_its_name(tokenizer: PreTrainedTokenizerFast) -> None:
    shared = SharedTokenizer(tokenizer)
    tokenizer.chat_template = {"default": "default", "tool_use": "with tools", "rag": "with documents"}
    try:
        assert shared.chat_text(MESSAGES) == "default"
        assert shared.chat_text(MESSAGES, tools=TOOLS) == "with tools"
        assert shared.chat_text(MESSAGES, chat_template="rag") == "with documents"
    finally:
        tokenizer.chat_template = None


def doubled(body: str) -> str:
    return "{% set n = namespace(x='ab', y=[1]) %}{% for i in range(99) %}" + body + "{% endfor %}"


TOO_MUCH = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "constant text in a loop": "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loops": "{% for x in [9] recursive %}{{ loop(range(99)) if loop.depth < 9 }}{% endfor %}",
    "a long product": "{{ 'a' * 10**10 }}",
    "a long list": "{{ 10**9 * [1] }}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "a filter that pads": "{{ 'a' | center(10**10) }}",
    "a filter that pads each item": "{{ range(99999) | map('string') | map('center', 9999) | list }}",
    "indentation": "{{ ('\n' * 9999) | indent(9999) }}",
    "tabulators": "{{ ('\t' * 9999).expandtabs(9999) }}",
    "a wide field": "{{ '%99999d' % 1 }}",
    "a wide field with a name": "{{ '%(a%b)99999d' % {'a%b': 1} }}",
    "a field whose width is an argument": "{{ '%*d' % (10**9, 1) }}",
    "a wide field in braces": "{{ '{0[}]:99999}'.format({'}': 1}) }}",
    "a width in braces": "{{ '{:{}}'.format(1, 10**9) }}",
    "many fields": "{{ ('%s' * 9999) % ((('a' * 9999),) * 9999) }}",
    "a wide date": "{{ strftime_now('%99999d') }}",
    "a replacement": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "a replacement of nothing": "{{ ('a' * 9999) | replace('', 'b' * 9999) }}",
    "a translation": "{{ ('a' * 9999).translate({97: 'b' * 9999}) }}",
    "a long separator": "{{ ('b' * 9999).join('a' * 9999) }}",
    "bytes of a number": "{{ (1).to_bytes(10**9, 'big') }}",
    "sums of lists": "{{ ([[1]] * 9999) | sum(start=[]) | length }}",
    "a slow codec": "{{ ('a' * 999999).encode('punycode') }}",
    "a text that doubles": doubled("{% set n.x = n.x + n.x %}"),
    "a text that is joined to itself": doubled("{% set n.x = n.x ~ n.x %}"),
    "a block that doubles": doubled("{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    "lists in lists": doubled("{% set n.y = [n.y, n.y] %}"),
    "tables in tables": doubled("{% set n.y = dict(a=n.y, b=n.y) %}"),
    "lists that are added": doubled("{% set n.y = n.y + n.y %}"),
    "many slices": "{% set n = 'a' * 999999 %}{{ [" + "n[1:], " * 99 + "] | length }}",
}


@pytest.mark.parametrize("template", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_asks_for_too_much(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 300.0)  # the other bounds come first
    monkeypatch.setattr(template_limits, "MAX_STEPS", 20_000)
    with pytest.raises(RequestError, match="which is not allowed"):
        render_template(template, {"messages": MESSAGES})


def test_a_template_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.0)
    with pytest.raises(RequestError, match="seconds"):
        render_template("{% for a in range(99) %}{% endfor %}", {})


def test_long_messages_may_become_long_texts() -> None:
    messages = [{"role": "user", "content": "a" * template_limits.MAX_CHARS}]
    rendered = render_template(
        "{% for m in messages %}{{ m.role + m.content + '\n' }}{% endfor %}", {"messages": messages}
    )
    assert len(rendered) == template_limits.MAX_CHARS + 5


@pytest.mark.parametrize("template", ["a" * (template_limits.MAX_TEMPLATE_CHARS + 1), 5, None])
def test_a_template_that_is_no_text_or_too_long(template: Any) -> None:
    with pytest.raises(RequestError, match="chat template"):
        render_template(template, {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ lipsum(n=10**9) }}",
    ],
)
def test_the_sandbox_stays_closed(template: str) -> None:
    with pytest.raises(Exception, match=r"unsafe|safely callable|undefined"):
        render_template(template, {"messages": list(MESSAGES)})
