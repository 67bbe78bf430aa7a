"""The paper's evaluation: BERT-Large, ViT-Large, GPT-2 and GPT-J, loaded and run in six ways.

    python -m benchmarks.paper [--models bert,vit,gpt2,gptj] [--small] [--runs 5] [--limit 500] [--folder DIR]

Each run is a process of its own that begins with nothing in the page cache. Its latency is from the first byte read to
the output: load and inference together. No way can take less than max(bytes read over the disk's rate, compute), and
loading that overlaps with computing at best turns load + compute into max(load, compute): that is the ceiling of every
ratio here, and it is printed first. The modes:

    transformers  from_pretrained, then forward
    baseline      every layer deserialised with torch.load and copied in, then forward (the paper's baseline)
    pipeswitch    the same loader on a thread of its own, while the layers that are there compute; nothing is freed
    pipeload-N    N loading agents, N + 1 layers in memory, every layer freed after its computation
    budget-X      this library's planner, given X of the weights' bytes

Source: Hermes (arXiv 2409.04249), section V; PipeSwitch (Bai et al., OSDI 2020).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import torch
import transformers
from torch import nn
from transformers import BertConfig, GPT2Config, GPTJConfig, PreTrainedConfig, PreTrainedModel, ViTConfig

from benchmarks.disk import limited_disk
from hermes_async import Engine, EngineConfig, SamplingParams, format_bytes
from hermes_async.pipeload.memory import process_rss_bytes
from hermes_async.storage.checkpoint import Checkpoint

MIB = 2**20
_TOKENS = 128  # of a text, or of a prompt
_NEW_TOKENS = 8
_AGENTS = (2, 4, 6)
_BUDGETS = (0.1, 0.25, 0.5)
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")

MODELS: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "bert": (
        "BertModel",
        lambda: BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    ),
    "vit": (
        "ViTModel",
        lambda: ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    ),
    "gpt2": ("GPT2LMHeadModel", lambda: GPT2Config(bos_token_id=None, eos_token_id=None)),
    "gptj": ("GPTJForCausalLM", lambda: GPTJConfig(bos_token_id=None, eos_token_id=None)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="which models (default all)")
    parser.add_argument("--small", action="store_true", help="leave GPT-J (24 GB in float32) out")
    parser.add_argument("--runs", type=int, default=5, help="runs of each mode; medians count (default 5)")
    parser.add_argument("--limit", type=int, default=0, help="MiB/s that the disk is held at (default: not held)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make checkpoints: the disk to measure")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args)
        return
    names = [name for name in args.models.split(",") if not (args.small and name == "gptj")]
    if unknown := set(names) - MODELS.keys():
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    results = {name: evaluate(name, args) for name in names}
    print(json.dumps(results))


# --- checkpoints: as transformers saves them, and a file of each layer for the loaders that deserialise ---


@contextmanager
def checkpoint(name: str, folder: Path | None) -> Iterator[Path]:
    class_name, make_config = MODELS[name]
    path = Path(tempfile.mkdtemp(prefix="hermes-benchmark-", dir=folder))
    try:
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, class_name)(make_config())
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        if shutil.disk_usage(path).free < 2.2 * num_bytes:
            raise SystemExit(f"{name}: {path} has too little room for twice {format_bytes(num_bytes)}")
        model.save_pretrained(path)
        (path / "layers").mkdir()
        for idx, group in enumerate(layer_groups(model)):
            state = {key: value.clone() for key, value in model.state_dict().items() if key in group}
            torch.save(state, path / "layers" / f"{idx}.pt")
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def layer_groups(model: nn.Module) -> list[list[str]]:
    """Names of what is loaded together, in the model's order: a layer, or what stands by itself."""
    groups: dict[str, list[str]] = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in model.state_dict():
        if name not in tied:
            match = re.match(r".*?\.\d+(?=\.)", name)
            groups.setdefault(match.group() if match else name.rpartition(".")[0], []).append(name)
    return list(groups.values())


