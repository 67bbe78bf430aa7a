"""Whisper: tokens are those of transformers' own `generate`, in one window and in several; audio that is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from hermes_async import Engine, EngineConfig, RequestError, SamplingParams
from hermes_async.engine import audio as audio_module
from hermes_async.engine.audio import load_audio
from hermes_async.engine.opening import open_model
from tests.audio_models import FIRST_TIME, RATE, START, WINDOW_S, Whisper, noise, write_wave
from tests.models import TinyModel

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Any]) -> Whisper:
    return Whisper(tmp_path_factory.mktemp("whisper"), random_model)


@pytest.fixture(scope="module")
def smallest(whisper: Whisper) -> int:
    opened = open_model(whisper.path, "64MiB", EngineConfig())
    opened.close()
    return opened.plan.minimum_budget


async def test_one_window(whisper: Whisper, smallest: int) -> None:
    async with Engine(whisper.path, memory_budget=smallest) as engine:
        answers: dict[int, Any] = {}

        async def answer(idx: int, **options: Any) -> None:
            answers[idx] = await engine.transcribe(noise(1 + idx / 4, idx), sampling_rate=RATE, **options)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: answer(0))
            tasks.start_soon(lambda: answer(1, language="german"))
            tasks.start_soon(lambda: answer(2, language="en", task="translate"))
            tasks.start_soon(lambda: answer(3, language="<|de|>", timestamps=True))
        once = {"force_unique_generate_call": True}  # random weights choose times although none are wanted
        expected = [
            whisper.generate(noise(1), task="transcribe", **once)[0].tolist(),
            whisper.generate(noise(1.25, 1), language="german", task="transcribe", **once)[0].tolist(),
            whisper.generate(noise(1.5, 2), language="english", task="translate", **once)[0].tolist(),
        ]
        for idx, token_ids in enumerate(expected):
            got = [token_id for segment in answers[idx].segments for token_id in segment.token_ids]
            wanted = token_ids[4:] if token_ids[0] == START else token_ids  # without the prompt
            assert got == [token_id for token_id in wanted if token_id != 99]
            assert len(got) > 5
            assert answers[idx].text.split() == [f"w{token_id}" for token_id in got]
        check_segments(answers[3], whisper.generate(
            noise(1.75, 3), language="de", task="transcribe", return_timestamps=True, return_segments=True,
        ))  # fmt: skip


def check_segments(transcript: Any, expected: Any) -> None:
    segments = expected["segments"][0]
    assert len(transcript.segments) == len(segments) > 0
    for segment, wanted in zip(transcript.segments, segments, strict=True):
        token_ids = wanted["tokens"].tolist()
        # transformers' last segment of a window also has the time at which the next one would begin.
        assert list(segment.token_ids) in (token_ids, token_ids[:-1])
        assert segment.start_s == pytest.approx(float(wanted["start"]))
        if token_ids[-2] < FIRST_TIME:
            assert segment.end_s == pytest.approx(float(wanted["end"]))


async def test_several_windows(whisper: Whisper) -> None:
    samples = noise(7.3, 5)
    expected = whisper.generate(
        samples, language="en", task="transcribe", return_timestamps=True, return_segments=True,
    )  # fmt: skip
    async with Engine(whisper.path, memory_budget="64MiB") as engine:
        transcript = await engine.transcribe(samples, sampling_rate=RATE, language="en")
    check_segments(transcript, expected)
    assert transcript.segments[-1].start_s > 2 * WINDOW_S


# What is read


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("width", "atol"), [(1, 1e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_wave_files_of_every_width(tmp_path: Path, width: int, atol: float, channels: int) -> None:
    samples = noise(0.05)
    path = write_wave(tmp_path / "a.wav", samples, width=width, channels=channels)
    read = load_audio(path, None, RATE)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, samples, atol=atol)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, np.float64])
def test_samples_of_every_type(dtype: Any) -> None:
    wave_form = np.linspace(-0.9, 0.9, 50)
    samples = wave_form
    if dtype != np.float64:
        about = np.iinfo(dtype)
        middle = (about.max + about.min + 1) // 2
        samples = np.round(wave_form * (about.max - middle) + middle).astype(dtype)
    np.testing.assert_allclose(load_audio(samples, RATE, RATE), wave_form, atol=0.02)
    np.testing.assert_allclose(load_audio(np.stack([samples, samples], 1), RATE, RATE), wave_form, atol=0.02)


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        ("no.wav", None, "no.wav cannot be read"),
        (".", None, "is a directory"),
        ("no.wav", RATE, "sampling_rate is for samples"),
        ([0.0, 0.1], None, "samples need their sampling_rate"),
        ([0.0, 0.1], 1.5, "sampling_rate must be a whole number"),
        ([0.0, 0.1], 0, "sampling_rate must be a whole number"),
        ([], RATE, "the audio has no samples"),
        ([0.0, float("nan")], RATE, "no finite numbers"),
        (["a", "b"], RATE, "audio is the path of a file, or numbers"),
        ([[[0.0]]], RATE, "audio is the path of a file, or numbers"),
        (np.zeros((2, 100)), RATE, "the audio has 100 channels"),
        (np.zeros(3601), 1, "3601 s long; at most 3600 s"),
        (None, RATE, "audio is the path of a file, or numbers"),
    ],
)
def test_audio_that_is_none(audio: Any, rate: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_audio(audio, rate, RATE)


def test_files_that_are_no_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_module, "find_spec", lambda name: None)
    text = tmp_path / "text.wav"
    text.write_text("no audio at all" * 9)
    with pytest.raises(RequestError, match=r"text.wav is no WAV file .*hermes-async\[audio\]"):
        load_audio(text, None, RATE)
    empty = tmp_path / "empty.wav"
    empty.touch()
    with pytest.raises(RequestError, match="is no WAV file of whole numbers"):
        load_audio(empty, None, RATE)
    cut = write_wave(tmp_path / "cut.wav", noise(0.1))
    cut.write_bytes(cut.read_bytes()[:-801])  # its header still promises all
    assert len(load_audio(cut, None, RATE)) == 1600 - 401
    with pytest.raises(RequestError, match="8000 samples a second, and the model takes 16000"):
        load_audio(np.zeros(100), 8000, RATE)
    monkeypatch.setattr(audio_module, "MAX_FILE_BYTES", 1000)
    with pytest.raises(RequestError, match="at most 1000 B are read"):
        load_audio(cut, None, RATE)


def test_a_file_that_soundfile_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Soundfile:
        @staticmethod
        def info(path: str) -> Any:
            raise RuntimeError(f"Error opening {path!r}: Format not recognised.")

    monkeypatch.setattr(audio_module, "find_spec", lambda name: object())
    monkeypatch.setattr(audio_module, "import_module", lambda name: Soundfile)
    path = tmp_path / "text.mp3"
    path.write_text("no audio")
    with pytest.raises(RequestError, match=r"is no audio file that soundfile reads: .*not recognised"):
        load_audio(path, None, RATE)


# What is refused, while others go on


async def test_refusals(whisper: Whisper, tmp_path: Path) -> None:
    async with Engine(whisper.path, memory_budget="64MiB") as engine:
        for options, message in (
            ({"language": "klingon"}, "language 'klingon': the checkpoint has <|de|>, <|en|>"),
            ({"language": 5}, "language must be a text"),
            ({"task": "sing"}, "task 'sing': the checkpoint has transcribe, translate"),
            ({"timestamps": 1}, "timestamps must be True or False"),
            ({"params": "greedy"}, "params must be SamplingParams"),
        ):
            with pytest.raises(RequestError, match=message.replace("|", r"\|")):
                await engine.transcribe(noise(0.5), sampling_rate=RATE, **options)
        with pytest.raises(RequestError, match="takes audio, not text; transcribe runs it"):
            await engine.complete("w5 w6")
        with pytest.raises(RequestError, match="has no sessions"):
            engine.session()
        path = write_wave(tmp_path / "a.wav", noise(0.5))
        transcript = await engine.transcribe(path, language="en", params=SamplingParams(max_tokens=3, temperature=0))
        assert sum(len(segment.token_ids) for segment in transcript.segments) == 3
        assert engine.statistics().kv_bytes == 0


async def test_a_model_of_text_takes_no_audio(tmp_path: Path) -> None:
    model = TinyModel(tmp_path)
    async with Engine(model.path, memory_budget="8MiB", config=model.config) as engine:
        with pytest.raises(RequestError, match="LlamaForCausalLM takes no audio"):
            await engine.transcribe(noise(0.1), sampling_rate=RATE)


async def test_leaving_early_frees_everything(whisper: Whisper) -> None:
    async with Engine(whisper.path, memory_budget="64MiB") as engine:
        async for segment in engine.transcribe_stream(noise(7, 5), sampling_rate=RATE, language="en"):
            assert segment.token_ids
            break
        stream = engine.transcribe_stream(noise(1), sampling_rate=RATE)
        assert (await anext(stream)).text
        await stream.aclose()
        with anyio.fail_after(10):
            while engine.statistics().kv_bytes:
                await anyio.lowlevel.checkpoint()
