"""Models on the hub: which revision, with which token, kept where; and plans from headers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import huggingface_hub
import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from hermes_async import CheckpointError, Engine, UnsupportedModelError
from hermes_async.cli import app
from hermes_async.config import EngineConfig
from hermes_async.engine.opening import plans_by_budget
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.hub import HubOptions, download, without_weights
from tests.gguf_models import save_gguf
from tests.hub import Hub, hub_fixture  # noqa: F401 - a fixture
from tests.inside import inside
from tests.quantization.test_gguf import llama


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def saved(random_model: Callable[..., Any], save_model: Callable[..., Path]) -> dict[str, Path]:
    """One model, in one file and in shards."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = random_model(config)
    return {"whole": save_model(model), "sharded": save_model(model, max_shard_size="200KB")}


def hermes(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.parametrize("kind", ["whole", "sharded"])
@pytest.mark.parametrize("first_bytes", [100_000, 100])
def test_a_plan_takes_headers_alone(
    hub: Hub, saved: dict[str, Path], tmp_path: Path, kind: str, first_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hermes_async.storage.hub._FIRST_BYTES", first_bytes)
    hub.files["org/name"] = files_of(saved[kind])
    options = HubOptions(cache_dir=tmp_path / "cache")
    with without_weights("org/name", options) as source:
        tensors = Checkpoint.open(source).tensors
        plans = plans_by_budget(source, EngineConfig(), 3)
    assert not Path(source).exists()
    here = Checkpoint.open(saved[kind])
    assert {name: (spec.file.name, spec.offset, spec.shape) for name, spec in tensors.items()} == {
        name: (spec.file.name, spec.offset, spec.shape) for name, spec in here.tensors.items()
    }
    assert [plan.as_dict() for plan in plans] == [
        plan.as_dict() for plan in plans_by_budget(saved[kind], EngineConfig(), 3)
    ]
    shards = [name for name in hub.files["org/name"] if name.endswith(".safetensors")]
    assert set(hub.ranges) == set(shards)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    for name in shards:
        header = 8 + int.from_bytes(hub.files["org/name"][name][:8], "little")
        assert hub.bytes_sent[name] <= max(header, first_bytes)


@pytest.mark.parametrize("extra", [("--memory", "2MiB"), ("--sweep",)])
def test_the_command_plan_downloads_no_weights(
    hub: Hub, saved: dict[str, Path], tmp_path: Path, extra: tuple[str, ...]
) -> None:
    hub.files["org/name"] = files_of(saved["whole"])
    args = ("--json", "--revision", "main", "--token", "hf_secret", "--cache-dir", tmp_path / "cache")
    told = hermes("plan", "org/name", *extra, *args)
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)
    assert "model.safetensors" in hub.ranges
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert hub.authorizations == {"Bearer hf_secret"}


def test_a_plan_takes_weights_that_are_in_the_cache(hub: Hub, saved: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("whole", "sharded"):
        hub.files = {"org/name": files_of(saved[kind])}
        options = HubOptions(cache_dir=tmp_path / kind)
        path = Checkpoint.open("org/name", cache_dir=options.cache_dir).path
        with without_weights("org/name", options) as source:
            assert Path(source).resolve() == path
    assert not hub.ranges


def test_what_is_here_is_planned_as_it_is(hub: Hub, saved: dict[str, Path]) -> None:
    for source in (str(saved["whole"]), "/nowhere/model"):
        with without_weights(source, HubOptions()) as same:
            assert same == source
    assert not hub.authorizations


def test_a_hub_that_would_send_all_of_a_shard(hub: Hub, saved: dict[str, Path], tmp_path: Path) -> None:
    hub.files["org/name"] = files_of(saved["whole"])
    hub.knows_ranges = False
    with (
        pytest.raises(CheckpointError, match=r"'org/name' could not be downloaded .*does not send parts of model\.saf"),
        without_weights("org/name", HubOptions(cache_dir=tmp_path / "cache")),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("data", [b"", b"1234", b"\xff" * 7 + b"\0" + b"{}", b"\xff" * 200_000])
def test_shards_on_the_hub_that_are_none(hub: Hub, tmp_path: Path, data: bytes) -> None:
    hub.files["org/name"] = {"config.json": b'{"model_type": "llama"}', "model.safetensors": data}
    told = hermes("plan", "org/name", "--memory", "2MiB", "--cache-dir", tmp_path / "cache")
    assert told.exit_code == 1
    assert told.output.startswith("hermes-async: error: ")
    assert told.output.count(os.linesep) == 1


@pytest.mark.parametrize("way", ["engine", "plan"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("model.gguf", r"org/name has its weights in GGUF; choose .*: org/name:model\. It has model$"),
        ("Q4_K_M/model-00001-of-00002.gguf", r"org/name has its weights in GGUF; .* It has Q4_K_M/model$"),
        (
            "pytorch_model.bin",
            r"org/name has its weights in 'pytorch_model\.bin', PyTorch.s pickles.*save_pretrained",
        ),
        ("pytorch_model-00001-of-00002.bin", r"org/name has its weights in 'pytorch_model-00001-of-00002\.bin', PyTor"),
        ("0_Transformer/pytorch_model.bin", r"org/name has its weights in '0_Transformer/pytorch_model\.bin', PyTorch"),
        ("onnx/model.onnx", r"org/name has its weights in 'onnx/model\.onnx', ONNX"),
        ("weights.dat", r"org/name is on the hub but has no weights in safetensors: it holds 'a', .*'config\.json'"),
        ("consolidated.safetensors", r"org/name has its weights in 'consolidated\.safetensors' alone, Mistral's own"),
        ("adapter_model.safetensors", r"org/name is an adapter"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_a_model_on_the_hub_in_another_format_is_named(
    hub: Hub, tmp_path: Path, weights: str, message: str, way: str, with_config: bool
) -> None:
    hub.files["org/name"] = {"a": b"", "training_args.bin": b"no weights", weights: b"never sent"}
    if with_config or weights == "weights.dat":
        hub.files["org/name"]["config.json"] = b'{"model_type": "llama"}'

    async def use() -> None:
        async with Engine("org/name", memory_budget="8MiB", cache_dir=tmp_path / "cache"):
            pytest.fail("entered")

    with pytest.raises(UnsupportedModelError, match=message):
        if way == "engine":
            anyio.run(use)
        else:
            with without_weights("org/name", HubOptions(cache_dir=tmp_path / "cache")):
                pytest.fail("entered")
    assert weights not in hub.downloads


@pytest.mark.anyio
async def test_an_engine_takes_a_revision_a_token_and_a_folder(
    hub: Hub, saved: dict[str, Path], tmp_path: Path
) -> None:
    hub.files["org/name"] = files_of(saved["whole"])
    cache = tmp_path / "cache"
    commit = hub.commit("org/name")
    async with Engine(
        "org/name", memory_budget="8MiB", revision="main", token="hf_secret", cache_dir=cache, draft_model="org/name"
    ) as engine:
        assert inside(engine).checkpoint_path.name == commit
    assert (cache / "models--org--name" / "snapshots" / commit / "model.safetensors").is_file()
    assert hub.authorizations == {"Bearer hf_secret"}
    with pytest.raises(CheckpointError, match="'org/name' at revision 'v9' is not on the hub, though"):
        async with Engine("org/name", memory_budget="8MiB", revision="v9", cache_dir=cache):
            pytest.fail("entered")


def test_commands_take_a_revision(hub: Hub, saved: dict[str, Path], tmp_path: Path) -> None:
    hub.files["org/name"] = files_of(saved["whole"])
    for command in (["generate", "1 2"], ["chat"], ["embed", "text"], ["classify", "text"], ["profile"], ["plan"]):
        told = hermes(command[0], "org/name", *command[1:], "--revision", "v9", "--cache-dir", tmp_path / "cache")
        assert told.exit_code == 1
        assert "'org/name' at revision 'v9' is not on the hub, though" in told.output, command


def test_a_download_prints_nothing_unless_at_a_terminal(
    hub: Hub, saved: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.files["org/name"] = files_of(saved["sharded"])
    download("org/name", HubOptions(cache_dir=tmp_path / "cache"))
    assert capfd.readouterr() == ("", "")


# --- models in GGUF ---


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository with three models, one of them in parts in a folder."""
    folder = tmp_path_factory.mktemp("gguf")
    parts = folder / "Q8_0"
    parts.mkdir()
    save_gguf(llama(), folder / "small-F32.gguf")
    save_gguf(llama(), parts / "small.gguf", quantization="Q8_0", split_max_tensors=12)
    (folder / "small-UD-F32.gguf").write_bytes(b"never sent")
    (folder / "mmproj-F32.gguf").write_bytes(b"never sent")
    return files_of(folder)


PARTS = ["Q8_0/small-00001-of-00002.gguf", "Q8_0/small-00002-of-00002.gguf"]


@pytest.mark.parametrize("first_bytes", [100_000, 100])
def test_a_plan_takes_the_headers_of_all_parts(
    hub: Hub, gguf_files: dict[str, bytes], tmp_path: Path, first_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hermes_async.storage.hub._FIRST_BYTES", first_bytes)
    hub.files["org/name"] = gguf_files
    options = HubOptions(cache_dir=tmp_path / "cache")
    with without_weights("org/name:Q8_0", options) as source:
        planned = Checkpoint.open(source).tensors
    assert set(hub.ranges) == {Path(name).name for name in PARTS}
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    path = Checkpoint.open("org/name:Q8_0", cache_dir=options.cache_dir).path
    here = Checkpoint.open(path).tensors
    assert {name: (spec.file.name, spec.offset, spec.shape) for name, spec in planned.items()} == {
        name: (spec.file.name, spec.offset, spec.shape) for name, spec in here.items()
    }
    with without_weights("org/name:Q8_0", options) as source:
        assert Path(source).resolve() == path.resolve()


@pytest.mark.anyio
async def test_an_engine_takes_the_end_of_a_file_s_name(hub: Hub, gguf_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.files["org/name"] = gguf_files
    for source in ("org/name:q8_0", "org/name:Q8_0/small.gguf"):
        async with Engine(source, memory_budget="8MiB", cache_dir=tmp_path / "cache") as engine:
            assert inside(engine).checkpoint_path.name == "small-00001-of-00002.gguf"
            assert engine.model_name == source
    assert hub.downloads == set(PARTS)
    hub.files.clear()
    again = Checkpoint.open("org/name:Q8_0", cache_dir=tmp_path / "cache", local_files_only=True)
    assert [file.name for file in again.gguf.files] == [Path(name).name for name in PARTS]  # type: ignore[union-attr]


def test_a_file_in_the_cache_is_used_when_the_hub_is_out_of_reach(
    hub: Hub, gguf_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["org/name"] = gguf_files
    options = HubOptions(cache_dir=tmp_path / "cache")
    file = download("org/name:Q8_0", options)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two tries
    assert download("org/name:Q8_0", options) == file
    with without_weights("org/name:Q8_0", options) as source:
        assert source == file
    with pytest.raises(CheckpointError, match=r"^'org/name' could not be downloaded .*ConnectError"):
        download("org/name:small-F32", options)
    with pytest.raises(CheckpointError, match=r"^'org/name' at revision 'v9' is no directory here and not complete"):
        download("org/name:Q8_0", HubOptions("v9", cache_dir=options.cache_dir))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            "",
            r"^org/name has its weights in GGUF; .*: org/name:Q8_0/small\. It has Q8_0/small, small-F32, small-UD-F32$",
        ),
        (
            ":Q4_K_M",
            "^org/name has no model in GGUF whose name ends with 'Q4_K_M'; it has Q8_0/small, small-F32, small",
        ),
        (":F32", "^org/name has 2 models in GGUF whose names end with 'F32'; it has small-F32, small-UD-F32$"),
        (":32", "^org/name has no model in GGUF whose name ends with '32'"),
    ],
)
def test_models_in_gguf_are_listed(
    hub: Hub, gguf_files: dict[str, bytes], tmp_path: Path, wanted: str, message: str
) -> None:
    hub.files["org/name"] = gguf_files
    with pytest.raises(CheckpointError, match=message):
        download(f"org/name{wanted}", HubOptions(cache_dir=tmp_path / "cache"))
    assert not hub.downloads


def test_a_name_in_a_repository_without_gguf(hub: Hub, saved: dict[str, Path], tmp_path: Path) -> None:
    hub.files["org/name"] = files_of(saved["whole"])
    with pytest.raises(CheckpointError, match=r"^org/name has no model in GGUF; without ':Q8_0', its safetensors are"):
        download("org/name:Q8_0", HubOptions(cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize("commit", ["../../../outside", "..", "../../blobs"])
def test_a_damaged_cache_does_not_lead_out_of_the_model(tmp_path: Path, commit: str) -> None:
    model = tmp_path / "models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots").mkdir()
    for folder in (model / "snapshots" / commit, tmp_path / "outside"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        download("org/name", HubOptions(cache_dir=tmp_path), local_files_only=True)
    assert "not in the model's folder" in str(caught.value) or "hub's cache" in str(caught.value)