# --- the parent: alternates the modes, and compares ---


def evaluate(name: str, args: argparse.Namespace) -> dict[str, Any]:
    modes = ["transformers", "baseline", "pipeswitch"]
    modes += [f"pipeload-{agents}" for agents in _AGENTS]
    modes += [f"budget-{share}" for share in _BUDGETS]
    with checkpoint(name, args.folder) as path:
        weights = _weight_bytes(path)
        rate = statistics.median(run_child("disk", path, args)["bytes_per_s"] for _ in range(3))
        compute = run_child("compute", path, args)
        generates = "per_token_s" in compute
        print(
            f"\n{name}: {format_bytes(weights)} in float32; the disk gives {format_bytes(round(rate))}/s, so reading "
            f"takes {weights / rate:.2f} s; computing takes {compute['latency_s']:.2f} s"
            + (f", and {compute['per_token_s']:.3f} s for each further token" if generates else "")
            + f"; ceiling of load + compute over max(load, compute): "
            f"{(weights / rate + compute['latency_s']) / max(weights / rate, compute['latency_s']):.2f}",
            flush=True,
        )
        runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
        for _ in range(args.runs):
            for mode in modes:
                runs[mode].append(run_child(mode, path, args))
    result: dict[str, Any] = {"weight_bytes": weights, "disk_bytes_per_s": rate, "compute": compute, "modes": {}}
    switch = {key: statistics.median(run[key] for run in runs["pipeswitch"]) for key in ("latency_s", "memory_bytes")}
    for mode in modes:
        figures = {
            key: statistics.median(run[key] for run in runs[mode])
            for key in runs[mode][0]
            if isinstance(runs[mode][0][key], (int, float))
        }
        bytes_read = figures.get("bytes_read", weights)
        limit = max(bytes_read / rate, compute["latency_s"])
        figures |= {
            "share_of_limit": figures["latency_s"] / limit,
            "times_pipeswitch": switch["latency_s"] / figures["latency_s"],
            "memory_less": 1 - figures["memory_bytes"] / switch["memory_bytes"],
            "same_output": all(_same(run["output"], compute["output"]) for run in runs[mode]),
            "latencies_s": [run["latency_s"] for run in runs[mode]],
        }
        if generates and "bytes_per_sweep" in figures:
            token_limit = max(figures["bytes_per_sweep"] / rate, compute["per_token_s"])
            figures["token_share_of_limit"] = figures["per_token_s"] / token_limit
        result["modes"][mode] = figures
        print(
            f"  {mode:13} {figures['latency_s']:7.2f} s ({figures['share_of_limit']:.2f} of the limit, "
            f"{figures['times_pipeswitch']:.2f} times pipeswitch's speed)"
            + (f", {figures['per_token_s']:.3f} s a token" if generates else "")
            + (f" ({figures['token_share_of_limit']:.2f})" if "token_share_of_limit" in figures else "")
            + f"; weights and buffers {format_bytes(round(figures['memory_bytes']))} "
            f"({figures['memory_less']:.1%} less), RSS {format_bytes(round(figures['rss_bytes']))} more; output "
            f"{'equal' if figures['same_output'] else 'DIFFERS'}",
            flush=True,
        )
    return result


def _same(output: list[float], expected: list[float]) -> bool:
    return len(output) == len(expected) and all(
        abs(one - other) <= 1e-3 * max(1, abs(other)) for one, other in zip(output, expected, strict=True)
    )


