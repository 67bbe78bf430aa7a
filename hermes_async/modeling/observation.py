"""Runs a model with weights that are all zero, and records what it does.

Every parameter is a view of one anonymous mapping, which is never written to. So it takes no memory, and none is
reserved for it. Where there are not even addresses for it, each parameter is a single zero, expanded.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hermes_async.errors import UnsupportedModelError
from hermes_async.foreign_errors import reason_of
from hermes_async.modeling.module_tensors import ones_for_numbers, replaced_tensors
from hermes_async.modeling.row_tables import TableUse, joined_uses, row_taken
from hermes_async.modeling.transformers_api import own_buffers, own_parameters, storage_identity
from hermes_async.quantization.encoded_weight import uses_rows
from hermes_async.storage.buffers import MAP_NORESERVE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Observation:
    """What a call of a model did. The attributes are those of `Probe`."""

    visits: Mapping[str, int]
    used_outside: frozenset[str]
    used_whole: frozenset[str]
    table_uses: Mapping[str, TableUse]


class _ModuleCalls:
    """Records the calls of all modules that have tensors in or under them.

    Args:
        input_ids: What the model is called with; None where its input is something else.

    Attributes:
        visits: Each module that was called, with its turn, by name.
        num_open: How many calls of each module are under way, by name.
        table_uses: How their forward used the table of each embedding, by name.
    """

    def __init__(self, input_ids: torch.Tensor | None) -> None:
        self.visits: dict[str, int] = {}
        self.num_open: Counter[str] = Counter()
        self.table_uses: dict[str, TableUse] = {}
        self._input_ids = input_ids

    @contextmanager
    def recorded(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block the calls of the model's modules are recorded."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if any(True for _ in chain(module.parameters(), module.buffers())):
                    hooks.callback(module.register_forward_pre_hook(partial(self._begin, name)).remove)
                    hooks.callback(module.register_forward_hook(partial(self._end, name)).remove)
                if isinstance(module, nn.Embedding):
                    hooks.callback(module.register_forward_pre_hook(partial(self._look_up, name)).remove)
            yield

    def _begin(self, name: str, module: nn.Module, args: Any) -> None:
        self.visits.setdefault(name, len(self.visits))
        self.num_open[name] += 1

    def _end(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.num_open[name] -= 1

    def _look_up(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        given, input_ids = args[0] if len(args) == 1 else None, self._input_ids
        use = TableUse(only_rows=False)
        if isinstance(given, torch.Tensor) and input_ids is not None and given.numel() == input_ids.numel():
            pairs = zip(input_ids.flatten().tolist(), given.flatten().tolist(), strict=True)
            use = TableUse(frozenset(pairs), only_rows=name not in self.table_uses)
        self.table_uses[name] = use


class _UsesOutside(TorchFunctionMode):
    """Finds modules whose weights are used while their forward does not run.

    Args:
        names: The tensors that count as weights.
        num_open: How many calls of each module are under way, by name; changes from outside.

    Attributes:
        modules: Their names; a module that contains one of them counts too.
        whole: The tensors that were used in another way than row by row, wherever it was.
        table_uses: How the tables of embeddings were used, by the module's name.
    """

    def __init__(self, model: nn.Module, names: Collection[str], num_open: Counter[str]) -> None:
        super().__init__()
        self.modules: set[str] = set()
        self.whole: set[str] = set()
        self.table_uses: dict[str, TableUse] = {}
        self._embeddings = {path for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
        self._num_open = num_open
        self._names = {
            id(value): name
            for path, module in model.named_modules()
            for leaf, value in (*own_parameters(module).items(), *own_buffers(module).items())
            if (name := f"{path}.{leaf}" if path else leaf) in names
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Reading the shape or device of a weight is no use of it.
        if isinstance(result, (torch.Tensor, tuple, list)) and not isinstance(result, torch.Size):
            for given in (*args, *(kwargs or {}).values()):
                for item in given if isinstance(given, (tuple, list)) else (given,):
                    name = self._names.get(id(item), "")
                    self._record(name.rpartition(".")[0], row_taken(func, args))
                    if name and not uses_rows(func, args):
                        self.whole.add(name)
        return result

    def _record(self, owner: str, row: int | None) -> None:
        if owner in self._embeddings and not self._num_open[owner]:
            use = TableUse(only_rows=False) if row is None else TableUse(taken=frozenset([row]))
            self.table_uses[owner] = self.table_uses.get(owner, TableUse()) | use
        while owner:
            if not self._num_open[owner]:
                self.modules.add(owner)
            owner = owner.rpartition(".")[0]


class Alive(TorchFunctionMode):
    """Measures the memory of the computed tensors that are alive; tensors that share memory count once.

    Attributes:
        most_bytes: The most at one time.
        total_bytes: Of all that were computed, also those that are no longer alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0
        self.total_bytes = 0
        self._bytes = 0
        self._tensors: dict[int, weakref.ref[torch.Tensor]] = {}
        self._num_tensors: Counter[int] = Counter()  # of a storage

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor) and id(item) not in self._tensors:
                self._add(item)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        try:
            storage, key = tensor.untyped_storage(), id(tensor)
        except NotImplementedError:  # a part of a tensor within `vmap`, which has no memory of its own
            return
        place, nbytes = storage_identity(tensor), storage.nbytes()

        def dropped(_: weakref.ref[torch.Tensor]) -> None:
            del self._tensors[key]
            self._num_tensors[place] -= 1
            if not self._num_tensors[place]:
                self._bytes -= nbytes

        self._tensors[key] = weakref.ref(tensor, dropped)
        self._num_tensors[place] += 1
        if self._num_tensors[place] == 1:
            self._bytes += nbytes
            self.total_bytes += nbytes
            self.most_bytes = max(self.most_bytes, self._bytes)


