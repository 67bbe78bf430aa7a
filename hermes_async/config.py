"""What a user can set: byte sizes, one request's sampling parameters, the engine's options."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Literal

from hermes_async.errors import ConfigError, RequestError

Pooling = Literal["mean", "cls", "max", "last", "weightedmean", "mean_sqrt_len"]
"""How the vectors of a text's tokens become one vector: their mean or maximum, the first ("cls") or last one, a mean
weighted by position, or their sum divided by the root of their number."""

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[_letter] = 1024**_power


# Logits are float32. These bounds on bias, penalty and temperature keep them in its range.
_LARGEST = 1e6
_LARGEST_BIAS = 1e9
_LARGEST_STRUCTURE_BYTES = 64 * 1024
_LARGEST_REGEX_BYTES = 8 * 1024
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
_NOT_OPTIONAL = ("max_tokens", "min_tokens", *_FLAGS)
"""Fields of `SamplingParams` for which None does not mean the default. For `max_tokens`, it means no limit."""


def parse_bytes(size: int | str) -> int:
    """Parses a byte size: an int, or a text such as "3GiB", "512 MiB", "1.5GB" (10**9) or "800M" (2**20).

    Raises:
        ConfigError: It is not a size, or not positive.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ConfigError(f"a byte size is an int or a text such as '3GiB', not {size!r}")
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        unit = _UNITS.get(match.group(2).upper()) if match else None
        if match is None or unit is None:
            raise ConfigError(f"not a byte size: {size!r}; write it like '3GiB', '512MiB' or '1.5GB'")
        size = int(Decimal(match.group(1)) * unit)
    if size <= 0:
        raise ConfigError(f"a byte size must be more than zero, not {size}")
    return size


