"""Divides a model into stages, none larger than a given size where that is possible."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from torch import nn

from hermes_async.modeling.checkpoint_tensors import weight_bytes
from hermes_async.modeling.experts import ExpertLayer
from hermes_async.modeling.laying_out import laying_out_bytes, layout_bytes
from hermes_async.modeling.probe import Probe
from hermes_async.modeling.row_tables import RowTable, row_tables
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.pipeload.stage import StageLayout
from hermes_async.quantization.encoded_weight import EncodedParameter, parameter_of
from hermes_async.storage.tensor_spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Partition:
    """Stages in the order in which the model computes them.

    Attributes:
        base: Parameters that belong to no stage and are resident: mostly norms, biases and other vectors.
        linear_blocks: Linear layers that are too large for one stage, with the output rows of each block.
        row_tables: Embeddings whose rows are read as needed, in the order in which they are looked up. All others are
            in stages.
        cast_bytes: Bytes of the parameters of one stage, and one expert, that are cast to the dtype they compute in, at
            most.
        layout_bytes: Bytes that it takes to lay out all weights for kernels of whole numbers, in addition to the stored
            bytes; 0 if there is no kernel for them, or if not all weights stay in memory.
        encoded: The parameters of the stages and experts that are computed from stored tensors, by name.
        experts: The layers whose experts are read one by one, in the order in which they are computed. Their weights
            are in no stage. Empty for a model that is in memory as a whole.
    """

    base: StageLayout
    stages: tuple[StageLayout, ...]
    linear_blocks: dict[str, tuple[int, ...]]
    row_tables: tuple[RowTable, ...]
    cast_bytes: int
    layout_bytes: int = 0
    encoded: dict[str, EncodedParameter] = field(default_factory=dict)
    experts: tuple[ExpertLayer, ...] = ()


def partition(
    skeleton: Skeleton, probe: Probe, max_stage_bytes: int | None = None, *, experts: Sequence[ExpertLayer] = ()
) -> Partition:
    """Divides the model.

    A transformer layer is one stage if it fits in `max_stage_bytes`. Otherwise its attention, MLP or single linear
    layers are stages. A linear layer that is still too large is divided into blocks of rows. None is for a model that
    is in memory as a whole: no linear layer is divided, each embedding is in a stage, and all experts of a layer are in
    the layer's stage.

    Args:
        experts: The layers whose experts can be read one by one.
    """
    return _Divider(skeleton, probe, max_stage_bytes, () if max_stage_bytes is None else experts).divide()


class _Divider:
    """State: the parameters not yet given to a stage's list, and the lists so far."""

    def __init__(
        self, skeleton: Skeleton, probe: Probe, max_stage_bytes: int | None, experts: Sequence[ExpertLayer]
    ) -> None:
        self.model = skeleton.model
        self.probe = probe
        self.experts = tuple(experts)
        self.limit = max_stage_bytes
        self.dtypes = dict(skeleton.dtypes)
        self.base: list[str] = []
        self.stages: list[tuple[int, str, list[tuple[str, TensorSpec]]]] = []
        self.linear_blocks: dict[str, tuple[int, ...]] = {}
        self.encoded = dict(skeleton.encoded)
        apart = probe.unused.union(*(layer.parameters for layer in experts))
        self.tensors = {name: spec for name, spec in skeleton.tensors.items() if parameter_of(name) not in apart}
        for layer in experts:
            self.encoded |= layer.encoded
        self.row_tables = () if max_stage_bytes is None else row_tables(skeleton, probe)
        for table in self.row_tables:
            for name in [name for name in self.tensors if parameter_of(name) == f"{table.name}.weight"]:
                del self.tensors[name]
        self.sorted_names = sorted(self.tensors)
        sizes = [self.tensors[name].nbytes for name in self.sorted_names]
        self.bytes_before = list(accumulate(sizes, initial=0))
        self.shares = weight_bytes(self.sorted_names, self.tensors) < self.bytes_before[-1]

    def divide(self) -> Partition:
        self._walk("", self.model, in_list=False)
        if self.limit is None:
            self._keep_shared_by_groups()
        base = StageLayout.of("", [(name, self.tensors[name]) for name in self.base])
        self.stages.sort(key=lambda stage: stage[0])
        layouts = self._layouts(base)
        return Partition(
            base=base,
            stages=layouts,
            linear_blocks=self.linear_blocks,
            row_tables=self.row_tables,
            cast_bytes=max(map(self._cast_bytes, (base, *layouts)))
            + max((layer.cast_bytes for layer in self.experts), default=0),
            layout_bytes=self._layout_bytes(layouts),
            encoded=self.encoded,
            experts=tuple(replace(layer, position=self._position(layer)) for layer in self.experts),
        )

    def _position(self, layer: ExpertLayer) -> int:
        """How many stages are entered before the experts of a layer."""
        return sum(visit < self.probe.visits[layer.name] for visit, _, _ in self.stages)

    def _keep_shared_by_groups(self) -> None:
        """Moves tied tensors to the base if not all of their stages are computed in the same sweeps."""
        groups: dict[tuple[object, int], set[str | None]] = {}
        for _, name, tensors in self.stages:
            for _, spec in tensors:
                groups.setdefault((spec.file, spec.offset), set()).add(self._group_of(name))
        for _, _, tensors in self.stages:
            shared = [item for item in tensors if len(groups[item[1].file, item[1].offset]) > 1]
            self.base += [parameter for parameter, _ in shared]
            for item in shared:
                tensors.remove(item)

    def _group_of(self, name: str) -> str | None:
        """Of a stage: the group of the module whose stage or block it is."""
        module = name.rpartition(".blocks.")[0] if name not in self.probe.visits else name
        return self.probe.groups.get(module)

    def _layouts(self, base: StageLayout) -> tuple[StageLayout, ...]:
        """Where all stages are resident, tied tensors are loaded once, with the first stage that has them."""
        if self.limit is not None:
            return tuple(StageLayout.of(name, tensors, self._group_of(name)) for _, name, tensors in self.stages)
        owner: dict[tuple[object, int], list[tuple[str, TensorSpec]]] = {}
        kept = []
        for _, name, tensors in self.stages:
            own: list[tuple[str, TensorSpec]] = []
            for item in tensors:
                owner.setdefault((item[1].file, item[1].offset), own).append(item)
            kept.append((name, own))
        return tuple(StageLayout.of(name, own, self._group_of(name)) for name, own in kept if own)

    def _walk(self, path: str, module: nn.Module, *, in_list: bool) -> None:
        names = self._names_under(path)
        if not names:
            return
        fits = self.limit is None or self._bytes_under(path) <= self.limit
        called = self._called(path)
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        children = [(name, child) for name, child in children if self._names_under(name)]
        is_optional = path in self.probe.groups
        own = self._own(path) if is_optional and children else []  # the base would have them, in every sweep
        fits = fits or any(len(self.tensors[name].shape) > 1 for name in own)
        if not children and not is_optional and all(len(self.tensors[name].shape) <= 1 for name in names):
            self.base += names  # vectors are too small for a read of their own in every sweep
        elif called and (in_list or own) and (fits or not all(self._callable(*one) for one in children)):
            self._add_stage(path, names)
        elif children:
            covered = {name for child, _ in children for name in self._names_under(child)}
            self.base += [name for name in names if name not in covered]
            for name, child in children:
                self._walk(name, child, in_list=in_list or isinstance(module, nn.ModuleList))
        elif not called:
            self.base += names
        elif not fits and type(module) is nn.Linear and self._divisible(path):
            self._add_blocks(path, module)
        else:
            self._add_stage(path, names)

    def _own(self, path: str) -> list[str]:
        """The parameters of a module itself."""
        return [name for name in self._names_under(path) if name.rpartition(".")[0] == path]

    def _called(self, path: str) -> bool:
        """Whether the module's weights are needed only while it is called."""
        return path in self.probe.visits and path not in self.probe.used_outside

    def _callable(self, path: str, module: nn.Module) -> bool:
        """Whether the module can be a stage, or can be divided into stages: each is a module that is called."""
        if self._called(path):
            return True
        children = [(f"{path}.{name}", child) for name, child in module.named_children()]
        if self._own(path):
            return False
        return all(self._callable(*child) for child in children if self._names_under(child[0]))

    def _add_stage(self, path: str, names: Iterable[str]) -> None:
        self.stages.append((self.probe.visits[path], path, [(name, self.tensors[name]) for name in names]))

    def _divisible(self, path: str) -> bool:
        """Whether the rows of a linear layer can be read apart."""
        weight, bias = self.encoded.get(f"{path}.weight"), self.encoded.get(f"{path}.bias")
        return (weight is None or weight.divisible) and bias is None

    def _add_blocks(self, path: str, linear: nn.Linear) -> None:
        """Adds blocks of equal size; each has its rows of the bias too, if there is one."""
        assert self.limit is not None
        num_rows, nbytes = linear.out_features, self._bytes_under(path)
        step = self.encoded[f"{path}.weight"].cut_step if f"{path}.weight" in self.encoded else 1
        num_steps = -(-num_rows // step)
        step_bytes = -(-nbytes // num_steps)
        num_blocks = min(num_steps, -(-nbytes // max(self.limit, step_bytes)))
        bounds = [min(num_rows, num_steps * idx // num_blocks * step) for idx in range(num_blocks + 1)]
        self.linear_blocks[path] = tuple(end - start for start, end in pairwise(bounds))
        for idx, (start, end) in enumerate(pairwise(bounds)):
            block = f"{path}.blocks.{idx}"
            tensors: list[tuple[str, TensorSpec]] = []
            for leaf in ("weight", "bias"):
                name, part = f"{path}.{leaf}", f"{block}.{leaf}"
                if name in self.encoded:
                    self.encoded[part] = self.encoded[name].rows(part, start, end)
                    tensors += self.encoded[part].specs()
                elif name in self.tensors:
                    tensors.append((part, self.tensors[name].rows(start, end)))
                    self.dtypes[part] = self.dtypes[name]
            self.stages.append((self.probe.visits[path], block, tensors))

    def _names_under(self, path: str) -> list[str]:
        start, end = self._places_under(path)
        return self.sorted_names[start:end]

    def _places_under(self, path: str) -> tuple[int, int]:
        """Where the names of a module's tensors begin and end."""
        if not path:
            return 0, len(self.sorted_names)
        # "/" is the character after ".", so these bounds hold exactly the names that begin with the path and a dot.
        return bisect_left(self.sorted_names, f"{path}."), bisect_left(self.sorted_names, f"{path}/")

    def _bytes_under(self, path: str) -> int:
        """Bytes of a module's tensors; shared ones count once."""
        if self.shares:
            return weight_bytes(self._names_under(path), self.tensors)
        start, end = self._places_under(path)
        return self.bytes_before[end] - self.bytes_before[start]

    def _layout_bytes(self, layouts: Iterable[StageLayout]) -> int:
        if self.limit is not None:
            return 0
        names = {parameter_of(placement.name) for layout in layouts for placement in layout.placements}
        encoded = [self.encoded[name] for name in names.intersection(self.encoded)]
        return sum(map(layout_bytes, encoded)) + max(map(laying_out_bytes, encoded), default=0)

    def _cast_bytes(self, layout: StageLayout) -> int:
        plain = [placement for placement in layout.placements if parameter_of(placement.name) == placement.name]
        encoded = {parameter_of(placement.name) for placement in layout.placements}.intersection(self.encoded)
        return sum(self.encoded[name].nbytes for name in encoded if self.encoded[name].whole) + sum(
            math.prod(placement.shape) * self.dtypes[placement.name].itemsize
            for placement in plain
            if self.dtypes[placement.name] != placement.dtype
        )
