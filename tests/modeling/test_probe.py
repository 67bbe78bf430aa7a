"""A model is looked at without memory for its weights, however large they are."""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hermes_async import EngineConfig
from hermes_async.engine.opening import open_model
from hermes_async.memory.available import process_rss_bytes

HIDDEN = 4096
MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
TOO_MANY_ROWS = MACHINE_BYTES * 5 // 4 // (2 * HIDDEN)


def save_holes(path: Path, **sizes: int) -> Path:
    """A bf16 checkpoint whose file is one hole: it has any size, and takes no disk."""
    config = LlamaConfig(
        **{
            "hidden_size": HIDDEN,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            **sizes,
        }
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.dtype, config.architectures = "bfloat16", [type(model).__name__]
    config.save_pretrained(path)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            offsets = [end, end := end + tensor.nbytes]
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize("name", ["vocab_size", "intermediate_size"])
@pytest.mark.parametrize("addresses", [True, False], ids=["addresses", "no-addresses"])
def test_a_matrix_larger_than_the_machine_s_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, addresses: bool
) -> None:
    path = save_holes(tmp_path, **{name: TOO_MANY_ROWS})
    if not addresses:
        mapped = mmap.mmap

        def refuses_much(fileno: int, length: int, *args: Any, **kwargs: Any) -> mmap.mmap:
            if length > MACHINE_BYTES:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            return mapped(fileno, length, *args, **kwargs)

        monkeypatch.setattr(mmap, "mmap", refuses_much)
    before = process_rss_bytes()
    opened = open_model(path, "4GiB", EngineConfig())
    try:
        assert opened.plan.bytes_per_sweep > MACHINE_BYTES
        assert process_rss_bytes() - before < 1 << 30
    finally:
        opened.close()
