"""The commands: what they print, how they refuse, and what Ctrl-C ends."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import typer.main
from PIL import Image
from transformers import LlamaConfig, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.testing import CliRunner, Result

import hermes_async
from hermes_async.cli import app
from hermes_async.cli import chat as chat_module
from hermes_async.cli import generate as generate_module
from hermes_async.cli.lines import LineReader
from hermes_async.cli.run import Interrupts, run
from hermes_async.demo import MODEL_PATH
from hermes_async.engine.engine import Engine
from hermes_async.engine.session import Session
from hermes_async.errors import ConfigError
from hermes_async.serving.preparations import Preparations
from tests.audio_models import Whisper, noise, write_wave
from tests.cli.forked import ForkedCommands
from tests.inside import on_delivery

BUDGET = "6MiB"
COMMANDS = typer.main.get_command(app).list_commands(None)  # type: ignore[attr-defined]


def hermes(*args: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def last_json(result: Result) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return record


@pytest.fixture(scope="module")
def bare_model(random_model: Callable[..., Any], save_model: Callable[..., Path]) -> Path:
    """A checkpoint without a tokenizer."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return save_model(random_model(config))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pieces of text as `generate` streams them."""
    pieces: list[str] = []
    stream_to(monkeypatch, pieces.append)
    return pieces


def stream_to(monkeypatch: pytest.MonkeyPatch, write: Callable[[str], None]) -> None:
    """Gives what `generate` would write to standard output as it comes to `write`."""
    stream_answer = generate_module.stream_answer

    async def elsewhere(engine: Engine, prompt: Any, params: Any, interrupts: Any, _: Any) -> Any:
        return await stream_answer(engine, prompt, params, interrupts, write)

    monkeypatch.setattr(generate_module, "stream_answer", elsewhere)


def interrupt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


# --- help, version ---


def test_version() -> None:
    result = hermes("--version")
    assert (result.exit_code, result.stdout) == (0, f"hermes-async {hermes_async.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    (line,) = re.findall(rf"^  {command}  +(.*)$", hermes("--help").stdout, re.MULTILINE)
    assert line.endswith(".") and not line.endswith("...")  # it is not cut off
    own = hermes(command, "--help")
    assert own.exit_code == 0
    assert own.stdout.startswith(f"Usage: hermes-async {command} ")


def test_a_command_that_does_not_exist() -> None:
    result = hermes("genrate", "model")
    assert result.exit_code == 2
    assert "No such command 'genrate'. Did you mean 'generate'?" in result.stderr


# --- embed, classify ---


def test_embed_prints_a_vector_a_line() -> None:
    texts = ("ROMEO:", "What light is that?")
    result = hermes("embed", MODEL_PATH, *texts, "--memory", "16MiB", "--normalize")
    assert result.exit_code == 0
    vectors = [[float(number) for number in line.split()] for line in result.stdout.splitlines()]
    record = last_json(hermes("embed", MODEL_PATH, *texts, "--memory", "16MiB", "--normalize", "--json"))
    assert set(record) == {"vectors", "plan", "statistics"}
    for vector, exact in zip(vectors, record["vectors"], strict=True):
        assert vector == pytest.approx(exact, rel=1e-4, abs=1e-6)
        assert sum(number**2 for number in exact) == pytest.approx(1, abs=1e-4)


def test_embed_refuses_in_one_line() -> None:
    result = hermes("embed", MODEL_PATH, "a", "--memory", "16MiB", "--prompt-name", "no")
    message = "hermes-async: error: prompt_name 'no' is none of the checkpoint's prompts: query, document\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)
    assert hermes("embed", MODEL_PATH, "a", "--pooling", "sum").exit_code == 2


def test_transcribe_prints_the_text_or_a_segment_a_line(tmp_path: Path, random_model: Callable[..., Any]) -> None:
    whisper = Whisper(tmp_path / "whisper", random_model)
    file = write_wave(tmp_path / "a.wav", noise(3, 5))
    options = (whisper.path, file, "--memory", "64MiB", "--language", "en")
    record = last_json(hermes("transcribe", *options, "--json"))
    assert set(record) == {"text", "segments", "plan", "statistics"}
    result = hermes("transcribe", *options)
    assert (result.exit_code, result.stdout) == (0, record["text"] + "\n")
    lines = hermes("transcribe", *options, "--timestamps").stdout.splitlines()
    assert len(lines) == len(record["segments"])
    assert float(lines[0][1:9]) == round(record["segments"][0]["start_s"], 2)
    result = hermes("transcribe", whisper.path, tmp_path / "no.wav", "--memory", "64MiB")
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)


