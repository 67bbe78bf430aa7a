"""What users may import. A name more or less is a decision: change it here too, and say so in the changelog."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import hermes_async

API = [
    "CheckpointError",
    "Chunk",
    "Completion",
    "ConfigError",
    "ContextLengthError",
    "CorruptShardError",
    "DeadlineExceededError",
    "Embeddings",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "EngineFailedError",
    "EngineSnapshot",
    "EngineStatistics",
    "HermesError",
    "IncompatibleVersionError",
    "Label",
    "MemoryBudgetError",
    "MemorySnapshot",
    "MessageDelta",
    "MissingTensorError",
    "ParkingError",
    "Plan",
    "Prediction",
    "QueueFullError",
    "RankedDocument",
    "ReadError",
    "ReadTimeoutError",
    "RequestError",
    "RequestEvent",
    "RequestSnapshot",
    "ResponseStream",
    "SampledToken",
    "SamplingParams",
    "Session",
    "SessionClosedError",
    "ShortReadError",
    "StageSnapshot",
    "StructuredOutputs",
    "Timings",
    "ToolCall",
    "Transcript",
    "TranscriptSegment",
    "UnsupportedModelError",
    "Usage",
    "format_bytes",
    "parse_bytes",
    "predict",
]


# Parameters and defaults of what users call. `python -m tests.test_api` prints what they are now.
SIGNATURES = """
Engine(source, *, memory_budget='auto', draft_model=None, config=None, on_event=None, trace=None, revision=None,
    token=None, cache_dir=None)
await Engine.tokenize(prompt, *, tools=None, chat_template_kwargs=None, add_special_tokens=True,
    add_generation_prompt=True)
await Engine.detokenize(token_ids, *, skip_special_tokens=False)
await Engine.token_strings(token_ids)
await Engine.response_stream(prompt, tools=None, *, chat_template_kwargs=None)
await Engine.forward(**inputs)
await Engine.embed(texts, *, pooling=None, normalize=None, truncate=None, prompt_name=None, prompt=None,
    truncate_dim=None)
await Engine.embed_counted(inputs, *, dimensions=None)
await Engine.classify(item, *, truncate=False)
await Engine.rank(query, documents)
await Engine.transcribe(audio, *, sampling_rate=None, language=None, task='transcribe', timestamps=False,
    params=None, deadline=None)
Engine.transcribe_stream(audio, *, sampling_rate=None, language=None, task='transcribe', timestamps=False,
    params=None, deadline=None)
Engine.model_name
Engine.is_open
Engine.plan
Engine.ready
await Engine.wait_ready()
Engine.resolve_sampling_params(params=None)
Engine.statistics()
Engine.snapshot()
Engine.generate(prompt, params=None, *, tools=None, chat_template_kwargs=None, request_id=None, deadline=None)
Engine.stream(prompt, params=None, *, tools=None, chat_template_kwargs=None, request_id=None, deadline=None)
await Engine.complete(prompt, params=None, *, tools=None, chat_template_kwargs=None, request_id=None, deadline=None)
Engine.session(messages=())
await Engine.abort(request_id)
await Engine.resize(memory_budget)
Engine.drop_prefixes()
Session.messages
Session.token_ids
Session.edit(messages=None, *, token_ids=None)
Session.generate(prompt, params=None, *, tools=None, chat_template_kwargs=None, request_id=None, deadline=None)
await Session.complete(prompt, params=None, *, tools=None, chat_template_kwargs=None, request_id=None,
    deadline=None)
Session.fork()
await Session.aclose()
EngineConfig(*, num_loading_agents=None, max_resident_layers=None, max_tokens_per_sweep=None, max_sequences=64,
    context_length=None, max_waiting=1024, max_buffered_chunks=64, kv_budget=None, share_prefixes=True,
    prompt_lookup=True, parking_dir=None, direct_io=True, lock_memory='auto', read_timeout=None, kernels='auto',
    dtype='auto', batching='auto', self_check='require')
SamplingParams(*, max_tokens=16, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,
    presence_penalty=0.0, frequency_penalty=0.0, seed=None, stop=(), stop_token_ids=(),
    include_stop_str_in_output=False, ignore_eos=False, min_tokens=None, logprobs=None, logit_bias=None,
    skip_special_tokens=True, structured_outputs=None, num_beams=1, model_defaults=False)
SamplingParams.from_model(**overrides)
predict(plan, *, num_sessions=1, prompt_tokens=64, new_tokens=64)
parse_bytes(size)
format_bytes(num_bytes)
"""


def signatures() -> Iterator[str]:
    """A line for each class, public method and property, and function."""
    for name in ("Engine", "Session", "EngineConfig", "SamplingParams", "predict", "parse_bytes", "format_bytes"):
        value = getattr(hermes_async, name)
        if name != "Session":  # `Engine.session` makes it
            yield f"{name}{parameters_of(value)}"
        bases = reversed(value.__mro__[:-1]) if inspect.isclass(value) else ()
        members = [item for base in bases for item in vars(base).items()]
        for member_name, member in members:
            if isinstance(member, property) and not member_name.startswith("_"):
                yield f"{name}.{member_name}"
            elif inspect.isfunction(member) and not member_name.startswith("_"):
                called = "await " if inspect.iscoroutinefunction(member) else ""
                yield f"{called}{name}.{member_name}{parameters_of(member)}"
            elif isinstance(member, classmethod) and not member_name.startswith("_"):
                yield f"{name}.{member_name}{parameters_of(getattr(value, member_name))}"


def parameters_of(function: Any) -> str:
    """Names and defaults, without types and without `self`."""
    signature = inspect.signature(function)
    own = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    return str(signature.replace(parameters=own, return_annotation=inspect.Signature.empty))


def printed() -> str:
    lines = (textwrap.wrap(line, 116, subsequent_indent="    ", break_on_hyphens=False) for line in signatures())
    return "\n".join("\n".join(line) for line in lines)


def test_the_public_signatures() -> None:
    assert printed() == SIGNATURES.strip()


def test_the_public_names() -> None:
    assert hermes_async.__all__ == API
    assert all(hasattr(hermes_async, name) for name in API)


def test_every_error_is_a_hermes_error() -> None:
    errors = [getattr(hermes_async, name) for name in API if name.endswith("Error")]
    assert all(issubclass(error, hermes_async.HermesError) for error in errors)
    for error in (hermes_async.ConfigError, hermes_async.RequestError):
        assert issubclass(error, ValueError)


def test_every_public_name_is_documented() -> None:
    assert [name for name in API if not getattr(hermes_async, name).__doc__] == []


if __name__ == "__main__":
    print(printed())
