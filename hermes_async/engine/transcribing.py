"""The part of the engine that writes down what is said in audio."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hermes_async.config import SamplingParams
from hermes_async.engine.forwarding import Forwarding
from hermes_async.errors import RequestError
from hermes_async.results import Chunk

if TYPE_CHECKING:  # these import torch, which only an engine that opens may do
    import numpy.typing as npt

    from hermes_async.engine.opening import OpenedModel
    from hermes_async.engine.transcription import AudioTask, Segments
    from hermes_async.serving.request import EncodedPrompt


@dataclass(frozen=True, slots=True)
class TranscriptSegment:
    """A part of what is said in audio.

    Attributes:
        text: "" if the checkpoint has no tokenizer.
        token_ids: Of the text, and of the times where there are any.
        start_s: Where it begins, in seconds from the beginning of the audio; None without times.
        end_s: Where it ends.
    """

    text: str
    token_ids: tuple[int, ...]
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is said in audio.

    Attributes:
        segments: Its parts. Without times, they are the pieces in which the text came.
    """

    text: str
    segments: tuple[TranscriptSegment, ...]


class Transcribing(Forwarding):
    """Calls of `Engine` for models that take audio, as Whisper."""

    async def transcribe(
        self,
        audio: str | os.PathLike[str] | npt.ArrayLike,
        *,
        sampling_rate: int | None = None,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: bool = False,
        params: SamplingParams | None = None,
        deadline: float | None = None,
    ) -> Transcript:
        """As `transcribe_stream`, but returns the whole text at its end."""
        chunks = self.transcribe_stream(
            audio,
            sampling_rate=sampling_rate,
            language=language,
            task=task,
            timestamps=timestamps,
            params=params,
            deadline=deadline,
        )
        async with contextlib.aclosing(chunks):
            segments = [segment async for segment in chunks]
        text = "".join(segment.text for segment in segments)
        return Transcript(text, tuple(segments))

    async def transcribe_stream(
        self,
        audio: str | os.PathLike[str] | npt.ArrayLike,
        *,
        sampling_rate: int | None = None,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: bool = False,
        params: SamplingParams | None = None,
        deadline: float | None = None,
    ) -> AsyncGenerator[TranscriptSegment, None]:
        """Writes down what is said in audio; yields the text as it comes.

        Tokens are those of transformers' `WhisperForConditionalGeneration.generate`. Audio that fits into one window
        (30 s) comes token by token, without times. Longer audio, and all audio with `timestamps`, comes in segments,
        with times: the model says where each begins and ends, and the next window begins where the last segment of
        this one has ended.

        Args:
            audio: A file's path, or samples: [samples] or [samples, channels]. WAV files of whole numbers are read
                without other packages; for others, and to change the sampling rate, install `hermes-async[audio]`.
            sampling_rate: Of samples, in samples a second.
            language: Its name, such as "german", or its code, such as "de". None lets the model find out.
            task: "transcribe"; or "translate", into English.
            timestamps: Let the model write times also where one window is enough.
            params: How tokens are chosen. None is greedy, up to the end that the model finds.
            deadline: When the text must be complete, on the event loop's clock.

        Raises:
            RequestError: The model takes no audio, the audio cannot be used, or an option is not valid.
            CheckpointError: The checkpoint does not say how audio is prepared.
            MemoryBudgetError, QueueFullError, DeadlineExceededError, ReadError: As `generate`.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: as `generate`.
        """
        from hermes_async.engine.transcription import prepare_audio

        params = SamplingParams(max_tokens=None, temperature=0.0) if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
        with self._call():
            prepared = await self._prepare(
                lambda opened: prepare_audio(
                    opened,
                    audio,
                    sampling_rate=sampling_rate,
                    language=language,
                    task=task,
                    timestamps=timestamps,
                )
            )
        language_id = prepared.language_id
        if prepared.detects:
            one_token = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
            chunks = self._generate_audio(lambda _: prepared.for_language(), one_token, deadline)
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    language_id = next(iter(chunk.token_ids), language_id)
        segments = self._windows(prepared, language_id, params, deadline)
        async with contextlib.aclosing(segments):
            async for segment in segments:
                yield segment

    async def _windows(
        self, task: AudioTask, language_id: int | None, params: SamplingParams, deadline: float | None
    ) -> AsyncGenerator[TranscriptSegment, None]:
        from hermes_async.engine.transcription import Segments

        eos_token_ids, first_frame = self._opened_model().skeleton.eos_token_ids, 0
        while first_frame < task.num_frames:
            num_frames = min(task.window, task.num_frames - first_frame)
            prompt = partial(_prompt, task, first_frame, language_id)
            chunks = self._generate_audio(prompt, params, deadline)
            segments = Segments(task, first_frame, num_frames) if task.timestamps else None
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    token_ids = [token_id for token_id in chunk.token_ids if token_id not in eos_token_ids]
                    if segments is None:
                        if token_ids or chunk.text:
                            yield TranscriptSegment(chunk.text, tuple(token_ids))
                        continue
                    for segment in await self._prepare(partial(_push, segments, token_ids)):
                        yield segment
            if segments is None:
                return
            rest, num_done = await self._prepare(partial(_finish, segments))
            for segment in rest:
                yield segment
            first_frame += num_done

    def _generate_audio(
        self, prompt: Callable[[OpenedModel], EncodedPrompt], params: SamplingParams, deadline: float | None
    ) -> AsyncGenerator[Chunk, None]:
        return self._generate(self._open_stream(prompt, params, self._request_id(None), deadline, None))


# What runs on a worker thread, because it copies features or decodes text.


def _prompt(task: AudioTask, first_frame: int, language_id: int | None, _: OpenedModel) -> EncodedPrompt:
    return task.for_window(first_frame, language_id)


def _push(segments: Segments, token_ids: Sequence[int], _: OpenedModel) -> list[TranscriptSegment]:
    return segments.push(token_ids)


def _finish(segments: Segments, _: OpenedModel) -> tuple[list[TranscriptSegment], int]:
    return segments.finish()