def test_classify_prints_labels(
    tmp_path: Path, random_model: Callable[..., Any], save_model: Callable[..., Path]
) -> None:
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        id2label={0: "a cat", 1: "a dog"},
        label2id={"a cat": 0, "a dog": 1},
    )
    path = save_model(random_model(config, model_class=ViTForImageClassification))
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    file = tmp_path / "image.png"
    Image.effect_noise((20, 20), 90.0).save(file)
    result = hermes("classify", path, file, "--memory", "8MiB")
    assert result.exit_code == 0
    assert re.fullmatch(r"0\.\d{4}  a (cat|dog)\n0\.\d{4}  a (cat|dog)\n", result.stdout)
    record = last_json(hermes("classify", path, file, "--memory", "8MiB", "--top", 1, "--json"))
    assert [set(label) for label in record["labels"]] == [{"label", "score"}]
    assert f"{record['labels'][0]['score']:.4f}  {record['labels'][0]['label']}" == result.stdout.splitlines()[0]
    file.write_text("no image")
    result = hermes("classify", path, file, "--memory", "8MiB")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"hermes-async: error: .*image\.png cannot be read as an image: .*\n", result.stderr)


# --- generate ---


def test_generate_streams_text_then_a_line_of_statistics(written: list[str]) -> None:
    result = hermes("generate", MODEL_PATH, "ROMEO:\n", "--memory", BUDGET, "--max-tokens", 8)
    assert result.exit_code == 0
    assert len(written) > 1
    assert re.fullmatch(
        r"8 tokens in .* s \(the first after .* s, then .* a second\); 8 sweeps, .* MiB read; peak .* of 6.00 MiB\n",
        result.stderr,
    )


def test_generate_prints_the_same_text_as_json() -> None:
    args = ("generate", MODEL_PATH, "ROMEO:\n", "--memory", BUDGET, "--max-tokens", 8)
    plain, record = hermes(*args), last_json(hermes(*args, "--json"))
    assert plain.stdout == record["text"] + "\n"
    assert set(record) == {"text", "token_ids", "finish_reason", "usage", "timings", "sampling", "plan", "statistics"}
    assert len(record["token_ids"]) == 8
    assert record["finish_reason"] == "length"
    assert record["usage"]["completion_tokens"] == 8
    assert record["plan"]["memory_budget"] == record["statistics"]["memory_budget"] == 6 * 2**20
    assert record["statistics"]["peak_bytes_in_use"] <= 6 * 2**20


def test_generate_json_prints_one_line_and_nothing_else() -> None:
    result = hermes("generate", MODEL_PATH, "A", "--max-tokens", 2, "--json")
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""


def test_generate_samples_by_seed() -> None:
    def token_ids(*args: object) -> list[int]:
        options = ("--max-tokens", 8, "--temperature", 1.5, "--top-p", 0.95, "--top-k", 500, "--json")
        result: list[int] = last_json(hermes("generate", MODEL_PATH, "ROMEO:\n", *options, *args))["token_ids"]
        return result

    assert token_ids("--seed", 1) == token_ids("--seed", 1) != token_ids("--seed", 2)


@pytest.fixture
def sampling_model(tmp_path: Path) -> Path:
    """The demo model, with sampling values of its own."""
    path = Path(shutil.copytree(MODEL_PATH, tmp_path / "sampling"))
    says = {"eos_token_id": 0, "do_sample": True, "temperature": 1.4, "top_p": 0.9, "suppress_tokens": [5]}
    (path / "generation_config.json").write_text(json.dumps(says))
    return path


