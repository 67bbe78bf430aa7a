"""Calls of different kinds in one sweep: each gives what it gives alone, and what one needs no other feels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hermes_async import EngineConfig
from hermes_async.engine.opening import OpenedModel, open_model
from hermes_async.modeling import streamed
from hermes_async.modeling.calls import EmbeddingRows, ModelCall, PackedCall
from hermes_async.modeling.kv_cache import KVPool, SequenceKV, num_blocks
from hermes_async.modeling.packed import PackedBatch, PackedSequence
from hermes_async.modeling.partition import partition
from hermes_async.modeling.streamed import StreamedModel, replace_linears
from hermes_async.modeling.transformers_api import attention_implementation
from hermes_async.pipeload.agents import SweepAbandoned
from hermes_async.pipeload.stage import Stage
from hermes_async.storage.buffers import Buffer

CONFIG = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
PROMPTS = [5, 17, 8, 9, 33], [70, 3, 21]


class Gate:
    """Stages that are always there; it may be woken before it lets a stage in."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights = weights
        self.on_enter: Callable[[Stage], bool] = lambda stage: True
        self.entered: list[str] = []

    def enter(self, stages: Sequence[Stage]) -> Stage | None:
        (stage,) = stages
        if not self.on_enter(stage):
            return None
        self.entered.append(stage.name)
        stage.buffer = Buffer(stage.layout.slot_bytes)
        for placement in stage.layout.placements:
            values = self._weights[placement.name]
            stage.buffer.tensor(placement.position, placement.dtype, placement.shape).copy_(values)
        return stage

    def leave(self, stage: Stage) -> None:
        pass

    def ask(self, experts: Sequence[Stage]) -> None:
        raise NotImplementedError

    forget = ask


