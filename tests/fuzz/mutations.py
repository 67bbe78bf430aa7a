"""Changes of a checkpoint's files that keep most of their structure. The same random numbers make the same change."""
# ruff: noqa: E501  # templates in one line

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

_NUMBERS = (
    *(0, 1, -1, 2, 3, 5, 7, 31, 33, 97, 255, 1000, 10**5, 10**6, 10**8, 10**9, 2**31 - 1, 2**31, 2**32, 2**53 + 1),
    *(2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1e-30, 1e308, -1e308),
)
_WORDS = (
    "",
    "x",
    "none",
    "float64",
    "int8",
    "llama",
    "bert",
    "default",
    "eager",
    "../x",
    "/etc/passwd",
    "\0",
    "\ud800",
)

KEYS: dict[str, tuple[str, ...]] = {
    "config": (
        *("num_hidden_layers", "hidden_size", "head_dim", "num_labels", "max_position_embeddings", "vocab_size"),
        *("intermediate_size", "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok"),
        *("model_type", "architectures", "auto_map", "quantization_config", "rope_scaling", "rope_parameters"),
        *("rope_theta", "sliding_window", "layer_types", "id2label", "label2id", "text_config", "vision_config"),
        *("is_encoder_decoder", "tie_word_embeddings", "pad_token_id", "torch_dtype", "dtype", "transformers_weights"),
        *("attn_implementation", "_attn_implementation", "problem_type", "n_positions", "n_layer", "n_ctx", "n_inner"),
        *("type_vocab_size", "hidden_act", "activation_function", "decoder_sparse_step", "mlp_only_layers", "mtp"),
        *("partial_rotary_factor", "original_max_position_embeddings", "task_specific_params", "pruned_heads"),
        *("encoder", "decoder", "generation_config", "bad_words_ids", "eos_token_id", "max_length", "num_beams"),
    ),
    "generation": (
        *(
            "eos_token_id",
            "bos_token_id",
            "max_length",
            "max_new_tokens",
            "min_length",
            "temperature",
            "top_k",
            "top_p",
        ),
        *("do_sample", "num_beams", "suppress_tokens", "bad_words_ids", "sequence_bias", "forced_eos_token_id"),
        *("exponential_decay_length_penalty", "no_repeat_ngram_size", "watermarking_config", "stop_strings"),
        *("repetition_penalty", "cache_implementation", "compile_config", "assistant_model", "transformers_version"),
    ),
    "tokenizer": (
        *("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "truncation", "padding", "added_tokens"),
        *("decoders", "normalizers", "pretokenizers", "prepend_scheme", "start", "stop", "suffix", "prefix"),
        *("type", "pattern", "Regex", "vocab", "unk_token", "content", "max_length", "pad_id", "behavior", "merges"),
    ),
    "tokenizer settings": (
        *(
            "tokenizer_class",
            "auto_map",
            "model_max_length",
            "chat_template",
            "response_template",
            "extra_special_tokens",
        ),
        *("added_tokens_decoder", "bos_token", "eos_token", "pad_token", "padding_side", "truncation_side", "backend"),
        *("fields", "open_pattern", "close_pattern", "start_anchor_pattern", "tag_pattern", "value_parser", "open"),
        *("clean_up_tokenization_spaces", "additional_special_tokens", "name_or_path", "tokenizer_file", "vocab_file"),
    ),
    "header": ("dtype", "shape", "data_offsets", "__metadata__", "format"),
    "index": ("weight_map", "metadata", "total_size"),
    "pooling": ("pooling_mode_cls_token", "pooling_mode_max_tokens", "word_embedding_dimension", "include_prompt"),
    "profile": ("layer_s", "disk", "kernels", "created_at", "read_share", "expert_uses"),
}

BOMBS = (
    *(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    ),
    *(
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**9 }}",
        "{{ 10 ** 10 ** 8 }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%9999999999d' % 1 }}",
    ),
    *(
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ lipsum(n=10**7) }}",
        "{{ 'a' | indent(10**10) }}",
    ),
    *("{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}", "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) }}"),
    *(
        "{{ (('a' * 10**5) | list) | join('b' * 10**5) }}",
        "{{ [1] | tojson(indent=10**10) }}",
        "{{ strftime_now('%Y' * 10**6) }}",
    ),
    *("{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}", "{{ [1] | batch(10**10, 'x') | list }}"),
    *("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",),
    *("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",),
    *("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",),
    *("{{ (1).to_bytes(10**10, 'big') }}", "{{ range(99999) | map('string') | map('center', 99999) | list | length }}"),
    *(
        "{{ ('a\\t' * 9999).expandtabs(10**7) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
    ),
    *("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "[" * 300 + "]" * 300 + " }}", "{% if 1 %}" * 3000),
)
"""Templates that ask for more time, memory or output than any answer needs, or that try to leave the sandbox."""

