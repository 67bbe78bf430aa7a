"""Runs every class of transformers that generates, as a tiny model, and writes `docs/models.md`.

    python -m benchmarks.architectures [--kinds causal,images] [--only llama,mamba] [--results results.json]

Each model has random weights in float32 and runs in a process of its own, with a time limit. The engine opens it with
the smallest budget and generates greedily for prompts of 1 to 200 tokens: each alone, all at once, and each starting
when the one before it has given a token. The tokens must be those of transformers' `model.generate` for the same
checkpoint. `--results` keeps the results in a file: other model types can be run later, and the page has all of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
import torch
import transformers

from benchmarks.processes import preload, run_within
from hermes_async import Chunk, Completion, Engine, EngineConfig, MemoryBudgetError, SamplingParams
from hermes_async.engine.opening import open_model
from tests.architectures import FIRST_SPECIAL_TOKEN, KINDS, NOT_FROM_TEXT, model_types, random_model, tiny_config

_LENGTHS = (1, 5, 40, 200, 2, 9, 17, 33)  # tokens of each prompt
_ALONE = 4  # of them, which also run alone
_NEW_TOKENS = 8
_LIMIT_S = 180
_REASON_LENGTH = 220  # characters, in the table
_CLOSE = 2e-3  # of log-probabilities: a larger difference is no rounding


@dataclass
class Result:
    """What became of one architecture.

    Attributes:
        how: "packed", "turns" or "no".
        reason: Why it does not run, or differs, or is not packed.
        differing: Which tokens differ from transformers', as "alone 40".
        logprob_difference: The largest one, of the likeliest tokens.
        num_distinct: Of all expected tokens; few say little.
    """

    kind: str
    architecture: str
    model_type: str
    how: str = "no"
    reason: str = ""
    by_us: bool = True
    differing: list[str] = field(default_factory=list)
    logprob_difference: float = 0.0
    num_distinct: int = 0
    minimum_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Expected:
    prompt: list[int]
    token_ids: list[int]
    logprobs: torch.Tensor  # [tokens, vocabulary]


def examine(kind: str, architecture: str, model_type: str, batching: str) -> dict[str, Any]:
    """Runs one model in transformers and in the engine."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    result = Result(kind, architecture, model_type)
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _examine(result, Path(folder), batching)
    except Exception as error:
        result.how, result.reason = "no", f"{type(error).__name__}: {error}"
    result.seconds = round(time.perf_counter() - started, 1)
    return asdict(result)


def _examine(result: Result, path: Path, batching: str) -> None:
    reason = NOT_FROM_TEXT.get(result.model_type)
    try:
        if reason is not None:
            raise NotImplementedError(reason)
        random_model(tiny_config(result.model_type), KINDS[result.kind]).save_pretrained(path)
        expected = _generate(path, getattr(transformers, result.architecture))
    except Exception as error:
        result.by_us = False
        result.reason = str(error) if reason else f"transformers: {type(error).__name__}: {error}"
        return
    result.num_distinct = len({token_id for item in expected for token_id in item.token_ids})
    config = EngineConfig(batching=batching)
    try:
        open_model(path, 1, config).close()
    except MemoryBudgetError as error:
        assert error.minimum_bytes is not None
        result.minimum_bytes = error.minimum_bytes
    anyio.run(_compare, result, path, config, expected)


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, FIRST_SPECIAL_TOKEN, (length,), generator=generator).tolist() for length in _LENGTHS]


def _generate(path: Path, model_class: Any) -> list[_Expected]:
    loaded = model_class.from_pretrained(path, dtype=torch.float32).eval()
    expected = []
    for prompt in _prompts():
        input_ids = torch.tensor([prompt])
        model = copy.deepcopy(loaded)  # a few models keep something of one call for the next
        with torch.inference_mode():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                eos_token_id=-1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        logits = torch.cat(output.logits).float()
        if not logits.isfinite().all():
            raise ArithmeticError("logits that are not finite")
        expected.append(_Expected(prompt, output.sequences[0, -len(logits) :].tolist(), logits.log_softmax(-1)))
    return expected


async def _compare(result: Result, path: Path, config: EngineConfig, expected: list[_Expected]) -> None:
    params = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=5)

    def check(how: str, item: _Expected, completion: Completion) -> None:
        if list(completion.token_ids) != item.token_ids:
            result.differing.append(f"{how} {len(item.prompt)}")
        for sampled, token_id, logprobs in zip(completion.logprobs, item.token_ids, item.logprobs, strict=False):
            assert sampled.top_logprobs is not None
            given = torch.tensor(list(sampled.top_logprobs.values()))
            difference = float((given - logprobs[list(sampled.top_logprobs)]).abs().max())
            result.logprob_difference = max(result.logprob_difference, difference)
            if sampled.token_id != token_id:
                break  # what comes after has another history

    async with Engine(path, memory_budget=result.minimum_bytes, config=config) as engine:
        plan = engine.plan.as_dict()
        result.how = plan.get("batching", "packed")
        result.reason = plan["reasons"][0] if result.how == "turns" else ""
        context = engine.plan.context_length
        if context is not None and any(len(item.prompt) + _NEW_TOKENS > context for item in expected):
            expected = [item for item in expected if len(item.prompt) + _NEW_TOKENS <= context]
            note = f"its context has {context} tokens here"
            result.reason = f"{result.reason}; {note}" if result.reason else note
        for item in expected[:_ALONE]:
            check("alone", item, await engine.complete(item.prompt, params))

        async def together(item: _Expected) -> None:
            check("together", item, await engine.complete(item.prompt, params))

        async with anyio.create_task_group() as tasks:
            for item in expected:
                tasks.start_soon(together, item)

        async def joining(item: _Expected, before: anyio.Event | None, begun: anyio.Event) -> None:
            if before is not None:
                await before.wait()
            chunks = engine.generate(item.prompt, params)
            check("joining", item, await Completion.collect(_noting(chunks, begun)))

        async with anyio.create_task_group() as tasks:
            before = None
            for item in expected:
                begun = anyio.Event()
                tasks.start_soon(joining, item, before, begun)
                before = begun


