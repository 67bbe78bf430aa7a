"""What a checkpoint says of generation: `generation_config.json`, read and checked."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hermes_async.config import LARGEST_NUMBER, SamplingParams
from hermes_async.errors import CheckpointError
from hermes_async.storage.checkpoint import Checkpoint, read_config
from hermes_async.storage.file_kinds import is_file

logger = logging.getLogger(__name__)

_MAX_TOKEN_IDS = 2**18
"""The most token ids of one list: about as many as the largest vocabularies have."""

_LARGEST_LENGTH = 2**62
_LARGEST_NGRAM = 1024
"""The time that a token takes grows with the size of n-grams. In practice they have less than ten tokens."""

_TRANSFORMERS_TOP_K = 50
"""What transformers samples from if neither the user nor the file says `top_k`."""

_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": _TRANSFORMERS_TOP_K, "min_p": 0.0, "repetition_penalty": 1.0}

_DECODERS = ("decoder", "generator", "text_config")
"""Parts of a `config.json` that transformers also searches for settings of generation, in this order."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale"), (None, 1)),
    **dict.fromkeys(("penalty_alpha", "epsilon_cutoff", "eta_cutoff"), (None, 0)),
    **dict.fromkeys(("typical_p", "top_h"), (None, 1)),
    **dict.fromkeys(("dola_layers", "constraints", "force_words_ids", "watermarking_config"), (None,)),
    **dict.fromkeys(("token_healing", "use_mtp"), (None, False)),
    **dict.fromkeys(("stop_strings", "max_time"), (None,)),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "assistant_ensemble_weight"), (None,)),
}
"""Fields that are not honoured, with the values at which they change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """The settings of a checkpoint, with the names and meanings of transformers' `generate`.

    Lengths count the tokens of the whole sequence: prompt and answer, or for an encoder-decoder what its decoder got
    and gave. `TokenRules` applies everything but `sampling`, to every request.

    Attributes:
        eos_token_ids: The end-of-sequence tokens. Some may be outside of the vocabulary; those are never sampled.
        decoder_start_token_id: What the decoder of an encoder-decoder begins with.
        forced_bos_token_id: The second token of a sequence that begins with one token.
        forced_eos_token_id: The last token that fits is one of these.
        suppress_tokens: Never chosen; nor are `begin_suppress_tokens` as the first token. Ids outside of the vocabulary
            were left out.
        bad_words_ids: Sequences that never come.
        sequence_bias: Added to the logit of a sequence's last token after its other tokens.
        no_repeat_ngram_size: No n-gram of this size comes twice; 0 for no rule.
        encoder_no_repeat_ngram_size: No n-gram of this size comes that the input has; 0 for no rule.
        encoder_repetition_penalty: Favours the input's tokens if it is above 1.
        exponential_decay_length_penalty: The number of new tokens after which the end's logit grows, and the factor.
        remove_invalid_values: Logits that are not finite are replaced.
        min_length: The length before which no end-of-sequence token is chosen; `min_new_tokens` overrides it.
        min_new_tokens: As `min_length`, without the prompt. None if the file does not say.
        max_length: The most tokens of a sequence whose request sets no limit; `max_new_tokens` overrides it.
        max_new_tokens: As `max_length`, without the prompt.
        sampling: What `SamplingParams.from_model()` takes: values of all fields that may be None there.
        held: The names of the file's fields that hold for every request.
        not_honoured: Fields of the file that would change tokens and are not honoured, with their values.
    """

    eos_token_ids: frozenset[int] = frozenset()
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: Mapping[tuple[int, ...], float] = field(default_factory=dict)
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    encoder_repetition_penalty: float = 1.0
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    min_length: int = 0
    min_new_tokens: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=lambda: dict(_GREEDY))
    held: tuple[str, ...] = ()
    not_honoured: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self, params: SamplingParams) -> SamplingParams:
        """The parameters with the checkpoint's values where `SamplingParams.from_model` left them open."""
        if not params.model_defaults:
            return params
        taken = {name: value for name, value in self.sampling.items() if getattr(params, name) is None}
        return replace(params, model_defaults=False, **taken)

    @property
    def has_token_rules(self) -> bool:
        """Whether `TokenRules` have something to do."""
        return not {"max_length", "max_new_tokens"}.issuperset(self.held)

    def first_end(self, num_prompt_tokens: int) -> int:
        """The length from which on an end-of-sequence token may come."""
        return self.min_length if self.min_new_tokens is None else num_prompt_tokens + self.min_new_tokens

    def limit(self, num_prompt_tokens: int) -> int | None:
        """The most tokens of a sequence whose request sets no limit; None for no limit."""
        return self.max_length if self.max_new_tokens is None else num_prompt_tokens + self.max_new_tokens


