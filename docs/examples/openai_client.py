"""OpenAI's client against `hermes-async serve`: python openai_client.py [BASE_URL].

Without an address, it starts a server of its own, with the demo model. With one, such as http://127.0.0.1:8000/v1, it
uses that server, with the key in OPENAI_API_KEY.
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.streams.text import TextReceiveStream
from openai import AsyncOpenAI

from hermes_async.demo import MODEL_PATH


async def talk(base_url: str) -> None:
    """Streams an answer, and then asks for two at once."""
    async with AsyncOpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
        model = (await client.models.list()).data[0].id
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Who goes there?"}],
            max_completion_tokens=48,
            stream=True,
            extra_body={"top_k": 40},  # fields that OpenAI's API lacks
        )
        async with stream:  # leaving it early frees the request on the server
            async for chunk in stream:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
        answers = await client.completions.create(model=model, prompt="ROMEO:", max_tokens=16, n=2, seed=1)
        for choice in answers.choices:
            print(f"\n--- answer {choice.index + 1} ---\n{choice.text.strip()}")


@asynccontextmanager
async def demo_server() -> AsyncIterator[str]:
    """Runs `hermes-async serve` on a free port, and yields its address."""
    command = [sys.executable, "-m", "hermes_async", "serve", str(MODEL_PATH), "--port", "0"]
    async with await anyio.open_process(command, stdout=None) as process:
        assert process.stderr is not None
        log, announced = "", "listening on "
        async for text in TextReceiveStream(process.stderr):
            log += text
            if announced in log and log.endswith("\n"):
                break
        else:
            raise SystemExit(f"the server has not started: {log}")
        try:
            yield log.partition(announced)[2].split()[0] + "/v1"
        finally:
            process.terminate()


async def main(base_url: str = "") -> None:
    """Uses the server at `base_url`, or one of its own."""
    if base_url:
        await talk(base_url)
    else:
        async with demo_server() as address:
            await talk(address)


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
