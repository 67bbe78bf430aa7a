"""What bodies of requests have in common: strict types, known fields only, and a bound on every number and list."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Header
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from hermes_async.config import SamplingParams

MAX_STOP_TEXTS = 16
MAX_STOP_TOKENS = 256
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128
MAX_MESSAGES = 4096
MAX_PROMPTS = 64
MAX_TOKENS = 2**24
"""The most tokens of a prompt, and the most that may be asked for. The model's context is the real bound."""


class Body(BaseModel):
    """A part of a request. A field that is not declared is an error, and no value is converted."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_by_name=True,
        validate_by_alias=True,
    )


def _token_ids(biases: dict[str, float]) -> dict[str, float]:
    for token_id in biases:
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) <= 9):
            raise ValueError(f"{token_id[:20]!r} is not a token id")
    return biases


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
Text = Annotated[str, StringConstraints(max_length=2**24)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOP_TEXTS)]
Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES), AfterValidator(_token_ids)
]
JsonSchema = dict[str, Any]


class StreamOptions(Body):
    """OpenAI's `stream_options`.

    Attributes:
        include_usage: Sends a last chunk with the token counts.
    """

    include_usage: bool | None = None


class StructuredOutputsBody(Body):
    """vLLM's `structured_outputs`: exactly one of its fields."""

    json_schema: JsonSchema | Text | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Annotated[str, StringConstraints(max_length=2**16)] | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=1024)] | None = None

    def as_mapping(self) -> dict[str, Any]:
        """The fields that are set, with the names of `StructuredOutputs`."""
        return self.model_dump(by_alias=True, exclude_none=True)


class SamplingFields(Body):
    """The fields of sampling that all generating routes take. None means the default."""

    n: Annotated[int, Field(ge=1, le=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | StopTexts | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Biases | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputsBody | None = None

    def sampling_params(self, defaults: SamplingParams, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's parameters.

        Args:
            defaults: The values of fields that the request leaves out.

        Raises:
            RequestError: Two fields contradict each other.
        """
        given: dict[str, Any] = {
            name: value
            for name in SamplingFields.model_fields
            if name not in ("n", "seed", "logit_bias", "structured_outputs")
            and (value := getattr(self, name)) is not None
        }
        if self.structured_outputs is not None:
            given["structured_outputs"] = self.structured_outputs.as_mapping()
        return replace(
            defaults,
            max_tokens=max_tokens,
            seed=None if self.seed is None or self.seed == -1 else self.seed % 2**64,
            logit_bias={int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()} or None,
            logprobs=logprobs,
            **given,
        )


def of_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one of several answers to a prompt, which must not be the same."""
    return params if params.seed is None else replace(params, seed=(params.seed + choice) % 2**64)


def json_logprob(logprob: float | None) -> float:
    """A log-probability for JSON, which has no infinity. A token that cannot come has -9999, as in OpenAI's API."""
    return max(logprob or 0.0, -9999.0)


class UsageBody(BaseModel):
    """Token counts, as OpenAI's API sends them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


ClientId = Annotated[
    str | None,
    Header(
        alias="x-request-id",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="An id for the request, which becomes a part of the answer's id and stands in the server's log.",
    ),
]


def new_id(prefix: str, client_id: str | None = None) -> str:
    """An id for an answer, such as "chatcmpl-...", which is also the engine's id of the request."""
    return f"{prefix}-{client_id or uuid.uuid4().hex}"


Model = Annotated[str, StringConstraints(max_length=512)]
User = Annotated[str, StringConstraints(max_length=512)]