def read_generation_config(
    checkpoint: Checkpoint, *, eos_token_id: Any, decoder_start_token_id: Any = None, vocab_size: int
) -> GenerationConfig:
    """Reads `generation_config.json`; without one, the same fields of `config.json`, as transformers does.

    Fields that are not honoured are named in one warning.

    Args:
        eos_token_id: The end-of-sequence token or tokens by `config.json`, if `generation_config.json` does not say.
        decoder_start_token_id: The same for what an encoder-decoder's decoder begins with.

    Raises:
        CheckpointError: The file is not valid JSON, or a value has the wrong type or is out of its range. The message
            names the file and the field.
    """
    path, config_path = checkpoint.path / "generation_config.json", checkpoint.path / "config.json"
    has_own = is_file(path)
    entries = read_config(path, dict) if has_own else _legacy_entries(checkpoint.config)
    fields = _Fields(path if has_own else config_path, entries, vocab_size)
    said = {name: entries.get(name) for name in ("eos_token_id", "decoder_start_token_id") if has_own}
    of_model = {"eos_token_id": eos_token_id, "decoder_start_token_id": decoder_start_token_id}
    others = _Fields(config_path, of_model, vocab_size)
    config = fields.config(
        eos=fields if said.get("eos_token_id") is not None else others,
        start=fields if said.get("decoder_start_token_id") is not None else others,
    )
    if config.held:
        logger.info("%s: these hold for every request: %s", fields.path, ", ".join(config.held))
    if config.not_honoured:
        named = ", ".join(f"{name} ({value!r:.60})" for name, value in config.not_honoured.items())
        logger.warning("%s: not honoured, so that tokens may differ from transformers': %s", fields.path, named)
    return config


def _legacy_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    decoder: dict[str, Any] = next((config[name] for name in _DECODERS if isinstance(config.get(name), dict)), {})
    own = {name: value for name, value in config.items() if value is not None}
    return {**decoder, **own}


