"""From audio to windows of features, and from the tokens of a window to segments of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoFeatureExtractor

from hermes_async.engine.audio import load_audio
from hermes_async.engine.transcribing import TranscriptSegment
from hermes_async.errors import CheckpointError, RequestError
from hermes_async.foreign_errors import is_foreign, one_request, reason_of
from hermes_async.modeling.audio_rules import AudioTokens, LanguageRules, TimestampRules
from hermes_async.modeling.encoder_inputs import FEATURES, positions_of_audio, takes_audio
from hermes_async.modeling.token_rules import TokenRules
from hermes_async.serving.request import EncodedPrompt

if TYPE_CHECKING:
    from hermes_async.engine.opening import OpenedModel

_SECONDS_OF_TOKEN = 0.02
_FRAMES_OF_POSITION = 2
"""The encoder's convolutions halve the length of the features."""


@dataclass(frozen=True, slots=True)
class AudioTask:
    """Audio that was prepared for one model.

    Attributes:
        features: [1, mel, frames] in the model's dtype, a window at least.
        window: Frames of a window.
        language_id: The language's token; None if it is to be detected, or the model has no choice.
        detects: Whether it is to be detected.
        timestamps: Whether the model writes times: they were asked for, or there is more than one window.
    """

    opened: OpenedModel
    features: torch.Tensor
    window: int
    tokens: AudioTokens
    language_id: int | None
    detects: bool
    task: str
    timestamps: bool

    @property
    def num_frames(self) -> int:
        return self.features.shape[-1]

    def for_language(self) -> EncodedPrompt:
        """The prompt after which the model chooses a language."""
        vocab_size = self.opened.skeleton.num_choices
        prompt = [self.tokens.start]
        return self._prompt(prompt, 0, lambda _: LanguageRules(prompt, self.tokens, vocab_size=vocab_size))

    def for_window(self, first_frame: int, language_id: int | None) -> EncodedPrompt:
        """The prompt after which the model writes what it hears from a frame on, in one window."""
        prompt = self.tokens.prompt(language_id, self.task, timestamps=self.timestamps)
        return self._prompt(prompt, first_frame, partial(self._timestamp_rules, prompt) if self.timestamps else None)

    def _timestamp_rules(self, prompt: list[int], max_length: int) -> TokenRules:
        skeleton = self.opened.skeleton
        return TimestampRules(
            skeleton.generation, prompt, self.tokens, max_length=max_length, vocab_size=skeleton.num_choices
        )

    def _prompt(self, token_ids: list[int], first_frame: int, rules: Any) -> EncodedPrompt:
        features = self.features[..., first_frame : first_frame + self.window]
        features = torch.nn.functional.pad(features, (0, self.window - features.shape[-1]))
        return EncodedPrompt(
            token_ids,
            model_inputs={FEATURES: features},
            num_encoder_positions=positions_of_audio(self.opened.skeleton.model),
            rules=rules,
        )

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without times and other special tokens; "" without a tokenizer."""
        first_time, tokenizer = self.tokens.first_time, self.opened.tokenizer
        kept = [token_id for token_id in token_ids if first_time is None or token_id < first_time]
        return "" if tokenizer is None else tokenizer.decode(kept, skip_special_tokens=True)


def prepare_audio(
    opened: OpenedModel,
    audio: Any,
    *,
    sampling_rate: int | None,
    language: str | None,
    task: str,
    timestamps: bool,
) -> AudioTask:
    """Reads audio and computes its features as transformers does; for a worker thread.

    Raises:
        RequestError: The model takes no audio, the audio cannot be used, or an option is not valid.
        CheckpointError: The checkpoint does not say how audio is prepared.
    """
    skeleton, path = opened.skeleton, opened.checkpoint.path
    if not skeleton.is_encoder_decoder or not takes_audio(skeleton.model):
        raise RequestError(f"{type(skeleton.model).__name__} takes no audio; generate runs models of text")
    for name, value in (("language", language), ("task", task)):
        if not isinstance(value, str) and (name == "task" or value is not None):
            raise RequestError(f"{name} must be a text, not {value!r:.100}")
    if not isinstance(timestamps, bool):
        raise RequestError(f"timestamps must be True or False, not {timestamps!r:.100}")
    tokens = AudioTokens.read(path, skeleton.generation.decoder_start_token_id, skeleton.num_choices)
    language_id = None if language is None else tokens.language(language)
    extractor = _feature_extractor(opened)
    samples = load_audio(audio, sampling_rate, extractor.sampling_rate)
    window = _FRAMES_OF_POSITION * positions_of_audio(skeleton.model)
    is_long = len(samples) > window * extractor.hop_length
    options: dict[str, Any] = {"truncation": False, "padding": "longest"} if is_long else {}
    with one_request("the preparation of the audio by the checkpoint's feature extractor"):
        prepared = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt", **options)
    features = prepared.get(FEATURES)
    if not isinstance(features, torch.Tensor) or features.dim() != 3 or features.shape[1] != _num_mel_bins(opened):
        raise CheckpointError(f"{path}: the feature extractor's {FEATURES} do not fit the model", path=path)
    several = timestamps or features.shape[-1] > window
    tokens.prompt(language_id, task, timestamps=several)  # raises what is wrong
    return AudioTask(
        opened=opened,
        features=features.to(skeleton.dtype),
        window=window,
        tokens=tokens,
        language_id=language_id,
        detects=language_id is None and bool(tokens.languages),
        task=task,
        timestamps=several,
    )


def _num_mel_bins(opened: OpenedModel) -> int:
    return int(opened.skeleton.model.config.num_mel_bins)


def _feature_extractor(opened: OpenedModel) -> Any:
    path = opened.checkpoint.path
    try:
        load: Any = AutoFeatureExtractor.from_pretrained
        extractor = load(path, trust_remote_code=False, local_files_only=True)
    except BaseException as error:
        if not is_foreign(error):
            raise
        raise CheckpointError(f"{path} does not say how audio is prepared: {reason_of(error)}", path=path) from error
    for name in ("sampling_rate", "hop_length"):
        value = getattr(extractor, name, None)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path}: the feature extractor has no {name}", path=path)
    return extractor


class Segments:
    """Divides the tokens of one window into segments, at pairs of times, as transformers does.

    Source: the decoding of long audio in Whisper (Radford et al., arXiv 2212.04356, section 3.8).

    Args:
        first_frame: Where the window begins.
        num_frames: Frames of the window that have audio.
    """

    def __init__(self, task: AudioTask, first_frame: int, num_frames: int) -> None:
        assert task.tokens.first_time is not None
        self._task, self._first_time = task, task.tokens.first_time
        self._first_frame, self._num_frames = first_frame, num_frames
        # All mutable state: the tokens so far, and how many of them were in segments.
        self._token_ids: list[int] = []
        self._num_taken = 0

    def push(self, token_ids: Sequence[int]) -> list[TranscriptSegment]:
        """Adds tokens; returns the segments that are complete now."""
        segments = []
        for token_id in token_ids:
            self._token_ids.append(token_id)
            if len(self._token_ids) > self._num_taken + 1 and self._is_time(-1) and self._is_time(-2):
                end = len(self._token_ids) - 1
                segments.append(self._segment(self._token_ids[self._num_taken : end]))
                self._num_taken = end
        return segments

    def finish(self) -> tuple[list[TranscriptSegment], int]:
        """The segments that are complete with the window's last token, and the frames to go on by."""
        rest = self._token_ids[self._num_taken :]
        ends_with_time = len(self._token_ids) >= 2 and self._is_time(-1) and not self._is_time(-2)
        if not self._num_taken:  # the whole window is one segment
            return ([self._segment(rest)] if rest else []), self._num_frames
        if ends_with_time:  # nobody speaks after the last time
            return [self._segment(rest)], self._num_frames
        # What comes after the last pair was cut off by the end of the window: it is heard again in the next one.
        last_time = self._token_ids[self._num_taken - 1] - self._first_time
        return [], last_time * _FRAMES_OF_POSITION or self._num_frames

    def _is_time(self, idx: int) -> bool:
        return self._token_ids[idx] >= self._first_time

    def _segment(self, token_ids: list[int]) -> TranscriptSegment:
        start_s = self._first_frame * _SECONDS_OF_TOKEN / _FRAMES_OF_POSITION
        times = [(token_id - self._first_time) * _SECONDS_OF_TOKEN for token_id in token_ids if self._is(token_id)]
        end_s = self._num_frames * _SECONDS_OF_TOKEN / _FRAMES_OF_POSITION
        first = times[0] if times and self._is(token_ids[0]) else 0.0
        last = times[-1] if times and times[-1] > first else end_s
        return TranscriptSegment(self._task.text(token_ids), tuple(token_ids), start_s + first, start_s + last)

    def _is(self, token_id: int) -> bool:
        return token_id >= self._first_time
