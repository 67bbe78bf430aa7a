"""Opening checkpoints: whole ones, broken ones, hostile ones, and ones that are on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hermes_async.errors import CheckpointError, CorruptShardError, MissingTensorError, UnsupportedModelError
from hermes_async.storage import checkpoint as checkpoint_module
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.file_state import FileState
from hermes_async.storage.headers import MAX_HEADER_BYTES, MAX_TENSORS
from hermes_async.storage.tensor_spec import Extent, TensorSpec, merge_extents
from tests.hub import Hub, hub_fixture  # noqa: F401 - a fixture

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "hidden_size": 4}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a config and no weights yet."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def write_shard(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a safetensors file by hand, from a header that need not be right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(spec: TensorSpec) -> torch.Tensor:
    """Read a tensor from where its spec says that it is."""
    with spec.file.open("rb") as file:
        file.seek(spec.offset)
        data = bytearray(file.read(spec.nbytes))
    return torch.frombuffer(data, dtype=spec.dtype).reshape(spec.shape)


def reference_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except SafetensorError:
        return False
    return True


# Whole checkpoints


def test_specs_point_at_the_bytes_of_every_tensor(directory: Path) -> None:
    tensors = {
        "embed.weight": torch.randn(7, 4),
        "norm.weight": torch.randn(4).to(torch.bfloat16),
        "steps": torch.tensor(3),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    checkpoint = Checkpoint.open(directory)

    assert checkpoint.path == directory.resolve()
    assert checkpoint.config == CONFIG
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        spec = checkpoint.tensors[name]
        assert (spec.name, spec.file, spec.shape) == (
            name,
            directory / "model.safetensors",
            tuple(tensor.shape),
        )
        assert torch.equal(read(spec), tensor)
    assert checkpoint.total_bytes == 7 * 4 * 4 + 4 * 2 + 8


def test_tensors_come_in_the_order_of_their_bytes(directory: Path) -> None:
    header = {"b": entry(2, 4), "a": entry(4, 6), "c": entry(0, 2)}
    write_shard(directory / "model.safetensors", header, bytes(6))
    assert list(Checkpoint.open(directory).tensors) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("BOOL", torch.bool),
        ("U8", torch.uint8),
        ("I8", torch.int8),
        ("U16", torch.uint16),
        ("I16", torch.int16),
        ("U32", torch.uint32),
        ("I32", torch.int32),
        ("U64", torch.uint64),
        ("I64", torch.int64),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F32", torch.float32),
        ("F64", torch.float64),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
    ],
)
def test_dtypes_are_those_of_the_reference(directory: Path, name: str, dtype: torch.dtype) -> None:
    save_file({"t": torch.zeros(2, 3, dtype=dtype)}, directory / "model.safetensors")
    assert f'"{name}"'.encode() in (directory / "model.safetensors").read_bytes()
    spec = Checkpoint.open(directory).tensors["t"]
    assert (spec.dtype, spec.nbytes) == (dtype, 6 * dtype.itemsize)


def test_scalars_and_empty_tensors_and_padding_after_the_header(directory: Path) -> None:
    header = json.dumps({"s": entry(0, 4, [], "F32"), "e": entry(4, 4, [0, 5], "F32")}).encode() + b"   "
    path = write_shard(directory / "model.safetensors", header, bytes(4))
    assert reference_accepts(path)
    tensors = Checkpoint.open(directory).tensors
    assert (tensors["s"].shape, tensors["s"].nbytes) == ((), 4)
    assert (tensors["e"].shape, tensors["e"].nbytes) == ((0, 5), 0)


def test_a_shard_without_tensors_is_empty(directory: Path) -> None:
    write_shard(directory / "model.safetensors", {})
    assert Checkpoint.open(directory).total_bytes == 0


def test_a_relative_name_and_a_trailing_slash(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(directory / "model.safetensors", {})
    monkeypatch.chdir(directory.parent)
    assert Checkpoint.open("checkpoint/").path == directory.resolve()


def test_repr_is_short(directory: Path) -> None:
    write_shard(directory / "model.safetensors", {"a": entry(0, 1)}, b"1")
    assert repr(Checkpoint.open(directory)) == f"Checkpoint(path={directory.resolve()!r})"


def test_specs_tell_what_their_files_were(directory: Path) -> None:
    write_shard(directory / "one.safetensors", {"a": entry(0, 4, [2, 2])}, b"1234")
    write_shard(directory / "two.safetensors", {"b": entry(0, 2, [1, 2])}, b"56")
    tensors = Checkpoint.open(directory).tensors
    joined = TensorSpec.joined(list(tensors.values()), (3, 2))
    states = {path: FileState.of(path.stat()) for path in directory.glob("*.safetensors")}
    assert joined.file_states == joined.rows(1, 3).file_states == states
    assert joined.packed is None


# Rows of a tensor


def test_rows_are_the_rows(directory: Path) -> None:
    tensor = torch.arange(60, dtype=torch.int32).reshape(5, 3, 4)
    save_file({"t": tensor}, directory / "model.safetensors")
    spec = Checkpoint.open(directory).tensors["t"]
    rows = spec.rows(1, 4)
    assert (rows.name, rows.shape, rows.nbytes) == ("t[1:4]", (3, 3, 4), 3 * 3 * 4 * 4)
    assert torch.equal(read(rows), tensor[1:4])
    assert spec.rows(2, 2).nbytes == 0
    assert spec.rows(0, 5).nbytes == spec.nbytes


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6)])
def test_rows_outside_the_tensor_are_refused(start: int, stop: int) -> None:
    spec = TensorSpec("t", Path("f"), 100, 20, torch.float32, (5,))
    with pytest.raises(ValueError, match=r"no rows"):
        spec.rows(start, stop)


def test_a_scalar_has_no_rows() -> None:
    with pytest.raises(ValueError, match=r"no rows 0:0"):
        TensorSpec("t", Path("f"), 100, 4, torch.float32, ()).rows(0, 0)


# Which files


def test_index_names_the_shards(directory: Path) -> None:
    write_shard(directory / "one.safetensors", {"a": entry(0, 1), "unlisted": entry(1, 3)}, b"123")
    (directory / "sub").mkdir()
    write_shard(directory / "sub" / "two.safetensors", {"b": entry(0, 2)}, b"45")
    write_shard(directory / "other.safetensors", {"not": entry(0, 1)}, b"6")
    write_index(directory, {"a": "one.safetensors", "b": "sub/two.safetensors"})
    tensors = Checkpoint.open(directory).tensors
    assert {name: spec.file.name for name, spec in tensors.items()} == {
        "a": "one.safetensors",
        "unlisted": "one.safetensors",  # transformers takes all of a shard
        "b": "two.safetensors",
    }


@pytest.mark.parametrize("stale", [True, False])
def test_a_whole_file_comes_before_an_index(directory: Path, stale: bool) -> None:
    write_shard(directory / "model.safetensors", {"a": entry(0, 1)}, b"1")
    if not stale:
        write_shard(directory / "one.safetensors", {"a": entry(0, 1)}, b"2")
    write_index(directory, {"a": "one.safetensors"})
    assert Checkpoint.open(directory).tensors["a"].file.name == "model.safetensors"


@pytest.mark.parametrize("name", ["own.safetensors", "own.safetensors.index.json"])
def test_config_json_names_the_weights(directory: Path, name: str) -> None:
    write_shard(directory / "model.safetensors", {"a": entry(0, 1)}, b"1")
    write_shard(directory / "own.safetensors", {"a": entry(0, 1)}, b"2")
    (directory / "own.safetensors.index.json").write_text('{"weight_map": {"a": "own.safetensors"}}')
    (directory / "config.json").write_text(json.dumps({**CONFIG, "transformers_weights": name}))
    assert Checkpoint.open(directory).tensors["a"].file.name == "own.safetensors"


@pytest.mark.parametrize("name", ["../own.safetensors", "own.bin", 3, "own.index.json"])
def test_config_json_names_weights_that_cannot_be(directory: Path, name: object) -> None:
    write_shard(directory / "model.safetensors", {"a": entry(0, 1)}, b"1")
    (directory / "config.json").write_text(json.dumps({**CONFIG, "transformers_weights": name}))
    with pytest.raises(CheckpointError, match="transformers_weights is"):
        Checkpoint.open(directory)


def test_shards_of_an_index_that_hold_the_same_tensor(directory: Path) -> None:
    write_shard(directory / "one.safetensors", {"a": entry(0, 1)}, b"1")
    write_shard(directory / "two.safetensors", {"a": entry(0, 1), "b": entry(1, 2)}, b"12")
    write_index(directory, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"'a' is in both 'one\.safetensors' and 'two\.safetensors'"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["config.json", "adapter_config.json", "adapter_model.safetensors"], "an adapter"),
        (["adapter_config.json", "adapter_model.bin"], "an adapter"),
        (["adapter_model.safetensors"], "an adapter"),
        (["model_index.json"], "a pipeline of diffusers"),
        (["params.json", "consolidated.safetensors"], "Mistral's own layout"),
        (["config.json", "mmproj-model.gguf"], "GGUF"),
        (["config.json", "model-Q4_K_M.gguf", "model-Q8_0.gguf"], "2 models in GGUF: model-Q4_K_M.gguf, model-Q8_0.g"),
        (["config.json", "weights.00.npz"], "MLX"),
        (["config.json", "model.onnx"], "ONNX"),
        (["config.json", "openvino_model.xml", "openvino_model.bin"], "OpenVINO"),
    ],
)
def test_what_is_something_else_is_named(tmp_path: Path, files: list[str], what: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedModelError, match=what) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.path == tmp_path


@pytest.mark.parametrize(("written_for", "what"), [("mlx", "MLX"), ("tf", "TensorFlow"), ("flax", "Flax")])
@pytest.mark.parametrize("indexed", [True, False])
def test_weights_written_for_another_library_are_named(
    directory: Path, written_for: str, what: str, indexed: bool
) -> None:
    name = "one.safetensors" if indexed else "model.safetensors"
    save_file({"a": torch.zeros(1)}, directory / name, metadata={"format": written_for})
    if indexed:
        write_index(directory, {"a": name})
    with pytest.raises(UnsupportedModelError, match=f"was written by {what}"):
        Checkpoint.open(directory)


def test_shards_may_be_links_out_of_the_directory(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    write_shard(tmp_path / "blobs" / "0123", {"a": entry(0, 1)}, b"1")
    (directory / "one.safetensors").symlink_to("../blobs/0123")
    write_index(directory, {"a": "one.safetensors"})
    assert Checkpoint.open(directory).tensors["a"].file == directory / "one.safetensors"


@pytest.mark.parametrize(
    "shard",
    [
        "../one.safetensors",
        "sub/../../one.safetensors",
        "/one.safetensors",
        "./one.safetensors",
        "sub//one.safetensors",
        "..\\one.safetensors",
        "C:\\one.safetensors",
        "C:one.safetensors",
        "one.safetensors\0",
        "one\0.safetensors",
        "\ud800.safetensors",
        "pytorch_model.bin",
        "..",
        "",
        7,
        None,
        ["one.safetensors"],
    ],
)
def test_index_entries_that_leave_the_directory_are_refused(directory: Path, shard: Any) -> None:
    write_shard(directory.parent / "one.safetensors", {"a": entry(0, 1)}, b"1")
    write_index(directory, {"a": shard})
    with pytest.raises(CorruptShardError, match=r"puts tensor 'a' in") as caught:
        Checkpoint.open(directory)
    assert caught.value.path == directory / INDEX


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"weight_map": []}',
        b'{"metadata": {}}',
        b'{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}',
        b"[" * 100_000,
    ],
)
def test_an_index_that_is_none(directory: Path, text: bytes) -> None:
    (directory / INDEX).write_bytes(text)
    with pytest.raises(CorruptShardError) as caught:
        Checkpoint.open(directory)
    assert caught.value.path == directory / INDEX


def test_an_index_too_large_is_not_read(directory: Path) -> None:
    with (directory / INDEX).open("wb") as file:
        file.truncate(256 * 2**20 + 1)
    with pytest.raises(CorruptShardError, match=r"more than"):
        Checkpoint.open(directory)


def test_a_tensor_that_its_shard_lacks(directory: Path) -> None:
    write_shard(directory / "one.safetensors", {"a": entry(0, 1)}, b"1")
    write_index(directory, {"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"})
    with pytest.raises(MissingTensorError, match=r"lacks tensor 'b' and 1 more") as caught:
        Checkpoint.open(directory)
    assert caught.value.names == ("b", "c")
    assert caught.value.path == directory / "one.safetensors"


def test_a_shard_that_is_missing(directory: Path) -> None:
    write_index(directory, {"a": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"one\.safetensors is missing") as caught:
        Checkpoint.open(directory)
    assert caught.value.path == directory / "one.safetensors"


def test_one_shard_of_another_name(directory: Path) -> None:
    write_shard(directory / "weights.safetensors", {"a": entry(0, 1)}, b"1")
    write_shard(directory / "._weights.safetensors", b"what macOS leaves behind")
    assert Checkpoint.open(directory).tensors["a"].file.name == "weights.safetensors"


def test_model_safetensors_comes_before_others(directory: Path) -> None:
    write_shard(directory / "model.safetensors", {"a": entry(0, 1)}, b"1")
    write_shard(directory / "adapter.safetensors", {"b": entry(0, 1)}, b"1")
    assert Checkpoint.open(directory).tensors.keys() == {"a"}


def test_shards_without_an_index_are_merged(directory: Path) -> None:
    write_shard(directory / "one.safetensors", {"a": entry(0, 1)}, b"1")
    write_shard(directory / "two.safetensors", {"b": entry(0, 1)}, b"1")
    assert Checkpoint.open(directory).tensors.keys() == {"a", "b"}


def test_shards_without_an_index_that_hold_the_same_tensor(directory: Path) -> None:
    write_shard(directory / "one.safetensors", {"a": entry(0, 1)}, b"1")
    write_shard(directory / "two.safetensors", {"a": entry(0, 1)}, b"1")
    with pytest.raises(CheckpointError, match=r"'a' is in both 'one\.safetensors' and 'two\.safetensors'"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "model.bin",
        "model.pt",
        "model.pth",
        "last.ckpt",
        "model.pkl",
        "tf_model.h5",
        "flax_model.msgpack",
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_other_formats_are_refused_by_name(directory: Path, name: str, with_config: bool) -> None:
    (directory / name).write_bytes(b"never read")
    if not with_config:
        (directory / "config.json").unlink()
    with pytest.raises(UnsupportedModelError) as caught:
        Checkpoint.open(directory)
    for part in (name, "only safetensors", "can run code", "save_pretrained"):
        assert part in str(caught.value)
    assert caught.value.path == directory


def test_a_directory_without_anything(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint directory: no config\.json and no \*\.saf"):
        Checkpoint.open(tmp_path)


def test_a_directory_without_weights(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint directory: no \*\.safetensors"):
        Checkpoint.open(directory)


# config.json


def test_a_missing_config(directory: Path) -> None:
    write_shard(directory / "model.safetensors", {})
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing") as caught:
        Checkpoint.open(directory)
    assert caught.value.path == directory / "config.json"


@pytest.mark.parametrize("text", [b"", b"[1]", b"null", b"{", b"\xff\xfe", b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000])
def test_an_invalid_config(directory: Path, text: bytes) -> None:
    write_shard(directory / "model.safetensors", {})
    (directory / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"JSON") as caught:
        Checkpoint.open(directory)
    assert caught.value.path == directory / "config.json"
    assert not isinstance(caught.value, CorruptShardError)


def test_a_config_too_large_is_not_read(directory: Path) -> None:
    write_shard(directory / "model.safetensors", {})
    with (directory / "config.json").open("wb") as file:
        file.truncate(4 * 2**20 + 1)
    with pytest.raises(CheckpointError, match=r"more than"):
        Checkpoint.open(directory)


def test_a_config_that_only_transformers_would_read(directory: Path) -> None:
    write_shard(directory / "model.safetensors", {})
    (directory / "config.json").write_text('{"a": 1, "a": 2, "time_step_limit": [0.0, Infinity]}')
    assert Checkpoint.open(directory).config == {"a": 2, "time_step_limit": [0.0, float("inf")]}


# Broken and hostile shards

ENTRY = json.dumps(entry(0, 8)).encode()
GOOD = json.dumps({"a": entry(0, 4), "b": entry(4, 8, [1], "F32")}).encode()


def test_the_shard_that_the_broken_ones_are_made_from_is_good(directory: Path) -> None:
    assert reference_accepts(write_shard(directory / "model.safetensors", GOOD, bytes(8)))
    assert Checkpoint.open(directory).total_bytes == 8


@pytest.mark.parametrize("size", [0, 1, 7])
def test_too_short_for_a_header_length(directory: Path, size: int) -> None:
    (directory / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(CorruptShardError, match=r"too short") as caught:
        Checkpoint.open(directory)
    assert (caught.value.expected, caught.value.actual) == (8, size)


@pytest.mark.parametrize("header_bytes", [len(GOOD) + 9, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(directory: Path, header_bytes: int) -> None:
    (directory / "model.safetensors").write_bytes(header_bytes.to_bytes(8, "little") + GOOD + bytes(8))
    with pytest.raises(CorruptShardError, match=r"a header of") as caught:
        Checkpoint.open(directory)
    assert (caught.value.expected, caught.value.actual) == (header_bytes, len(GOOD) + 8)
    assert caught.value.path == directory / "model.safetensors"


def test_a_long_header_is_not_read(directory: Path) -> None:
    with (directory / "model.safetensors").open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)
    with pytest.raises(CorruptShardError, match=rf"at most {MAX_HEADER_BYTES}"):
        Checkpoint.open(directory)


def test_a_header_of_too_many_tensors_is_not_parsed(directory: Path) -> None:
    text = b"{" + b'"data_offsets",' * (MAX_TENSORS + 1) + b"}"
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CorruptShardError, match=r"tensors, which are too many"):
        Checkpoint.open(directory)


def test_a_config_of_too_many_values_is_not_parsed(directory: Path) -> None:
    write_shard(directory / "model.safetensors", {})
    (directory / "config.json").write_bytes(b'{"a": [' + b"[]," * 2**20 + b"0]}")
    with pytest.raises(CheckpointError, match=r"values, which are too many"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("place", ["pipe", "/dev/zero", "/proc/self/pagemap"])
def test_only_regular_files_are_read(directory: Path, name: str, place: str) -> None:
    write_shard(directory / "model.safetensors", {})
    (directory / "config.json").write_text("{}")
    if name.endswith(".index.json"):
        (directory / "model.safetensors").unlink()
    (directory / name).unlink(missing_ok=True)
    if place == "pipe":
        os.mkfifo(directory / name)
    else:
        (directory / name).symlink_to(place)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert name in str(caught.value) or "config.json" in str(caught.value)


def test_a_file_that_is_replaced_by_a_pipe_while_it_is_opened(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(directory / "model.safetensors", {})
    (directory / "config.json").write_text("{}")
    regular = (directory / "config.json").stat()
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    own = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **key: regular if path.name == "config.json" else own(path, **key))
    with pytest.raises(CheckpointError, match="regular file"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "vocab.txt", "additional_chat_templates/a.jinja"]
)
@pytest.mark.parametrize("size", [0, 8 * 2**30])
def test_files_for_other_libraries_are_small(directory: Path, name: str, size: int) -> None:
    write_shard(directory / "model.safetensors", {})
    (directory / "config.json").write_text("{}")
    (directory / name).parent.mkdir(exist_ok=True)
    with (directory / name).open("wb") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match=Path(name).name):
        Checkpoint.open(directory)


@pytest.mark.parametrize("num_lost", [1, 4, 8])
def test_a_truncated_shard(directory: Path, num_lost: int) -> None:
    write_shard(directory / "model.safetensors", GOOD, bytes(8 - num_lost))
    with pytest.raises(CorruptShardError, match=r"truncated") as caught:
        Checkpoint.open(directory)
    assert caught.value.expected == 8 + len(GOOD) + 8
    assert caught.value.actual == caught.value.expected - num_lost


def test_a_git_lfs_pointer(directory: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 10\n"
    (directory / "model.safetensors").write_bytes(pointer)
    with pytest.raises(CorruptShardError, match=r"git lfs pull"):
        Checkpoint.open(directory)


BROKEN_HEADERS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{]", "not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "too deep": (b'{"a":' + b"[" * 100_000, "not valid JSON"),
    "more than JSON": (GOOD + b"\0", "not valid JSON"),
    "a huge number": (GOOD.replace(b"8]", b"8" * 5000 + b"]"), "not valid JSON"),
    "no object": ([entry(0, 8)], "does not begin"),
    "a space first": (b" " + GOOD, "does not begin"),
    "empty": (b"", "does not begin"),
    "the same tensor twice": (b'{"a": %s, "a": %s}' % (ENTRY, ENTRY), "duplicate key 'a'"),
    "the same field twice": (GOOD.replace(b'"dtype": "U8"', b'"dtype": "U8", "dtype": "I8"'), "duplicate"),
    "metadata not text": ({"__metadata__": {"a": 1}, "a": entry(0, 8)}, "__metadata__"),
    "metadata no object": ({"__metadata__": ["pt"], "a": entry(0, 8)}, "__metadata__"),
    "metadata null": ({"__metadata__": None, "a": entry(0, 8)}, "__metadata__"),
    "entry no object": ({"a": [0, 8]}, "tensor 'a' lacks"),
    "entry a number": (b'{"a": NaN}', "tensor 'a' lacks"),
    "field missing": ({"a": {"dtype": "U8", "shape": [8]}}, "tensor 'a' lacks"),
    "field unknown": ({"a": {**entry(0, 8), "device": "cpu"}}, "tensor 'a' has unknown entries: 'device'"),
    "dtype unknown": ({"a": entry(0, 8, [8], "Q8")}, "tensor 'a' has dtype 'Q8'"),
    "dtype of no whole bytes": (
        {"a": entry(0, 8, [3], "F4")},
        "tensor 'a' of F4 [3] does not end with a whole byte",
    ),
    "dtype no text": ({"a": entry(0, 8, [8], 3)}, "tensor 'a' lacks"),
    "shape no list": ({"a": entry(0, 8, 8)}, "tensor 'a' lacks"),
    "shape negative": ({"a": entry(0, 8, [-2, -4])}, "tensor 'a' has an impossible"),
    "shape a float": ({"a": entry(0, 8, [8.0])}, "tensor 'a' has an impossible"),
    "shape a bool": ({"a": entry(0, 8, [8, True])}, "tensor 'a' has an impossible"),
    "shape nested": ({"a": entry(0, 8, [[8]])}, "tensor 'a' has an impossible"),
    "shape past int64": ({"a": entry(0, 0, [0, 2**63])}, "tensor 'a' has an impossible"),
    "product wraps to 8 bytes": ({"a": entry(0, 8, [2**32 + 1, 2**32, 2**3])}, "too many elements"),
    "product wraps to 0 bytes": ({"a": entry(0, 0, [2**32, 2**32])}, "too many elements"),
    "product without end": ({"a": entry(0, 8, [2**62] * 10_000)}, "too many elements"),
    "three offsets": ({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, "tensor 'a' lacks"),
    "offsets reversed": ({"a": {**entry(0, 8), "data_offsets": [8, 0]}}, "tensor 'a' has an impossible"),
    "offset negative": ({"a": {**entry(0, 8), "data_offsets": [-8, 0]}}, "tensor 'a' has an impossible"),
    "offset a bool": ({"a": {**entry(0, 8), "data_offsets": [False, 8]}}, "tensor 'a' has an impossible"),
    "range larger than shape": ({"a": entry(0, 8, [7])}, "'a' has 8 bytes, where U8 [7] takes 7"),
    "range smaller than shape": ({"a": entry(0, 8, [3], "F32")}, "'a' has 8 bytes, where F32 [3] takes 12"),
    "overlap": ({"a": entry(0, 5), "b": entry(4, 8)}, "tensors 'a' and 'b' overlap"),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, "tensors 'a' and 'b' overlap"),
    "an empty tensor inside another": ({"a": entry(0, 8), "b": entry(4, 4)}, "tensors 'a' and 'b' overlap"),
    "a hole": ({"a": entry(0, 4), "b": entry(6, 8)}, "2 bytes before tensor 'b'"),
    "a hole first": ({"a": entry(1, 8)}, "1 bytes before tensor 'a'"),
    "trailing bytes": ({"a": entry(0, 5)}, "3 bytes after the last tensor"),
    "only trailing bytes": ({}, "8 bytes after the last tensor"),
    "data past the end": ({"a": entry(0, 4), "b": entry(4, 2**40)}, "truncated"),
}

# What the reference lets pass and we do not: either the format's text forbids it, or it is ambiguous.
STRICTER = {
    "a space first",
    "the same tensor twice",
    "metadata null",
    "field unknown",
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_headers(directory: Path, case: str) -> None:
    header, message = BROKEN_HEADERS[case]
    path = write_shard(directory / "model.safetensors", header, bytes(8))
    with pytest.raises(CorruptShardError) as caught:
        Checkpoint.open(directory)
    assert message in str(caught.value)
    assert caught.value.path == path
    assert case in STRICTER or not reference_accepts(path)


def test_messages_do_not_quote_without_end(directory: Path) -> None:
    write_shard(directory / "model.safetensors", {"a" * 100_000: entry(0, 8, [8], "Q8")}, bytes(8))
    with pytest.raises(CorruptShardError) as caught:
        Checkpoint.open(directory)
    assert len(str(caught.value)) < 2000


# What the operating system says


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_a_file_that_may_not_be_read(directory: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # By hand, since nothing is unreadable to root.
    opened = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    if name == INDEX:
        write_index(directory, {})
    else:
        write_shard(directory / "model.safetensors", {})
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read: Permission denied") as caught:
        Checkpoint.open(directory)
    assert caught.value.path == directory / name
    assert isinstance(caught.value.__cause__, PermissionError)


def test_a_directory_that_may_not_be_listed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be listed: Permission denied"):
        Checkpoint.open(directory)


def make_directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [make_directory, os.mkfifo])
def test_a_shard_that_is_no_regular_file(directory: Path, make: Callable[[Path], None]) -> None:
    make(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not a regular file"):
        Checkpoint.open(directory)


def test_a_link_to_nothing_and_a_link_to_itself(directory: Path) -> None:
    (directory / "model.safetensors").symlink_to("nothing")
    with pytest.raises(CheckpointError, match=r"is missing"):
        Checkpoint.open(directory)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        Checkpoint.open(directory)


# What a source can be


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Path:
        pytest.fail(f"the hub was asked: {args}")

    monkeypatch.setattr(checkpoint_module, "download", refuse)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "source",
    [
        *(
            "",
            "./model",
            "../org/name",
            "/nowhere/model",
            "~/model",
            "a/b/c",
            "name/",
            ".hidden/name",
            "org/.name",
        ),
        *("with space", "org\\name", "hf:org/name", "nul\0", "\ud800", "org/name\n", Path("org/name")),
    ],
)
def test_a_directory_that_is_not_there(source: str | Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such directory"):
        Checkpoint.open(source)


@pytest.mark.usefixtures("no_hub")
def test_a_file_is_not_a_checkpoint(directory: Path) -> None:
    path = write_shard(directory / "model.safetensors", {})
    with pytest.raises(CheckpointError, match=r"is a file; give the directory") as caught:
        Checkpoint.open(path)
    assert caught.value.path == path


# The hub


@pytest.fixture
def repository(hub: Hub, directory: Path) -> str:
    """A model on the stand-in, with files that must never be fetched."""
    shard = write_shard(directory / "model.safetensors", {"a": entry(0, 4)}, b"1234")
    wanted = {
        "config.json": (directory / "config.json").read_bytes(),
        "model.safetensors": shard.read_bytes(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "vocab.txt": b"a",
        "spiece.model": b"b",
        "chat_template.jinja": b"c",
        "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": shard.read_bytes(),
    }
    unwanted = ["pytorch_model.bin", "model.pt", "modeling.py", "tokenizer.py", "tokenizer.pkl", "vocab.bin"]
    unwanted += ["consolidated.safetensors", "README.md", "model.onnx", "original/params.json"]
    hub.files["org/name"] = wanted | dict.fromkeys(unwanted, b"unwanted")
    return "org/name"


def test_a_hub_id_is_downloaded_without_code_and_pickles(hub: Hub, repository: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(repository, cache_dir=tmp_path / "cache", token="hf_secret")
    assert checkpoint.path.name == hub.commit(repository)
    assert checkpoint.path.is_relative_to((tmp_path / "cache").resolve())
    assert checkpoint.config == CONFIG
    assert read(checkpoint.tensors["a"]).tolist() == list(b"1234")
    assert hub.downloads == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "spiece.model",
        "chat_template.jinja",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }
    assert "Bearer hf_secret" in hub.authorizations


def test_a_downloaded_model_opens_without_the_hub(hub: Hub, repository: str, tmp_path: Path) -> None:
    first = Checkpoint.open(repository, cache_dir=tmp_path / "cache")
    hub.files.clear()
    hub.downloads.clear()
    again = Checkpoint.open(repository, cache_dir=tmp_path / "cache", local_files_only=True)
    assert again == first
    assert not hub.downloads


def test_a_directory_comes_before_the_hub(hub: Hub, repository: str, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    directory.rename(tmp_path / "org" / "name")
    assert Checkpoint.open(repository).path == (tmp_path / "org" / "name").resolve()
    assert not hub.downloads


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", r"neither a directory here nor a model on the hub"),
        (401, "RepoNotFound", r"pass a token \(token=, or --token\)"),
        (403, "GatedRepo", r"is gated: accept its terms"),
        (400, "", r"is out of reach"),
    ],
)
def test_what_the_hub_refuses(hub: Hub, tmp_path: Path, status: int, code: str, message: str) -> None:
    hub.errors["org/name"] = (status, code)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open("org/name", cache_dir=tmp_path / "cache")
    assert str(caught.value).startswith("'org/name' ")
    assert caught.value.__cause__ is not None


def test_a_revision_that_is_not_there(repository: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'org/name' at revision 'v9' is not on the hub, though"):
        Checkpoint.open(repository, revision="v9", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
def test_offline_and_not_in_the_cache(
    hub: Hub, repository: str, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"not complete in the hub's cache.*HF_HUB_OFFLINE unset"):
        Checkpoint.open(repository, cache_dir=tmp_path / "cache", local_files_only=how == "local_files_only")
    assert not hub.authorizations


def test_a_name_that_the_hub_would_not_take(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a directory here nor a hub id"):
        Checkpoint.open("org--name..git", cache_dir=tmp_path / "cache")
    assert not hub.authorizations


def test_any_other_failure_of_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"could not be downloaded.*No space left on device"):
        Checkpoint.open("org/name", cache_dir=tmp_path / "cache")


# Extents

A, B = Path("a"), Path("b")


def spec(file: Path, offset: int, nbytes: int) -> TensorSpec:
    return TensorSpec(f"{file}@{offset}", file, offset, nbytes, torch.uint8, (nbytes,))


def test_extents_are_merged_across_small_gaps_only() -> None:
    specs = [spec(B, 100, 10), spec(A, 200, 50), spec(A, 100, 90), spec(A, 261, 9), spec(A, 270, 30)]
    assert merge_extents(specs, max_gap=10) == [Extent(A, 100, 150), Extent(A, 261, 39), Extent(B, 100, 10)]
    assert merge_extents(specs, max_gap=11) == [Extent(A, 100, 200), Extent(B, 100, 10)]
    assert merge_extents(specs, max_gap=0) == [
        Extent(A, 100, 90),
        Extent(A, 200, 50),
        Extent(A, 261, 39),
        Extent(B, 100, 10),
    ]


def test_extents_of_specs_that_overlap() -> None:
    whole = spec(A, 100, 40)
    assert merge_extents([whole, whole.rows(10, 20), whole]) == [Extent(A, 100, 40)]


def test_extents_of_nothing() -> None:
    assert merge_extents([]) == []
    assert merge_extents([spec(A, 100, 0)]) == []


def test_a_whole_shard_is_one_extent(directory: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.randn(8, 8) for i in range(5)}
    save_file(tensors, directory / "model.safetensors")
    checkpoint = Checkpoint.open(directory)
    (extent,) = merge_extents(checkpoint.tensors.values(), max_gap=0)
    assert extent.nbytes == checkpoint.total_bytes
