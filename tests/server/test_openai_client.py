"""OpenAI's own client against a real server: what it sends is taken, and what it gets, it understands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anyio
import openai
import pytest

from tests.server.running import MODEL, RunningServer

pytestmark = pytest.mark.anyio

MESSAGES: Any = [{"role": "user", "content": "Speak, good friends, and say what you have to tell."}]
TOO_LONG = "context_length_exceeded"
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Corioli"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "no_arguments"}},
]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(num_tokens: int = 12) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": num_tokens, "temperature": 0}


# --- chat ---


def test_a_chat_answer_is_the_engines_own(server: RunningServer, client: openai.OpenAI) -> None:
    own = server.complete(MESSAGES, max_tokens=12, temperature=0)
    answer = client.chat.completions.create(messages=MESSAGES, **greedy())
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (own.text, own.finish_reason)
    assert (answer.choices[0].message.role, answer.model, answer.object) == ("assistant", MODEL, "chat.completion")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == own.usage.prompt_tokens
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (12, own.usage.prompt_tokens + 12)


def test_a_streamed_chat_answer(server: RunningServer, client: openai.OpenAI) -> None:
    own = server.complete(MESSAGES, max_tokens=12, temperature=0)
    chunks = list(
        client.chat.completions.create(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **greedy()
        )
    )
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == own.text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert (set(reasons[:-1]), reasons[-1]) == ({None}, own.finish_reason)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_async_client(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        texts: dict[int, str] = {}

        async def ask(number: int) -> None:
            stream = await client.chat.completions.create(messages=MESSAGES, stream=True, **greedy())
            texts[number] = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(ask, number)
    assert len(texts) == 8
    own = await anyio.to_thread.run_sync(lambda: server.complete(MESSAGES, max_tokens=12, temperature=0))
    assert set(texts.values()) == {own.text}


def test_an_accumulated_stream(server: RunningServer, client: openai.OpenAI) -> None:
    stop = server.complete(MESSAGES, max_tokens=12, temperature=0).text[-4:]  # the client takes "length" as an error
    with client.chat.completions.stream(messages=MESSAGES, stop=stop, **greedy()) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    whole = client.chat.completions.create(messages=MESSAGES, stop=stop, **greedy())
    assert final.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_several_answers_differ_and_repeat_with_their_seed(client: openai.OpenAI, stream: bool) -> None:
    def ask() -> list[str]:
        asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "n": 3, "seed": 7, "max_tokens": 12}
        if not stream:
            answer = client.chat.completions.create(**asked)
            assert [choice.index for choice in answer.choices] == [0, 1, 2]
            return [choice.message.content or "" for choice in answer.choices]
        texts, ends = ["", "", ""], []
        for chunk in client.chat.completions.create(stream=True, **asked):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            ends += [chunk.choices[0].index] * (chunk.choices[0].finish_reason is not None)
        assert sorted(ends) == [0, 1, 2]
        return texts

    texts = ask()
    assert len(set(texts)) == 3
    assert ask() == texts


def test_a_stop_text_ends_the_answer(server: RunningServer, client: openai.OpenAI) -> None:
    whole = server.complete(MESSAGES, max_tokens=40, temperature=0).text
    stop = whole[10:14]
    answer = client.chat.completions.create(messages=MESSAGES, stop=["never to be found", stop], **greedy(40))
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == whole.partition(stop)[0]


def test_log_probabilities_are_the_engines_own(server: RunningServer, client: openai.OpenAI) -> None:
    own = server.complete(MESSAGES, max_tokens=6, temperature=0, logprobs=3)
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **greedy(6))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [token.logprob for token in logprobs.content] == pytest.approx([token.logprob for token in own.logprobs])
    assert {len(token.top_logprobs) for token in logprobs.content} == {3}
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content
    for token in logprobs.content:
        assert bytes(token.bytes or ()).decode() == token.token
        assert token.top_logprobs[0].token == token.token  # greedy

    chunks = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True, **greedy(6))
    streamed = [
        token.logprob
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == pytest.approx([token.logprob for token in own.logprobs])


def test_a_bias_that_suppresses_a_token(server: RunningServer, client: openai.OpenAI) -> None:
    first = server.complete(MESSAGES, max_tokens=1, temperature=0)
    answer = client.chat.completions.create(messages=MESSAGES, logit_bias={str(first.token_ids[0]): -100}, **greedy(1))
    assert answer.choices[0].message.content != first.text


def test_fields_of_vllm(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"top_k": 3, "min_p": 0.05, "min_tokens": 4, "repetition_penalty": 1.2, "ignore_eos": True}
    own = server.complete(MESSAGES, max_tokens=10, temperature=0.7, seed=3, **fields)
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=10, temperature=0.7, seed=3, extra_body=fields
    )
    assert answer.choices[0].message.content == own.text


def test_a_conversation_with_its_answers_sent_back(client: openai.OpenAI) -> None:
    messages = [*MESSAGES]
    for _ in range(2):
        answer = client.chat.completions.create(messages=messages, **greedy()).choices[0].message
        messages += [answer, {"role": "user", "content": [{"type": "text", "text": "And then?"}]}]
    assert len(messages) == 5


# --- tools and structured answers ---


def test_a_named_tool(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(messages=MESSAGES, tools=TOOLS, tool_choice=choice, **greedy(200))
    message = answer.choices[0].message
    assert message.content is None and message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function" and call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Rome", "Corioli") and 1 <= arguments["days"] <= 9

    with client.chat.completions.stream(messages=MESSAGES, tools=TOOLS, tool_choice=choice, **greedy(200)) as stream:
        for _ in stream:
            pass
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert json.loads(streamed.function.arguments) == arguments


def test_a_tool_that_the_model_chooses(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, tools=TOOLS[:1], tool_choice="required", **greedy(600))
    (call,) = answer.choices[0].message.tool_calls or ()
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Corioli")


def test_tools_that_the_template_does_not_know_leave_the_text_as_it_is(
    server: RunningServer, client: openai.OpenAI
) -> None:
    own = server.complete(MESSAGES, max_tokens=12, temperature=0)
    answer = client.chat.completions.create(messages=MESSAGES, tools=TOOLS, tool_choice="auto", **greedy())
    assert answer.choices[0].message.content == own.text
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_response_format_with_a_schema(client: openai.OpenAI, stream: bool) -> None:
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
    asked: dict[str, Any] = {"messages": MESSAGES, "response_format": response_format, **greedy(200)}
    if stream:
        chunks = client.chat.completions.create(stream=True, **asked)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = client.chat.completions.create(**asked).choices[0].message.content or ""
    found = json.loads(text)
    assert found["city"] in ("Rome", "Corioli") and 1 <= found["days"] <= 9


def test_a_schema_that_cannot_be_compiled(client: openai.OpenAI) -> None:
    schema: Any = {"type": "object", "properties": {"a": {"type": "no such type"}}}
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(messages=MESSAGES, response_format=response_format, **greedy())


# --- completions, models ---


def test_completions_of_several_prompts(server: RunningServer, client: openai.OpenAI) -> None:
    prompts: Any = ["First Citizen:\n", "MENENIUS:\n"]
    own = [server.complete(prompt, max_tokens=8, temperature=0).text for prompt in prompts]
    answer = client.completions.create(prompt=prompts, **greedy(8))
    assert [choice.text for choice in answer.choices] == own
    texts = ["", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **greedy(8)):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == own


def test_a_completion_of_token_ids(server: RunningServer, client: openai.OpenAI) -> None:
    own = server.complete([5, 6, 7], max_tokens=8, temperature=0, logprobs=2)
    answer = client.completions.create(prompt=[5, 6, 7], logprobs=2, **greedy(8))
    choice = answer.choices[0]
    assert choice.text == own.text and choice.logprobs is not None and choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs == pytest.approx([token.logprob for token in own.logprobs])
    assert "".join(choice.logprobs.tokens) == own.text
    assert choice.logprobs.text_offset == [
        sum(map(len, choice.logprobs.tokens[:idx])) for idx in range(len(choice.logprobs.tokens))
    ]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/model")


# --- what ends early ---


def test_a_stream_that_is_closed_frees_its_request(server: RunningServer, client: openai.OpenAI) -> None:
    before = server.statistics().tokens_generated
    with server.held():
        stream = client.chat.completions.create(messages=MESSAGES, stream=True, **greedy(400))
        next(iter(stream))
        server.until(lambda now: now.num_running == 1)
        stream.close()
    server.check_nothing_is_left()
    assert server.statistics().tokens_generated < before + 400


def test_a_client_that_gives_up_frees_its_requests(server: RunningServer, client: openai.OpenAI) -> None:
    with server.held(), pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(messages=MESSAGES, n=2, timeout=0.05, **greedy(400))
    server.check_nothing_is_left()


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"model": "another"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": -1}, openai.UnprocessableEntityError, "temperature", "invalid_value"),
        ({"extra_body": {"top_kk": 1}}, openai.UnprocessableEntityError, "top_kk", "unknown_field"),
        ({"n": 65}, openai.UnprocessableEntityError, "n", "invalid_value"),
        ({"messages": [{"role": "nobody", "content": ""}]}, openai.UnprocessableEntityError, None, "invalid_value"),
        ({"messages": [{"role": "user", "content": "a b " * 9999}]}, openai.BadRequestError, None, TOO_LONG),
    ],
    ids=["model", "temperature", "unknown", "n", "role", "context"],
)
def test_errors_have_openais_form(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], param: str | None, code: str
) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"messages": MESSAGES, **greedy(), **fields})
    assert raised.value.type == "invalid_request_error"
    assert raised.value.code == code
    if param is not None:
        assert raised.value.param == param
