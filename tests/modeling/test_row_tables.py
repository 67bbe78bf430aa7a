"""Which embeddings are read by row, and which rows."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hermes_async import EngineConfig
from hermes_async.engine.opening import OpenedModel, open_model
from hermes_async.modeling.calls import EmbeddingRows, NotLoadedError
from hermes_async.modeling.inputs import example_token_ids
from hermes_async.modeling.partition import partition
from hermes_async.modeling.row_tables import (
    RowTable,
    TableUse,
    joined_uses,
    most_rows,
    row_tables,
    row_taken,
    token_tables,
)
from hermes_async.storage.tensor_spec import TensorSpec

SMALL = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4000,
}
PER_LAYER = SMALL | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 128,
}
GEMMA_3N = PER_LAYER | {"intermediate_size": [96] * 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 2}


def opened(config: t.PreTrainedConfig, path: Path, model_class: Any = None) -> Any:
    """A planned model of random weights; closed behind a block."""
    model = t.AutoModelForCausalLM.from_config(config) if model_class is None else model_class(config)
    model.save_pretrained(path)
    return closing(open_model(path, "1GiB", EngineConfig()))


def found(model: OpenedModel) -> dict[str, frozenset[int]]:
    """The tables that are read by row, in order, with their other rows."""
    parts = partition(model.skeleton, model.probe, 1 << 20)
    assert parts.row_tables == row_tables(model.skeleton, model.probe)
    in_stages = {placement.name for stage in parts.stages for placement in stage.placements}
    assert in_stages.isdisjoint(f"{table.name}.weight" for table in parts.row_tables)
    assert partition(model.skeleton, model.probe, None).row_tables == ()
    return {table.name: table.other_rows for table in parts.row_tables}


@pytest.mark.parametrize(
    ("config", "other_rows"),
    [
        (t.Gemma3nTextConfig(**GEMMA_3N, vocab_size_per_layer_input=1900), {0}),
        (t.Gemma3nTextConfig(**GEMMA_3N, vocab_size_per_layer_input=2000), set()),
        (t.Gemma4TextConfig(**PER_LAYER, global_head_dim=16, vocab_size_per_layer_input=2000), set()),
    ],
    ids=["gemma3n-smaller-table", "gemma3n", "gemma4"],
)
def test_a_table_for_all_layers_is_read_by_row(
    config: t.PreTrainedConfig, other_rows: set[int], tmp_path: Path
) -> None:
    with opened(config, tmp_path) as model:
        assert list(found(model).items()) == [
            ("model.embed_tokens", frozenset()),
            ("model.embed_tokens_per_layer", frozenset(other_rows)),
        ]
        # The head is tied to the input embedding, and is in a stage all the same.
        assert model.skeleton.tensors["lm_head.weight"] == model.skeleton.tensors["model.embed_tokens.weight"]
        both = token_tables(model.skeleton, model.probe)
        rows = model.bounds.embedding_rows(tokens=1000)
        assert rows >= sum(table.row_bytes for table in both) * 2 * 1000


def test_a_table_that_takes_less_memory_than_its_rows_is_in_a_stage(tmp_path: Path) -> None:
    config = t.Gemma3nTextConfig(**GEMMA_3N | {"hidden_size_per_layer_input": 8}, vocab_size_per_layer_input=1900)
    with opened(config, tmp_path) as model:
        assert list(found(model)) == ["model.embed_tokens"]
        names = [table.name for table in token_tables(model.skeleton, model.probe)]
        assert names == ["model.embed_tokens", "model.embed_tokens_per_layer"]


@pytest.mark.parametrize(
    ("config", "model_class", "names"),
    [
        (t.GPT2Config(vocab_size=2000, n_embd=64, n_layer=2, n_head=4, n_positions=4000), None, ["transformer.wte"]),
        (
            t.OPTConfig(vocab_size=2000, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
                        word_embed_proj_dim=64, max_position_embeddings=4000),
            None,
            ["model.decoder.embed_tokens"],
        ),
        (t.BertConfig(**SMALL, type_vocab_size=3000), t.BertModel, ["embeddings.word_embeddings"]),
        (t.RobertaConfig(**SMALL, type_vocab_size=3000), t.RobertaModel, ["embeddings.word_embeddings"]),
        # Called by the encoder and by the decoder.
        (t.T5Config(vocab_size=2000, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4), t.T5Model, []),
    ],
    ids=["gpt2", "opt", "bert", "roberta", "t5"],
)  # fmt: skip
def test_positions_and_token_types_are_not(
    config: t.PreTrainedConfig, model_class: Any, names: list[str], tmp_path: Path
) -> None:
    with opened(config, tmp_path, model_class) as model:
        assert found(model) == dict.fromkeys(names, frozenset())


def test_the_ids_that_are_tried_are_on_both_sides_of_the_end_of_each_table() -> None:
    model = t.Gemma3nForCausalLM(t.Gemma3nTextConfig(**GEMMA_3N, vocab_size_per_layer_input=1900))
    assert example_token_ids(model) == [1999, 1900, 1899, 1, 0]
    model.set_input_embeddings(nn.Embedding(2, 64))
    assert example_token_ids(model) == [1, 0]


@given(st.sets(st.integers(0, 50)), st.integers(1, 40), st.sets(st.integers(0, 0)))
def test_the_rows_that_are_read_are_all_that_are_looked_up(
    token_ids: set[int], num_rows: int, other_rows: set[int]
) -> None:
    spec = TensorSpec("table", Path("file"), 0, num_rows * 8, torch.float32, (num_rows, 2))
    table = RowTable("table", spec, frozenset(other_rows))
    rows = table.rows_of(token_ids)
    looked_up = {token_id if token_id < num_rows else 0 for token_id in token_ids if other_rows or token_id < num_rows}
    assert looked_up | other_rows == set(rows)
    assert rows == sorted(set(rows))
    assert len(rows) <= most_rows([table], len(token_ids))


def test_what_several_calls_do_is_joined() -> None:
    ids = TableUse(frozenset({(5, 5), (6, 6)}))
    assert ids.other_rows == set()
    joined = joined_uses(
        [{"table": ids}, {"table": TableUse(frozenset({(9, 0)}))}, {"table": TableUse(taken=frozenset([3]))}]
    )
    assert joined["table"].other_rows == {0, 3}
    assert (ids | TableUse(frozenset({(9, 1), (8, 0)}))).other_rows is None  # two rows for others
    assert (ids | TableUse(only_rows=False)).other_rows is None
    assert TableUse(frozenset({(5, 5), (1, 0), (0, 0)})).other_rows is None  # the own row of one id alone


def test_a_row_is_taken_by_its_number() -> None:
    table, take = torch.arange(6).view(3, 2), torch.Tensor.__getitem__
    for index in (1, (1, slice(None)), (1,)):
        assert row_taken(take, (table, index)) == 1
    for index in (-1, slice(1), (slice(None), 1), torch.tensor(1), None, (), True):
        assert row_taken(take, (table, index)) is None
    assert row_taken(torch.add, (table, 1)) is None


def test_a_row_that_was_not_read_is_an_error() -> None:
    rows = EmbeddingRows.of({3: torch.tensor([3.0]), 7: torch.tensor([7.0])})
    assert rows.rows[rows.index_of(torch.tensor([[7, 3, 7]]))].tolist() == [[[7.0], [3.0], [7.0]]]
    for row in (0, 4, 9):
        with pytest.raises(NotLoadedError):
            rows.index_of(torch.tensor([3, row]))
