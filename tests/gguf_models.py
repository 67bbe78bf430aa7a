"""Small models in GGUF files, as llama.cpp's converter writes them: it renames tensors, and changes some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

Arrays = Iterator[tuple[str, np.ndarray]]

WORDS = ("▁Hello", "▁world", "▁all", "▁who", "▁go", "!", ".", ",")
CHAT_TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Written:
    """What a model is written as.

    Attributes:
        changes: From a parameter's configuration, name and values to names and what is written.
        metadata: Entries, without the architecture's name before them; "__" stands for a dot.
    """

    config: Any
    architecture: str
    changes: Callable[[Any, str, np.ndarray], Arrays] | None
    metadata: dict[str, Any]

    def model(self) -> PreTrainedModel:
        """A model with random weights, the same in each call."""
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        return model.eval()


def save_gguf(one: Written, path: Path, *, quantization: str = "F32", split_max_tensors: int = 0) -> Path:
    """Writes a model to a file.

    Args:
        quantization: The type of matrices whose rows can be divided into its blocks.
        split_max_tensors: Writes several files with at most so many tensors; the path is that of the first.
    """
    config, architecture = one.config, one.architecture
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    sizes = {"embedding_length": config.hidden_size, "block_count": config.num_hidden_layers}
    sizes["context_length"] = getattr(config, "max_position_embeddings", 128)
    for key, value in (sizes | one.metadata).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add = writer.add_array if isinstance(value, list) else add
        add(f"{architecture}.{key.replace('__', '.')}", value)
    write_tokenizer(writer, config.vocab_size)
    number = next(idx for idx, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, values in one.model().state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        for changed, array in (one.changes or unchanged)(config, name, values.numpy()):
            stored = changed if changed.startswith("blk.") else names.get_name(changed, (".weight", ".bias"))
            stored = stored or names.get_name(changed.removeprefix("transformer."), (".weight", ".bias"))
            assert stored is not None, changed
            write_tensor(writer, stored, array, quantization)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split_max_tensors else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def unchanged(config: Any, name: str, values: np.ndarray) -> Arrays:
    yield name, values


def write_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, quantization: str) -> None:
    kind = gguf.GGMLQuantizationType[quantization]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    values = np.ascontiguousarray(values, dtype=np.float32)
    if quantization == "F32" or values.ndim < 2 or values.shape[-1] % block or "ssm_" in name or "norm" in name:
        writer.add_tensor(name, values)
    elif quantization == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    elif quantization in HALVES:
        kind = "Q6_K" if name == "output.weight" else quantization  # as in mixtures such as Q4_K_M
        writer.add_tensor(name, random_blocks(values.shape, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


HALVES = {"Q4_K": (0, 2), "Q6_K": (208,)}
"""Where the numbers in half precision are in a block of a type that the package `gguf` does not quantize to."""


def random_blocks(shape: tuple[int, ...], quantization: str) -> np.ndarray:
    """Random numbers of about the size of weights, whatever the model's are."""
    _, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantization]]
    generator = np.random.default_rng(shape[0])
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // 256, nbytes), dtype=np.uint8)
    for place in HALVES[quantization]:
        scales = generator.uniform(1e-4, 3e-4, blocks.shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """A vocabulary of SentencePiece: bytes, letters and a few words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))][: max(3, vocab_size - 80)]
    pieces = {piece: None for word in WORDS for end in range(1, len(word) + 1) for piece in (word[:end], word[end - 1])}
    tokens += [piece for piece in pieces if piece not in tokens]
    tokens = [*tokens, *(f"<extra{idx}>" for idx in range(vocab_size))][:vocab_size]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(idx) for idx in range(vocab_size)])
    writer.add_token_types(
        [3 if idx in (1, 2) else 6 if token.startswith("<0x") else 1 for idx, token in enumerate(tokens)]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def permuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp rotates them: halves of a head become neighbours."""
    shape = values.shape
    return values.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def llama_changes(config: Any, name: str, values: np.ndarray) -> Arrays:
    if ".q_proj." in name:
        values = permuted(values, config.num_attention_heads)
    if ".k_proj." in name:
        values = permuted(values, config.num_key_value_heads)
    yield name, values


def expert_changes(config: Any, name: str, values: np.ndarray) -> Arrays:
    """Experts are stacked, with gate and up apart."""
    layer = name.split(".")[2] if name.startswith("model.layers.") else ""
    if name.endswith("experts.gate_up_proj"):
        rows = values.shape[1] // 2
        yield f"blk.{layer}.ffn_gate_exps.weight", values[:, :rows]
        yield f"blk.{layer}.ffn_up_exps.weight", values[:, rows:]
    elif name.endswith("experts.down_proj"):
        yield f"blk.{layer}.ffn_down_exps.weight", values
    else:
        yield name, values[0] if name.endswith("shared_expert_gate.weight") else values


def norm_changes(config: Any, name: str, values: np.ndarray) -> Arrays:
    """Norms have one added."""
    yield name, values + 1 if name.endswith("norm.weight") else values


def conv_changes(config: Any, name: str, values: np.ndarray) -> Arrays:
    yield name, values.squeeze(1) if name.endswith("conv.weight") else values


def mamba_changes(config: Any, name: str, values: np.ndarray) -> Arrays:
    if name.endswith("A_log"):
        values = -np.exp(values)
    yield name, values.squeeze(1) if name.endswith("conv1d.weight") else values


def qwen35_changes(config: Any, name: str, values: np.ndarray) -> Arrays:
    """Heads of values are those of one head of keys behind the other; in the file, those of all heads of keys."""
    key_heads, dim = config.linear_num_key_heads, config.linear_value_head_dim
    queries_and_keys = 2 * key_heads * config.linear_key_head_dim
    layer = name.split(".")[2] if ".layers." in name else ""

    def tiled(values: np.ndarray, head_dim: int = 1) -> np.ndarray:
        return values.reshape(key_heads, -1, head_dim, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)

    match name.rpartition("linear_attn.")[2]:
        case "A_log":
            yield f"blk.{layer}.ssm_a", tiled(-np.exp(values))
        case "dt_bias":
            yield f"blk.{layer}.ssm_dt.bias", tiled(values)
        case "in_proj_a.weight":
            yield f"blk.{layer}.ssm_alpha.weight", tiled(values)
        case "in_proj_b.weight":
            yield f"blk.{layer}.ssm_beta.weight", tiled(values)
        case "in_proj_z.weight":
            yield f"blk.{layer}.attn_gate.weight", tiled(values, dim)
        case "in_proj_qkv.weight" | "conv1d.weight" as leaf:
            both = np.concatenate([values[:queries_and_keys], tiled(values[queries_and_keys:], dim)])
            yield f"blk.{layer}.{'attn_qkv' if 'qkv' in leaf else 'ssm_conv1d'}.weight", both.squeeze()
        case "out_proj.weight":
            yield f"blk.{layer}.ssm_out.weight", tiled(values.T, dim).T
        case "norm.weight":
            yield f"blk.{layer}.ssm_norm.weight", values
        case _ if name.endswith("norm.weight"):
            yield name, values + 1
        case _:
            yield from expert_changes(config, name, values)


def gpt2_changes(config: Any, name: str, values: np.ndarray) -> Arrays:
    matrices = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    yield name, values.T if name.endswith(matrices) else values


def bloom_changes(config: Any, name: str, values: np.ndarray) -> Arrays:
    """Queries, keys and values of all heads one behind the other, and not those of each head."""
    if "query_key_value" in name:
        heads = values.reshape(config.n_head, 3, -1, *values.shape[1:])
        values = heads.swapaxes(0, 1).reshape(values.shape)
    yield name, values


def loaded(path: Path, model_class: Any, **kwargs: Any) -> PreTrainedModel:
    """transformers' own model of a file, dequantized. It asks for accelerate, and does not use it on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)
        model: PreTrainedModel = model_class.from_pretrained(path.parent, gguf_file=path.name, **kwargs)
    return model.eval()


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
    return output[0, len(prompt) :].tolist()
