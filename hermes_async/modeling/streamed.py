"""Binds each stage's weights to its module when the forward pass gets there, and unbinds them behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.kernels import bounded_attention, without_one_dnn
from hermes_async.modeling.module_tensors import Place, places_of
from hermes_async.modeling.packed import PackedBatch, forward_packed
from hermes_async.modeling.passes import EmbeddingRows, ForwardPass, NotLoadedError, Turn, run_in_turns
from hermes_async.modeling.transformers_api import attention_implementation, own_parameters, plain_attention
from hermes_async.pipeload.pipeline import SweepAbandoned
from hermes_async.pipeload.stage import Stage
from hermes_async.storage.buffers import Buffer


class StageGate(Protocol):
    """What the forward pass asks before and after each stage; in the engine, the `Pipeline`."""

    def enter(self, stage: Stage, on_look: Callable[[], None]) -> Buffer: ...
    def leave(self, stage: Stage) -> None: ...


class StreamedLinear(nn.Module):
    """A linear layer in blocks of output rows, each a stage of its own; `[..., in] -> [..., out]`."""

    def __init__(self, linear: nn.Linear, block_rows: Sequence[int]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.blocks = nn.ModuleList(
            nn.Linear(linear.in_features, rows, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
            for rows in block_rows
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([block(hidden_states) for block in self.blocks], dim=-1)


def replace_linears(model: nn.Module, linear_blocks: Mapping[str, Sequence[int]]) -> None:
    """Puts a `StreamedLinear` in place of each named linear layer."""
    for name, block_rows in linear_blocks.items():
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), leaf, StreamedLinear(linear, block_rows).eval())


# What says nothing of a tensor's numbers; attributes, such as dtype and shape, are read by `__get__`.
_HARMLESS = frozenset(
    {
        "__get__",
        "__len__",
        "__repr__",
        "data_ptr",
        "dim",
        "element_size",
        "is_complex",
        "is_floating_point",
        "numel",
        "size",
    }
)


class _NotLoaded(nn.Parameter):
    """Stands in for a weight or buffer that is not loaded: has its shape and dtype, and refuses to be computed with.

    It is in the CPU's memory and takes none of it. On the meta device it would mislead a model that asks it where
    tensors are to be made, and torch multiplies there without an error and gives what happens to lie in memory.
    """

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _NotLoaded:
        """With the tensor's shape and dtype."""
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in _HARMLESS:
            raise NotLoadedError(f"a part of its weights was to be used ({name}) while it is not loaded")
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        return result.as_subclass(cls) if isinstance(result, torch.Tensor) else result


def _check_loaded(module: nn.Module, args: Any) -> None:
    """A forward pre-hook.

    Raises:
        NotLoadedError: A parameter of the module is not loaded.
    """
    for name, parameter in own_parameters(module).items():
        if parameter is not None and (isinstance(parameter, _NotLoaded) or parameter.is_meta):
            raise NotLoadedError(f"a {type(module).__name__} was to compute while its {name} is not loaded")