class _Fields:
    """The fields of a file, checked one by one."""

    def __init__(self, path: Path, entries: Mapping[str, Any], vocab_size: int) -> None:
        self.path = path
        self._entries = entries
        self._vocab_size = vocab_size

    def config(self, *, eos: _Fields, start: _Fields) -> GenerationConfig:
        """All of them; `eos` has the end-of-sequence tokens, and `start` what a decoder begins with."""
        first = start._token_ids("decoder_start_token_id", several=False, in_vocabulary=False)
        forced_bos = self._token_ids("forced_bos_token_id", several=False)
        values: dict[str, Any] = {
            "forced_bos_token_id": forced_bos[0] if forced_bos else None,
            "forced_eos_token_id": self._token_ids("forced_eos_token_id"),
            "suppress_tokens": self._existing("suppress_tokens"),
            "begin_suppress_tokens": self._existing("begin_suppress_tokens"),
            "bad_words_ids": self._bad_words(),
            "sequence_bias": self._sequence_bias(),
            "no_repeat_ngram_size": self._whole("no_repeat_ngram_size", most=_LARGEST_NGRAM) or 0,
            "encoder_no_repeat_ngram_size": self._whole("encoder_no_repeat_ngram_size", most=_LARGEST_NGRAM) or 0,
            "encoder_repetition_penalty": self._penalty("encoder_repetition_penalty"),
            "exponential_decay_length_penalty": self._exponential_decay(),
            "remove_invalid_values": self._flag("remove_invalid_values"),
            "min_length": self._whole("min_length") or 0,
            "min_new_tokens": self._whole("min_new_tokens"),
            "max_length": self._whole("max_length", least=1),
            "max_new_tokens": self._whole("max_new_tokens", least=1),
        }
        defaults = GenerationConfig()
        return GenerationConfig(
            eos_token_ids=frozenset(eos._token_ids("eos_token_id", in_vocabulary=False)),
            decoder_start_token_id=first[0] if first else None,
            sampling=self._sampling(),
            held=tuple(name for name, value in values.items() if value != getattr(defaults, name)),
            not_honoured={
                name: self._entries[name]
                for name, neutral in _WITHOUT_EFFECT.items()
                if name in self._entries and self._entries[name] not in neutral
            },
            **values,
        )

    def _refuse(self, name: str, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {name} is {self._entries[name]!r:.200}; it must be {allowed}, or null", path=self.path
        )

    # --- numbers ---

    def _flag(self, name: str) -> bool:
        value = self._entries.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._refuse(name, "true or false")
        return value is True

    def _number(self, name: str, least: float, most: float) -> float | None:
        value = self._entries.get(name)
        if value is None:
            return None
        if not _is_number(value) or not least <= value <= most:
            raise self._refuse(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def _whole(self, name: str, *, least: int = 0, most: int = _LARGEST_LENGTH) -> int | None:
        value = self._entries.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._refuse(name, f"an integer from {least} to {most}")
        return value

    def _penalty(self, name: str) -> float:
        value = self._number(name, 1 / LARGEST_NUMBER, LARGEST_NUMBER)
        return 1.0 if value is None else value

    def _exponential_decay(self) -> tuple[int, float] | None:
        name = "exponential_decay_length_penalty"
        value = self._entries.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(_is_number(item) for item in value):
            raise self._refuse(name, "a number of tokens and a factor")
        start, factor = value
        if not isinstance(start, int) or not 0 <= start <= _LARGEST_LENGTH or not 0 < factor <= LARGEST_NUMBER:
            allowed = f"an integer of at least 0, and a factor of more than 0 and at most {LARGEST_NUMBER:g}"
            raise self._refuse(name, allowed)
        return start, float(factor)

    def _sampling(self) -> dict[str, float]:
        """What transformers would sample with; greedy unless the file asks for sampling."""
        temperature = self._number("temperature", 0, LARGEST_NUMBER)
        top_p, min_p = self._number("top_p", 0, 1), self._number("min_p", 0, 1)
        top_k = self._whole("top_k")
        samples = self._flag("do_sample")
        return {
            "temperature": (1.0 if temperature is None else temperature) if samples else 0.0,
            "top_p": 1.0 if top_p is None else max(top_p, 1 / LARGEST_NUMBER),
            "top_k": _TRANSFORMERS_TOP_K if top_k is None else top_k,
            "min_p": min_p or 0.0,
            "repetition_penalty": self._penalty("repetition_penalty"),
        }

    # --- token ids ---

    def _token_ids(self, name: str, *, several: bool = True, in_vocabulary: bool = True) -> tuple[int, ...]:
        value = self._entries.get(name)
        ids = () if value is None else value if several and isinstance(value, (list, tuple)) else (value,)
        allowed = "a token id" + (", a list of token ids" if several else "")
        return self._checked(name, ids, allowed, in_vocabulary=in_vocabulary)

    def _existing(self, name: str) -> tuple[int, ...]:
        """Tokens that are not to be chosen. Those outside of the vocabulary, such as -1, are not chosen anyway."""
        value = self._entries.get(name)
        if value is not None and not isinstance(value, list):
            raise self._refuse(name, "a list of token ids")
        ids = self._checked(name, value or (), "a list of token ids", in_vocabulary=False)
        return tuple(token_id for token_id in ids if 0 <= token_id < self._vocab_size)

    def _bad_words(self) -> tuple[tuple[int, ...], ...]:
        words = self._sequences("bad_words_ids", self._entries.get("bad_words_ids"))
        return tuple(dict.fromkeys(words))

    def _sequence_bias(self) -> dict[tuple[int, ...], float]:
        name = "sequence_bias"
        value = self._entries.get(name)
        if value is None:
            return {}
        if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            raise self._refuse(name, "a list of pairs of a list of token ids and a number")
        biases = [pair[1] for pair in value]
        if not all(_is_number(bias) and abs(bias) <= 1e9 for bias in biases):
            raise self._refuse(name, "a list of pairs whose second items are numbers from -1e9 to 1e9")
        return dict(zip(self._sequences(name, [pair[0] for pair in value]), map(float, biases), strict=True))

    def _sequences(self, name: str, value: Any) -> list[tuple[int, ...]]:
        allowed = "a list of lists of token ids, none of them empty"
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, list) and item for item in value):
            raise self._refuse(name, allowed)
        num_ids = sum(map(len, value))
        if num_ids > _MAX_TOKEN_IDS:
            raise CheckpointError(
                f"{self.path}: {name} has {num_ids} token ids; at most {_MAX_TOKEN_IDS} are read", path=self.path
            )
        return [self._checked(name, item, allowed, in_vocabulary=True) for item in value]

    def _checked(self, name: str, ids: Any, allowed: str, *, in_vocabulary: bool) -> tuple[int, ...]:
        if len(ids) > _MAX_TOKEN_IDS:
            raise CheckpointError(
                f"{self.path}: {name} has {len(ids)} token ids; at most {_MAX_TOKEN_IDS} are read", path=self.path
            )
        for token_id in ids:
            whole = isinstance(token_id, int) or (isinstance(token_id, float) and token_id.is_integer())
            if isinstance(token_id, bool) or not whole:
                raise self._refuse(name, allowed)
            if in_vocabulary and not 0 <= token_id < self._vocab_size:
                raise CheckpointError(
                    f"{self.path}: {name}: token id {token_id!r:.40} is not one of the {self._vocab_size} tokens",
                    path=self.path,
                )
        return tuple(map(int, ids))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
