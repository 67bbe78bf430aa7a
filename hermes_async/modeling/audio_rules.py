"""What Whisper's checkpoints say of their special tokens, and the rules for tokens that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import WhisperTimeStampLogitsProcessor
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from hermes_async.errors import CheckpointError, RequestError
from hermes_async.modeling.generation_config import GenerationConfig
from hermes_async.modeling.token_rules import TokenRules
from hermes_async.storage.checkpoint import read_config
from hermes_async.storage.file_kinds import is_file


@dataclass(frozen=True, slots=True)
class AudioTokens:
    """The special tokens of a checkpoint.

    Attributes:
        start: What the decoder begins with.
        languages: The token of each language, such as `<|en|>`; empty for a model of one language.
        tasks: The token of each task.
        no_timestamps: Says that no times are wanted; the tokens behind it are times. None if the file has none.
        max_initial_timestamp_index: The latest time at which a text may begin, in steps of 0.02 s.
    """

    start: int
    languages: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    no_timestamps: int | None = None
    max_initial_timestamp_index: int | None = None

    @classmethod
    def read(cls, path: Path, start: int | None, vocab_size: int) -> AudioTokens:
        """Reads them from `generation_config.json` in the folder `path`.

        Raises:
            CheckpointError: The file is missing, or a value is not valid.
        """
        file = path / "generation_config.json"
        entries: dict[str, Any] = read_config(file, dict) if is_file(file) else {}

        def token(name: str, value: Any) -> int:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
                raise CheckpointError(
                    f"{file}: {name} is {value!r:.100}, not one of the {vocab_size} tokens", path=file
                )
            return value

        def tokens(name: str) -> dict[str, int]:
            found = entries.get(name) or {}
            if not isinstance(found, dict):
                raise CheckpointError(f"{file}: {name} must be a table of token ids", path=file)
            return {key: token(name, value) for key, value in found.items()}

        latest = entries.get("max_initial_timestamp_index")
        if latest is not None and (isinstance(latest, bool) or not isinstance(latest, int) or latest < 0):
            raise CheckpointError(f"{file}: max_initial_timestamp_index is {latest!r:.100}", path=file)
        no_timestamps = entries.get("no_timestamps_token_id")
        several = entries.get("is_multilingual", True) is not False
        return cls(
            start=token("decoder_start_token_id", start),
            languages=tokens("lang_to_id") if several else {},
            tasks=tokens("task_to_id") if several else {},
            no_timestamps=None if no_timestamps is None else token("no_timestamps_token_id", no_timestamps),
            max_initial_timestamp_index=latest,
        )

    @property
    def first_time(self) -> int | None:
        """The token of 0.00 s. Those behind it are times, too."""
        return None if self.no_timestamps is None else self.no_timestamps + 1

    def language(self, name: str) -> int:
        """The token of a language, by its name ("german"), its code ("de"), or its token ("<|de|>").

        Raises:
            RequestError: The checkpoint has no such language.
        """
        lower = name.lower()
        for key in (lower, f"<|{TO_LANGUAGE_CODE.get(lower, lower)}|>"):
            if key in self.languages:
                return self.languages[key]
        known = ", ".join(sorted(self.languages)) or "no choice of languages"
        raise RequestError(f"language {name!r}: the checkpoint has {known:.400}")

    def prompt(self, language_id: int | None, task: str, *, timestamps: bool) -> list[int]:
        """What the decoder begins with.

        Raises:
            RequestError: The checkpoint does not have the task, or has no tokens for times.
        """
        prompt = [self.start, *([] if language_id is None else [language_id])]
        if task in self.tasks:
            prompt.append(self.tasks[task])
        elif task != "transcribe":
            known = ", ".join(sorted(self.tasks)) or "transcribe"
            raise RequestError(f"task {task!r}: the checkpoint has {known}")
        if timestamps and self.no_timestamps is None:
            raise RequestError(
                "the checkpoint's generation_config.json has no no_timestamps_token_id, so it has no tokens for times, "
                "which audio of more than one window needs, too"
            )
        return prompt if timestamps or self.no_timestamps is None else [*prompt, self.no_timestamps]


class TimestampRules(TokenRules):
    """Also those of times: they come in pairs, ascend, and come where they are likelier than any text."""

    def __init__(
        self, config: GenerationConfig, prompt: Sequence[int], tokens: AudioTokens, *, max_length: int, vocab_size: int
    ) -> None:
        super().__init__(config, prompt, max_length=max_length, vocab_size=vocab_size)
        settings: Any = SimpleNamespace(
            no_timestamps_token_id=tokens.no_timestamps,
            eos_token_id=min(config.eos_token_ids, default=0),
            max_initial_timestamp_index=tokens.max_initial_timestamp_index,
        )
        self._times: Any = WhisperTimeStampLogitsProcessor(settings, begin_index=len(prompt))

    def restrict(self, scores: torch.Tensor) -> torch.Tensor:
        scores = super().restrict(scores)
        restricted: torch.Tensor = self._times(self._sequence[None], scores[None])[0]
        return restricted


class LanguageRules(TokenRules):
    """The next token is a language. Nothing else that the checkpoint says holds."""

    def __init__(self, prompt: Sequence[int], tokens: AudioTokens, *, vocab_size: int) -> None:
        super().__init__(GenerationConfig(), prompt, max_length=len(prompt) + 1, vocab_size=vocab_size)
        self._languages = torch.tensor(sorted(tokens.languages.values()))

    def restrict(self, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -math.inf)
        kept[self._languages] = scores[self._languages]
        return kept
