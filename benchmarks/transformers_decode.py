"""Decodes with a library that runs transformers' own models, and prints how fast. Runs in that library's environment.

    python -m benchmarks.transformers_decode '{"side": "accelerate", "path": FOLDER, "threads": 2, ...}'

Each library opens the model as its documentation says, for a CPU. The sides:

    transformers  `from_pretrained`: all weights are in memory
    accelerate    `device_map="auto"`, and at most `memory_bytes` of weights on the CPU. The others are on the disk
    airllm        `AutoModel.from_pretrained` of AirLLM, with its files of single layers in `folder`. It makes them when
                  they are not there
    ollm          `Inference` of oLLM
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.decode_protocol import Benchmark, Moment, Record, decoded, opened


def open_transformers(asked: Record) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(asked["path"], dtype=torch.bfloat16)


def open_accelerate(asked: Record) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        asked["path"],
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": asked["memory_bytes"]},
        offload_folder=asked["folder"],
    )


def open_airllm(asked: Record) -> Any:
    airllm = importlib.import_module("airllm")
    model = airllm.AutoModel.from_pretrained(asked["path"], device="cpu", layer_shards_saving_path=asked["folder"])
    return model.model


def open_ollm(asked: Record) -> Any:
    ollm = importlib.import_module("ollm")
    opener = ollm.Inference("llama3-8B-chat", device="cpu", logging=False)  # its name for a Llama in several files
    opener.load_model(asked["path"])
    return opener.model


_SIDES: dict[str, tuple[str | None, Callable[[Record], Any]]] = {
    "transformers": (None, open_transformers),
    "accelerate": ("accelerate", open_accelerate),
    "airllm": ("airllm", open_airllm),
    "ollm": ("ollm", open_ollm),
}


def main() -> None:
    benchmark = Benchmark()
    asked = benchmark.asked
    torch.set_num_threads(asked["threads"])
    package, open_model = _SIDES[asked["side"]]
    for name in (package, "transformers.models.llama.modeling_llama"):
        if name is not None:
            importlib.import_module(name)
    start = benchmark.wait_for_start()
    model = open_model(asked)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    benchmark.tell(opened(start, places=_places(model)))
    for point in asked["points"]:
        benchmark.tell(decode(model, point))
    benchmark.finish()
    sys.stderr.flush()
    os._exit(0)  # what the library frees is not measured


def _places(model: Any) -> dict[str, int]:
    """How many modules accelerate put on each device."""
    devices = list(getattr(model, "hf_device_map", {}).values())
    return {str(device): devices.count(device) for device in devices}


class _Clock(BaseStreamer):
    """Notes when `generate` has tokens. The prompt comes first."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(Moment())

    def end(self) -> None:
        pass


def decode(model: Any, point: Record) -> Record:
    """Greedy tokens of sequences that start together. Their prompts have one length."""
    prompts = torch.tensor(point["prompts"])
    clock = _Clock()
    start = Moment()
    with torch.inference_mode():
        found = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=point["tokens"],
            do_sample=False,
            use_cache=True,
            streamer=clock,
        )
    moments = clock.moments[1:]
    times = [moment.seconds for moment in moments]
    return decoded(point, start, moments[0], moments[-1], times, found[:, prompts.shape[1] :].tolist())


if __name__ == "__main__":
    main()