def test_generate_says_which_values_it_takes_from_the_checkpoint(sampling_model: Path) -> None:
    args = ("generate", sampling_model, "ROMEO:\n", "--max-tokens", 8, "--seed", 1)
    given = ("--temperature", 1.4, "--top-p", 0.9, "--top-k", 50)
    greedy, by_hand = last_json(hermes(*args, "--json")), last_json(hermes(*args, *given, "--json"))
    taken = last_json(hermes(*args, "--from-model", "--json"))
    assert taken["token_ids"] == by_hand["token_ids"] != greedy["token_ids"]
    own = {"temperature": 1.4, "top_p": 0.9, "top_k": 50, "min_p": 0.0, "repetition_penalty": 1.0}
    assert taken["sampling"] == by_hand["sampling"] == own
    assert greedy["sampling"] == own | {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    result = hermes(*args, "--from-model", "--top-k", 7)
    line = "from generation_config.json: temperature 1.4, top_p 0.9, min_p 0, repetition_penalty 1"
    assert result.stderr.splitlines()[0] == line


def test_generate_reads_the_prompt_from_standard_input() -> None:
    args = ("--max-tokens", 4, "--json")
    given = last_json(hermes("generate", MODEL_PATH, "O Roméo,", *args))
    read = last_json(hermes("generate", MODEL_PATH, "-", *args, stdin="O Roméo,"))
    assert read["token_ids"] == given["token_ids"]
    assert read["usage"] == given["usage"]


def test_generate_refuses_standard_input_that_is_no_text() -> None:
    result = hermes("generate", MODEL_PATH, "-", stdin=b"\xff\xfe")
    assert result.exit_code == 2
    assert "UTF-8" in result.stderr


def test_generate_ends_at_a_stop_text() -> None:
    args = ("generate", MODEL_PATH, "ROMEO:\n", "--max-tokens", 12, "--json")
    text = last_json(hermes(*args))["text"]
    stop = text[len(text) // 2 :][:3]
    record = last_json(hermes(*args, "--stop", "never to be found", "--stop", stop))
    assert record["text"] == text[: text.index(stop)]
    assert record["finish_reason"] == "stop"


def test_generate_sends_a_chat_message() -> None:
    args = ("--max-tokens", 2, "--json")
    raw = last_json(hermes("generate", MODEL_PATH, "What news?", *args))
    chat = last_json(hermes("generate", MODEL_PATH, "What news?", "--chat", *args))
    assert chat["usage"]["prompt_tokens"] > raw["usage"]["prompt_tokens"]


@pytest.mark.parametrize("prompt", ["3,1,4", "3 1 4", "3, 1,\n4,"])
def test_generate_takes_and_prints_token_ids(bare_model: Path, prompt: str) -> None:
    args = ("--token-ids", "--memory", "4MiB", "--max-tokens", 3)
    record = last_json(hermes("generate", bare_model, prompt, *args, "--json"))
    assert record["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "cached_tokens": 0}
    assert record["text"] == ""
    printed = hermes("generate", bare_model, prompt, *args).stdout
    assert printed == " ".join(map(str, record["token_ids"])) + "\n"


# --- errors ---


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", "no/such/place", "A"), "no such directory"),
        (("generate", MODEL_PATH, ""), "the prompt is empty"),
        (("generate", MODEL_PATH, "A", "--memory", "100KiB"), "the smallest that works is"),
        (("generate", MODEL_PATH, "99999", "--token-ids"), "99999"),
        (("generate", MODEL_PATH, "", "--token-ids"), "the prompt is empty"),
        (("generate", MODEL_PATH, "A", "--top-p", 0), "top_p"),
        (("plan", MODEL_PATH, "--memory", "100KiB"), "the smallest that works is"),
        (("plan", "no/such/place"), "no such directory"),
        (("chat", "no/such/place"), "no such directory"),
        (("demo", "--memory", "100KiB"), "the smallest that works is"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(args: tuple[object, ...], message: str) -> None:
    result = hermes(*args)
    assert result.exit_code == 1
    assert result.stderr.startswith("hermes-async: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_text_for_a_model_without_a_tokenizer(bare_model: Path) -> None:
    result = hermes("generate", bare_model, "A")
    assert result.exit_code == 1
    assert "token ids" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("frobnicate",),
        ("generate", MODEL_PATH),
        ("generate", MODEL_PATH, "1 x", "--token-ids"),
        ("generate", MODEL_PATH, "1", "--token-ids", "--chat"),
        ("demo", "--sessions", 0),
    ],
)
def test_wrong_usage_is_exit_code_2(args: tuple[object, ...]) -> None:
    assert hermes(*args).exit_code == 2


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("generate", MODEL_PATH, "A", "--memory", "much"), "much"),
        (("generate", MODEL_PATH, "A", "--max-tokens", 0), "max_tokens"),
        (("generate", MODEL_PATH, "A", "--temperature", -1), "temperature"),
        (("plan", MODEL_PATH, "--loading-agents", 0), "num_loading_agents"),
    ],
)
def test_a_value_out_of_range_is_told_in_one_line(args: tuple[object, ...], named: str) -> None:
    result = hermes(*args)
    assert result.exit_code == 1
    assert named in result.stderr
    assert result.stderr.count("\n") == 1


