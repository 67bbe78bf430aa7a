"""Compiles and runs grammars that are made to cost much, in little memory. A process of its own, as one may end it."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import hermes_async
from hermes_async.config import SamplingParams, StructuredOutputs
from hermes_async.errors import RequestError
from hermes_async.modeling.sampling import Sampler
from hermes_async.modeling.structured_outputs import GrammarCompiler

VOCAB_SIZE = 2048
NUM_TOKENS = 50
MEMORY_BYTES = 2**28
CPU_SECONDS = 120


def chain(length: int, link: Callable[[str], Any]) -> dict[str, Any]:
    """Definitions of which each refers to the next."""
    definitions = {f"d{idx}": link(f"#/$defs/d{idx + 1}") for idx in range(length)}
    return {"$defs": definitions | {f"d{length}": {}}, "$ref": "#/$defs/d0"}


def nested(key: str, depth: int) -> str:
    return f'{{"{key}":' * depth + "{}" + "}" * depth


CASES: dict[str, dict[str, Any]] = {
    "deep": {"json": nested("items", 6000)},
    "deep lists": {"json": '{"enum":' + "[" * 20000 + "]" * 20000 + "}"},
    "chain": {"json": chain(900, lambda r: {"properties": {"a": {"$ref": r}}})},
    "chain of allOf": {"json": chain(900, lambda r: {"allOf": [{"$ref": r}, {"type": "object"}]})},
    "chain of anyOf": {"json": chain(900, lambda r: {"anyOf": [{"$ref": r}, {"$ref": r}]})},
    "longest chain": {"json": chain(195, lambda r: {"properties": {"a": {"$ref": r}}})},
    "longest chain of anyOf": {"json": chain(195, lambda r: {"anyOf": [{"$ref": r}, {"$ref": r}]})},
    "doubling": {"json": chain(40, lambda r: {"allOf": [{"$ref": r}, {"$ref": r}]})},
    "itself": {"json": {"$ref": "#"}},
    "itself twice": {"json": {"properties": {"a": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}}}},
    "ambiguous": {"json": {"anyOf": [{"type": "array", "items": {"$ref": "#"}} for _ in range(300)]}},
    "huge enum": {"json": {"enum": [f"v{i * 7919 % 9973}" for i in range(7000)]}},
    "enum of mappings": {"json": {"enum": [{"a": [i, {"b": i}]} for i in range(1500)]}},
    "properties": {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(2000)}}},
    "patternProperties": {"json": {"patternProperties": {f"^(x+x+)+y{i}$": {} for i in range(500)}}},
    "few patternProperties": {"json": {"patternProperties": {f"^(x+x+)+y{i}$": {} for i in range(16)}}},
    "patterns at once": {"json": {"allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(50, 90)]}},
    "patterns": {"json": {"anyOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(300)]}},
    "multiples": {"json": {"type": "integer", "multipleOf": 999983}},
    "multiples at once": {"json": {"allOf": [{"type": "number", "multipleOf": p} for p in (9973, 9967, 9949)]}},
    "lengths": {"json": {"type": "string", "minLength": 10**6, "maxLength": 10**9}},
    "counts": {"json": {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}}},
    "repeats": {"regex": "(a{1,1000}){1000}"},
    "more repeats": {"regex": "(((a{1,1000}b?){1,1000}c?){1,1000}d?){1,1000}"},
    "classes": {"regex": r"(\p{L}{1,1000}\d?){1000}"},
    "catastrophic": {"regex": "((a|aa)+|(ab|ba)*)*c"},
    "states": {"regex": r"[\s\S]*a[\s\S]{200}b"},
    "parentheses": {"regex": "(" * 4000 + ")" * 4000},
    "groups": {"regex": "(ab|c)*" * 1170},
    "optional": {"regex": "a?" * 4096},
    "choices": {"choice": [f"{i}" * 9 for i in range(1200)]},
}


def outcome(compiler: GrammarCompiler, asked: dict[str, Any]) -> str:
    """The error, or "ok"."""
    params = SamplingParams(seed=1, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS)
    try:
        grammar = compiler.compile(StructuredOutputs(**asked), {0})
        sampler = Sampler(params, [5], eos_token_ids=frozenset({0}), vocab_size=VOCAB_SIZE, grammar=grammar)
        for _ in range(NUM_TOKENS):
            if sampler.sample(torch.zeros(VOCAB_SIZE)).token_id == 0:
                break
    except RequestError as error:
        return str(error)
    return "ok"


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(Path(hermes_async.__file__).parent / "demo" / "model")
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    compiler.compile(StructuredOutputs(regex="a"), {0})
    nbytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    outcomes: dict[str, str] = {}

    def run() -> None:
        outcomes.update({name: outcome(compiler, asked) for name, asked in CASES.items()})
        print(json.dumps(outcomes))

    thread = threading.Thread(target=run)  # as a request is prepared
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
