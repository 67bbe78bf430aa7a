"""A chat with a history, and two ways on from the same point: python chat_forks.py [MODEL]."""

import sys

import anyio

from hermes_async import Engine, SamplingParams, Session
from hermes_async.demo import MODEL_PATH

PARAMS = SamplingParams(max_tokens=40, temperature=0.7, seed=1)


async def ask(chat: Session, question: str) -> None:
    """Takes one turn. Only the new tokens are computed: the session keeps the keys and values of the others."""
    print(f"\n> {question}")
    async for chunk in chat.generate(question, PARAMS):
        print(chunk.text, end="", flush=True)
        if chunk.usage is not None:  # the last chunk
            print(f"\n  [{chunk.usage.cached_tokens} of {chunk.usage.prompt_tokens} prompt tokens were kept]")


async def main(model: str = str(MODEL_PATH)) -> None:
    """Asks two questions, and then a third one in two forks."""
    system = {"role": "system", "content": "A street in Rome."}
    async with Engine(model) as engine, engine.session([system]) as chat:
        await ask(chat, "Who goes there?")
        await ask(chat, "What news from the senate?")
        async with chat.fork() as other:
            await ask(chat, "Is there corn?")
            await ask(other, "Is there war?")
            assert chat.messages[:5] == other.messages[:5]  # the history before the fork is shared
        chat.edit(chat.messages[:3])  # back to the point after the first answer
        await ask(chat, "Where is Marcius?")


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