def test_errors_leave_the_event_loop_bare() -> None:
    async def work(interrupts: Interrupts) -> None:
        raise ConfigError("as it is")

    with pytest.raises(ConfigError, match="as it is"):
        run(work)


# --- plan ---


def test_plan_is_printed_and_as_json() -> None:
    args = ("plan", MODEL_PATH, "--memory", BUDGET, "--loading-agents", 1)
    assert re.search(
        r"^resident .*^ring .* 1 loading agent.*^each sweep ", hermes(*args).stdout, re.DOTALL | re.MULTILINE
    )
    record = last_json(hermes(*args, "--json"))
    assert record["memory_budget"] == 6 * 2**20
    assert record["num_loading_agents"] == 1
    assert 0 < record["num_resident_stages"] < record["num_stages"]


def test_plan_keeps_to_the_most_resident_layers() -> None:
    record = last_json(hermes("plan", MODEL_PATH, "--memory", BUDGET, "--max-resident-layers", 3, "--json"))
    assert record["num_resident_stages"] + record["num_buffers"] <= 3


def test_a_context_length_is_in_the_plan() -> None:
    args = ("plan", MODEL_PATH, "--memory", BUDGET, "--context-length", 100)
    assert "of up to 100 tokens each" in hermes(*args).stdout
    assert last_json(hermes(*args, "--json"))["context_length"] == 100


def test_plan_says_why_and_predicts() -> None:
    told = hermes("plan", MODEL_PATH, "--memory", BUDGET).stdout
    assert told.count("\nbecause ") >= 4
    assert "estimated, as nothing was measured here" in told
    record = last_json(hermes("plan", MODEL_PATH, "--memory", BUDGET, "--json"))
    one, *others = record["predictions"]
    assert one["num_sessions"] == 1
    for prediction in (one, *others):
        assert prediction["sweep_seconds"] >= max(0, prediction["read_seconds"] - 1e-6)
        assert 0 < prediction["peak_bytes"] <= record["memory_budget"]
        assert prediction["tokens_per_second"] == prediction["num_sessions"] / prediction["sweep_seconds"]
    assert all(other["tokens_per_second"] > one["tokens_per_second"] for other in others)


def test_plan_goes_through_all_budgets_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    told = hermes("plan", MODEL_PATH, "--sweep", "--plot", picture)
    assert told.exit_code == 0
    assert "the smallest budget that works is" in told.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    records = last_json(hermes("plan", MODEL_PATH, "--sweep", "--json"))
    budgets = [record["memory_budget"] for record in records]
    assert budgets == sorted(budgets)
    assert budgets[0] == records[0]["minimum_budget"]
    assert all(record["num_buffers"] for record in records[:-1])
    assert records[-1]["num_buffers"] == 0
    speeds = [record["predictions"][0]["tokens_per_second"] for record in records]
    assert speeds[-1] == max(speeds)