class _ZerosForZeros(TorchFunctionMode):
    """Returns zeros in place of what is computed from weights that are all zero: it would take most of the time.

    On the meta device torch would also compute the shapes of each step of attention and GELU. Arguments that do not
    fit are given to the function itself, which raises an error.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        shape = _shape_of_zeros(func, args, kwargs)
        return func(*args, **kwargs) if shape is None else args[0].new_zeros(shape)


def _shape_of_zeros(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of the result of `func`, if the result is known to be zero."""
    match func, args:
        case F.linear, (given, weight, *_) if _alike(given, weight) and given.shape[-1] == weight.shape[-1]:
            return (*given.shape[:-1], *weight.shape[:-1])
        case torch.addmm, (_, given, weight) if _alike(given, weight) and given.shape[-1] == weight.shape[0]:
            return (*given.shape[:-1], weight.shape[-1])
        case F.layer_norm, (given, shape) if _alike(given, kwargs.get("weight")):
            return tuple(given.shape) if given.shape[-len(shape) :] == kwargs["weight"].shape else None
        case F.gelu, (given, *_):
            return tuple(given.shape)
        case F.scaled_dot_product_attention, (query, key, value, *_):
            if query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.shape[-1] == key.shape[-1]:
                return (*query.shape[:-1], value.shape[-1])
    return None


def _alike(given: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether dtype and device are the same: a weight that stayed on the meta device must cause an error."""
    return weight is not None and given.dtype == weight.dtype and given.device == weight.device


def _zeros_like(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros that take no memory, as matrices may be larger than the machine's memory; ones for whole numbers."""
    numbers = ones_for_numbers(tensors)
    return numbers | _zero_weights({name: tensor for name, tensor in tensors.items() if name not in numbers})


def _zero_weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    largest = max((tensor.nbytes for tensor in tensors.values()), default=0)
    try:
        block = mmap.mmap(-1, max(1, largest), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:  # addresses are limited, or the system does not overcommit memory
        logger.debug("no addresses for %d bytes: %s", largest, error)
        # The second choice, because a product of several matrices would copy an expanded zero.
        return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in tensors.items()}
    return {
        name: torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
        if tensor.numel()
        else torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in tensors.items()
    }


def observe(
    model: PreTrainedModel,
    run: Callable[[], object],
    *,
    names: Sequence[str],
    input_ids: torch.Tensor | None,
    on_what: str,
) -> Observation:
    """Calls `run`, which runs the model, with zeros for the parameters in `names`.

    Raises:
        UnsupportedModelError: The model does not run; the message says `on_what`.
    """
    unloaded = model.state_dict(keep_vars=True)
    zeros = _zeros_like({name: unloaded[name] for name in names})
    calls = _ModuleCalls(input_ids)
    try:
        with replaced_tensors(model, zeros), calls.recorded(model), torch.inference_mode(), _ZerosForZeros():
            outside = _UsesOutside(model, unloaded, calls.num_open)  # knows the zeros as the weights
            with outside:
                run()
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} does not run {on_what}: {reason_of(error)}") from error
    return Observation(
        visits=calls.visits,
        used_outside=frozenset(outside.modules),
        used_whole=frozenset(outside.whole),
        table_uses=joined_uses([calls.table_uses, outside.table_uses]),
    )
