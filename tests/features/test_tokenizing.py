"""`tokenize` and `detokenize`, and tools and template variables of requests and turns."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hermes_async import ContextLengthError, Engine, RequestError, SamplingParams
from tests.engines import check_nothing_is_left

pytestmark = pytest.mark.anyio

GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
# A tool's name is a word of the vocabulary, and so is what `loud` adds.
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    "{% if loud %}w9 {% endif %}{% if add_generation_prompt %}w7{% endif %}"
)
RESPONSE_TEMPLATE = {"start_anchor": "w7", "fields": {"content": {}, "reasoning": {"open": "w20", "close": "w21"}}}
TOOLS = [{"type": "function", "function": {"name": "w30"}}]
ASKED = [{"role": "user", "content": "w11 w12"}]


@pytest.fixture(scope="module")
def path(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(tiny_model.path, tmp_path_factory.mktemp("tools") / "model"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
async def engine(tiny_model: Any, path: Path) -> AsyncIterator[Engine]:
    async with Engine(path, memory_budget="8MiB", config=tiny_model.config) as engine:
        yield engine
        await check_nothing_is_left(engine)


async def test_texts_and_messages_as_token_ids(engine: Engine, no_blocking: Any) -> None:
    assert await engine.tokenize("w5 w6") == [5, 6]
    assert await engine.tokenize("") == await engine.tokenize(" ", add_special_tokens=False) == []
    assert await engine.tokenize(ASKED) == [11, 12, 7]
    assert await engine.tokenize(ASKED, tools=TOOLS, chat_template_kwargs={"loud": True}) == [30, 11, 12, 9, 7]
    assert await engine.tokenize(ASKED, add_generation_prompt=False) == [11, 12]
    assert await engine.detokenize([0, 5, 6, 1]) == "<s> w5 w6 </s>"
    assert await engine.detokenize([0, 5, 6, 1], skip_special_tokens=True) == "w5 w6"
    assert await engine.detokenize([]) == ""


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([5, 6], {}, "tokenize takes a text, or chat messages"),
        ([], {}, "tokenize takes a text, or chat messages"),
        (5, {}, "not int"),
        ("w5\ud800", {}, "lone surrogate"),
        ("w5", {"tools": TOOLS}, "tools need a prompt of chat messages"),
        ("w5", {"chat_template_kwargs": {"loud": True}}, "chat_template_kwargs need a prompt of chat messages"),
        ("w5", {"add_special_tokens": 1}, "add_special_tokens must be True or False"),
        (ASKED, {"add_generation_prompt": "no"}, "add_generation_prompt must be True or False"),
        (ASKED, {"tools": [{}]}, "tool 0 has no type"),
        ([{"role": "user"}], {}, "message 0, of role 'user', has no content"),
    ],
)
async def test_what_has_no_token_ids(engine: Engine, prompt: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        await engine.tokenize(prompt, **options)


async def test_a_text_far_longer_than_the_context(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match="of at most 64"):
        await engine.tokenize("w5 " * 100_000)


@pytest.mark.parametrize(
    ("token_ids", "says"),
    [
        ([5, 96], "token id 96 is not one of the 96"),
        ([-1], "token id -1"),
        ("w5", "token ids are a sequence of int"),
        ([1.5], "token ids are a sequence of int"),
        ([True], "token ids are a sequence of int"),
        (5, "not int"),
    ],
)
async def test_what_has_no_text(engine: Engine, token_ids: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        await engine.detokenize(token_ids)
    with pytest.raises(RequestError, match="skip_special_tokens must be True or False"):
        await engine.detokenize([5], skip_special_tokens=1)  # type: ignore[arg-type]


async def test_a_request_with_tools(tiny_model: Any, engine: Engine) -> None:
    completion = await engine.complete(ASKED, GREEDY, tools=TOOLS, chat_template_kwargs={"loud": True})
    assert completion.token_ids == tiny_model.greedy([30, 11, 12, 9, 7])[:3]
    for prompt in ("w5", [5, 6]):
        with pytest.raises(RequestError, match="tools need a prompt of chat messages"):
            await engine.complete(prompt, GREEDY, tools=TOOLS)
        assert (await engine.complete(prompt, GREEDY, tools=[])).token_ids


async def test_turns_with_tools(tiny_model: Any, engine: Engine) -> None:
    async with engine.session() as chat:
        first = await chat.complete("w11", GREEDY, tools=TOOLS)
        assert first.token_ids == tiny_model.greedy([30, 11, 7])[:3]
        second = await chat.complete("w12", GREEDY, chat_template_kwargs={"loud": True})
        assert second.token_ids == tiny_model.greedy([11, *first.token_ids, 12, 9, 7])[:3]
    async with engine.session() as chat:
        with pytest.raises(RequestError, match="tools need a prompt of chat messages"):
            await chat.complete([5, 6], GREEDY, tools=TOOLS)


@pytest.mark.parametrize("as_token_ids", [False, True])
async def test_an_answer_is_divided_by_the_response_template(engine: Engine, path: Path, as_token_ids: bool) -> None:
    prompt: Any = await engine.tokenize(ASKED, tools=TOOLS) if as_token_ids else ASKED
    responses = await engine.response_stream(prompt, TOOLS if not as_token_ids else None)
    assert responses is not None
    deltas = []
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, skip_special_tokens=False)
    text = ""
    async for chunk in engine.generate(prompt, params, tools=None if as_token_ids else TOOLS):
        deltas += responses.push(chunk.text)
        text += chunk.text
    deltas += responses.finish()
    message = AutoTokenizer.from_pretrained(path).parse_response(text, prefix="w7")
    assert "".join(delta.content for delta in deltas) == message["content"] != ""
    assert "".join(delta.reasoning for delta in deltas) == message["reasoning"] != ""


async def test_a_checkpoint_without_a_response_template(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        assert await engine.response_stream(ASKED) is None
