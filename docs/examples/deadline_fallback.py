"""An answer by a deadline, whatever happens: python deadline_fallback.py [MODEL [SECONDS]].

If the answer is late, what has arrived is used. If nothing has arrived, a prepared text is.
"""

import sys

import anyio

from hermes_async import DeadlineExceededError, Engine, QueueFullError, SamplingParams
from hermes_async.demo import MODEL_PATH

PREPARED = "The citizens are busy. Please ask again."


async def answer_by(engine: Engine, prompt: str, deadline: float) -> tuple[str, str]:
    """Returns a text, and where it comes from: "whole", "part" or "prepared"."""
    text = ""
    try:
        async for chunk in engine.generate(prompt, SamplingParams(max_tokens=64), deadline=deadline):
            text += chunk.text
    except (DeadlineExceededError, QueueFullError):
        return (text, "part") if text else (PREPARED, "prepared")
    return text, "whole"


async def main(model: str = str(MODEL_PATH), seconds: str = "60") -> None:
    """Asks once with time enough, and once with none."""
    async with Engine(model) as engine:
        for time_s in (float(seconds), 0.0):
            text, source = await answer_by(engine, "First Citizen:\n", anyio.current_time() + time_s)
            print(f"within {time_s:g} s ({source}): {text}")


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