async def _noting(chunks: AsyncGenerator[Chunk, None], begun: anyio.Event) -> AsyncGenerator[Chunk, None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            begun.set()
            yield chunk


def _run(kind: str, architecture: str, model_type: str, batching: str) -> Result:
    try:
        return Result(**run_within(_LIMIT_S, examine, kind, architecture, model_type, batching))
    except TimeoutError:
        reason = f"took longer than {_LIMIT_S} s"
    except EOFError:
        reason = "its process ended"
    return Result(kind, architecture, model_type, reason=reason)


_HEADER = """# Architectures

<!-- Written by `python -m benchmarks.architectures`. -->

Every class of transformers {version} that generates text, run as a tiny model with random weights in float32. The
engine had the smallest budget. It generated {num_tokens} tokens greedily after prompts of {shortest} to {longest}
tokens: each prompt alone, all at once, and each joining while others ran. Prompts beyond the model's context were left
out. A class *runs* if all tokens were those of `model.generate`.

- **packed**: the tokens of all requests lie in one row, which is one call of the model.
- **turns**: each request is a call of its own, with the cache that transformers makes for the model. The calls share
  the reads of each sweep.
- **no**: the last column says why.

"""
_TITLES = {
    "causal": "Causal language models",
    "images": "Text and images",
    "seq2seq": "Encoder-decoders",
    "speech": "Speech to text",
}


def _table(results: list[Result]) -> Iterable[str]:
    yield _HEADER.format(
        version=transformers.__version__, num_tokens=_NEW_TOKENS, shortest=min(_LENGTHS), longest=max(_LENGTHS)
    )
    for kind, title in _TITLES.items():
        chosen = [result for result in results if result.kind == kind]
        if not chosen:
            continue
        counts = Counter(_verdict(result) for result in chosen)
        able = sum(1 for result in chosen if result.by_us)
        running = counts["packed"] + counts["turns"]
        yield f"## {title}\n\n"
        yield (
            f"{running} of {able} run ({running / max(able, 1):.0%}): {counts['packed']} packed, {counts['turns']} in "
            f"turns. transformers itself does not generate text from text alone with {len(chosen) - able} others.\n\n"
        )
        yield "| architecture | `model_type` | runs | |\n|---|---|---|---|\n"
        for result in sorted(chosen, key=lambda result: (result.architecture.lower(), result.model_type)):
            reason = " ".join(_reason(result).replace("|", "/").replace("<", "&lt;").split())
            yield f"| {result.architecture} | `{result.model_type}` | {_verdict(result)} | {reason} |\n"
        yield "\n"


def _verdict(result: Result) -> str:
    return "no" if result.differing or result.logprob_difference > _CLOSE else result.how


def _reason(result: Result) -> str:
    if result.differing:
        return f"differs from transformers ({result.how}: {', '.join(result.differing)})"
    if result.logprob_difference > _CLOSE:
        return f"log-probabilities differ by {result.logprob_difference:.2g} ({result.how})"
    reason = result.reason.removeprefix("in turns, a packed row does not work: ").removeprefix(
        "UnsupportedModelError: "
    )
    return reason if len(reason) <= _REASON_LENGTH else f"{reason[:_REASON_LENGTH]} ..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="causal", help="causal, images, seq2seq, speech")
    parser.add_argument("--only", default="", help="these model types, divided by commas")
    parser.add_argument("--batching", default="auto", help="auto, packed or turns")
    parser.add_argument("--results", type=Path, help="a JSON file with the results of all runs; made or extended")
    parser.add_argument("--page", type=Path, help="the page to write, such as docs/models.md")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    preload("torch", "transformers", "hermes_async.engine.opening", "tests.architectures")
    results = _read(args.results)
    for kind in args.kinds.split(","):
        for model_type, architecture in model_types(kind):
            if only and model_type not in only:
                continue
            result = _run(kind, architecture, model_type, args.batching)
            results[kind, model_type] = result
            verdict, reason = _verdict(result), _reason(result)
            print(f"{verdict:7} {architecture} {model_type} {result.seconds} s  {reason}", flush=True)
            if args.results:
                args.results.write_text(json.dumps([asdict(result) for result in results.values()], indent=1))
    if args.page:
        args.page.write_text("".join(_table(list(results.values()))).rstrip() + "\n")
    print(json.dumps(Counter(_verdict(result) for result in results.values())))


def _read(path: Path | None) -> dict[tuple[str, str], Result]:
    if path is None or not path.exists():
        return {}
    return {(item["kind"], item["model_type"]): Result(**item) for item in json.loads(path.read_text())}


if __name__ == "__main__":
    main()
