"""Byte sizes, SamplingParams and EngineConfig: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hermes_async.config import EngineConfig, SamplingParams, format_bytes, parse_bytes
from hermes_async.errors import ConfigError, HermesError, RequestError

# Byte sizes


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        (1, 1),
        (4096, 4096),
        ("1", 1),
        ("12B", 12),
        ("3GiB", 3 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("800M", 800 * 2**20),
        ("2k", 2048),
        ("2kb", 2000),
        (" 1 TiB ", 2**40),
        ("0.5KiB", 512),
        ("1.1KB", 1100),
        ("0.1GB", 100_000_000),
        ("9007199254740993", 2**53 + 1),  # one more than a float can tell apart
        ("1" + 400 * "0", 10**400),
    ],
)
def test_parse_bytes(size: int | str, num_bytes: int) -> None:
    assert parse_bytes(size) == num_bytes


@pytest.mark.parametrize(
    "size",
    [
        "",
        "GiB",
        "3 GiBs",
        "3XB",
        "-3GiB",
        "1e9",
        "1,5GB",
        "3 4",
        "1.GiB",
        0,
        -1,
        "0",
        "0.1",
        True,
        None,
        1.5,
        b"1",
    ],
)
def test_parse_bytes_refuses(size: Any) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 * 2**20, "1.50 GiB"),
        (int(9.996 * 2**20), "10.0 MiB"),
        (int(99.96 * 2**10), "100 KiB"),
        (int(999.7 * 2**20), "1000 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (340 * 2**20, "340 MiB"),
        (5000 * 2**40, "5000 TiB"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(1, 2**50))
@example(1111)
def test_formatted_bytes_parse_to_nearly_the_same(num_bytes: int) -> None:
    """Three digits are half a percent off at the most, and a byte is cut off below them."""
    assert abs(parse_bytes(format_bytes(num_bytes)) - num_bytes) <= 0.005 * num_bytes + 1


# SamplingParams


def test_defaults_are_vllms() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "max_tokens": 16,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "min_tokens": None,
        "logprobs": None,
        "logit_bias": None,
        "skip_special_tokens": True,
        "structured_outputs": None,
        "num_beams": 1,
        "model_defaults": False,
    }


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": None},
        {"max_tokens": 1, "min_tokens": 1},
        {"max_tokens": None, "min_tokens": 1000},
        {"temperature": 0},
        {"temperature": 100.0},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"min_p": 0},
        {"min_p": 1},
        {"repetition_penalty": 0.01},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"logprobs": 0},
        {"logit_bias": {}},
        {"logit_bias": {3: -100}},
    ],
)
def test_values_at_the_edge_of_their_range_are_accepted(params: dict[str, Any]) -> None:
    accepted = SamplingParams(**params)
    assert {name: getattr(accepted, name) for name in params} == params


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_tokens", value) for value in (0, -1, 1.5, "16", True)],
        *[("temperature", value) for value in (-0.1, math.nan, math.inf, "1", True, 10**400)],
        *[("top_p", value) for value in (0, -0.5, 1.01, math.nan)],
        *[("top_k", value) for value in (-2, 1.0, False)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
        *[("repetition_penalty", value) for value in (0, -1.0, math.inf)],
        *[("presence_penalty", value) for value in (-2.1, 2.1, math.nan)],
        *[("frequency_penalty", value) for value in (-2.1, 2.1, "0")],
        *[("seed", value) for value in (-2, -1.0, 2**64, 1.0, True)],
        *[("stop", value) for value in ("", ["a", ""], [1], 5, b"a", [None])],
        *[("stop_token_ids", value) for value in ("12", [1.0], [True], 5)],
        *[("include_stop_str_in_output", value) for value in ("false", 1, None)],
        *[("ignore_eos", value) for value in ("false", 1, None)],
        *[("min_tokens", value) for value in (-1, 1.0, 17)],
        *[("logprobs", value) for value in (-2, 1.0, True)],
        *[("logit_bias", value) for value in ([1, 2], {"1": 1.0}, {True: 1.0}, 5)],
        *[("temperature", value) for value in (2**64, 1e7)],
        *[("repetition_penalty", value) for value in (1e300, 1e7, 1e-7)],
        *[("logit_bias", {0: bias}) for bias in (-1e300, 1e300, 1e10)],
        *[("logit_bias", {1: bias}) for bias in (math.nan, math.inf, "1", None, 10**400)],
        *[("skip_special_tokens", value) for value in ("no", 0, None)],
        *[("num_beams", value) for value in (0, 2, 4, 1.0, True)],
        *[("model_defaults", value) for value in ("no", 1, None)],
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, HermesError)


@pytest.mark.parametrize(
    "name",
    [
        *("stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "logit_bias"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    ],
)
def test_none_is_the_default_where_vllm_takes_it(name: str) -> None:
    given: dict[str, Any] = {name: None}
    assert SamplingParams(**given) == SamplingParams()


def test_a_seed_of_minus_one_is_none() -> None:
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize("stop", ["a\ud800", ["end", "\udfff"]])
def test_a_stop_text_with_a_lone_surrogate_is_refused(stop: Any) -> None:
    with pytest.raises(RequestError, match="stop has a lone surrogate, U\\+D"):
        SamplingParams(stop=stop)


def test_min_tokens_must_fit_into_max_tokens() -> None:
    with pytest.raises(RequestError, match="min_tokens must be at most max_tokens, not 5"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_one_stop_text_is_one_text() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["END", "\n"]).stop == ("END", "\n")


def test_later_changes_of_what_was_passed_do_not_reach_the_params() -> None:
    stop, stop_token_ids, logit_bias = ["END"], [1], {1: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=stop_token_ids, logit_bias=logit_bias)
    stop.append("")
    stop_token_ids.append(-1)
    logit_bias[1] = math.nan
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("END",), (1,), {1: 1.0})


def test_params_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(16)  # type: ignore[call-arg]


# SamplingParams.from_model


def test_what_is_left_to_the_checkpoint_is_none_until_an_engine_resolves_it() -> None:
    params = SamplingParams.from_model(temperature=0.5, max_tokens=3, min_tokens=0)
    assert (params.temperature, params.max_tokens, params.min_tokens) == (0.5, 3, 0)
    assert [params.top_p, params.top_k, params.min_p, params.repetition_penalty] == [None] * 4
    assert SamplingParams.from_model().max_tokens is None
    # It stays so when other fields are replaced, also by the values of vLLM's defaults.
    changed = dataclasses.replace(params, top_p=1.0, temperature=None, seed=3)
    assert (changed.top_p, changed.temperature, changed.top_k, changed.seed) == (1.0, None, None, 3)
    assert changed == SamplingParams.from_model(top_p=1.0, max_tokens=3, min_tokens=0, seed=3)


def test_from_model_refuses_what_the_class_refuses() -> None:
    with pytest.raises(RequestError, match="top_p"):
        SamplingParams.from_model(top_p=2.0)
    with pytest.raises(RequestError, match="beam search"):
        SamplingParams.from_model(num_beams=4)
    with pytest.raises(TypeError, match="top_pp"):
        SamplingParams.from_model(top_pp=0.5)


# EngineConfig


def test_the_engine_s_defaults() -> None:
    assert dataclasses.asdict(EngineConfig()) == {
        "num_loading_agents": None,
        "max_resident_layers": None,
        "max_tokens_per_sweep": None,
        "max_sequences": 64,
        "context_length": None,
        "max_waiting": 1024,
        "max_buffered_chunks": 64,
        "kv_budget": None,
        "share_prefixes": True,
        "prompt_lookup": True,
        "parking_dir": None,
        "direct_io": True,
        "lock_memory": "auto",
        "read_timeout": None,
        "kernels": "auto",
        "dtype": "auto",
        "batching": "auto",
        "self_check": "require",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"num_loading_agents": 1},
        {"num_loading_agents": 64},
        {"max_resident_layers": 1, "max_tokens_per_sweep": 1, "max_sequences": 1},
        {"max_waiting": 0},
        {"max_waiting": None},
        {"max_buffered_chunks": 1},
        {"kv_budget": 1},
        {"share_prefixes": False, "prompt_lookup": False, "direct_io": False},
        {"lock_memory": True},
        {"lock_memory": False},
        {"read_timeout": 1},
        {"read_timeout": 0.001},
        {"kernels": "fastest"},
        {"parking_dir": "parked"},
        {"parking_dir": Path("parked")},
    ],
)
def test_options_at_the_edge_of_their_range_are_accepted(options: dict[str, Any]) -> None:
    accepted = EngineConfig(**options)
    assert {name: getattr(accepted, name) for name in options} == options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("num_loading_agents", value) for value in (0, -1, 1.0, "2", True, 65)],
        *[("max_resident_layers", value) for value in (0, 1.5, True)],
        *[("max_tokens_per_sweep", value) for value in (0, "64", False)],
        *[("max_sequences", value) for value in (0, None, 64.0, True)],
        *[("max_waiting", value) for value in (-1, 1.0, "0", False)],
        *[("max_buffered_chunks", value) for value in (0, None, 1.0, True)],
        *[("share_prefixes", value) for value in (None, 1, "no")],
        *[("prompt_lookup", value) for value in (None, 0, "yes")],
        *[("direct_io", value) for value in (None, 1)],
        *[("lock_memory", value) for value in (None, 1, "on", "yes")],
        *[("read_timeout", value) for value in (0, -1.0, float("inf"), float("nan"), "10", True)],
        *[("kernels", value) for value in (None, "", "default", True)],
        *[("parking_dir", value) for value in (b"parked", 3, False)],
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("value", [0, -1, "", "much", True, 1.5])
def test_a_kv_budget_is_a_byte_size(value: Any) -> None:
    with pytest.raises(ConfigError, match="byte size"):
        EngineConfig(kv_budget=value)


def test_a_kv_budget_in_words_becomes_bytes() -> None:
    assert EngineConfig(kv_budget="512MiB").kv_budget == 512 * 2**20