def format_bytes(num_bytes: int) -> str:
    """Formats a byte count with a binary unit and three significant digits, such as "1.50 GiB"."""
    if abs(num_bytes) < 1024:
        return f"{num_bytes} B"
    value, unit = num_bytes / 1024, "KiB"
    for larger_unit in ("MiB", "GiB", "TiB"):
        if abs(value) < 1023.5:
            break
        value, unit = value / 1024, larger_unit
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def format_count(count: int, noun: str) -> str:
    """Formats a count with its noun, such as "1 token" and "3 tokens"; the noun's plural must end in "s"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What the text of an answer must match. Exactly one field is set. Needs the extra `structured`.

    Attributes:
        json: A JSON schema, as a mapping or as its text. It is kept as text.
        json_object: Any JSON object.
        regex: A regular expression in the syntax of Rust's `regex` crate. The whole text matches it.
        choice: The text is one of these.

    Raises:
        RequestError: Not exactly one field is set, or a value has the wrong type or is too large.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise RequestError(f"structured_outputs.json_object must be True or False, not {self.json_object!r}")
        texts = (self.json, self.regex, self.choice)
        if sum(value is not None for value in texts) + self.json_object != 1:
            raise RequestError("structured_outputs needs exactly one of json, json_object, regex and choice")
        if isinstance(self.json, Mapping):
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            choice = (self.choice,) if isinstance(self.choice, str) else self.choice
            object.__setattr__(self, "choice", _tuple_of("structured_outputs.choice", choice, str))
            if not self.choice or not all(self.choice):
                raise RequestError("structured_outputs.choice needs at least one text, and none may be empty")
        self._check_text("json", self.json, _LARGEST_STRUCTURE_BYTES)
        self._check_text("regex", self.regex, _LARGEST_REGEX_BYTES)
        self._check_text("choice", None if self.choice is None else "".join(self.choice), _LARGEST_STRUCTURE_BYTES)

    @staticmethod
    def _check_text(field: str, text: object, most: int) -> None:
        name = f"structured_outputs.{field}"
        if text is None:
            return
        if not isinstance(text, str):
            raise RequestError(f"{name} must be a text, not {type(text).__name__}")
        check_text(name, text)
        if len(text) > most or len(text.encode()) > most:
            raise RequestError(f"{name} has more than {most} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names and meanings are vLLM's.

    As in vLLM, None means the default, for all fields but `max_tokens`, `min_tokens` and the flags.

    Attributes:
        max_tokens: The most tokens to generate; None generates until the context is full.
        temperature: 0.0 is greedy. Otherwise logits are divided by it. At most 1e6.
        top_p: Keeps the smallest set of likeliest tokens whose probabilities sum to at least this, in (0, 1].
        top_k: Keeps the k likeliest tokens; 0 or -1 keeps all.
        min_p: Drops tokens whose probability is below this share of the likeliest token's, in [0, 1].
        repetition_penalty: Divides positive logits of tokens in the prompt or output, and multiplies negative ones;
            from 1e-6 to 1e6.
        presence_penalty: Subtracted from the logit of each token that was generated, in [-2, 2].
        frequency_penalty: Subtracted once for each time that a token was generated, in [-2, 2].
        seed: Seeds the request's own random generator; None or -1 draws a seed.
        stop: Texts that end the generation.
        stop_token_ids: Tokens that end the generation, besides the model's end-of-sequence tokens.
        include_stop_str_in_output: Keeps the stop text, or the text of the token that ended the generation, in `text`.
            `token_ids` always contain that token.
        ignore_eos: Continues after the model's end-of-sequence tokens.
        min_tokens: The number of tokens before which neither an end-of-sequence or stop token nor a stop text ends the
            generation.
        logprobs: The number of likeliest tokens whose log-probabilities are reported at each position; -1 for all,
            None for none.
        logit_bias: Added to the logits, by token id; from -1e9 to 1e9 each.
        skip_special_tokens: Leaves special tokens out of the text.
        structured_outputs: What the text must match, as `StructuredOutputs` or a mapping of its fields. It does not go
            with `ignore_eos` and `include_stop_str_in_output`. A stop text ends the answer only after a text that
            matches, and `min_tokens` yields where nothing but the end can follow.

    Raises:
        RequestError: A value is out of its range; the message names it.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._normalize()
        self._check_types()
        self._check_ranges()
        if self.logit_bias is not None:
            self._check_logit_bias(self.logit_bias)
        if self.structured_outputs is not None:
            self._check_structured_outputs(self.structured_outputs)

    def _normalize(self) -> None:
        # As in vLLM and its server, None is the default, and -1 is no seed.
        for field in fields(self):
            if getattr(self, field.name) is None and field.name not in _NOT_OPTIONAL:
                object.__setattr__(self, field.name, field.default)
        if self.seed == -1 and not isinstance(self.seed, float):
            object.__setattr__(self, "seed", None)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _tuple_of("stop", stop, str))
        object.__setattr__(self, "stop_token_ids", _tuple_of("stop_token_ids", self.stop_token_ids, int))

    def _check_types(self) -> None:
        if any(not text for text in self.stop):
            raise RequestError("stop: a stop text must not be empty")
        for text in self.stop:
            check_text("stop", text)
        for name in ("max_tokens", "top_k", "seed", "min_tokens", "logprobs"):
            value = getattr(self, name)
            optional = name in ("max_tokens", "seed", "logprobs")
            if not (value is None and optional) and (isinstance(value, bool) or not isinstance(value, int)):
                raise RequestError(f"{name} must be an int{' or None' if optional else ''}, not {value!r}")
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in ("temperature", "top_p", "min_p", *penalties):
            if not _is_finite_number(getattr(self, name)):
                raise RequestError(f"{name} must be a finite number, not {getattr(self, name)!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, not {getattr(self, name)!r}")

    def _check_ranges(self) -> None:
        def check(name: str, holds: bool, allowed: str) -> None:
            if not holds:
                raise RequestError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

        check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        check("temperature", 0 <= self.temperature <= _LARGEST, f"from 0 (greedy) to {_LARGEST:g}")
        check("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        check("top_k", self.top_k >= -1, "-1 or 0 (all tokens) or more")
        check("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        in_range = 1 / _LARGEST <= self.repetition_penalty <= _LARGEST
        check("repetition_penalty", in_range, f"from {1 / _LARGEST:g} to {_LARGEST:g}")
        check("presence_penalty", abs(self.presence_penalty) <= 2, "from -2 to 2")
        check("frequency_penalty", abs(self.frequency_penalty) <= 2, "from -2 to 2")
        check("seed", self.seed is None or 0 <= self.seed < 2**64, "from 0 to 2**64 - 1")
        check("min_tokens", self.min_tokens >= 0, "0 or more")
        check("min_tokens", self.max_tokens is None or self.min_tokens <= self.max_tokens, "at most max_tokens")
        check("logprobs", self.logprobs is None or self.logprobs >= -1, "0 or more, or -1 (all tokens)")

    def _check_logit_bias(self, logit_bias: Mapping[int, float]) -> None:
        if not isinstance(logit_bias, Mapping):
            raise RequestError(f"logit_bias must be a mapping or None, not {logit_bias!r}")
        copied = dict(logit_bias)
        object.__setattr__(self, "logit_bias", copied)
        for token_id, bias in copied.items():
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not _is_finite_number(bias):
                pair = f"{token_id!r} to {bias!r}"
                raise RequestError(f"logit_bias must map token ids to finite numbers, not {pair}")
            if abs(bias) > _LARGEST_BIAS:
                allowed = f"from -{_LARGEST_BIAS:g} to {_LARGEST_BIAS:g}"
                raise RequestError(f"logit_bias must be {allowed}, not {bias!r} for {token_id}")

    def _check_structured_outputs(self, asked: object) -> None:
        if isinstance(asked, Mapping):
            unknown = [name for name in asked if name not in StructuredOutputs.__dataclass_fields__]
            if unknown:
                raise RequestError(f"structured_outputs has no field {unknown[0]!r:.100}")
            asked = StructuredOutputs(**asked)
            object.__setattr__(self, "structured_outputs", asked)
        if not isinstance(asked, StructuredOutputs):
            raise RequestError(
                f"structured_outputs must be StructuredOutputs, a mapping or None, not {type(asked).__name__}"
            )
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if getattr(self, name):
                raise RequestError(
                    f"{name} does not go with structured_outputs: nothing may follow an answer that is complete"
                )


def _schema_text(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"structured_outputs.json is no JSON schema: {reason:.200}") from error


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _tuple_of(name: str, values: Any, kind: type) -> tuple[Any, ...]:
    try:
        items = tuple(values)
    except TypeError:
        raise RequestError(f"{name} must be a sequence of {kind.__name__}, not {values!r}") from None
    for value in items:
        if isinstance(value, bool) or not isinstance(value, kind):
            raise RequestError(f"{name} must hold only {kind.__name__} values, not {value!r}")
    return items


def check_text(name: str, text: str) -> None:
    """Raises `RequestError` for a text with half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise RequestError(
            f"{name} has a lone surrogate, {code}, as character {error.start}; such a text cannot be encoded. Decode "
            "bytes that are not UTF-8 with errors='replace'"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of an engine. By default, the engine chooses them itself.

    Attributes:
        num_loading_agents: The number of stages that may be read at once; None lets the planner choose.
        max_resident_layers: The most layers in memory at once, resident and streamed ones together. Each transformer
            layer is then one stage. None lets the budget decide. `num_loading_agents + 1` is the paper's PIPELOAD,
            which frees every layer after its computation.
        max_tokens_per_sweep: The most prompt and decode tokens in one sweep. Longer prompts are split into chunks. None
            lets the planner choose.
        max_sequences: The most sequences in one sweep. Further requests wait.
        context_length: The most tokens of a sequence, prompt and answer together (vLLM's `max_model_len`). None takes
            the length in the model's configuration, including RoPE scaling; it cannot be exceeded.
        max_waiting: The most requests that may wait. One more raises `QueueFullError`. None sets no limit.
        max_buffered_chunks: The number of chunks that a user may leave in the stream before the request pauses.
        kv_budget: Memory for KV caches, in bytes or as "512MiB". None takes about a tenth of the budget, and more where
            all weights are resident. A larger budget never gets less.
        share_prefixes: Requests that begin with the same tokens share their keys and values.
        prompt_lookup: Drafts tokens from the sequence itself, where that is expected to pay.
        parking_dir: The directory for the KV of idle sessions; it should be on a disk. None takes /var/tmp, or the
            system's temporary directory.
        direct_io: Reads bypass the page cache where the file system allows it.
        kernels: "default" computes as transformers does. "fastest" uses torch's own kernels in sweeps of few tokens,
            where a profile has found them to be faster than oneDNN's (for one token in bf16, by 1.5 times). They round
            differently, and the setting holds for the whole process while such a sweep computes.
        self_check: "require" compares a small copy of a causal language model with transformers at opening, and refuses
            a model that differs or cannot be compared. "skip" does not compare; the tokens may then be wrong.

    Raises:
        ConfigError: A value is out of its range; the message names it.
    """

    num_loading_agents: int | None = None
    max_resident_layers: int | None = None
    max_tokens_per_sweep: int | None = None
    max_sequences: int = 64
    context_length: int | None = None
    max_waiting: int | None = 1024
    max_buffered_chunks: int = 64
    kv_budget: int | str | None = None
    share_prefixes: bool = True
    prompt_lookup: bool = True
    parking_dir: str | os.PathLike[str] | None = None
    direct_io: bool = True
    kernels: str = "default"
    self_check: str = "require"

    def __post_init__(self) -> None:
        optional = (
            "num_loading_agents",
            "max_resident_layers",
            "max_tokens_per_sweep",
            "max_waiting",
            "context_length",
        )
        for name in (*optional, "max_sequences", "max_buffered_chunks"):
            value, least = getattr(self, name), {"max_waiting": 0, "context_length": 2}.get(name, 1)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an int of at least {least}, not {value!r}")
        if self.num_loading_agents is not None and self.num_loading_agents > 64:
            raise ConfigError(f"num_loading_agents must be at most 64, not {self.num_loading_agents}")
        for name in ("share_prefixes", "prompt_lookup", "direct_io"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.kernels not in ("default", "fastest"):
            raise ConfigError(f"kernels must be 'default' or 'fastest', not {self.kernels!r}")
        if self.self_check not in ("require", "skip"):
            raise ConfigError(f"self_check must be 'require' or 'skip', not {self.self_check!r}")
        if self.parking_dir is not None and not isinstance(self.parking_dir, (str, os.PathLike)):
            raise ConfigError(f"parking_dir must be a path or None, not {self.parking_dir!r}")
        if self.kv_budget is not None:
            object.__setattr__(self, "kv_budget", parse_bytes(self.kv_budget))
