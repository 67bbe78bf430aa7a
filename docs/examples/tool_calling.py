"""Tool calling: the model asks for a function, the program runs it, the model answers: python tool_calling.py [MODEL].

A model whose tokenizer brings a response template calls tools by itself. The demo model has learnt no tools. So its
call is forced: its text must follow the JSON schema of the arguments, which needs the extra `structured`.
"""

import json
import sys
from typing import Any

import anyio

from hermes_async import Engine, SamplingParams, StructuredOutputs, ToolCall
from hermes_async.demo import MODEL_PATH

PRICES = {"Rome": 12, "Corioli": 7, "Antium": 9}
ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"enum": list(PRICES)}},
    "required": ["city"],
    "additionalProperties": False,
}
DESCRIPTION = "The price of a bushel of corn in a city, in coins."
TOOLS = [{"type": "function", "function": {"name": "price", "description": DESCRIPTION, "parameters": ARGUMENTS}}]


def result_of(call: ToolCall) -> str:
    """Runs the function. The model may have written anything: then it gets the error, and may try again."""
    try:
        if call.name != "price":
            raise ValueError(f"there is no function {call.name}")
        return str(PRICES[json.loads(call.arguments)["city"]])
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {error!r}"


async def use_tools(engine: Engine, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Asks the model for calls, runs them, and returns what the conversation goes on with."""
    parser = await engine.response_stream(messages, TOOLS)
    if parser is None:  # the text comes as it is, so make it a call; the chat template may have no place for results
        params = SamplingParams(max_tokens=256, structured_outputs=StructuredOutputs(json=ARGUMENTS))
        call = ToolCall(0, "price", (await engine.complete(messages, params, tools=TOOLS)).text)
        print(f"{call.name}({call.arguments}) = {result_of(call)}")
        return [{"role": "user", "content": f"It costs {result_of(call)} coins."}]
    params = SamplingParams(max_tokens=1024, skip_special_tokens=False)  # the parser needs them
    completion = await engine.complete(messages, params, tools=TOOLS)
    deltas = [*parser.push(completion.text), *parser.finish()]
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(delta.content for delta in deltas),
        "tool_calls": [],
    }
    results = []
    for call in [delta.tool_call for delta in deltas if delta.tool_call is not None]:
        print(f"{call.name}({call.arguments}) = {result_of(call)}")
        function = {"name": call.name, "arguments": call.arguments}
        answer["tool_calls"].append({"id": f"call_{call.index}", "type": "function", "function": function})
        results.append({"role": "tool", "tool_call_id": f"call_{call.index}", "content": result_of(call)})
    return [answer, *results]


async def main(model: str = str(MODEL_PATH)) -> None:
    """Asks a question that needs the function."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What does corn cost?"}]
    async with Engine(model) as engine:
        messages += await use_tools(engine, messages)
        answer = await engine.complete(messages, SamplingParams(max_tokens=48), tools=TOOLS)
        print(answer.text)


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
