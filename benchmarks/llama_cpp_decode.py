"""Decodes with llama.cpp, and prints how fast. Runs in llama.cpp's own environment.

    python -m benchmarks.llama_cpp_decode '{"path": FILE, "load": "mapped", "threads": 2, "points": [...]}'

All sequences of a point are decoded in one batch, which is how llama.cpp decodes in parallel. `load` is one of:

    mapped   maps the file, as it does by default, and computes with the file's own bytes
    copied   maps the file, and copies weights into the layout of its kernels, which it does by default. This takes
             memory for all of them; where there is not enough, the kernel ends the process
    direct   reads the file with direct I/O into memory of its own
"""

from __future__ import annotations

import os
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.decode_protocol import Benchmark, Moment, Record, decoded, opened

_MICRO_BATCH = 512  # llama.cpp's default


def main() -> None:
    benchmark = Benchmark()
    asked = benchmark.asked
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silent, None)
    start = benchmark.wait_for_start()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = asked["load"] == "copied"
    if asked["load"] == "direct":
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO
    model = llama_cpp.llama_model_load_from_file(asked["path"].encode(), model_params)
    if model is None:
        raise SystemExit(f"llama.cpp cannot open {asked['path']}")
    context = llama_cpp.llama_init_from_model(model, _context_params(asked))
    if context is None:
        raise SystemExit("llama.cpp cannot make a context")
    benchmark.tell(opened(start))
    for point in asked["points"]:
        benchmark.tell(decode(model, context, point))
    benchmark.finish()
    os._exit(0)  # what llama.cpp frees is not measured


def _context_params(asked: Record) -> Any:
    """No more memory than the largest point takes, in one cache for all sequences."""
    points = asked["points"]
    params = llama_cpp.llama_context_default_params()
    most = max(sum(len(prompt) + point["tokens"] for prompt in point["prompts"]) for point in points)
    params.n_ctx = -(-most // 256) * 256
    params.n_batch = max(32, *(sum(map(len, point["prompts"])) for point in points))
    params.n_ubatch = min(params.n_batch, _MICRO_BATCH)
    params.n_seq_max = max(len(point["prompts"]) for point in points)
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = asked["threads"]
    return params


def decode(model: Any, context: Any, point: Record) -> Record:
    """Greedy tokens of sequences that start together. Their prompts have one length."""
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    prompts, length = point["prompts"], len(point["prompts"][0])
    batch = llama_cpp.llama_batch_init(sum(map(len, prompts)), 0, 1)
    start = Moment()
    rows = [
        (token, place, idx, place == length - 1)
        for idx, prompt in enumerate(prompts)
        for place, token in enumerate(prompt)
    ]
    moments, steps = [], []
    for step in range(point["tokens"]):
        steps.append(run(context, batch, rows, vocab_size))
        moments.append(Moment())
        rows = [(token, length + step, idx, True) for idx, token in enumerate(steps[-1])]
    llama_cpp.llama_batch_free(batch)
    times = [moment.seconds for moment in moments]
    return decoded(point, start, moments[0], moments[-1], times, list(zip(*steps, strict=True)))


def run(context: Any, batch: Any, rows: list[tuple[int, int, int, bool]], vocab_size: int) -> list[int]:
    """The greedy token after each row of (token, position, sequence, whether its logits are wanted) that wants one."""
    batch.n_tokens = len(rows)
    for place, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[place] = token
        batch.pos[place] = position
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = sequence
        batch.logits[place] = wanted
    code = llama_cpp.llama_decode(context, batch)
    if code:
        raise SystemExit(f"llama.cpp cannot decode: code {code}")
    chosen = []
    for place, row in enumerate(rows):
        if row[3]:
            logits = llama_cpp.llama_get_logits_ith(context, place)
            chosen.append(int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax()))
    return chosen


if __name__ == "__main__":
    main()
