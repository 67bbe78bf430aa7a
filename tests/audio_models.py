"""A tiny Whisper, on disk and in transformers, and audio for it."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

RATE = 16000
WINDOW_S = 2  # of the model here: 100 positions of 0.02 s
START, ENGLISH, GERMAN, TRANSCRIBE, TRANSLATE, NO_TIMES, FIRST_TIME = 100, 101, 102, 103, 104, 105, 106
VOCAB_SIZE = FIRST_TIME + 101


class Whisper:
    """A tiny one with random weights, on disk and in transformers."""

    def __init__(self, path: Path, random_model: Callable[..., Any]) -> None:
        self.path = path
        config = WhisperConfig(
            vocab_size=VOCAB_SIZE, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=100,
            max_target_positions=48, pad_token_id=99, bos_token_id=99, eos_token_id=99, decoder_start_token_id=START,
            suppress_tokens=None, begin_suppress_tokens=None,
        )  # fmt: skip
        model = random_model(config, model_class=WhisperForConditionalGeneration)
        model.generation_config = GenerationConfig(
            pad_token_id=99, bos_token_id=99, eos_token_id=99, decoder_start_token_id=START, max_length=48,
            suppress_tokens=[7, START, TRANSCRIBE, TRANSLATE], begin_suppress_tokens=[99, 11],
        )  # fmt: skip
        own = {
            "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
            "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE},
            "no_timestamps_token_id": NO_TIMES,
            "is_multilingual": True,
            "max_initial_timestamp_index": 50,
            "return_timestamps": False,
        }
        for name, value in own.items():
            setattr(model.generation_config, name, value)
        model.save_pretrained(path)
        self.extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=WINDOW_S, n_fft=400)
        self.extractor.save_pretrained(path)
        words = {f"w{idx}": idx for idx in range(VOCAB_SIZE)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w99").save_pretrained(path)
        self.model = WhisperForConditionalGeneration.from_pretrained(path).eval()

    def generate(self, samples: Any, **options: Any) -> Any:
        long = len(samples) > WINDOW_S * RATE
        shape = {"truncation": False, "padding": "longest"} if long else {}
        features = self.extractor(samples, sampling_rate=RATE, return_tensors="pt", **shape).input_features
        with torch.inference_mode():
            return self.model.generate(features, **options)


def noise(seconds: float, seed: int = 0) -> Any:
    time = np.arange(int(seconds * RATE)) / RATE
    chosen = np.random.default_rng(seed)
    tones = sum(np.sin(2 * np.pi * chosen.uniform(100, 3000) * time * (1 + time / 3)) for _ in range(4))
    return (0.1 * tones + 0.02 * chosen.standard_normal(len(time))).astype(np.float32)


def write_wave(path: Path, samples: Any, *, width: int = 2, channels: int = 1, rate: int = RATE) -> Path:
    largest = 2 ** (8 * width - 1) - 1
    whole = np.round(np.repeat(samples, channels) * largest).astype("<i4")
    data = whole.view(np.uint8).reshape(-1, 4)[:, :width]
    if width == 1:
        data = (whole + 128).astype(np.uint8)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data.tobytes())
    return path
