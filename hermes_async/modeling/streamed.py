"""Binds each stage's weights to its module when a model call comes to it, and unbinds them behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum, auto
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.bfloat16_weight import Bfloat16Weight, may_be_bfloat16_weight, with_products
from hermes_async.modeling.calls import EmbeddingRows, ModelCall, NotLoadedError, PackedCall, Turn, run_calls
from hermes_async.modeling.experts import ExpertLayer, RoutedExperts
from hermes_async.modeling.kernels import without_one_dnn
from hermes_async.modeling.laying_out import lay_out
from hermes_async.modeling.module_tensors import Place, places_of
from hermes_async.modeling.packed import PackedBatch, forward_packed
from hermes_async.modeling.row_tables import RowTable, row_taken
from hermes_async.modeling.transformers_api import AttentionChoice, own_parameters
from hermes_async.pipeload.agents import SweepAbandoned
from hermes_async.pipeload.stage import Placement, Stage
from hermes_async.quantization.bfloat16_products import LINEAR, Bfloat16Products
from hermes_async.quantization.encoded_weight import EncodedParameter, EncodedWeight, parameter_of, reads_no_values
from hermes_async.quantization.row_threads import RowThreads
from hermes_async.storage.buffers import Buffer


class StageGate(Protocol):
    """What the inference thread asks before and after each stage; in the engine, the `Pipeline`."""

    def enter(self, stages: Sequence[Stage]) -> Stage | None:
        """Waits for one of these stages; None where it was woken because somebody was aborted."""
        ...

    def leave(self, stage: Stage) -> None: ...
    def ask(self, experts: Sequence[Stage]) -> None: ...
    def forget(self, experts: Sequence[Stage]) -> None: ...


class StreamedLinear(nn.Module):
    """A linear layer `[..., in] -> [..., out]` in blocks of output rows; each block is a stage."""

    def __init__(self, linear: nn.Linear, block_rows: Sequence[int]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.blocks = nn.ModuleList(
            nn.Linear(linear.in_features, rows, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
            for rows in block_rows
        )

    @property
    def weight(self) -> torch.Tensor:
        """The rows of the first block: some models read the dtype of a weight here, none reads its values."""
        return self.blocks[0].weight  # type: ignore[return-value]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([block(hidden_states) for block in self.blocks], dim=-1)


def replace_linears(model: nn.Module, linear_blocks: Mapping[str, Sequence[int]]) -> None:
    """Replaces each named linear layer by a `StreamedLinear`."""
    for name, block_rows in linear_blocks.items():
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), leaf, StreamedLinear(linear, block_rows).eval())


class _NotLoaded(nn.Parameter):
    """A placeholder for a weight or buffer that is not loaded. It has the shape and dtype, but cannot be computed with.

    It is a CPU tensor that takes no memory. A placeholder on the meta device would mislead models that create tensors
    on the device of a weight; and torch multiplies with it without an error, and returns undefined values.
    """

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """A placeholder with the tensor's shape and dtype."""
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if not reads_no_values(func):
            raise NotLoadedError(f"a part of its weights was to be used ({name}) while it is not loaded")
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        return result.as_subclass(cls) if isinstance(result, torch.Tensor) else result


class _RowsElsewhere(_NotLoaded):
    """A placeholder for a table that is read by row. A row can be taken from it if the running call has brought it.

    Attributes:
        table: How its rows are stored.
    """

    table: RowTable

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        row = row_taken(func, args)
        if row is None:
            return super().__torch_function__(func, types, args, kwargs)
        table, index = args
        name = table.table.name
        brought = Turn.current().call.rows.get(name)
        if brought is None:
            raise NotLoadedError(f"row {row} of {name} was to be used, and is not loaded")
        stored = brought.rows[brought.index_of(torch.tensor([row]))]
        taken = table.table.values(stored, table.dtype)[0]
        return taken[index[1:]] if isinstance(index, tuple) else taken


