"""Embedding tables that stay on disk: of each, only the rows of the tokens of a sweep are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.storage.rows import RowReader
from hermes_async.storage.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from hermes_async.modeling.probe import Probe
    from hermes_async.modeling.skeleton import Skeleton

_FEW_TOKENS = 64
"""Beside the input embedding, a table is read by row if the rows of so many tokens take less memory than the table."""


@dataclass(frozen=True, slots=True)
class TableUse:
    """How calls of a model used the table of an `nn.Embedding`.

    Attributes:
        looked_up: Token ids, each with the row that was looked up for it.
        taken: Rows that were taken from the table while the embedding's forward did not run (`embedding.weight[0]`).
        only_rows: Nothing else was done with it: no call of the model called the embedding more than once, or with
            another number of ids than it was given itself, or used the table as a whole.
    """

    looked_up: frozenset[tuple[int, int]] = frozenset()
    taken: frozenset[int] = frozenset()
    only_rows: bool = True

    def __or__(self, other: TableUse) -> TableUse:
        """What both did together."""
        return TableUse(self.looked_up | other.looked_up, self.taken | other.taken, self.only_rows and other.only_rows)

    @property
    def other_rows(self) -> frozenset[int] | None:
        """See `RowTable.other_rows`; None if the table cannot be read by row.

        The rows of positions or token types are hardly ever the token ids. If the own rows of at least two ids were
        looked up, and the same row for all others, the rows are those of token ids. If a model does something else
        with an id that was not tried, its call ends with `NotLoadedError`.
        """
        own = {row for token_id, row in self.looked_up if token_id == row}
        others = {row for token_id, row in self.looked_up if token_id != row}
        is_of_ids = len(others) <= 1 and len(own - others) >= 2
        return self.taken | others if is_of_ids and self.only_rows else None


def joined_uses(several: Iterable[Mapping[str, TableUse]]) -> dict[str, TableUse]:
    """What several calls of a model did, by the embeddings' names."""
    joined: dict[str, TableUse] = {}
    for uses in several:
        joined |= {name: joined.get(name, TableUse()) | use for name, use in uses.items()}
    return joined


@dataclass(frozen=True, slots=True)
class RowTable:
    """An `nn.Embedding` of which a call of the model only uses rows: those of its token ids, and a few others.

    Attributes:
        name: The module's name in the model.
        spec: The table, [rows, columns], or what its rows are stored as.
        other_rows: Rows that the model looks up in place of a token id's own row, or takes in any call. For example,
            Gemma 3n looks up row 0 for ids beyond the end of its table for all layers.
        encoded: How the rows are stored, if they are not plain numbers.
    """

    name: str
    spec: TensorSpec
    other_rows: frozenset[int]
    encoded: EncodedParameter | None = None

    @property
    def row_bytes(self) -> int:
        """Of a row that the model computes with."""
        if self.encoded is None:
            return self.spec.nbytes // self.spec.shape[0]
        return self.encoded.nbytes // self.encoded.shape[0]

    def values(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the model computes with, [rows, columns], from rows as they are stored."""
        if self.encoded is None:
            return rows.to(dtype)
        (matrix,) = self.encoded.matrices
        (part,) = matrix.parts
        values = torch.empty((len(rows), matrix.shape[1]), dtype=dtype)
        matrix.encoding.dequantize({part: rows}, 0, len(rows), values)
        return values

    def rows_of(self, token_ids: Iterable[int]) -> list[int]:
        """The rows that may be looked up for these ids, sorted."""
        num_rows = self.spec.shape[0]
        return sorted(self.other_rows.union(token_id for token_id in token_ids if token_id < num_rows))


def token_tables(skeleton: Skeleton, probe: Probe) -> tuple[RowTable, ...]:
    """All such embeddings of a model, in the order in which they are looked up."""
    tables = []
    for name in sorted(probe.table_uses.keys() & probe.visits.keys(), key=probe.visits.__getitem__):
        other_rows, encoded = probe.table_uses[name].other_rows, skeleton.encoded.get(f"{name}.weight")
        spec = skeleton.tensors.get(f"{name}.weight") if encoded is None else _only_part(encoded)
        if spec is not None and not spec.pieces and other_rows is not None:
            tables.append(RowTable(name, spec, other_rows, encoded))
    return tuple(tables)


def _only_part(encoded: EncodedParameter) -> TensorSpec | None:
    """The stored tensor whose rows are those of the table; None if a row is not one piece of one tensor."""
    specs = [spec for _, spec in encoded.specs()]
    by_row = encoded.divisible and encoded.cut_step == 1 and len(specs) == 1
    return specs[0] if by_row and specs[0].shape[0] == encoded.shape[0] else None


def row_tables(skeleton: Skeleton, probe: Probe) -> tuple[RowTable, ...]:
    """Those that are large enough to be read by row."""
    return tuple(
        table
        for table in token_tables(skeleton, probe)
        if is_input_embedding(skeleton, table) or RowReader.buffer_bytes(table.spec, _FEW_TOKENS) < table.spec.nbytes
    )


def is_input_embedding(skeleton: Skeleton, table: RowTable) -> bool:
    """Whether it is the model's input embedding."""
    return skeleton.model.get_submodule(table.name) is skeleton.embedding


def most_rows(tables: Sequence[RowTable], num_tokens: int) -> int:
    """The most rows of any table that so many tokens look up."""
    return num_tokens + max((len(table.other_rows) for table in tables), default=0)


def row_taken(func: object, args: Sequence[object]) -> int | None:
    """The row, if a function of torch takes one from its first argument: `table[row]` or `table[row, ...]`."""
    if func is not torch.Tensor.__getitem__ or len(args) != 2:
        return None
    index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
    return index if isinstance(index, int) and not isinstance(index, bool) and index >= 0 else None