PATTERNS = (
    r"(a+)+$",
    r"(a|a)*b",
    r"(w|w|w7)+x",
    r"(.*)*\d",
    r"((w7 ?)*)*!",
    r"(?:a?){60}a{60}",
    r"\G" * 50,
    r"(?<!a{1,90})b",
    "[" * 9,
)
"""Expressions whose matching takes exponential time in a naive implementation, or that are not valid."""


def mutate(random: Random, part: str, data: bytes) -> bytes:
    """One to three changes of a file's content, mostly of its structure."""
    if part == "template":
        return _template(random, data.decode()).encode(errors="surrogatepass")
    if part == "gguf":
        return _gguf(random, data)
    if random.random() < 0.2:
        return _bytes(random, data)
    if part == "header":
        length = int.from_bytes(data[:8], "little")
        text = _json(random, part, data[8 : 8 + length])
        if random.random() < 0.3:
            text = text.ljust(random.choice((8, 64, 4096, 2**20)))
        length = len(text) if random.random() < 0.9 else random.choice((0, 7, 2**32, 2**63, 2**64 - 1, len(text) + 1))
        return length.to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]
    return _json(random, part, data)


# --- JSON ---


def _json(random: Random, part: str, text: bytes) -> bytes:
    tree = json.loads(text)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree = _changed(random, part, tree)
    out = json.dumps(tree, ensure_ascii=random.random() < 0.8)
    if random.random() < 0.03:
        at = random.randrange(len(out))
        out = (
            out[:at]
            + random.choice(("[" * 100_000, '{"a":' * 50_000, " " * 2**20, "NaN", "1e999", "9" * 5000))
            + out[at:]
        )
    return out.encode(errors="surrogatepass")


