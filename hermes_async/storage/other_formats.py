"""Names what a directory is, if it is no checkpoint of transformers in safetensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path

from hermes_async.errors import UnsupportedModelError

_FORMATS = {
    "pytorch_model*.bin": "PyTorch's pickles",
    "*.pt": "PyTorch's pickles",
    "*.pth": "PyTorch's pickles",
    "*.ckpt": "pickles",
    "*.pkl": "pickles",
    "*.gguf": "GGUF, llama.cpp's format",
    "*.ggml": "GGML, llama.cpp's older format",
    "tf_model*.h5": "TensorFlow's format",
    "flax_model*.msgpack": "Flax's format",
    "*.npz": "NumPy's format, as MLX once wrote it",
    "*.onnx": "ONNX",
    "openvino_model.xml": "OpenVINO's format",
    "*.tflite": "TensorFlow Lite's format",
    "*.mlmodel": "Core ML's format",
    "*.mlpackage": "Core ML's format",
    "*.nemo": "NeMo's format",
    "*model*.bin": "PyTorch's pickles, or an older format of llama.cpp",
}
ONLY_SAFETENSORS = (
    "hermes_async reads only safetensors, because a pickle can run code when it is loaded; convert the checkpoint "
    "once: load it with transformers' class for it, such as AutoModelForCausalLM.from_pretrained(...), and save it "
    "with save_pretrained(directory)"
)
_FROM_LLAMA_CPP = (
    "hermes_async reads only safetensors and GGUF; use the safetensors of the model that this was made from, which the "
    "model card or the name tells"
)
_GGUF = "download one of these files, with all its parts if it has several, and give its path"
_WRITERS = {
    "mlx": "MLX, which changes some weights and quantizes others; use the model that it was converted from",
    "tf": "TensorFlow, whose tensors have other names and shapes; use the model's safetensors for PyTorch",
    "flax": "Flax, whose tensors have other names and shapes; use the model's safetensors for PyTorch",
}
_MAX_NAMED_FILES = 5  # in a message


def check_names(directory: Path, names: Collection[str]) -> None:
    """Refuses a directory whose file names show that it is no whole checkpoint of transformers.

    Raises:
        UnsupportedModelError: The message names what it is.
    """
    weights = [name for name in names if name.endswith(".safetensors")]
    if "adapter_config.json" in names or weights == ["adapter_model.safetensors"]:
        raise UnsupportedModelError(
            f"{directory} is an adapter (LoRA or another of PEFT), which hermes_async does not apply; merge it into "
            "its base model once with PEFT (merge_and_unload, then save_pretrained), and give that directory; if the "
            "directory also has a whole model, remove the adapter's files",
            path=directory,
        )
    if "model_index.json" in names and "config.json" not in names:
        raise UnsupportedModelError(
            f"{directory} is a pipeline of diffusers; give the directory of one of its models, such as text_encoder",
            path=directory,
        )
    if weights and all(name.startswith("consolidated") for name in weights):
        raise UnsupportedModelError(
            f"{directory} has its weights in {weights[0]!r} alone, Mistral's own layout; use the files for "
            "transformers (config.json, and model.safetensors or its shards)",
            path=directory,
        )
    if not weights:
        _check_formats(directory, names)


def check_repository(repo_id: str, names: Collection[str]) -> None:
    """Refuses a repository of the hub that is no checkpoint of transformers in safetensors.

    Args:
        names: The paths of all its files.

    Raises:
        UnsupportedModelError: The message names what it is.
    """
    check_names(Path(repo_id), [name for name in names if "/" not in name])
    if any(name.endswith(".safetensors") for name in names):
        return
    _check_formats(Path(repo_id), names)
    held = ", ".join(repr(name) for name in sorted(names)[:_MAX_NAMED_FILES]) or "nothing"
    more = f" and {len(names) - _MAX_NAMED_FILES} more files" if len(names) > _MAX_NAMED_FILES else ""
    message = f"{repo_id} is on the hub but has no weights in safetensors: it holds {held}{more}; {ONLY_SAFETENSORS}"
    raise UnsupportedModelError(message, path=Path(repo_id))


def _check_formats(directory: Path, names: Collection[str]) -> None:
    for pattern, what in _FORMATS.items():
        for name in sorted(names):
            if fnmatch(name.rpartition("/")[2], pattern):
                advice = _FROM_LLAMA_CPP if "llama.cpp's" in what else ONLY_SAFETENSORS
                advice = _GGUF if pattern == "*.gguf" else advice
                message = f"{directory} has its weights in {name!r}, {what}; {advice}"
                raise UnsupportedModelError(message, path=directory)


def check_writer(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuses a shard whose header says that it was not written for PyTorch.

    Raises:
        UnsupportedModelError: The message names the writer.
    """
    writer = _WRITERS.get(metadata.get("format", "").lower())
    if writer is not None:
        raise UnsupportedModelError(f"{path} was written by {writer}", path=path)