def run_child(mode: str, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    subprocess.run(["sync"], check=True)
    try:
        _DROP_CACHES.write_text("3")
    except OSError as error:
        raise SystemExit(
            f"the page cache cannot be dropped ({error}), and every figure would be wrong; be root"
        ) from error
    command = [
        sys.executable,
        "-m",
        "benchmarks.paper",
        "--child",
        mode,
        "--path",
        str(path),
        "--limit",
        str(args.limit),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{mode}: the measurement failed with exit code {done.returncode}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


# --- the children: one mode each, everything imported before the clock starts ---


def child(args: argparse.Namespace) -> None:
    transformers.utils.logging.disable_progress_bar()
    mode, _, option = args.child.partition("-")
    inputs = _inputs(args.path)
    _warm_up()
    with limited_disk(args.path, args.limit * MIB or None) as error:
        if args.limit and error is not None:
            raise SystemExit(f"the disk cannot be held: {error}")
        baseline = process_rss_bytes()
        record: dict[str, Any]
        if mode == "disk":
            record = _disk(args.path)
        elif mode in ("pipeload", "budget"):
            asked = (args.path, _weight_bytes(args.path), inputs, mode, option)
            record = anyio.run(_hermes, *asked, backend_options={"use_uvloop": True})
        else:
            record = {"transformers": _transformers, "compute": _compute}.get(mode, _deserialising(mode))(
                args.path, inputs
            )
    print(json.dumps(record | {"rss_bytes": max(0, _peak_rss_bytes() - baseline)}))


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _inputs(path: Path) -> dict[str, torch.Tensor]:
    config = transformers.AutoConfig.from_pretrained(path)
    torch.manual_seed(1)
    if config.model_type == "vit":
        return {"pixel_values": torch.randn(1, 3, config.image_size, config.image_size)}
    return {"input_ids": torch.randint(10, 20_000, (1, _TOKENS))}


def _peak_rss_bytes() -> int:
    """Of this process alone: what `getrusage` tells also counts the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _warm_up() -> None:
    """Threads and kernels, which every mode needs and none should be charged for."""
    nn.functional.linear(torch.randn(64, 1024), torch.randn(1024, 1024))


def _disk(path: Path) -> dict[str, Any]:
    from benchmarks.disk import read_directly
    from hermes_async.storage.reader import ReadRange

    tensors = Checkpoint.open(path).tensors.values()
    file = max((spec.file for spec in tensors), key=lambda file: file.stat().st_size)
    size = min(file.stat().st_size, 2 << 30)
    pieces = [[ReadRange(file, offset, min(16 * MIB, size - offset), 0)] for offset in range(0, size, 16 * MIB)]
    return {"bytes_per_s": size / read_directly(pieces, 2)}


def _finish(model: PreTrainedModel, inputs: dict[str, torch.Tensor], started: float) -> dict[str, Any]:
    """Runs the model, and times it from `started`."""
    with torch.inference_mode():
        if "pixel_values" in inputs or not model.can_generate():
            output = model(**inputs).last_hidden_state
            return {"latency_s": time.perf_counter() - started, "output": output[0, -1, :8].tolist()}
        moments: list[float] = []
        streamer = _Moments(moments)
        tokens = model.generate(
            inputs["input_ids"], max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0, streamer=streamer,
            attention_mask=torch.ones_like(inputs["input_ids"]),
        )  # fmt: skip
    per_token = (moments[-1] - moments[0]) / (_NEW_TOKENS - 1)
    new = [float(token_id) for token_id in tokens[0, _TOKENS:]]
    return {"latency_s": moments[0] - started, "per_token_s": per_token, "output": new}


class _Moments:
    """When each new token came; `generate` puts the prompt first."""

    def __init__(self, moments: list[float]) -> None:
        self._moments = moments
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls > 1:
            self._moments.append(time.perf_counter())

    def end(self) -> None:
        pass


def _model_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _load(path: Path) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(path)
    model_class = getattr(transformers, config.architectures[0])
    model: PreTrainedModel = model_class.from_pretrained(path, local_files_only=True).eval()
    return model


def _transformers(path: Path, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    started = time.perf_counter()
    model = _load(path)
    return _finish(model, inputs, started) | {"memory_bytes": _model_bytes(model)}


def _compute(path: Path, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    model = _load(path)
    _finish(model, inputs, time.perf_counter())
    records = [_finish(model, inputs, time.perf_counter()) for _ in range(3)]
    return sorted(records, key=lambda record: record["latency_s"])[1]


def _deserialising(mode: str) -> Callable[[Path, dict[str, torch.Tensor]], dict[str, Any]]:
    """The paper's baseline, or, on a thread of its own, PipeSwitch's pipeline."""

    def run(path: Path, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        started = time.perf_counter()
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model: PreTrainedModel = getattr(transformers, config.architectures[0])(config).eval()
        model = model.to_empty(device="cpu")
        model.initialize_weights = lambda: None  # type: ignore[method-assign]
        model.tie_weights()
        _restore_buffers(model, config)
        groups = layer_groups(model)
        parameters = dict(model.state_dict())
        loaded = [threading.Event() for _ in groups]

        def load_all() -> None:
            for idx, event in enumerate(loaded):
                with torch.inference_mode():
                    state = torch.load(path / "layers" / f"{idx}.pt", weights_only=True)
                    for name, value in state.items():
                        parameters[name].copy_(value)
                event.set()

        if mode == "baseline":
            load_all()
            record = _finish(model, inputs, started)
        else:
            _await_layers(model, groups, loaded)
            loader = threading.Thread(target=load_all)
            loader.start()
            record = _finish(model, inputs, started)
            loader.join()
        largest = max(sum(parameters[name].nbytes for name in group) for group in groups)
        return record | {"memory_bytes": _model_bytes(model) + largest}

    return run


def _restore_buffers(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Buffers that no checkpoint holds; made again on the CPU by a model with one layer."""
    small = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 1, "n_layer": 1})
    made = dict(type(model)(small).named_buffers())
    for name, buffer in model.named_buffers():
        value = made.get(name, made.get(re.sub(r"\.\d+\.", ".0.", name)))
        if value is not None:
            buffer.copy_(value)


