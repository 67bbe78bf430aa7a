"""Chat sessions: every turn's answer is that of the whole conversation, and only what is new is computed."""

from __future__ import annotations

import dataclasses
import shutil
import time
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch

from hermes_async import (
    ContextLengthError,
    Engine,
    EngineClosedError,
    ReadError,
    RequestError,
    SamplingParams,
    SessionClosedError,
)
from hermes_async.engine.prompt import prepare
from tests.engines import BLOCK_BYTES, check_nothing_is_left, greedy_params, open_engine, tokens, until
from tests.inside import inside

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="session")
def chat_model(long_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`long_model` with a chat template by which a conversation's text begins with that of its first turns."""
    model = shutil.copytree(long_model.path, tmp_path_factory.mktemp("chat") / "model")
    template = "{% for message in messages %}{% if message['role'] == 'user' %}w3 {{ message['content'] }} w4 "
    template += "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    return Changed(long_model, model)


@pytest.fixture(scope="session")
def plain_model(long_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`long_model` without a chat template."""
    model = shutil.copytree(long_model.path, tmp_path_factory.mktemp("plain") / "model")
    (model / "chat_template.jinja").unlink()
    return Changed(long_model, model)


class Changed:
    def __init__(self, model: Any, path: Path) -> None:
        self._model, self.path = model, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def conversation(*texts: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[idx % 2], "content": text} for idx, text in enumerate(texts)]


async def alone(model: Any, prompt: Any, params: SamplingParams) -> Any:
    """The answer without a session and without anything shared."""
    async with open_engine(model, share_prefixes=False, prompt_lookup=False) as engine:
        return await engine.complete(prompt, params)


# Raw token ids


@pytest.mark.parametrize("share_prefixes", [True, False])
async def test_turns_of_token_ids_go_on_from_each_other(long_model: Any, share_prefixes: bool) -> None:
    history: list[int] = []
    async with open_engine(long_model, share_prefixes=share_prefixes) as engine:
        async with engine.session() as chat:
            for prompt in long_model.prompts:
                history += prompt
                completion = await chat.complete(prompt, long_model.params)
                assert completion.token_ids == long_model.greedy(history)
                assert completion.usage.prompt_tokens == len(history)
                history += completion.token_ids
                assert chat.token_ids == tuple(history)
            assert chat.messages == ()
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("share_prefixes", [True, False])
async def test_a_turn_computes_only_what_is_new(long_model: Any, share_prefixes: bool) -> None:
    config = {"max_tokens_per_sweep": 4, "prompt_lookup": False, "share_prefixes": share_prefixes}
    async with open_engine(long_model, **config) as engine, engine.session() as chat:
        first = await chat.complete(long_model.prompts[4], long_model.params)
        assert (first.usage.cached_tokens, engine.statistics().sweeps) == (0, -(-33 // 4) + 11)
        second = await chat.complete(long_model.prompts[1], long_model.params)
        # All of the first turn but its last token, which was chosen and not computed.
        assert second.usage.cached_tokens == 33 + 12 - 1
        assert second.timings.sweeps == -(-(1 + 5) // 4) + 11
        assert engine.statistics().tokens_generated == 24


async def test_a_turn_s_tokens_are_those_of_the_whole_in_another_engine(long_model: Any) -> None:
    async with open_engine(long_model) as engine, engine.session() as chat:
        await chat.complete(long_model.prompts[3], long_model.params)
        completion = await chat.complete(long_model.prompts[2], long_model.params)
        whole = [*long_model.prompts[3], *long_model.references[3], *long_model.prompts[2]]
    assert completion.token_ids == (await alone(long_model, whole, long_model.params)).token_ids


async def test_seeded_sampling_in_a_session_is_that_without_one(long_model: Any) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=7, repetition_penalty=1.2, ignore_eos=True)
    async with open_engine(long_model) as engine, engine.session() as chat:
        history: list[int] = []
        for prompt in long_model.prompts[1:4]:
            history += prompt
            completion = await chat.complete(prompt, params)
            assert completion.token_ids == (await alone(long_model, history, params)).token_ids
            history += completion.token_ids


async def test_sessions_and_requests_side_by_side(long_model: Any) -> None:
    wrong = []

    async def talk(idx: int) -> None:
        history: list[int] = []
        async with engine.session() as chat:
            for turn in range(4):
                prompt = long_model.prompts[(idx + turn) % 5]
                history += prompt
                answer = (await chat.complete(prompt, long_model.params)).token_ids
                if answer != long_model.greedy(history):
                    wrong.append((idx, turn))
                history += answer

    async def ask(idx: int) -> None:
        for _ in range(3):
            if (await engine.complete(long_model.prompts[idx], long_model.params)).token_ids != long_model.references[
                idx
            ]:
                wrong.append(idx)

    async with open_engine(long_model, max_sequences=3) as engine:
        async with anyio.create_task_group() as group:
            for idx in range(5):
                group.start_soon(talk, idx)
                group.start_soon(ask, idx)
        assert wrong == []
        await check_nothing_is_left(engine)


async def test_text_without_a_chat_template_goes_on_from_the_tokens(plain_model: Any) -> None:
    first, second = plain_model.prompts[2], plain_model.prompts[3]
    async with open_engine(plain_model) as engine, engine.session() as chat:
        answer = await chat.complete(plain_model.text(first), plain_model.params)
        assert answer.token_ids == plain_model.references[2]
        completion = await chat.complete(plain_model.text(second), plain_model.params)
        whole = [*first, *plain_model.references[2], *second]
        assert completion.token_ids == plain_model.greedy(whole)
        assert chat.messages == ()
        assert chat.token_ids == (*whole, *completion.token_ids)
        # And token ids go on from there too.
        assert (await chat.complete([5], plain_model.params)).token_ids == plain_model.greedy([*chat.token_ids[:-12]])


async def test_messages_without_a_chat_template(plain_model: Any) -> None:
    async with open_engine(plain_model) as engine, engine.session() as chat:
        with pytest.raises(RequestError, match="chat template"):
            await chat.complete(conversation("w5"), plain_model.params)


# Messages


async def test_texts_are_messages_where_there_is_a_template(chat_model: Any) -> None:
    asked = ["w5 w6 w7 w8", "w9 w10 w11", "w12 w13 w14 w15 w16"]
    texts: list[str] = []
    async with open_engine(chat_model) as engine, engine.session() as chat:
        for text in asked:
            texts.append(text)
            messages = conversation(*texts)
            completion = await chat.complete(text, chat_model.params)
            assert completion.token_ids == (await alone(chat_model, messages, chat_model.params)).token_ids
            texts.append(completion.text)
            assert chat.messages == tuple(conversation(*texts))
        assert chat.token_ids[-12:] == completion.token_ids


async def test_a_conversation_s_turn_computes_only_what_is_new(chat_model: Any) -> None:
    async with open_engine(chat_model) as engine, engine.session() as chat:
        first = await chat.complete(chat_model.text(chat_model.prompts[4]), chat_model.params)
        assert all(token_id > 1 for token_id in first.token_ids)  # so its text has the same tokens
        assert first.usage.prompt_tokens == 35
        second = await chat.complete("w8 w9", chat_model.params)
        assert second.usage.prompt_tokens == 35 + 12 + 4
        assert second.usage.cached_tokens == 35 + 12 - 1
        text = f"w3 {chat_model.text(chat_model.prompts[4])} w4 {first.text} w3 w8 w9 w4"
        token_ids = [int(word[1:]) for word in text.split()]
        assert second.token_ids == chat_model.greedy(token_ids)


async def test_a_template_that_rewrites_the_history_gives_the_same_answers(long_model: Any) -> None:
    """Its generation prompt comes once, at the end: a second turn does not begin with the first one's tokens."""
    async with open_engine(long_model) as engine, engine.session() as chat:
        asked = long_model.text(long_model.prompts[4])
        first = await chat.complete(asked, long_model.params)
        second = await chat.complete("w8 w9", long_model.params)
        messages = conversation(asked, first.text, "w8 w9")
        assert second.token_ids == (await alone(long_model, messages, long_model.params)).token_ids
        assert second.usage.cached_tokens in (32, 33)  # of the first turn's prompt, in whole blocks where shared


async def test_a_session_begins_with_messages(chat_model: Any) -> None:
    system = {"role": "system", "content": "w20 w21 w22"}
    async with open_engine(chat_model) as engine, engine.session([system]) as chat:
        assert chat.messages == (system,)
        completion = await chat.complete("w5 w6", chat_model.params)
        messages = [system, *conversation("w5 w6")]
        assert completion.token_ids == (await alone(chat_model, messages, chat_model.params)).token_ids
        assert chat.messages == (*messages, {"role": "assistant", "content": completion.text})


async def test_a_turn_of_several_messages(chat_model: Any) -> None:
    async with open_engine(chat_model) as engine, engine.session() as chat:
        messages = conversation("w5", "w6", "w7 w8")
        completion = await chat.complete(messages, chat_model.params)
        assert completion.token_ids == (await alone(chat_model, messages, chat_model.params)).token_ids
        assert [message["content"] for message in chat.messages] == ["w5", "w6", "w7 w8", completion.text]


async def test_what_a_user_does_with_messages_does_not_change_the_session(chat_model: Any) -> None:
    given = conversation("w5", "w6")
    async with open_engine(chat_model) as engine, engine.session(given) as chat:
        given[0]["content"] = "w90"
        chat.messages[0]["content"] = "w91"
        assert chat.messages[0]["content"] == "w5"


async def test_messages_and_token_ids_do_not_mix(chat_model: Any) -> None:
    async with open_engine(chat_model) as engine:
        async with engine.session() as chat:
            await chat.complete("w5 w6", chat_model.params)
            before = chat.messages, chat.token_ids
            with pytest.raises(RequestError, match="messages"):
                await chat.complete([5, 6], chat_model.params)
            assert (chat.messages, chat.token_ids) == before
            await chat.complete("w5 w6", chat_model.params)
        async with engine.session() as chat:
            await chat.complete([5, 6], chat_model.params)
            before = chat.messages, chat.token_ids
            for prompt in ("w5", conversation("w5")):
                with pytest.raises(RequestError, match="token ids"):
                    await chat.complete(prompt, chat_model.params)
            assert (chat.messages, chat.token_ids) == before
            await chat.complete([5, 6], chat_model.params)
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("prompt", ["", [], 5, [5, "w5"], [{"role": "user"}], [*conversation("w5"), 5]])
async def test_a_prompt_that_is_none_leaves_the_history(chat_model: Any, prompt: Any) -> None:
    async with open_engine(chat_model) as engine, engine.session() as chat:
        with pytest.raises(RequestError):
            await chat.complete(prompt, chat_model.params)
        assert (chat.messages, chat.token_ids) == ((), ())
        completion = await chat.complete("w5 w6", chat_model.params)
        assert completion.usage.prompt_tokens == 4


async def test_the_context_s_end_refuses_a_turn_and_keeps_the_history(long_model: Any) -> None:
    async with open_engine(long_model) as engine, engine.session() as chat:
        await chat.complete(long_model.prompts[4], long_model.params)
        before = chat.token_ids
        with pytest.raises(ContextLengthError) as caught:
            await chat.complete([5] * 500, long_model.params)
        assert (caught.value.context_length, caught.value.num_tokens) == (512, 545)
        assert chat.token_ids == before
        completion = await chat.complete([5], long_model.params)
        assert completion.token_ids == long_model.greedy([*before, 5])
        assert completion.usage.cached_tokens == 44


# Edits


@pytest.mark.parametrize(("share_prefixes", "cached"), [(True, 32), (False, 40)])
async def test_an_edited_history_keeps_what_it_begins_with(long_model: Any, share_prefixes: bool, cached: int) -> None:
    async with open_engine(long_model, share_prefixes=share_prefixes) as engine, engine.session() as chat:
        await chat.complete([*long_model.prompts[4], *long_model.prompts[3]], long_model.params)
        edited = [*chat.token_ids[:40], 5, 6]
        chat.edit(token_ids=edited)
        assert chat.token_ids == tuple(edited)
        completion = await chat.complete([7], long_model.params)
        assert completion.token_ids == long_model.greedy([*edited, 7])
        assert completion.usage.cached_tokens == cached  # whole blocks, where others may use them


async def test_edits_to_nothing_to_longer_and_back(long_model: Any) -> None:
    longer = [*long_model.prompts[4], *long_model.prompts[3]]
    async with open_engine(long_model) as engine:
        async with engine.session() as chat:
            for history in ([], longer, longer[:3], [9], longer, [*longer[:35], 8]):
                chat.edit(token_ids=history)
                completion = await chat.complete([7, 8], long_model.params)
                assert completion.token_ids == long_model.greedy([*history, 7, 8])
        await check_nothing_is_left(engine)


async def test_the_same_turn_again(long_model: Any) -> None:
    async with open_engine(long_model) as engine, engine.session() as chat:
        for _ in range(3):
            completion = await chat.complete(long_model.prompts[4], long_model.params)
            assert completion.token_ids == long_model.references[4]
            chat.edit(token_ids=[])
        assert completion.usage.cached_tokens == 32


async def test_edited_messages(chat_model: Any) -> None:
    async with open_engine(chat_model) as engine, engine.session() as chat:
        await chat.complete(chat_model.text(chat_model.prompts[4]), chat_model.params)
        messages = [*chat.messages[:1], {"role": "assistant", "content": "w30"}]
        chat.edit(messages)
        assert chat.messages == tuple(messages)
        completion = await chat.complete("w31", chat_model.params)
        messages += conversation("w31")
        assert completion.token_ids == (await alone(chat_model, messages, chat_model.params)).token_ids
        chat.edit(token_ids=[5, 6])  # from now on it goes on from token ids
        assert chat.messages == ()
        assert (await chat.complete([7], chat_model.params)).token_ids == chat_model.greedy([5, 6, 7])


async def test_an_edit_takes_messages_or_token_ids(chat_model: Any) -> None:
    async with open_engine(chat_model) as engine, engine.session() as chat:
        with pytest.raises(RequestError, match="either"):
            chat.edit()
        with pytest.raises(RequestError, match="either"):
            chat.edit([], token_ids=[])


# Forks


@pytest.mark.parametrize("share_prefixes", [True, False])
async def test_both_go_on_from_a_fork(long_model: Any, share_prefixes: bool) -> None:
    async with open_engine(long_model, share_prefixes=share_prefixes) as engine:
        async with engine.session() as chat:
            await chat.complete(long_model.prompts[4], long_model.params)
            history = chat.token_ids
            kv_bytes = engine.statistics().kv_bytes
            async with chat.fork() as fork:
                assert (fork.token_ids, engine.statistics().num_sessions) == (history, 2)
                assert engine.statistics().kv_bytes == kv_bytes  # nothing was copied
                ours = await chat.complete([5, 6], long_model.params)
                theirs = await fork.complete([7], long_model.params)
                assert ours.token_ids == long_model.greedy([*history, 5, 6])
                assert theirs.token_ids == long_model.greedy([*history, 7])
                assert theirs.usage.cached_tokens == (32 if share_prefixes else 0)
                assert chat.token_ids == (*history, 5, 6, *ours.token_ids)
                assert fork.token_ids == (*history, 7, *theirs.token_ids)
        await check_nothing_is_left(engine)


async def test_both_turns_at_once(long_model: Any) -> None:
    answers: dict[int, Any] = {}

    async def go_on(chat: Any, token_id: int) -> None:
        answers[token_id] = (await chat.complete([token_id], long_model.params)).token_ids

    async with open_engine(long_model) as engine, engine.session() as chat:
        await chat.complete(long_model.prompts[4], long_model.params)
        history = chat.token_ids
        left, right = chat.fork(), chat.fork()
        async with anyio.create_task_group() as group:
            for token_id, session in enumerate((chat, left, right, left.fork()), start=5):
                group.start_soon(go_on, session, token_id)
    assert answers == {token_id: long_model.greedy([*history, token_id]) for token_id in range(5, 9)}


async def test_a_fork_outlives_its_parent(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        async with engine.session() as chat:
            await chat.complete(long_model.prompts[4], long_model.params)
            fork = chat.fork()
        async with fork:
            history = fork.token_ids
            completion = await fork.complete([7], long_model.params)
            assert completion.token_ids == long_model.greedy([*history, 7])
            assert completion.usage.cached_tokens == 32
        await check_nothing_is_left(engine)


async def test_a_fork_of_a_conversation_has_its_messages(chat_model: Any) -> None:
    async with open_engine(chat_model) as engine, engine.session() as chat:
        first = await chat.complete("w5 w6", chat_model.params)
        async with chat.fork() as fork:
            assert fork.messages == chat.messages
            second = await fork.complete("w7", chat_model.params)
            messages = conversation("w5 w6", first.text, "w7")
            assert second.token_ids == (await alone(chat_model, messages, chat_model.params)).token_ids
            assert len(chat.messages) == 2


async def test_forks_of_a_session_without_turns(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        async with engine.session() as chat, chat.fork() as fork, fork.fork() as another:
            completion = await another.complete(long_model.prompts[1], long_model.params)
            assert completion.token_ids == long_model.references[1]
        await check_nothing_is_left(engine)


async def test_a_fork_after_a_turn_that_was_left_within_its_prompt(long_model: Any) -> None:
    """What the turn computed of a block is not yet something to share."""
    prompt = [*long_model.prompts[4], *long_model.prompts[3]]
    async with open_engine(long_model, max_tokens_per_sweep=5) as engine:
        for num_sweeps in (1, 4, 8):
            async with engine.session() as chat:
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as group:
                        group.start_soon(chat.complete, prompt, long_model.params)
                        wanted = engine.statistics().sweeps + num_sweeps
                        await until(lambda wanted=wanted: engine.statistics().sweeps >= wanted)
                        scope.cancel()
                await until(lambda: not engine.statistics().num_running)
                async with chat.fork() as fork:
                    for session in (fork, chat):
                        completion = await session.complete(prompt, long_model.params)
                        assert completion.token_ids == long_model.greedy(prompt)
            engine.drop_prefixes()
        await check_nothing_is_left(engine)


# Turns that do not come to their end


async def leave_by_break(engine: Engine, chat: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    token_ids: list[int] = []
    async with aclosing(chat.generate(prompt, params)) as chunks:
        async for chunk in chunks:
            token_ids += chunk.token_ids
            if len(token_ids) >= 4:
                break
    return token_ids


async def leave_by_cancellation(engine: Engine, chat: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    token_ids: list[int] = []
    with anyio.CancelScope() as scope:
        async for chunk in chat.generate(prompt, params):
            token_ids += chunk.token_ids
            if len(token_ids) >= 4:
                scope.cancel()
    return token_ids


async def leave_by_abort(engine: Engine, chat: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    token_ids: list[int] = []
    async for chunk in chat.generate(prompt, params, request_id="turn"):
        token_ids += chunk.token_ids
        if len(token_ids) >= 4:
            await engine.abort("turn")
    return token_ids


async def leave_by_failure(engine: Engine, chat: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    token_ids: list[int] = []
    gone = ReadError("the disk is gone", path=Path("shard"), offset=0)
    with ExitStack() as failing, pytest.raises(ReadError, match="gone"):
        async for chunk in chat.generate(prompt, params):
            token_ids += chunk.token_ids
            if len(token_ids) >= 4:
                failing.enter_context(inside(engine).failing_sweeps(gone))
    return token_ids


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("leave", [leave_by_break, leave_by_cancellation, leave_by_abort, leave_by_failure])
async def test_a_turn_that_is_left_belongs_to_the_history_as_far_as_it_was_taken(
    long_model: Any, leave: Any, share_prefixes: bool
) -> None:
    prompts = long_model.prompts
    async with open_engine(long_model, share_prefixes=share_prefixes) as engine:
        async with engine.session() as chat:
            first = await chat.complete(prompts[3], long_model.params)
            history = [*prompts[3], *first.token_ids, *prompts[2]]
            taken = await leave(engine, chat, prompts[2], greedy_params(100))
            assert 4 <= len(taken) < 100
            assert tuple(taken) == long_model.greedy(history, len(taken))
            history += taken
            assert chat.token_ids == tuple(history)
            completion = await chat.complete([5, 6], long_model.params)  # at once, while its last stage is computed
            assert completion.token_ids == long_model.greedy([*history, 5, 6])
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("share_prefixes", [True, False])
async def test_turns_left_and_taken_at_once_leave_nothing(long_model: Any, share_prefixes: bool) -> None:
    """A turn's KV is still in use when the next one begins; whichever moment that is, the session has one KV."""
    async with open_engine(long_model, share_prefixes=share_prefixes) as engine:
        for num_turns in range(24):
            async with engine.session() as chat:
                async with aclosing(chat.generate(long_model.prompts[4], long_model.params)) as chunks:
                    await anext(chunks)
                    for _ in range(2 * num_turns):
                        await anyio.lowlevel.checkpoint()
                history = chat.token_ids
                completion = await chat.complete([5, 6], greedy_params(2))
                assert completion.token_ids == long_model.greedy([*history, 5, 6], 2)
            await check_nothing_is_left(engine)


async def test_a_turn_that_is_left_before_its_first_token_changes_nothing(long_model: Any) -> None:
    async with open_engine(long_model, max_tokens_per_sweep=4) as engine:
        async with engine.session() as chat:
            await chat.complete(long_model.prompts[1], long_model.params)
            before = chat.token_ids
            for num_sweeps in range(4):
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as group:
                        group.start_soon(chat.complete, long_model.prompts[4], long_model.params)
                        wanted = engine.statistics().sweeps + num_sweeps
                        await until(lambda wanted=wanted: engine.statistics().sweeps >= wanted)
                        scope.cancel()
                assert chat.token_ids == before
            completion = await chat.complete(long_model.prompts[4], long_model.params)
            assert completion.token_ids == long_model.greedy([*before, *long_model.prompts[4]])
        await check_nothing_is_left(engine)


async def test_a_conversation_s_turn_that_is_left(chat_model: Any) -> None:
    async with open_engine(chat_model) as engine, engine.session() as chat:
        text = ""
        async with aclosing(chat.generate("w5 w6", chat_model.params)) as chunks:
            async for chunk in chunks:
                text += chunk.text
                if len(text.split()) >= 3:
                    break
        assert chat.messages == tuple(conversation("w5 w6", text))
        completion = await chat.complete("w7", chat_model.params)
        messages = conversation("w5 w6", text, "w7")
        assert completion.token_ids == (await alone(chat_model, messages, chat_model.params)).token_ids


async def test_a_refused_turn_changes_nothing(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        async with engine.session() as chat:
            await chat.complete(long_model.prompts[1], long_model.params)
            before = chat.token_ids
            for prompt, params in (([1000], long_model.params), ([5], "greedy"), ([5], SamplingParams(logprobs=1000))):
                with pytest.raises(RequestError):
                    await chat.complete(prompt, params)
            assert chat.token_ids == before
            completion = await chat.complete([5], long_model.params)
            assert completion.token_ids == long_model.greedy([*before, 5])
        await check_nothing_is_left(engine)


# One turn after another


async def test_one_turn_at_a_time(long_model: Any) -> None:
    async with open_engine(long_model) as engine, engine.session() as chat:
        async with aclosing(chat.generate(long_model.prompts[1], greedy_params(50))) as chunks:
            await anext(chunks)
            with pytest.raises(RequestError, match="turn under way"):
                await chat.complete([5])
            with pytest.raises(RequestError, match="turn under way"):
                chat.edit(token_ids=[5])
            with pytest.raises(RequestError, match="turn under way"):
                chat.fork()
            token_ids = [*long_model.references[1][:1]]
            async for chunk in chunks:
                token_ids += chunk.token_ids
        assert tuple(token_ids) == long_model.greedy(long_model.prompts[1], 50)
        chat.fork()


async def test_a_turn_that_was_not_begun_is_none(long_model: Any) -> None:
    async with open_engine(long_model) as engine, engine.session() as chat:
        chunks = chat.generate(long_model.prompts[1], long_model.params)
        assert (await chat.complete(long_model.prompts[2], long_model.params)).token_ids == long_model.references[2]
        await chunks.aclose()


# Ends


async def test_a_closed_session(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        async with engine.session() as chat:
            await chat.complete(long_model.prompts[1], long_model.params)
        await chat.aclose()
        with pytest.raises(SessionClosedError):
            await chat.complete([5])
        with pytest.raises(SessionClosedError):
            chat.edit(token_ids=[5])
        with pytest.raises(SessionClosedError):
            chat.fork()
        with pytest.raises(SessionClosedError):
            async with chat:
                pytest.fail("entered")
        await check_nothing_is_left(engine)


async def test_closing_a_session_aborts_its_turn(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        chat = engine.session()
        chunks = [chunk async for chunk in closed_meanwhile(chat, long_model, after=3)]
        assert chunks[-1].finish_reason == "abort"
        assert len(chunks) < 100
        await check_nothing_is_left(engine)


async def closed_meanwhile(chat: Any, model: Any, after: int) -> Any:
    count = 0
    async for chunk in chat.generate(model.prompts[1], greedy_params(100)):
        yield chunk
        count += 1
        if count == after:
            await chat.aclose()


async def test_closing_a_session_while_its_turn_waits(long_model: Any) -> None:
    completions = []

    async def take_turn() -> None:
        completions.append(await chat.complete(long_model.prompts[1], long_model.params))

    async with open_engine(long_model, max_sequences=1) as engine:
        chat = engine.session()
        async with aclosing(engine.generate(long_model.prompts[2], greedy_params(300))) as chunks:
            await anext(chunks)
            async with anyio.create_task_group() as group:
                group.start_soon(take_turn)
                await until(lambda: engine.statistics().num_waiting == 1)
                await chat.aclose()
        assert (completions[0].finish_reason, completions[0].token_ids) == ("abort", ())
        await check_nothing_is_left(engine)


async def test_closing_a_session_while_its_prompt_is_prepared(long_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turn is told, and computes nothing."""
    ends: list[Any] = []

    def prepare_slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return prepare(*args, **kwargs)

    monkeypatch.setattr("hermes_async.engine.streaming.prepare", prepare_slowly)

    async def take_turn() -> None:
        try:
            ends.append((await chat.complete(long_model.prompts[1], long_model.params)).finish_reason)
        except SessionClosedError:
            ends.append("closed")

    async with open_engine(long_model) as engine:
        chat = engine.session()
        async with anyio.create_task_group() as group:
            group.start_soon(take_turn)
            await until(lambda: engine.statistics().num_waiting == 1)
            await chat.aclose()
        assert ends[0] in ("abort", "closed")
        assert engine.statistics().tokens_generated == 0
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("share_prefixes", [True, False])
async def test_a_turn_that_waits_for_memory_keeps_what_its_session_has(long_model: Any, share_prefixes: bool) -> None:
    """The turn needs all KV memory there is: nine blocks that its session holds, and seven of another request."""
    async with open_engine(long_model, kv_budget=16 * BLOCK_BYTES, share_prefixes=share_prefixes) as engine:
        async with engine.session() as chat, anyio.create_task_group() as group:
            await chat.complete(tokens(1, 138), greedy_params(5))
            other = engine.generate(tokens(2, 60), greedy_params(50))
            await anext(other)
            group.start_soon(chat.complete, [5], greedy_params(256 - 144))
            await until(lambda: len(inside(engine).request_ids) == 2 and engine.statistics().num_waiting == 1)
            await other.aclose()
            with anyio.fail_after(30):
                await until(lambda: engine.statistics().num_waiting == 0)
        await check_nothing_is_left(engine)


async def test_a_session_whose_engine_was_left(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        chat = engine.session()
        await chat.complete(long_model.prompts[1], long_model.params)
        history = chat.token_ids
    assert engine.statistics().num_sessions == 0
    assert chat.token_ids == history
    with pytest.raises(EngineClosedError):
        await chat.complete([5])
    with pytest.raises(EngineClosedError):
        chat.fork()
    with pytest.raises(EngineClosedError):
        engine.session()
    await chat.aclose()


async def test_an_engine_left_while_a_turn_runs(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        chat = engine.session()
        chunks = chat.generate(long_model.prompts[1], greedy_params(300))
        token_ids = list((await anext(chunks)).token_ids)
    with pytest.raises(EngineClosedError):
        async for chunk in chunks:
            token_ids += chunk.token_ids
    assert chat.token_ids == (*long_model.prompts[1], *token_ids)
    statistics = engine.statistics()
    assert (statistics.num_leases, statistics.bytes_in_use) == (0, 0)


async def test_an_engine_left_in_the_session_s_block(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        chat = await engine.session().__aenter__()
        await chat.complete(long_model.prompts[1], long_model.params)
    await chat.__aexit__(None, None, None)
    assert engine.statistics().num_leases == 0


async def test_a_session_before_the_engine_is_entered(long_model: Any) -> None:
    with pytest.raises(EngineClosedError, match="not entered"):
        Engine(long_model.path).session()


async def test_sessions_are_counted(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        async with engine.session(), engine.session() as chat:
            chat.fork()
            assert engine.statistics().num_sessions == 3
        assert engine.statistics().num_sessions == 1


async def test_closing_a_session_frees_its_memory_at_once(long_model: Any) -> None:
    async with open_engine(long_model, share_prefixes=False) as engine:
        async with engine.session() as chat:
            await chat.complete(long_model.prompts[4], long_model.params)
            assert engine.statistics().kv_bytes == 3 * BLOCK_BYTES
            assert "KV of session 1" in engine.statistics().holders
        assert engine.statistics().kv_bytes == 0


async def test_a_turn_that_ends_early_gives_back_what_it_did_not_need(long_model: Any) -> None:
    stop = dataclasses.replace(long_model.params, max_tokens=200, stop_token_ids=long_model.references[4][2:3])
    async with open_engine(long_model, share_prefixes=False) as engine, engine.session() as chat:
        completion = await chat.complete(long_model.prompts[4], stop)
        assert completion.finish_reason == "stop"
        assert engine.statistics().kv_bytes == 3 * BLOCK_BYTES  # of fifteen


async def test_nothing_of_a_session_blocks_the_event_loop(chat_model: Any, no_blocking: Any) -> None:
    async with open_engine(chat_model) as engine, engine.session() as chat:
        await chat.complete("w5 w6", chat_model.params)
        async with chat.fork() as fork:
            await fork.complete("w7", chat_model.params)
        chat.edit([])
        await chat.complete("w8", chat_model.params)


async def test_a_history_is_checked(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        with pytest.raises(RequestError, match="a chat message has"):
            engine.session("Hello")  # type: ignore[arg-type]
        assert engine.statistics().num_sessions == 0
        async with engine.session() as chat:
            with pytest.raises(RequestError, match="message 0, of role 'user', has no content"):
                chat.edit(messages=[{"role": "user"}])
            chat.edit(token_ids=torch.tensor([4, 5]))  # type: ignore[arg-type]
            assert chat.token_ids == (4, 5)
