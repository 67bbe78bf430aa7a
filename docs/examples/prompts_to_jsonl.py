"""A file of prompts, one a line, to a JSONL file of answers: python prompts_to_jsonl.py [PROMPTS [ANSWERS [MODEL]]].

Many prompts are under way at once, so they share the reading. Stop it at any time: it goes on where it stopped.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectSendStream
from rich.progress import Progress

from hermes_async import Engine, RequestError, SamplingParams
from hermes_async.demo import MODEL_PATH

NUM_AT_ONCE = 16
SPEAKERS = ["ROMEO:", "JULIET:", "Nurse:", "KING HENRY:", "First Citizen:", "GLOUCESTER:"]


def answered(answers: Path) -> set[int]:
    """The prompts that have an answer. Cuts off a last line that was not written to its end."""
    if not answers.exists():
        return set()
    content = answers.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    os.truncate(answers, len(whole))
    return {json.loads(line)["idx"] for line in whole.splitlines()}


async def answer_each(
    engine: Engine, prompts: Iterable[tuple[int, str]], results: MemoryObjectSendStream[dict[str, Any]]
) -> None:
    """Answers prompts until there are no more. Several tasks take them from the same iterator."""
    params = SamplingParams(max_tokens=48, temperature=0.8, seed=0)
    async with results:
        for idx, prompt in prompts:
            try:
                completion = await engine.complete(prompt, params)
                answer = {"text": completion.text, "finish_reason": completion.finish_reason}
            except RequestError as error:  # such as a prompt that is too long; the others go on
                answer = {"error": str(error)}
            await results.send({"idx": idx, "prompt": prompt, **answer})


async def answer_all(model: str, prompts: list[tuple[int, str]], answers: Path) -> None:
    """Writes each answer as soon as it is there."""
    async with Engine(model) as engine, await anyio.open_file(answers, "a") as file, anyio.create_task_group() as tasks:
        results, arrivals = anyio.create_memory_object_stream[dict[str, Any]]()
        remaining = iter(prompts)
        with Progress() as progress, results, arrivals:
            bar = progress.add_task("prompts", total=len(prompts))
            for _ in range(NUM_AT_ONCE):
                tasks.start_soon(answer_each, engine, remaining, results.clone())
            results.close()  # the workers' clones stay open
            async for result in arrivals:
                await file.write(json.dumps(result) + "\n")
                await file.flush()
                progress.advance(bar)


def main(prompts_file: str = "", answers_file: str = "answers.jsonl", model: str = str(MODEL_PATH)) -> None:
    """Answers the prompts that have no answer yet."""
    prompts = Path(prompts_file).read_text().splitlines() if prompts_file else SPEAKERS
    done = answered(Path(answers_file))
    remaining = [(idx, prompt) for idx, prompt in enumerate(prompts) if idx not in done]
    anyio.run(answer_all, model, remaining, Path(answers_file))
    print(f"{len(done)} answers were there, {len(remaining)} are new: {answers_file}")


if __name__ == "__main__":
    main(*sys.argv[1:])