def _check_loaded(module: nn.Module, args: Any) -> None:
    """A forward pre-hook, called after the hooks that bind weights.

    Raises:
        NotLoadedError: A parameter of the module is not loaded.
    """
    for name, parameter in own_parameters(module).items():
        if parameter is not None and (isinstance(parameter, _NotLoaded) or parameter.is_meta):
            raise NotLoadedError(f"a {type(module).__name__} was to compute while its {name} is not loaded")


class StreamedModel:
    """A model without weights, whose stages are bound when they are entered and unbound when they are left.

    Args:
        attention: The one that the model was built with, if it lets its attention be chosen.
        stages: All stages; a stage's name is its module's. One without a name, the base, is entered first of all.
        experts: The layers whose experts are read one by one, with the stages of these.
        row_tables: The embeddings that are not loaded; each call brings the rows that it looks up.
        encoded: The parameters that are computed from stored tensors, by name.
        native_tokens: Packed calls of at most so many tokens are computed by torch's own kernels, without oneDNN's.
        products: How inputs are multiplied with bfloat16 weights.
        lays_out: Weights of resident stages are written in a kernel's layout when they are first bound.
        gate: Asked before and after each stage.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: PackedAttention,
        stages: Sequence[Stage],
        *,
        experts: Sequence[tuple[ExpertLayer, Sequence[Stage]]] = (),
        row_tables: Sequence[RowTable] = (),
        encoded: Mapping[str, EncodedParameter] = MappingProxyType({}),
        native_tokens: int = 0,
        lays_out: bool = False,
        products: Bfloat16Products = LINEAR,
        gate: StageGate,
    ) -> None:
        self.model = model
        self._attention = attention
        self._native_tokens = native_tokens
        self._lays_out = lays_out
        self._gate = gate
        # All mutable state: the stages whose weights are bound, the parameters of resident stages that lie in memory in
        # a kernel's layout with their tensors, the setting of the call that runs, and how to undo it.
        self._bound: set[Stage] = set()
        self._laid_out: dict[str, tuple[EncodedParameter, dict[str, torch.Tensor]]] = {}
        self._setting = _Setting.PACKED
        self._undo_setting = ExitStack()
        self._packed_attention = AttentionChoice(model)
        self._plain_attention = self._packed_attention.or_plain_for(attention.name)
        self._encoded = encoded
        self._products = products
        self._row_threads = RowThreads(torch.get_num_threads())
        names = {parameter_of(placement.name) for stage in stages for placement in stage.layout.placements}
        of_experts = {name for layer, _ in experts for name in layer.parameters}
        self._places = places_of(model, names | of_experts)
        self._unloaded = {name: _NotLoaded.of(place.get()) for name, place in self._places.items()}
        self._bfloat16_weights = frozenset(
            name
            for name, place in self._places.items()
            if not products.is_linear and may_be_bfloat16_weight(place, self._unloaded[name])
        )
        for name in of_experts:
            self._places[name].put(self._unloaded[name])
        self._experts: RoutedExperts | None = None
        if experts:
            self._experts = RoutedExperts(model, {layer.name: stages for layer, stages in experts}, gate)
        self._dtypes_of_experts = {expert: layer.dtypes for layer, stages in experts for expert in stages}
        self._stages = tuple(stages)
        for stage in stages:
            self.unbind(stage)
        self._hooks: list[RemovableHandle] = []
        self._base = next((stage for stage in stages if not stage.name), None)
        for stage in stages:
            if stage is self._base:
                continue
            module = model.get_submodule(stage.name)
            self._hooks.append(module.register_forward_pre_hook(_entering(stage)))
            self._hooks.append(module.register_forward_hook(_leaving(stage)))
        self._row_places: dict[str, Place] = {}
        for table in row_tables:
            name, embedding = table.name, model.get_submodule(table.name)
            assert isinstance(embedding, nn.Embedding)
            embedding.padding_idx = None  # means nothing without gradients, and need not be a row here
            self._row_places[name] = Place(embedding, "weight")
            unloaded = _RowsElsewhere.of(embedding.weight)
            unloaded.table = table
            self._unloaded[name] = unloaded
            self._unbind_rows(name)
            self._hooks.append(embedding.register_forward_pre_hook(partial(self._bind_rows, table)))
            self._hooks.append(embedding.register_forward_hook(partial(self._unbind_rows, name)))
        routed = {model.get_submodule(layer.name) for layer, _ in experts}
        for module in model.modules():
            if own_parameters(module) and module not in routed:
                self._hooks.append(module.register_forward_pre_hook(_check_loaded))  # after the hooks that bind

    def packed_call(
        self, batch: PackedBatch, then: Callable[[torch.Tensor], Any], rows: Mapping[str, EmbeddingRows]
    ) -> PackedCall:
        """A call on a packed row.

        Args:
            then: Makes the result from the logits [outputs, vocab], on the inference thread.
            rows: See `ModelCall.rows`.
        """
        return PackedCall(lambda: then(forward_packed(self.model, self._attention, batch)), rows=rows, batch=batch)

    def run(self, calls: Sequence[ModelCall]) -> None:
        """Runs one sweep for all calls on the calling thread; each call then has its result or error.

        Whatever is raised, no streamed stage stays bound.

        Raises:
            ReadError: A stage could not be read.
            SweepAbandoned: From the gate, or because no call came to its end: each was dropped, or has an error.
        """
        try:
            with torch.inference_mode():
                run_calls(calls, first=self._base, enter=self._enter, leave=self._leave, switch_to=self._switch_to)
        finally:
            self._change_setting(_Setting.PACKED)
            for name in self._row_places:
                self._unbind_rows(name)
            self._unbind_expert()
            for stage in [stage for stage in self._bound if not stage.resident]:
                self.unbind(stage)
        if not any(call.completed for call in calls):
            raise SweepAbandoned  # the stages that no call came to may still be needed by others

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Runs a packed call in a sweep of its own; logits [outputs, vocab].

        Raises:
            ReadError, SweepAbandoned: As `run`.
        """
        call = self.packed_call(batch, lambda logits: logits, rows={})
        try:
            self.run([call])
        except SweepAbandoned:
            if call.error is not None:
                raise call.error from None
            raise
        logits: torch.Tensor = call.result
        return logits

    def close(self) -> None:
        """Unbinds everything, takes the hooks off, and ends the threads."""
        while self._hooks:
            self._hooks.pop().remove()
        if self._experts is not None:
            self._experts.close()
        for stage in self._stages:
            self.unbind(stage)
        self._row_threads.close()

    # --- settings of the model and the process that a call needs ---

    def _switch_to(self, call: ModelCall) -> None:
        """Changes the settings to those that the call needs, if they are others."""
        if not isinstance(call, PackedCall):
            setting = _Setting.PLAIN
        elif call.batch.num_tokens <= self._native_tokens:
            setting = _Setting.PACKED_NATIVE
        else:
            setting = _Setting.PACKED
        if setting is not self._setting:
            self._change_setting(setting)

    def _change_setting(self, setting: _Setting) -> None:
        self._undo_setting.close()
        self._setting = setting
        if setting is _Setting.PLAIN:
            self._plain_attention.apply()
            self._undo_setting.callback(self._packed_attention.apply)
        elif setting is _Setting.PACKED_NATIVE:
            self._undo_setting.enter_context(without_one_dnn())

    # --- stages ---

    def _enter(self, stages: Sequence[Stage]) -> Stage | None:
        stage = self._gate.enter(stages)
        if stage is None:
            return None
        if stage.is_expert:
            self._bind_expert(stage)
        elif stage not in self._bound:
            self._bind(stage, stage.loaded)
        return stage

    def _leave(self, stage: Stage) -> None:
        if stage.is_expert:
            self._unbind_expert()
        elif not stage.resident:
            self.unbind(stage)
        if stage.is_expert or not stage.resident:
            self._gate.leave(stage)

    def _bind_expert(self, expert: Stage) -> None:
        """Gives an expert's weights, as views of its buffer, to the function that computes it."""
        assert self._experts is not None
        dtypes = self._dtypes_of_experts[expert]
        stored = {placement.name: placement for placement in expert.layout.placements}

        def part_of(name: str) -> torch.Tensor:
            placement = stored[name]
            return expert.loaded.tensor(placement.position, placement.dtype, placement.shape)

        weights: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(map(parameter_of, stored)):
            leaf = name.rpartition(".")[2]
            encoded = self._encoded.get(name)
            if encoded is None:
                weights[leaf] = with_products(part_of(name).to(dtypes[leaf]), self._products, self._row_threads)
            else:
                weights[leaf] = EncodedWeight.of(encoded, part_of, self._products, self._row_threads)
        self._experts.weights = weights

    def _unbind_expert(self) -> None:
        if self._experts is not None:
            self._experts.weights = {}

    def _bind(self, stage: Stage, buffer: Buffer) -> None:
        """Puts a stage's weights into the model, as views of `buffer`."""
        stored: dict[str, Placement] = {}
        for placement in stage.layout.placements:
            if placement.name not in self._places:
                stored[placement.name] = placement
                continue
            view = buffer.tensor(placement.position, placement.dtype, placement.shape)
            value = view.to(self._unloaded[placement.name].dtype)
            if placement.name in self._bfloat16_weights:
                value = Bfloat16Weight.of(value, self._products, self._row_threads)
            self._places[placement.name].put(value)

        def part_of(name: str) -> torch.Tensor:
            placement = stored[name]
            return buffer.tensor(placement.position, placement.dtype, placement.shape)

        for name in dict.fromkeys(map(parameter_of, stored)):
            if self._lays_out and stage.resident and not stage.layout.is_shared and name not in self._laid_out:
                laid_out = lay_out(self._encoded[name], part_of)
                if laid_out is not None:
                    self._laid_out[name] = laid_out
            if name in self._laid_out:
                encoded, tensors = self._laid_out[name]
                weight: torch.Tensor = EncodedWeight.of(encoded, tensors.__getitem__, self._products, self._row_threads)
            else:
                encoded = self._encoded[name]
                weight = (
                    encoded.dequantized(part_of)
                    if encoded.whole
                    else EncodedWeight.of(encoded, part_of, self._products, self._row_threads)
                )
            self._places[name].put(weight)
        self._bound.add(stage)

    def unbind(self, stage: Stage) -> None:
        """Takes a stage's weights out of the model."""
        self._bound.discard(stage)
        for name in dict.fromkeys(parameter_of(placement.name) for placement in stage.layout.placements):
            self._places[name].put(self._unloaded[name])
            self._laid_out.pop(name, None)  # the stage is read again before it is bound again

    def _bind_rows(
        self, table: RowTable, module: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        embedding = Turn.current().call.rows.get(table.name)
        if embedding is None:
            raise NotLoadedError("token ids were to be embedded, and no row of them is loaded")
        self._row_places[table.name].put(table.values(embedding.rows, self._unloaded[table.name].dtype))
        return (embedding.index_of(args[0]), *args[1:])

    def _unbind_rows(self, name: str, *_: Any) -> None:
        self._row_places[name].put(self._unloaded[name])


class _Setting(Enum):
    """Settings of the model and the process while a call runs."""

    PACKED = auto()
    """Attention for packed rows; also between sweeps."""
    PACKED_NATIVE = auto()
    """The same, without oneDNN."""
    PLAIN = auto()
    """transformers' own attention."""


def _entering(stage: Stage) -> Callable[[nn.Module, Any], None]:
    def enter(module: nn.Module, args: Any) -> None:
        Turn.current().rest(stage, entering=True)

    return enter


def _leaving(stage: Stage) -> Callable[[nn.Module, Any, Any], None]:
    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if not stage.resident:
            Turn.current().rest(stage, entering=False)

    return leave
