"""What a user can set: byte sizes, one request's sampling parameters, the engine's options."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Literal, Self

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
LARGEST_NUMBER = 1e6
_LARGEST_BIAS = 1e9
_LARGEST_STRUCTURE_BYTES = 64 * 1024
_LARGEST_REGEX_BYTES = 8 * 1024
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
_NOT_OPTIONAL = ("max_tokens", "model_defaults", *_FLAGS)
"""Fields of `SamplingParams` for which None does not mean the default. For `max_tokens`, it means the longest."""

MODEL_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of `SamplingParams` that `SamplingParams.from_model` leaves to the checkpoint."""


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


def format_sampling(params: SamplingParams, names: Sequence[str] = MODEL_FIELDS) -> str:
    """Formats fields of sampling parameters, such as "temperature 0.6, top_p 0.95"."""
    return ", ".join(f"{name} {getattr(params, name):g}" for name in names)


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

    As in vLLM, None means the default, for all fields but `max_tokens` and the flags.

    Attributes:
        max_tokens: The most tokens to generate. None takes the checkpoint's `max_new_tokens` or `max_length`; without
            these it generates until the context is full.
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
            generation. None takes the checkpoint's `min_new_tokens` or `min_length`, which only delay end-of-sequence
            tokens.
        logprobs: The number of likeliest tokens whose log-probabilities are reported at each position; -1 for all,
            None for none.
        logit_bias: Added to the logits, by token id; from -1e9 to 1e9 each.
        skip_special_tokens: Leaves special tokens out of the text.
        structured_outputs: What the text must match, as `StructuredOutputs` or a mapping of its fields. It does not go
            with `ignore_eos` and `include_stop_str_in_output`. A stop text ends the answer only after a text that
            matches, and `min_tokens` yields where nothing but the end can follow.
        num_beams: Only 1: beam search is not supported.
        model_defaults: None in `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` stands for the
            checkpoint's own value. `from_model` sets it.

    Raises:
        RequestError: A value is out of its range; the message names it.
    """

    max_tokens: int | None = 16
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    repetition_penalty: float | None = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    num_beams: int = 1
    model_defaults: bool = False

    @classmethod
    def from_model(cls, **overrides: Any) -> Self:
        """Parameters with the checkpoint's own values, as transformers' `generate` takes them.

            params = SamplingParams.from_model(max_tokens=256, seed=1)

        The engine takes the values from the checkpoint's `generation_config.json` when a request uses the parameters.
        So they can be made before an engine is open, and for any model. `Engine.resolve_sampling_params` shows the
        values.

        Args:
            overrides: Fields of this class, which have precedence over the checkpoint's. Not given, `max_tokens` is
                None.

        Raises:
            RequestError: A value is out of its range; the message names it.
        """
        open_fields = dict.fromkeys(("max_tokens", *MODEL_FIELDS))
        return cls(**{**open_fields, **overrides, "model_defaults": True})

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
        kept = (*_NOT_OPTIONAL, *MODEL_FIELDS) if self.model_defaults else _NOT_OPTIONAL
        for field in fields(self):
            if getattr(self, field.name) is None and field.name not in kept:
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
        for name in ("max_tokens", "top_k", "seed", "min_tokens", "logprobs", "num_beams"):
            value = getattr(self, name)
            optional = name in ("max_tokens", "seed", "min_tokens", "logprobs")
            if value is None and (optional or name in MODEL_FIELDS):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise RequestError(f"{name} must be an int{' or None' if optional else ''}, not {value!r}")
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in ("temperature", "top_p", "min_p", *penalties):
            value = getattr(self, name)
            if not _is_finite_number(value) and not (value is None and name in MODEL_FIELDS):
                raise RequestError(f"{name} must be a finite number, not {value!r}")
        for name in ("model_defaults", *_FLAGS):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, not {getattr(self, name)!r}")

    def _check_ranges(self) -> None:
        def check(name: str, holds: Callable[[Any], bool], allowed: str) -> None:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise RequestError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

        check("max_tokens", lambda count: count >= 1, "at least 1")
        check("temperature", lambda value: 0 <= value <= LARGEST_NUMBER, f"from 0 (greedy) to {LARGEST_NUMBER:g}")
        check("top_p", lambda value: 0 < value <= 1, "more than 0 and at most 1")
        check("top_k", lambda count: count >= -1, "-1 or 0 (all tokens) or more")
        check("min_p", lambda value: 0 <= value <= 1, "from 0 to 1")
        smallest = 1 / LARGEST_NUMBER
        in_range = f"from {smallest:g} to {LARGEST_NUMBER:g}"
        check("repetition_penalty", lambda value: smallest <= value <= LARGEST_NUMBER, in_range)
        check("presence_penalty", lambda value: abs(value) <= 2, "from -2 to 2")
        check("frequency_penalty", lambda value: abs(value) <= 2, "from -2 to 2")
        check("seed", lambda seed: 0 <= seed < 2**64, "from 0 to 2**64 - 1")
        check("min_tokens", lambda count: count >= 0, "0 or more")
        check("min_tokens", lambda count: self.max_tokens is None or count <= self.max_tokens, "at most max_tokens")
        check("logprobs", lambda count: count >= -1, "0 or more, or -1 (all tokens)")
        check("num_beams", lambda count: count == 1, "1, because beam search is not supported")

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
            which frees every layer after its computation. Experts that are read one by one do not count, and are then
            not kept longer than they are used.
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
        lock_memory: Locks weights and the ring's buffers in memory, so that no swap takes them (Linux only). "auto"
            does so if the system allows it for all of them (`RLIMIT_MEMLOCK`, CAP_IPC_LOCK); the plan says if not. True
            makes that an error. KV caches and the workspace are not locked.
        read_timeout: Seconds after which a read that has not come back is a `ReadTimeoutError` for those who wait for
            it, also while the engine opens, and while KV is written to disk. None waits for as long as the disk takes.
            It bounds one system call, of up to a whole stage.
        kernels: "transformers" makes the calls that transformers makes. "auto" makes the same calls, but multiplies
            large bfloat16 weights with one token by `torch.mv`, with some by compiled functions (where Numba is
            installed and all weights fit), and with many in float32, where a short measurement has found that to be
            faster; the last bit of a result may differ. float32 and float16 are computed as with "transformers".
            "fastest" uses compiled functions also where not all weights fit, and torch's own kernels, which round
            differently, in sweeps of few tokens, where a profile has found them to be faster: then for the whole
            process. 4-bit and 8-bit weights that stay in memory are laid out for torch's kernels, in bfloat16.
        dtype: What the model computes in: "float32", "bfloat16" or "float16". "auto" takes the dtype in the model's
            configuration, or else that of its first weight, as transformers does. Weights of another dtype are cast
            when their stage is computed.
        batching: How the sequences of a sweep are computed. "packed": in one row, which is fastest, where the
            architecture allows it. "turns": each in a call of its own, which works for every architecture; the calls
            share the reads. "auto" takes turns only where a packed row does not give transformers' tokens.
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
    lock_memory: bool | Literal["auto"] = "auto"
    read_timeout: float | None = None
    kernels: str = "auto"
    dtype: str = "auto"
    batching: str = "auto"
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
        if self.read_timeout is not None and not (_is_finite_number(self.read_timeout) and self.read_timeout > 0):
            raise ConfigError(f"read_timeout must be a number of seconds above 0, or None, not {self.read_timeout!r}")
        if self.kernels not in ("auto", "transformers", "fastest"):
            raise ConfigError(f"kernels must be 'auto', 'transformers' or 'fastest', not {self.kernels!r}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not {self.dtype!r}")
        if self.batching not in ("auto", "packed", "turns"):
            raise ConfigError(f"batching must be 'auto', 'packed' or 'turns', not {self.batching!r}")
        if self.self_check not in ("require", "skip"):
            raise ConfigError(f"self_check must be 'require' or 'skip', not {self.self_check!r}")
        if not isinstance(self.lock_memory, bool) and self.lock_memory != "auto":
            raise ConfigError(f"lock_memory must be 'auto', True or False, not {self.lock_memory!r}")
        if self.parking_dir is not None and not isinstance(self.parking_dir, (str, os.PathLike)):
            raise ConfigError(f"parking_dir must be a path or None, not {self.parking_dir!r}")
        if self.kv_budget is not None:
            object.__setattr__(self, "kv_budget", parse_bytes(self.kv_budget))
