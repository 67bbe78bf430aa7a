"""Headers of GGUF files: what they say, and how each way to violate the format is named."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hermes_async import CheckpointError, CorruptShardError, UnsupportedModelError
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.gguf import read_gguf

U8, U32, F32, BOOL, TEXT, LIST, U64 = 0, 4, 6, 7, 8, 9, 10
_LAYOUTS = {U8: "<B", U32: "<I", F32: "<f", BOOL: "<?", U64: "<Q"}
Q4_K = 12
LLAMA = ("general.architecture", TEXT, "llama")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_bytes(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return text(value)
    if kind == LIST:
        item_kind, items = value
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(value_bytes(item_kind, one) for one in items)
    return struct.pack(_LAYOUTS[kind], value)


def entry(key: str, kind: int, value: Any) -> bytes:
    return text(key) + struct.pack("<I", kind) + value_bytes(kind, value)


def tensor(name: str, sizes: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def gguf_bytes(
    entries: Sequence[bytes],
    tensors: Sequence[bytes] = (),
    data: bytes = bytes(4096),
    *,
    head: bytes = b"GGUF\3\0\0\0",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    out = io.BytesIO()
    out.write(head + struct.pack("<QQ", *(counts or (len(tensors), len(entries)))))
    out.write(b"".join([*entries, *tensors]))
    out.write(bytes(-out.tell() % alignment) + data)
    return out.getvalue()


PLAIN = gguf_bytes(
    [
        entry(*LLAMA),
        entry("llama.block_count", U32, 2),
        entry("general.file_type", BOOL, True),
        entry("a.list", LIST, (U8, [1, 2, 3])),
        entry("tokenizer.ggml.tokens", LIST, (TEXT, ["a", "bc", ""])),
        entry("tokenizer.ggml.scores", LIST, (F32, [0.5] * 5000)),
    ],
    [
        tensor("second", (3, 2), 0, 160),
        tensor("first", (256, 1), Q4_K, 0),
        tensor("experts", (32, 4, 2), 8, 192),
        tensor("scale", (), 30, 480),
    ],
)


def write(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_what_a_header_says(tmp_path: Path) -> None:
    header, tensors = read_gguf(write(tmp_path, PLAIN))
    data = len(PLAIN) - 4096
    assert [(spec.name, spec.offset - data, spec.nbytes, spec.shape) for spec in tensors.values()] == [
        ("first", 0, 144, (1, 144)),
        ("second", 160, 24, (2, 3)),
        ("experts", 192, 272, (2, 4, 34)),
        ("scale", 480, 2, ()),
    ]
    assert [spec.dtype for spec in tensors.values()] == [torch.uint8, torch.float32, torch.uint8, torch.bfloat16]
    assert [spec.packed for spec in tensors.values()] == ["Q4_K", None, "Q8_0", None]
    assert header.architecture == "llama"
    assert header.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "general.file_type": True,
        "a.list": [1, 2, 3],
        "tokenizer.ggml.tokens": 3,
    }


def test_an_outline_has_all_but_long_lists_and_numbers_of_tensors(tmp_path: Path) -> None:
    header, tensors = read_gguf(write(tmp_path, PLAIN))
    header.write_outline(tmp_path / "outline.gguf", {"llama.vocab_size": 3, "llama.block_count": 4})
    outline, one_number_each = read_gguf(tmp_path / "outline.gguf")
    assert outline.metadata == {**header.metadata, "llama.vocab_size": 3, "llama.block_count": 4}
    assert "tokenizer.ggml.scores" in header.entries
    assert "tokenizer.ggml.scores" not in outline.entries
    assert set(one_number_each) == set(tensors)


def test_the_second_version_is_read(tmp_path: Path) -> None:
    content = gguf_bytes([entry(*LLAMA)], [tensor("a", (4,), 1, 0)], head=b"GGUF\2\0\0\0")
    assert read_gguf(write(tmp_path, content))[1]["a"].dtype == torch.float16


def test_an_alignment_of_the_file_s_own(tmp_path: Path) -> None:
    entries = [entry(*LLAMA), entry("general.alignment", U32, 256)]
    content = gguf_bytes(entries, [tensor("a", (4,), 0, 256)], alignment=256)
    assert read_gguf(write(tmp_path, content))[1]["a"].offset == 512


A = tensor("a", (4,), 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "takes 4 bytes, where 0 are left"),
        (b"GGML" + bytes(100), "does not begin with b'GGUF'"),
        (b"version https://git-lfs", "Git LFS pointer"),
        (gguf_bytes([], counts=(2**60, 0)), f"claims {2**60} tensors, of at most"),
        (gguf_bytes([], counts=(0, 2**60)), f"claims {2**60} entries of metadata, of at most"),
        (gguf_bytes([struct.pack("<Q", 2**60)], counts=(0, 1)), f"has {2**60} bytes, of at most"),
        (gguf_bytes([text("key") + struct.pack("<IQ", TEXT, 2**62)]), f"entry 'key' has {2**62} bytes, of at most"),
        (gguf_bytes([text("key") + struct.pack("<IQ", TEXT, 99_999)]), "entry 'key' takes 99999 bytes, where"),
        (gguf_bytes([text("key") + struct.pack("<IIQ", LIST, U8, 2**60)]), f"entry 'key' is a list of {2**60} items"),
        (gguf_bytes([text("key") + struct.pack("<IIQ", LIST, U64, 2**20)]), "entry 'key' takes 8388608 bytes, where"),
        (gguf_bytes([text("key") + struct.pack("<IIQQ", LIST, TEXT, 1, 2**61)]), f"entry 'key' takes {2**61} bytes"),
        (gguf_bytes([text("key") + struct.pack("<IIQ", LIST, LIST, 1)]), "entry 'key' is a list of lists"),
        (gguf_bytes([text("key") + struct.pack("<IIQ", LIST, 77, 1)]), "entry 'key' is a list of type 77"),
        (gguf_bytes([text("key") + struct.pack("<I", 77)]), "entry 'key' has a value of type 77"),
        (gguf_bytes([struct.pack("<Q", 2) + b"\xff\xff" + bytes(8)]), "is not UTF-8"),
        (gguf_bytes([entry(*LLAMA), entry(*LLAMA)]), "two entries 'general.architecture'"),
        (gguf_bytes([entry("llama.block_count", U32, 2)]), "no text `general.architecture`"),
        (gguf_bytes([entry("general.architecture", U32, 2)]), "no text `general.architecture`"),
        (gguf_bytes([entry(*LLAMA), entry("general.alignment", U32, 0)]), "general.alignment is 0"),
        (gguf_bytes([entry(*LLAMA), entry("general.alignment", U32, 48)]), "general.alignment is 48"),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (4,), 99, 0)]), "tensor 'a' is of type 99"),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (4,), 4, 0)]), "tensor 'a' is of type 4"),
        (
            gguf_bytes([entry(*LLAMA)], [tensor("a", (48, 2), 8, 0)]),
            "tensor 'a' has rows of 48 numbers.*blocks of 32",
        ),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (), 8, 0)]), "tensor 'a' has rows of 1 numbers"),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (2**40, 2**40), 0, 0)]), "tensor 'a' has too many elements"),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (2**62,), 0, 0)]), "truncated: tensor 'a' ends at byte"),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (1,) * 9, 0, 0)]), "tensor 'a' has 9 dimensions"),
        (gguf_bytes([entry(*LLAMA)], [text("a") + struct.pack("<I", 2**31)]), f"tensor 'a' has {2**31} dimensions"),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (4,), 0, 8)]), "tensor 'a' has the offset 8, not a multiple of the"),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (4,), 0, 2**63)]), "tensor 'a' has the offset"),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (4,), 0, 8192)]), "truncated: tensor 'a' ends at byte"),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (2000,), 0, 0)]), "truncated: tensor 'a' ends at byte"),
        (gguf_bytes([entry(*LLAMA)], [A, tensor("b", (4,), 0, 0)]), "tensors 'a' and 'b' overlap"),
        (gguf_bytes([entry(*LLAMA)], [tensor("a", (99,), 0, 0), tensor("b", (4,), 0, 32)]), "'a' and 'b' overlap"),
        (gguf_bytes([entry(*LLAMA)], [A, tensor("a", (4,), 0, 32)]), "two tensors 'a'"),
    ],
)
def test_what_violates_the_format_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(CorruptShardError, match=message) as caught:
        Checkpoint.open(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"GGUF\1\0\0\0", "is in version 1 of GGUF"),
        (b"GGUF\4\0\0\0", "is in version 4 of GGUF"),
        (b"GGUF\0\0\0\3", "is a big-endian GGUF file"),
    ],
)
def test_other_versions_are_refused_by_name(tmp_path: Path, head: bytes, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_gguf(write(tmp_path, gguf_bytes([entry(*LLAMA)], head=head)))


def test_a_file_that_ends_anywhere_within_its_header(tmp_path: Path) -> None:
    for length in range(0, len(PLAIN) - 4096 + 481, 37):
        with pytest.raises(CorruptShardError):
            read_gguf(write(tmp_path, PLAIN[:length]))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 250), put=st.binary(min_size=1, max_size=8))
def test_whatever_a_header_says_one_error_of_ours_comes_at_most(tmp_path: Path, place: int, put: bytes) -> None:
    content = bytearray(PLAIN)
    content[place : place + len(put)] = put
    path = write(tmp_path, bytes(content))
    try:
        _, tensors = read_gguf(path)
    except CheckpointError:
        return
    assert all(spec.offset + spec.nbytes <= len(content) for spec in tensors.values())


# --- models of several files, and directories ---


def part(number: int, count: int, name: str, *, total: int | None = None) -> bytes:
    entries = [entry("split.no", U32, number), entry("split.count", U32, count)]
    if number == 0:
        entries += [entry(*LLAMA), *([] if total is None else [entry("split.tensors.count", U32, total)])]
    return gguf_bytes(entries, [tensor(name, (4,), 0, 0)])


def write_parts(folder: Path, *parts: bytes) -> list[Path]:
    names = [f"m-{idx + 1:05}-of-{len(parts):05}.gguf" for idx in range(len(parts))]
    return [write(folder, content, name) for content, name in zip(parts, names, strict=True)]


def test_any_part_opens_the_whole_model(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, part(0, 2, "a", total=2), part(1, 2, "b"))
    for path in (*paths, tmp_path):
        checkpoint = Checkpoint.open(path)
        assert {name: spec.file for name, spec in checkpoint.tensors.items()} == dict(zip("ab", paths, strict=True))
        assert checkpoint.gguf is not None
        assert checkpoint.gguf.files == tuple(paths)
        assert checkpoint.path == (paths[0] if path == tmp_path else path)


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    first, second = write_parts(tmp_path, part(0, 2, "a"), part(0, 2, "b"))
    with pytest.raises(CorruptShardError, match=r"says that it is part 0 of 2 \(split.no, split.count\), not 1"):
        read_gguf(first)
    write(tmp_path, part(1, 2, "a"), second.name)
    with pytest.raises(CorruptShardError, match="tensor 'a' is in both"):
        read_gguf(first)
    write(tmp_path, part(0, 2, "a", total=3), first.name)
    write(tmp_path, part(1, 2, "b"), second.name)
    with pytest.raises(CorruptShardError, match=r"the parts have 2 tensors, and split.tensors.count is 3"):
        read_gguf(first)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second.name} is missing"):
        read_gguf(first)
    with pytest.raises(CheckpointError, match=r"is a part of a model of 2 files.*-00001-of-00002\.gguf"):
        read_gguf(first.rename(tmp_path / "other.gguf"))


def test_a_file_of_another_name_and_a_file_that_is_none(tmp_path: Path) -> None:
    assert Checkpoint.open(write(tmp_path, PLAIN, "sha256-0123")).gguf is not None
    with pytest.raises(CheckpointError, match="is a file; give the directory it is in, or a GGUF file"):
        Checkpoint.open(write(tmp_path, b"something", "model.bin"))


def test_safetensors_of_a_directory_come_first(tmp_path: Path) -> None:
    write(tmp_path, PLAIN)
    write(tmp_path, b"something", "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)