class StreamedModel:
    """A model without weights, whose stages are bound when they are entered and unbound when they are left.

    Args:
        stages: All stages; a stage's name is its module's. One without a name, the base, is entered first of all.
        streamed_embedding: The input embedding is not loaded; each batch brings the rows it needs.
        native_tokens: Packed sweeps of at most so many tokens are computed by torch's own kernels, without oneDNN's.
        gate: Asked before and after each stage.
        on_stage: Called by the compute thread before each stage of a packed sweep, resident ones too, with its batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: PackedAttention,
        stages: Sequence[Stage],
        *,
        streamed_embedding: bool,
        native_tokens: int = 0,
        gate: StageGate,
        on_stage: Callable[[PackedBatch], None],
    ) -> None:
        self.model = model
        self._attention = attention
        self._native_tokens = native_tokens
        self._gate = gate
        self._on_stage = on_stage
        # All mutable state: what is called before each stage, the embedding rows that are bound next, and the stages
        # whose weights are bound.
        self._before_stage: Callable[[], None] = lambda: None
        self._embedding: EmbeddingRows | None = None
        self._bound: set[Stage] = set()
        names = {placement.name for stage in stages for placement in stage.layout.placements}
        self._places = places_of(model, names)
        self._unloaded = {name: _NotLoaded.of(place.get()) for name, place in self._places.items()}
        self._stages = tuple(stages)
        for stage in stages:
            self.unbind(stage)
        self._hooks: list[RemovableHandle] = []
        self._base = next((stage for stage in stages if not stage.name), None)
        for stage in stages:
            if stage is self._base:
                continue
            module = model.get_submodule(stage.name)
            self._hooks.append(module.register_forward_pre_hook(self._entering(stage)))
            self._hooks.append(module.register_forward_hook(self._leaving(stage)))
        self._streamed_embedding: Place | None = None
        if streamed_embedding:
            embedding = model.get_input_embeddings()
            assert isinstance(embedding, nn.Embedding)
            embedding.padding_idx = None  # means nothing without gradients, and need not be a row here
            self._streamed_embedding = Place(embedding, "weight")
            self._unloaded_embedding = _NotLoaded.of(embedding.weight)
            self._streamed_embedding.put(self._unloaded_embedding)
            self._hooks.append(embedding.register_forward_pre_hook(self._embed_rows))
        for module in model.modules():
            if own_parameters(module):
                self._hooks.append(module.register_forward_pre_hook(_check_loaded))  # behind those that load

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Runs one sweep on the calling thread; logits [outputs, vocab].

        Raises:
            ReadError: A stage could not be read.
            SweepAbandoned: From the gate or `on_stage`. Whatever is raised, no streamed stage stays bound.
        """
        rows = None
        if batch.embedding_rows is not None:
            rows = EmbeddingRows(batch.embedding_rows, index=batch.embedding_index)
        native = batch.input_ids.numel() <= self._native_tokens
        with without_one_dnn() if native else nullcontext(), self._running(partial(self._on_stage, batch), rows):
            return forward_packed(self.model, self._attention, batch)

    def run_passes(self, passes: Sequence[ForwardPass]) -> None:
        """Runs one sweep of the model's own forward, for all passes; each then has its result or error.

        Raises:
            ReadError: A stage could not be read.
            SweepAbandoned: From the gate, or because no pass came to its end.
        """
        with self._plain_attention(), torch.inference_mode(), bounded_attention(self.model.dtype):
            if len(passes) == 1:
                (alone,) = passes
                with self._running(alone.check_dropped, alone.embedding):
                    alone.run()
            else:
                with self._running(lambda: None, None):
                    run_in_turns(passes, self._enter, self._leave)
        if not any(forward_pass.completed for forward_pass in passes):
            raise SweepAbandoned  # nobody came to the end, so the stages that were not visited mean nothing

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """transformers' own attention in place of the one for packed rows."""
        packed = attention_implementation(self.model) == self._attention.name
        if packed:
            self.model.set_attn_implementation(plain_attention(self.model))
        try:
            yield
        finally:
            if packed:
                self.model.set_attn_implementation(self._attention.name)

    @contextmanager
    def _running(self, before_stage: Callable[[], None], embedding: EmbeddingRows | None) -> Iterator[None]:
        self._before_stage, self._embedding = before_stage, embedding
        try:
            if self._base is not None:
                self._enter(self._base)
            yield
        finally:
            self._embedding = None
            if self._streamed_embedding is not None:
                self._streamed_embedding.put(self._unloaded_embedding)
            for stage in [stage for stage in self._bound if not stage.resident]:
                self.unbind(stage)

    def close(self) -> None:
        """Unbinds everything and takes the hooks off."""
        while self._hooks:
            self._hooks.pop().remove()
        for stage in self._stages:
            self.unbind(stage)

    def _entering(self, stage: Stage) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            turn = Turn.current()
            if turn is None:
                self._before_stage()
                self._enter(stage)
                return
            if stage not in self._bound:
                turn.rest(stage, entering=True)
            turn.forward_pass.check_dropped()

        return enter

    def _leaving(self, stage: Stage) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            turn = Turn.current()
            if turn is None:
                self._leave(stage)
            elif not stage.resident:
                turn.rest(stage, entering=False)

        return leave

    def _enter(self, stage: Stage) -> None:
        buffer = self._gate.enter(stage, self._before_stage)
        if stage not in self._bound:
            self._bind(stage, buffer)

    def _leave(self, stage: Stage) -> None:
        if not stage.resident:
            self.unbind(stage)
            self._gate.leave(stage)

    def _bind(self, stage: Stage, buffer: Buffer) -> None:
        """Puts a stage's weights into the model, as views of `buffer`."""
        for placement in stage.layout.placements:
            view = buffer.tensor(placement.position, placement.dtype, placement.shape)
            self._places[placement.name].put(view.to(self._unloaded[placement.name].dtype))
        self._bound.add(stage)

    def unbind(self, stage: Stage) -> None:
        """Takes a stage's weights out of the model."""
        self._bound.discard(stage)
        for placement in stage.layout.placements:
            self._places[placement.name].put(self._unloaded[placement.name])

    def _embed_rows(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        turn = Turn.current()
        embedding = self._embedding if turn is None else turn.forward_pass.embedding
        if embedding is None:
            raise NotLoadedError("token ids were to be embedded, and no row of them is loaded")
        assert self._streamed_embedding is not None
        self._streamed_embedding.put(embedding.rows.to(self._unloaded_embedding.dtype))
        return (embedding.index_of(args[0]), *args[1:])
