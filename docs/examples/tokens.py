"""Tokens in ten lines: python tokens.py [MODEL [BUDGET]]."""

import sys

import anyio

import hermes_async
from hermes_async.demo import MODEL_PATH


async def main(model: str = str(MODEL_PATH), memory_budget: str = "6MiB") -> None:
    """Prints each token as soon as it is generated."""
    async with hermes_async.Engine(model, memory_budget=memory_budget) as engine:
        params = hermes_async.SamplingParams(max_tokens=64, temperature=0.0)
        async for chunk in engine.generate("Once upon a time", params):
            print(chunk.text, end="", flush=True)
    print()


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