def test_a_plot_is_of_a_sweep(tmp_path: Path) -> None:
    result = hermes("plan", MODEL_PATH, "--plot", tmp_path / "plan.png")
    assert result.exit_code != 0
    assert "--plot needs --sweep" in result.output
    result = hermes("plan", MODEL_PATH, "--sweep", "--plot", tmp_path / "no" / "plan.png")
    assert result.exit_code == 1
    assert "cannot be written" in result.output


# --- Ctrl-C ---


def test_ctrl_c_keeps_what_was_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        interrupt()

    stream_to(monkeypatch, write)
    result = hermes("generate", MODEL_PATH, "ROMEO:\n", "--memory", BUDGET, "--max-tokens", 250, "--ignore-eos")
    assert result.exit_code == 130
    assert written
    assert "stopped; " in result.stderr
    assert "sweep" in result.stderr


def test_ctrl_c_with_json_is_an_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_every(monkeypatch, 3)
    result = hermes(
        "generate", MODEL_PATH, "ROMEO:\n", "--memory", BUDGET, "--max-tokens", 250, "--ignore-eos", "--json"
    )
    assert result.exit_code == 130
    record = last_json(result)
    assert record["finish_reason"] == "abort"
    assert 3 <= len(record["token_ids"]) == record["usage"]["completion_tokens"] < 250
    assert record["text"]


