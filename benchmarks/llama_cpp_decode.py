"""Decodes with llama.cpp, and prints how fast. Runs in llama.cpp's own environment, so it imports nothing of ours.

    python -I llama_cpp_decode.py FILE SESSIONS,SESSIONS,... TOKENS PROMPT_TOKENS mapped|copied

Prints "ready" when everything is imported, and one JSON object when it is done. Waits for a line after each. All
sequences are decoded in one batch, which is how llama.cpp decodes in parallel. The file is mapped into memory, as it is
by default. By default llama.cpp also copies weights into the layout of its kernels (`copied`), which takes memory for
all of them; where there is not enough, the kernel ends the process. `mapped` computes with the file's own bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from typing import Any

import llama_cpp
import numpy as np


def main() -> None:
    path, numbers, num_tokens, prompt_tokens, layout = sys.argv[1:]
    sessions = [int(number) for number in numbers.split(",")]
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silent, None)
    tell("ready")
    started = time.perf_counter()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = layout == "copied"
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    if model is None:
        raise SystemExit(f"llama.cpp cannot open {path}")
    params = llama_cpp.llama_context_default_params()
    # No more memory than these tokens take, in one cache for all sequences.
    most = max(sessions)
    params.n_ctx = -(-most * (int(prompt_tokens) + int(num_tokens)) // 256) * 256
    params.n_batch = params.n_ubatch = max(32, most * int(prompt_tokens))
    params.n_seq_max = most
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    context = llama_cpp.llama_init_from_model(model, params)
    if context is None:
        raise SystemExit("llama.cpp cannot make a context")
    opened = time.perf_counter() - started
    points = [decode(model, context, number, int(num_tokens), int(prompt_tokens)) for number in sessions]
    tell(json.dumps({"opening_s": opened, "points": points}))
    os._exit(0)  # what llama.cpp frees is not measured


def tell(text: str) -> None:
    """Prints a line, and waits for one."""
    print(text, flush=True)
    sys.stdin.readline()


def decode(model: Any, context: Any, sessions: int, num_tokens: int, prompt_tokens: int) -> dict[str, Any]:
    """Greedy tokens of sequences that start together; the decode phase begins when each has its first token."""
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(sessions * prompt_tokens, 0, 1)
    started = time.perf_counter()
    prompts = [
        (1 + (idx * 131 + place * 17) % 1000, place, idx, place == prompt_tokens - 1)
        for idx in range(sessions)
        for place in range(prompt_tokens)
    ]
    tokens = run(context, batch, prompts, vocab_size)
    first = time.perf_counter()
    moments = [first]
    for step in range(num_tokens - 1):
        rows = [(token, prompt_tokens + step, idx, True) for idx, token in enumerate(tokens)]
        tokens = run(context, batch, rows, vocab_size)
        moments.append(time.perf_counter())
    llama_cpp.llama_batch_free(batch)
    return {
        "sessions": sessions,
        "first_token_s": first - started,
        "decode_tokens_per_s": sessions * (num_tokens - 1) / (moments[-1] - first),
        "step_seconds": [later - earlier for earlier, later in pairwise(moments)],
    }


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