def _await_layers(model: nn.Module, groups: list[list[str]], loaded: list[threading.Event]) -> None:
    """Each module waits for the groups that its own parameters are in."""
    event_of = {name: event for group, event in zip(groups, loaded, strict=True) for name in group}
    for path, module in model.named_modules():
        names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        events = {event_of[name] for name in names if name in event_of}
        if events:
            module.register_forward_pre_hook(lambda _, args, events=events: [event.wait() for event in events] and None)


async def _hermes(path: Path, weights: int, inputs: dict[str, torch.Tensor], mode: str, option: str) -> dict[str, Any]:
    budget = int(weights * float(option)) if mode == "budget" else 2 * weights
    config = EngineConfig(prompt_lookup=False)
    if mode == "pipeload":
        agents = int(option)
        config = EngineConfig(
            prompt_lookup=False, num_loading_agents=agents, max_resident_layers=agents + 1, max_tokens_per_sweep=256
        )
    started = time.perf_counter()
    async with Engine(path, memory_budget=budget, config=config) as engine:
        record: dict[str, Any]
        if engine._model().running.opened.skeleton.generates:
            params = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0, ignore_eos=True)
            moments, new = [], []
            async for chunk in engine.generate(inputs["input_ids"][0].tolist(), params):
                moments.append(time.perf_counter())
                new += [float(token_id) for token_id in chunk.token_ids]
            record = {"latency_s": moments[0] - started, "output": new}
            record["per_token_s"] = (moments[-1] - moments[0]) / (_NEW_TOKENS - 1)
            record["bytes_per_sweep"] = engine.plan.bytes_per_sweep
        else:
            output = (await engine.forward(**inputs)).last_hidden_state
            record = {"latency_s": time.perf_counter() - started, "output": output[0, -1, :8].tolist()}
        plan, done = engine.plan, engine.statistics()
        record["memory_bytes"] = plan.resident_bytes + plan.ring_bytes
        record["leased_bytes"] = done.peak_bytes_in_use
        record["bytes_read"] = plan.resident_bytes + plan.bytes_per_sweep
        return record


if __name__ == "__main__":
    main()