class Rig:
    def __init__(self, opened: OpenedModel, original: PreTrainedModel, *, resident: bool, native_tokens: int) -> None:
        parts = partition(opened.skeleton, opened.probe, None if resident else 40_000)
        assert not parts.linear_blocks
        replace_linears(opened.skeleton.model, parts.linear_blocks)
        layouts = [layout for layout in (parts.base, *parts.stages) if layout.placements]
        self.stages = [Stage(idx, layout, resident or not layout.name) for idx, layout in enumerate(layouts)]
        self.original = original
        self.weights = original.state_dict()
        self.gate = Gate(self.weights)
        self.row_tables = parts.row_tables
        self.pool = KVPool(opened.probe.kv, 1 << 20)
        self.attention = opened.attention
        self.model = StreamedModel(
            opened.skeleton.model,
            opened.attention,
            self.stages,
            row_tables=self.row_tables,
            native_tokens=native_tokens,
            gate=self.gate,
        )

    def rows(self, *token_ids: int) -> dict[str, EmbeddingRows]:
        needed = torch.tensor(sorted(set(token_ids)))
        tables = [table.name for table in self.row_tables]
        return {name: EmbeddingRows(self.weights[f"{name}.weight"][needed], needed) for name in tables}

    def packed(self, *prompts: list[int]) -> PackedCall:
        """Its result: the logits of each prompt's last token, [prompts, vocab]."""
        sequences = [
            PackedSequence(SequenceKV(self.pool, self.pool.allocate(num_blocks(len(prompt)))), 0, prompt, num_outputs=1)
            for prompt in prompts
        ]
        rows = self.rows(*(token_id for prompt in prompts for token_id in prompt))
        return self.model.packed_call(PackedBatch.of(sequences), lambda logits: logits, rows)

    def plain(self, prompt: list[int]) -> ModelCall:
        """Its result: the logits of all tokens, [tokens, vocab]."""
        input_ids = torch.tensor([prompt])
        return ModelCall(
            lambda: self.model.model(input_ids=input_ids, use_cache=False).logits[0], rows=self.rows(*prompt)
        )

    def expected(self, prompt: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self.original(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        return logits


@pytest.fixture(params=[False, True], ids=["streamed", "resident"])
def rig(request: pytest.FixtureRequest, random_model: Any, tmp_path: Path) -> Iterator[Rig]:
    original = random_model(t.LlamaConfig(**CONFIG))
    original.save_pretrained(tmp_path)
    with closing(open_model(tmp_path, "1GiB", EngineConfig())) as opened:
        rig = Rig(opened, original, resident=request.param, native_tokens=3)
        with closing(rig.model):
            yield rig


def test_packed_and_plain_calls_share_a_sweep(rig: Rig) -> None:
    first, second = PROMPTS
    calls = [rig.packed(first, second), rig.plain(first), rig.packed(second), rig.plain(second)]
    rig.model.run(calls)
    assert rig.gate.entered == [stage.name for stage in rig.stages]
    assert all(call.completed for call in calls)
    for call, prompts in zip(calls, (PROMPTS, [first], [second], [second]), strict=True):
        expected = torch.cat([rig.expected(prompt)[-1 if isinstance(call, PackedCall) else 0 :] for prompt in prompts])
        torch.testing.assert_close(call.result, expected, rtol=1e-4, atol=1e-4)
    alone = [rig.packed(first, second), rig.plain(first)]
    for call, other in zip(alone, calls, strict=False):
        rig.model.run([call])
        assert torch.equal(call.result, other.result)


def test_what_a_call_needs_is_there_while_it_runs_and_only_then(rig: Rig) -> None:
    seen: dict[str, set[Any]] = {"packed": set(), "native": set(), "plain": set()}
    first, second = PROMPTS
    packed, native = rig.packed(first), rig.packed(second)
    calls = {"packed": packed, "native": native, "plain": rig.plain(first)}

    def settings() -> tuple[Any, ...]:
        cache = rig.attention.cache
        is_packed = attention_implementation(rig.model.model) == rig.attention.name
        return is_packed, bool(torch._C._get_mkldnn_enabled()), None if cache is None else id(cache.segments)

    def record(module: Any, args: Any) -> None:
        call = streamed.Turn.current().call
        seen[next(name for name, one in calls.items() if one is call)].add(settings())

    before = settings()
    hooks = [layer.mlp.act_fn.register_forward_pre_hook(record) for layer in rig.model.model.model.layers]
    rig.model.run(list(calls.values()))
    for hook in hooks:
        hook.remove()
    assert seen == {
        "packed": {(True, True, id(packed.batch.segments))},
        "native": {(True, False, id(native.batch.segments))},
        "plain": {(False, True, None)},
    }
    assert settings() == before == (True, True, None)


def test_function_modes_are_the_call_s_own(rig: Rig) -> None:
    class Counting(TorchFunctionMode):
        num_calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.num_calls += 1
            return func(*args, **(kwargs or {}))

    def counted(*others: ModelCall) -> int:
        mode, call = Counting(), rig.plain(PROMPTS[0])
        compute = call.compute

        def within() -> Any:
            with mode:
                return compute()

        call.compute = within
        rig.model.run([call, *others])
        torch.testing.assert_close(call.result, rig.expected(PROMPTS[0]), rtol=1e-4, atol=1e-4)
        return mode.num_calls

    assert counted() == counted(rig.packed(*PROMPTS), rig.plain(PROMPTS[1])) > 0


class Flag:
    def __init__(self) -> None:
        self.times_set = 0

    def set(self) -> None:
        self.times_set += 1


@pytest.mark.parametrize("waits", [False, True])
def test_an_abandoned_sequence_is_dropped_at_the_next_stage(rig: Rig, waits: bool) -> None:
    call, other = rig.packed(*PROMPTS), rig.plain(PROMPTS[0])
    segment = call.batch.segments[1]
    segment.left = flag = Flag()
    woken = []

    def on_enter(stage: Stage) -> bool:
        if stage.idx == 2 and not woken:
            segment.abandoned = True
            woken.append(segment.dropped)
            return not waits
        assert segment.dropped is (stage.idx > 2 or (waits and bool(woken)))
        return True

    rig.gate.on_enter = on_enter
    rig.model.run([call, other])
    assert flag.times_set == 1
    assert not call.batch.segments[0].dropped
    torch.testing.assert_close(call.result[0], rig.expected(PROMPTS[0])[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.result, rig.expected(PROMPTS[0]), rtol=1e-4, atol=1e-4)


def test_a_call_whose_sequences_are_all_abandoned_ends_and_the_others_go_on(rig: Rig) -> None:
    call, other = rig.packed(*PROMPTS), rig.packed(PROMPTS[0])

    def on_enter(stage: Stage) -> bool:
        if stage.idx == 2:
            for segment in call.batch.segments:
                segment.abandoned = True
        return True

    rig.gate.on_enter = on_enter
    rig.model.run([call, other])
    assert call.dropped
    assert not call.completed
    assert call.error is None
    torch.testing.assert_close(other.result[0], rig.expected(PROMPTS[0])[-1], rtol=1e-4, atol=1e-4)


def test_when_no_call_comes_to_its_end_the_sweep_is_abandoned(rig: Rig) -> None:
    call, failing = rig.packed(*PROMPTS), rig.plain(PROMPTS[0])

    def fail() -> None:
        raise ValueError("as it does alone")

    failing.compute = fail
    for segment in call.batch.segments:
        segment.abandoned = True
    with pytest.raises(SweepAbandoned):
        rig.model.run([call, failing])
    assert call.dropped
    assert isinstance(failing.error, ValueError)
    assert attention_implementation(rig.model.model) == rig.attention.name
