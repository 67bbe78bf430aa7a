"""Writes GGUF files with the true shapes of a Llama: random weights, or those of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from transformers import LlamaConfig

from benchmarks.folders import temporary_folder

if TYPE_CHECKING:
    from gguf import GGUFWriter

_STANDARD_DEVIATION = 0.02
_NOISE_BLOCKS = 1 << 16
_HALVES = {  # where a block has numbers in float16, and what they are for the standard deviation above
    "Q4_0": {0: _STANDARD_DEVIATION / 4.6},
    "Q8_0": {0: _STANDARD_DEVIATION / 74},
    "Q4_K": {0: _STANDARD_DEVIATION / 170, 2: _STANDARD_DEVIATION / 170 * 7.5},  # numbers of 0 to 15, less 7.5
    "Q6_K": {208: _STANDARD_DEVIATION / 1360},
}
RECIPES = ("Q4_K_M", "Q8_0", "Q4_0")
_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "BF16": 32}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@contextmanager
def gguf_file(config: LlamaConfig, recipe: str, folder: Path | None) -> Iterator[Path]:
    """A file of `config` with random weights, which is deleted at the end."""
    with temporary_folder(folder) as path:
        write_gguf(path / "model.gguf", config, recipe)
        yield path / "model.gguf"


def convert_to_gguf(checkpoint: Path, config: LlamaConfig, path: Path) -> None:
    """Writes a checkpoint of `config` in bf16, whose head is its table of tokens, as a file in bf16.

    As llama.cpp's own converter does: vectors are in float32, and rows of queries and keys are in the order in which
    llama.cpp rotates them.
    """
    from gguf import GGMLQuantizationType

    writer = _writer(path, config, "BF16")
    shards = sorted(checkpoint.glob("*.safetensors"))
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                shape = file.get_slice(name).get_shape()
                if len(shape) == 1:
                    writer.add_tensor_info(_gguf_name(name), shape, np.dtype(np.float32), 4 * shape[0])
                else:
                    rows = (shape[0], 2 * shape[1])
                    writer.add_tensor_info(
                        _gguf_name(name),
                        rows,
                        np.dtype(np.uint8),
                        rows[0] * rows[1],
                        raw_dtype=GGMLQuantizationType.BF16,
                    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.ndim == 1:
                    writer.write_tensor_data(tensor.float().numpy())
                    continue
                num_heads = heads.get(name.split(".")[-2])
                if num_heads is not None:
                    halves = tensor.view(num_heads, 2, -1, tensor.shape[1])
                    tensor = halves.transpose(1, 2).reshape(tensor.shape)
                writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    writer.close()


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of a Llama."""
    module = name.removesuffix(".weight")
    if module in _NAMES:
        return f"{_NAMES[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def write_gguf(path: Path, config: LlamaConfig, recipe: str) -> None:
    """Writes a file of `config`, whose head is its table of tokens, in llama.cpp's types for `recipe`."""
    from gguf import GGMLQuantizationType

    writer = _writer(path, config, recipe)
    tensors = list(_tensors(config, recipe))
    for name, shape, type_name in tensors:
        raw_type = GGMLQuantizationType[type_name]
        if type_name == "F32":
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            row_bytes = _row_bytes(shape[1], type_name)
            writer.add_tensor_info(
                name, (shape[0], row_bytes), np.dtype(np.uint8), shape[0] * row_bytes, raw_dtype=raw_type
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    numbers = np.random.default_rng(0)
    noise = {type_name: _noise(numbers, type_name) for type_name in {item[2] for item in tensors} - {"F32"}}
    for _, shape, type_name in tensors:
        if type_name == "F32":
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            nbytes = shape[0] * _row_bytes(shape[1], type_name)
            blocks = np.roll(noise[type_name], int(numbers.integers(_NOISE_BLOCKS)), 0).reshape(-1)
            writer.write_tensor_data(np.resize(blocks, nbytes))
    writer.close()


def _writer(path: Path, config: LlamaConfig, recipe: str) -> GGUFWriter:
    """A writer that knows all but the tensors.

    The tokenizer has a token of its own for each byte, and no others that a text could have.
    """
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_name("random weights")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(_FILE_TYPES[recipe])
    special = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    tokens = special + [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
    tokens += [(f"\u2581token{idx}", TokenType.NORMAL) for idx in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([-float(idx) for idx in range(len(tokens))])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return writer


def _tensors(config: LlamaConfig, recipe: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """The name, shape and type of each tensor."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    usual = "Q4_K" if recipe == "Q4_K_M" else recipe
    better = "Q6_K" if recipe in ("Q4_K_M", "Q4_0") else recipe
    yield "token_embd.weight", (config.vocab_size, hidden), better
    yield "output_norm.weight", (hidden,), "F32"
    for idx in range(config.num_hidden_layers):
        layer = f"blk.{idx}"
        finer = better if recipe == "Q4_K_M" and _more_bits(idx, config.num_hidden_layers) else usual
        yield f"{layer}.attn_norm.weight", (hidden,), "F32"
        yield f"{layer}.attn_q.weight", (hidden, hidden), usual
        yield f"{layer}.attn_k.weight", (keys, hidden), usual
        yield f"{layer}.attn_v.weight", (keys, hidden), finer
        yield f"{layer}.attn_output.weight", (hidden, hidden), usual
        yield f"{layer}.ffn_norm.weight", (hidden,), "F32"
        yield f"{layer}.ffn_gate.weight", (intermediate, hidden), usual
        yield f"{layer}.ffn_up.weight", (intermediate, hidden), usual
        yield f"{layer}.ffn_down.weight", (hidden, intermediate), finer


def _more_bits(layer: int, num_layers: int) -> bool:
    """Whether llama.cpp stores a layer's values and down projection in Q6_K: the outer layers, and each third one."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _row_bytes(columns: int, type_name: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    if columns % elements:
        raise ValueError(f"rows of {columns} numbers cannot be stored in {type_name}")
    return columns // elements * nbytes


def _noise(numbers: np.random.Generator, type_name: str) -> np.ndarray:
    """Random blocks, uint8 [blocks, bytes]. Numbers in the blocks are random, and their scales in float16 are not."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    _, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    blocks = numbers.integers(0, 256, (_NOISE_BLOCKS, nbytes), np.uint8)
    for offset, value in _HALVES[type_name].items():
        blocks[:, offset : offset + 2] = np.array([value], np.float16).view(np.uint8)
    return blocks