def interrupt_every(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Presses Ctrl-C after every so many tokens."""
    num_delivered = 0

    def count() -> None:
        nonlocal num_delivered
        num_delivered += 1
        if num_delivered % number == 0:
            interrupt()

    on_delivery(monkeypatch, count)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_ctrl_c_before_the_request_is_made(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    async def interrupted(*args: Any) -> None:
        interrupt()
        await anyio.sleep_forever()

    monkeypatch.setattr(Preparations, "run", interrupted)
    result = hermes("generate", MODEL_PATH, "A", "--memory", BUDGET, *flags)
    assert result.exit_code == 130
    if flags:
        assert last_json(result)["finish_reason"] == "abort"


def test_ctrl_c_while_the_model_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(engine: Engine) -> Engine:
        interrupt()
        await anyio.sleep_forever()
        return engine

    monkeypatch.setattr(Engine, "__aenter__", interrupted)
    result = hermes("generate", MODEL_PATH, "A")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "hermes-async: stopped\n")


def test_ctrl_c_in_a_process_of_its_own(forked: ForkedCommands) -> None:
    args = ("generate", MODEL_PATH, "ROMEO:\n", "--memory", BUDGET, "--max-tokens", 250, "--ignore-eos")
    with forked.start(*args) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert b"stopped; " in stderr
    assert b"Traceback" not in stderr


@pytest.mark.parametrize("command", [("generate", MODEL_PATH, "A", "--max-tokens", 250, "--ignore-eos"), ("demo",)])
def test_a_reader_that_goes_away_ends_it_quietly(command: tuple[object, ...], forked: ForkedCommands) -> None:
    with forked.start(*command) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


# --- chat ---


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Makes standard input a pipe; what is written to this file descriptor is typed."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as stdin, os.fdopen(writer, "wb", buffering=0):
        monkeypatch.setattr(sys, "stdin", stdin)
        yield writer


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The conversations that `chat` asks for an answer to."""
    seen: list[Any] = []
    stream_answer = chat_module.stream_answer

    async def seeing(session: Session, prompt: Any, *args: Any) -> Any:
        seen.append([*session.messages, *prompt])
        return await stream_answer(session, prompt, *args)

    monkeypatch.setattr(chat_module, "stream_answer", seeing)
    return seen


def chat(*args: object) -> int | None:
    code: int | None = app(["chat", str(MODEL_PATH), "--memory", BUDGET, *map(str, args)], standalone_mode=False)
    return code


def test_chat_says_which_values_it_takes_from_the_checkpoint(
    keyboard: int, sampling_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.write(keyboard, b"Hello\n/exit\n")
    options = ["--memory", BUDGET, "--from-model", "--temperature", "0", "--max-tokens", "2"]
    assert not app(["chat", str(sampling_model), *options], standalone_mode=False)
    line = "from generation_config.json: top_p 0.9, top_k 50, min_p 0, repetition_penalty 1\n"
    assert capsys.readouterr().err.startswith(line)


def test_chat_keeps_the_conversation(keyboard: int, prompts: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    os.write(keyboard, "What news?\r\n\n  \nAnd thén?\n/reset\nWho is there?\n/exit\nnot read\n".encode())
    assert not chat("--max-tokens", 6)
    assert [[message["role"] for message in prompt] for prompt in prompts] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert prompts[1][0]["content"] == "What news?"
    assert prompts[1][2]["content"] == "And thén?"
    output = capsys.readouterr().out
    assert output.startswith(prompts[1][1]["content"])
    assert "\x1b" not in output


def test_chat_ends_with_its_input(monkeypatch: pytest.MonkeyPatch, prompts: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("What news?")
    with path.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert not chat("--max-tokens", 2)
    assert len(prompts) == 1


def test_chat_goes_on_after_a_question_that_is_too_long(
    keyboard: int, prompts: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    os.write(keyboard, b"news " * 1200 + b"\nWhat news?\n/exit\n")
    assert not chat("--max-tokens", 2)
    assert [len(prompt) for prompt in prompts] == [1, 1]
    errors = capsys.readouterr().err
    assert "a shorter message" in errors and "/reset" not in errors  # there is nothing to forget


def test_chat_says_that_reset_makes_room_where_it_does(
    keyboard: int, prompts: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    os.write(keyboard, b"What news?\n" + b"news " * 1200 + b"\n/exit\n")
    assert not chat("--max-tokens", 2)
    assert [len(prompt) for prompt in prompts] == [1, 3]
    assert "/reset forgets the conversation" in capsys.readouterr().err


def test_chat_that_could_answer_nothing_fails(keyboard: int, capsys: pytest.CaptureFixture[str]) -> None:
    os.write(keyboard, b"What news?\n/reset\nAnd now?\n/exit\n")
    assert chat("--max-tokens", 1000, "--memory", "4MiB") == 1
    errors = capsys.readouterr().err
    assert errors.count("a smaller --max-tokens or a larger --memory") == 2
    assert "/reset" not in errors


def test_ctrl_c_stops_only_the_answer(keyboard: int, prompts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_every(monkeypatch, 4)
    os.write(keyboard, b"What news?\nAnd then?\n/exit\n")
    assert not chat("--max-tokens", 200)
    assert [message["role"] for message in prompts[1]] == ["user", "assistant", "user"]
    assert prompts[1][1]["content"]


def test_ctrl_c_at_the_prompt_ends(keyboard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = select.select

    def interrupted(*args: Any) -> Any:
        interrupt()
        return wait(*args)

    monkeypatch.setattr("hermes_async.cli.lines.select.select", interrupted)
    assert not chat()


def test_chat_at_a_terminal(forked: ForkedCommands) -> None:
    terminal, its_end = os.openpty()
    try:
        with forked.start(*("chat", MODEL_PATH, "--memory", BUDGET, "--max-tokens", 3), stdin=its_end) as process:
            os.write(terminal, b"What news?\n\x04")
            stdout, stderr = process.communicate()
    finally:
        os.close(terminal)
        os.close(its_end)
    assert process.returncode == 0
    assert b"/reset" in stdout
    assert stdout.count(b"> ") == 2
    assert b"3 tokens in " in stderr


@pytest.mark.anyio
async def test_a_cancelled_line_reader_loses_nothing() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0), os.fdopen(writer, "wb", buffering=0):
        lines = LineReader(reader)
        os.write(writer, b"one\ntw")
        assert await lines.read() == "one"
        with anyio.move_on_after(0.001) as scope:
            await lines.read()
        assert scope.cancelled_caught
        os.write(writer, b"o\nthree")
        assert await lines.read() == "two"


@pytest.mark.anyio
async def test_a_last_line_without_an_end_is_a_line() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0):
        os.write(writer, b"\nlast\xff")
        os.close(writer)
        lines = LineReader(reader)
        assert [await lines.read() for _ in range(4)] == ["", "last\ufffd", None, None]