def _places(tree: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every container and key or index in it."""
    found = [] if found is None else found
    if isinstance(tree, (dict, list)):
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            found.append((tree, key))
            _places(value, found)
    return found


def _changed(random: Random, part: str, tree: Any) -> Any:
    places = _places(tree)
    if not places or random.random() < 0.02:
        return _value(random, tree)
    # Half of the time near the root, where the settings are: a vocabulary has most of all places.
    near = [(tree, key) for key in (tree if isinstance(tree, dict) else range(len(tree)))]
    container, key = random.choice(near if near and random.random() < 0.5 else places)
    match random.randrange(8):
        case 0:
            del container[key]
        case 1 | 2 | 3:
            container[key] = _value(random, container[key])
        case 4:
            other, its = random.choice(places)
            container[key] = json.loads(json.dumps(other[its] if its in other or isinstance(its, int) else None))
        case 5 | 6 if isinstance(container, dict) and part in KEYS:
            container[random.choice(KEYS[part])] = _value(random, container[key])
        case _ if isinstance(container, dict):
            container[random.choice((f"{key}x", str(key).upper(), "", "__class__", "a" * 10_000))] = container[key]
        case _:
            container.extend(container[:] * random.choice((1, 2, 50)))
    return tree


def _value(random: Random, old: Any) -> Any:
    match random.randrange(9):
        case 0 | 1 | 2:
            return random.choice(_NUMBERS)
        case 3 if isinstance(old, (int, float)) and not isinstance(old, bool):
            return random.choice((old + 1, old - 1, old * 2, -old, str(old), _as_float(old), [old], old * 1000))
        case 4:
            return random.choice(_WORDS)
        case 5:
            return random.choice((None, True, False, [], {}, [[]], [None], {"a": {}}))
        case 6:
            return random.choice(("x" * 10**5, [0] * 10**4, dict.fromkeys(map(str, range(1000)), 1), [10**9] * 9))
        case 7 if isinstance(old, str):
            return random.choice(PATTERNS)
        case 7:
            return [old, old]
        case _:
            return {
                "type": random.choice(_WORDS),
                "rope_type": random.choice(("yarn", "dynamic", "llama3", "x")),
                "factor": random.choice(_NUMBERS),
            }


def _as_float(number: float) -> float:
    """Also of whole numbers that are larger than any float."""
    try:
        return float(number)
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")


# --- bytes ---


def _bytes(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    if not changed:
        return random.randbytes(9)
    begin = min(len(changed), 4096)  # where headers are
    at = random.randrange(begin if random.random() < 0.7 else len(changed))
    match random.randrange(6):
        case 0:
            for _ in range(random.choice((1, 2, 8))):
                changed[random.randrange(begin)] = random.randrange(256)
        case 1:
            del changed[at:]
        case 2:
            del changed[at : at + random.choice((1, 8, 100))]
        case 3:
            changed[at:at] = random.randbytes(random.choice((1, 8, 1000)))
        case 4:
            changed[at : at + 8] = random.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
        case _:
            changed[at:at] = bytes(changed[max(0, at - 200) : at]) * random.choice((1, 50))
    return bytes(changed)


def _gguf(random: Random, data: bytes) -> bytes:
    """A number of the header, of a metadata entry or of the table of tensors becomes another; or any bytes change."""
    if random.random() < 0.4:
        return _bytes(random, data)
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2))):
        names = [b".block_count", b".embedding_length", b".head_count", b"vocab_size", b"context_length", b"alignment",
                 b"tokenizer.ggml.tokens", b"general.architecture", b"blk.0.", b"token_embd", b"chat_template", b"scores"]  # fmt: skip
        at = data.find(random.choice(names))
        at = random.choice((8, 16, 24)) if at < 0 or random.random() < 0.1 else at + random.randrange(60)
        width = random.choice((4, 8))
        number = random.choice([one for one in _NUMBERS if isinstance(one, int) and 0 <= one < 2**64])
        changed[at : at + width] = (number % 256**width).to_bytes(width, "little")
    return bytes(changed)


def _template(random: Random, text: str) -> str:
    at = random.randrange(len(text))
    match random.randrange(5):
        case 0 | 1:
            return random.choice((text, "")) + random.choice(BOMBS)
        case 2:
            return text[:at] + random.choice(BOMBS) + text[at:]
        case 3:
            words = (
                "{{",
                "}}",
                "{%",
                "%}",
                "for",
                "in",
                "|",
                "(",
                ")",
                "'",
                "\ud800",
                "{#",
                "messages",
                "endfor",
                "\0",
                "~",
            )
            return text[:at] + random.choice(words) + text[at + random.choice((0, 1, 5)) :]
        case _:
            other = random.randrange(len(text))
            return text[:at] + text[other : other + 40] * random.choice((1, 3, 1000)) + text[at:]


# --- what is in the place of a file ---


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(8 * 2**30)


def _linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


PLACES: dict[str, Callable[[Path], None]] = {
    "a named pipe": _fifo,
    "a directory": Path.mkdir,
    "a sparse file": _sparse,
    "nothing": lambda path: None,
    "an empty file": Path.touch,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": _linked("nothing-here"),
    "a link to a directory": _linked("/"),
    **{f"a link to {name}": _linked(name) for name in ("/dev/zero", "/dev/tty", "/proc/self/mem", "/proc/self/maps")},
    **{
        f"a link to {name}": _linked(name) for name in ("/proc/self/environ", "/proc/self/pagemap", "/sys/kernel/notes")
    },
}
"""What may stand in the place of a file, by name."""


def put_in_place(place: str, path: Path) -> None:
    """Replaces a file that is there."""
    path.unlink(missing_ok=True)
    PLACES[place](path)
